"""What makes two results comparable: the fingerprint of an evaluation, and the interval round a success rate."""

from __future__ import annotations

import importlib.metadata
import math
import pathlib
import platform
import subprocess
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import jax

from semanticvla_jax.evaluate.rollout import Episodes

PACKAGES = ("semanticvla_jax", "jax", "jaxlib", "flax", "numpy", "pillow")
# Fields in which compared results may differ: that is what is compared. All others must be equal.
COMPARED = ("policy", "preprocessing", "told", "model_changes")


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
  """The Wilson score interval of a success rate, both ends in [0, 1] (Wilson 1927, Eq. for the binomial proportion).

  Raises:
    ValueError: more successes than episodes, or negative numbers.
  """
  if not 0 <= successes <= episodes:
    raise ValueError(f"Wilson interval: got {successes} of {episodes}; expected 0 to {episodes}; count again.")
  if episodes == 0:
    return 0.0, 1.0
  z = NormalDist().inv_cdf(0.5 + confidence / 2)
  rate, weight = successes / episodes, z * z / episodes
  middle = (rate + weight / 2) / (1 + weight)
  half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / episodes + weight / (4 * episodes))
  return max(0.0, middle - half), min(1.0, middle + half)


def fingerprint(
  policy: Any, *, environment: str, suite: str, split: str, seeds: Sequence[int], max_steps: int, replay: int,
  loop: str, told: str = "the task's own instruction", model_changes: dict | None = None, **more: Any,
) -> dict:
  """Everything that a success rate depends on, as JSON values.

  Args:
    policy: its `metadata` is read.
    environment, suite, split, seeds, max_steps, replay: the protocol.
    loop: "device" or "host".
    told: what the policy was told.
    model_changes: config values of the model other than those it was trained with (controls).
    **more: what a simulator adds: versions, renderer, initial states.
  """
  facts, device = policy.metadata, jax.devices()[0]
  reads = ("image_size", "views", "crop_area", "jpeg_quality", "normalisation", "gripper", "dtype")
  seeds = [int(seed) for seed in seeds]
  consecutive = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
  return {
    "environment": environment, "suite": suite, "split": split,
    "seeds": f"{seeds[0]}..{seeds[-1]}" if consecutive else seeds,
    "episodes": len(seeds), "max_steps": max_steps, "replay": replay, "loop": loop, "told": told,
    "model_changes": model_changes or {},
    "policy": {key: facts.get(key) for key in ("policy_hash", "folder", "step", "dataset", "parameters")},
    "preprocessing": {key: facts.get(key) for key in reads},
    "device": f"{device.platform}: {device.device_kind} × {jax.device_count()}",
    "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
    "commit": commit(), **more,
  }  # fmt: skip


def fitting(names: Sequence[str], suite: str) -> list[str]:
  """Those of a policy's statistics that are in a LIBERO suite's units, the best first.

  The suite's own, with or without `_no_noops` as the release chooses, else those of the four suites together.
  """
  own = [name for name in (suite, f"{suite}_no_noops") if name in names]
  return own + [name for name in names if name.startswith("libero_4_task_suites") and suite != "libero_90"]


def require_alike(first: dict, second: dict) -> None:
  """Raises ValueError unless two results may be compared: equal fingerprints but for the fields COMPARED."""
  lines = differences(first, second, (first.keys() | second.keys()) - set(COMPARED))
  if lines:
    listing = "\n  ".join(lines)
    raise ValueError(f"Results cannot be compared: got different\n  {listing}\nexpected equal ones; run both alike.")


def differences(first: Mapping, second: Mapping, names: Iterable[str]) -> list[str]:
  """A line for each field that differs, "replay: 8 against 4"; of a field with parts, only those that differ."""
  lines = []
  for name in sorted(names):
    a, b = first.get(name), second.get(name)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += [f"{name}.{line}" for line in differences(a, b, a.keys() | b.keys())]
    elif a != b:
      lines.append(f"{name}: {a} against {b}")
  return lines


def summary(episodes: Episodes, group: Callable[[str], str] | None = None) -> dict:
  """Successes, episodes, errors, rate, Wilson interval and mean steps to success, as JSON values.

  Args:
    episodes: the result.
    group: a function of an instruction; adds the same numbers by its values, under "tasks".
  """
  done = [int(steps) for steps, success in zip(episodes.steps, episodes.success) if success]
  n = episodes.valid
  found = {
    "successes": episodes.successes, "episodes": n, "errors": int(episodes.error.sum()),
    "rate": episodes.successes / n if n else None, "interval": [*wilson(episodes.successes, n)],
    "mean_steps_to_success": sum(done) / len(done) if done else None,
  }  # fmt: skip
  if group is not None:
    names = [group(sentence) for sentence in episodes.instruction]
    members = {name: [i for i, other in enumerate(names) if other == name] for name in sorted(set(names))}
    found["tasks"] = {name: summary(select(episodes, index)) for name, index in members.items()}
  return found


def select(episodes: Episodes, index: Sequence[int]) -> Episodes:
  """Some of the episodes, without their states."""
  arrays = (getattr(episodes, name)[list(index)] for name in ("seeds", "success", "steps", "error"))
  return Episodes(*arrays, [episodes.instruction[i] for i in index], [episodes.told[i] for i in index])


def commit() -> str | None:
  """The commit of the source tree, "+" where it was changed since; None where there is no git."""
  git = ["git", "-C", str(pathlib.Path(__file__).parent)]
  commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
  try:
    with warnings.catch_warnings():  # jax warns of forks; these children become git at once
      warnings.filterwarnings("ignore", r"os\.fork\(\) was called")
      found = [subprocess.run(git + words, capture_output=True, text=True, check=True) for words in commands]
  except (OSError, subprocess.CalledProcessError):
    return None
  head, dirty = (result.stdout.strip() for result in found)
  return head + ("+" if dirty else "")


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
