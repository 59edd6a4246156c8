"""The fingerprint of an evaluation: everything that its success rates depend on, and what makes two comparable."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from semanticvla_jax.errors import refuse
from semanticvla_jax.libero import suites

PACKAGES = ("semanticvla_jax", "jax", "jaxlib", "flax", "numpy", "pillow")
# Fields in which compared results may differ: that is what is compared. `require_alike` wants all others equal.
COMPARED = (
  "policy.policy_hash",
  "policy.folder",
  "policy.step",
  "policy.parameters",
  "preprocessing.image_size",
  "preprocessing.views",
  "preprocessing.pruner_text",
  "chunk",
  "told",
  "model_changes",
  "served",
)
# Fields that belong to a policy, or name what computed it: `compare` lists those that differ. What the environment did
# is in none of these lists and has to agree.
OWN = ("policy", "preprocessing", "chunk", "prompt", "device", "versions")
# On the tabletop jax is the simulator: the layout of a seed depends on its random numbers.
OF_ENVIRONMENT = {"tabletop": ("versions.jax",)}
# Fields that are recorded but decide nothing: a comment changes the sources, too.
NOTED = ("sources",)
# Fields that count episodes; each episode is identified by its own seed.
COUNTED = ("seeds", "episodes", "first_states")
OWN_INSTRUCTION, ANOTHER_INSTRUCTION = "the task's own instruction", "another episode's instruction"
_NAMES = {"assets": suites.ASSETS}  # of known values, where a field is a hash
_FIRST, _THEN = ("environment", "suite", "split"), ("max_steps", "loop")


def of(
  policy: Any,
  seeds: Sequence[int],
  *,
  replan_steps: int,
  told: str = OWN_INSTRUCTION,
  model_changes: dict | None = None,
  **facts: Any,
) -> dict:
  """Everything that a success rate depends on, as JSON values.

  The names of its fields are those of results.json files of all versions: `replan_steps` is stored as "replay".

  Args:
    policy: its `metadata` is read.
    seeds: of the episodes.
    replan_steps: actions executed per policy query.
    told: which instruction the policy got.
    model_changes: config values of the model that differ from those it was trained with (controls).
    **facts: of the benchmark: environment, suite, split, max_steps, loop ("device", "host" or "simulators"), and what
      else it depends on: versions, renderer, initial states.
  """
  known = policy.metadata
  reads = (
    "image_size",
    "views",
    "crop_area",
    "jpeg_quality",
    "dct",
    "normalisation",
    "gripper",
    "dtype",
    "pruner_text",
  )
  rounded = {} if known.get("weights") in (None, "full") else {"weights": known["weights"]}
  seeds = [int(seed) for seed in seeds]
  consecutive = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
  return {
    **{name: facts[name] for name in _FIRST},
    "seeds": f"{seeds[0]}..{seeds[-1]}" if consecutive else seeds,
    "episodes": len(seeds),
    "max_steps": facts["max_steps"],
    "replay": replan_steps,
    "loop": facts["loop"],
    "told": told,
    "model_changes": model_changes or {},
    "policy": {key: known.get(key) for key in ("policy_hash", "folder", "step", "dataset", "parameters")},
    "preprocessing": {key: known.get(key) for key in reads} | rounded,
    "chunk": known.get("chunk"),
    "device": device(),
    "versions": versions(),
    "sources": sources(),
    **{name: value for name, value in facts.items() if name not in (*_FIRST, *_THEN)},
  }


def require_alike(first: Mapping, second: Mapping, but: Sequence[str] = ()) -> None:
  """Raises ValueError unless two fingerprints are equal in all but the fields COMPARED, NOTED and `but`."""
  lines = unlike(first, second, (*COMPARED, *NOTED, *but))
  if lines:
    raise refuse("Results cannot be compared", f"different {'; '.join(lines)}", "equal ones", "run both alike")


def unlike(first: Mapping, second: Mapping, but: Sequence[str] = ()) -> list[str]:
  """A line for each part of two fingerprints that differs, but for some: "simulator.mujoco: 3.8.1 against 3.2.3"."""
  return [f"{name}: {pair}" for name, pair in differences(first, second).items() if not within(name, but)]


def differences(first: Mapping, second: Mapping) -> dict[str, str]:
  """What differs, {"simulator.mujoco": "3.8.1 against 3.2.3"}; of a field with parts, only those parts."""
  found = {}
  for name in sorted(first.keys() | second.keys()):
    a, b = first.get(name), second.get(name)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      found |= {f"{name}.{part}": pair for part, pair in differences(a, b).items()}
    elif a != b:
      found[name] = f"{named(name, a)} against {named(name, b)}"
  return found


def named(field: str, value: Any) -> str:
  """A value in words, a known hash with its name: "7a3e5bfefe92d5b1 (visual stand-ins for 15 of the published)"."""
  known = _NAMES.get(field, {}).get(value) if isinstance(value, str) else None
  return f"{value}" if known is None else f"{value} ({known})"


def within(name: str, fields: Sequence[str]) -> bool:
  """Whether a name of `differences` is one of some fields or a part of one."""
  return any(name == field or name.startswith(f"{field}.") for field in fields)


def device() -> str:
  """The kind and number of jax's devices."""
  first = jax.devices()[0]
  return f"{first.platform}: {first.device_kind} × {jax.device_count()}"


def versions() -> dict[str, str | None]:
  """The versions of PACKAGES (None: not installed) and of Python."""
  return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


@functools.cache
def sources() -> str:
  """SHA-256 of the package's Python files, names and contents, 16 hexadecimal digits; with or without git."""
  digest, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
  for path in sorted(root.rglob("*.py")):
    digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
  return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
