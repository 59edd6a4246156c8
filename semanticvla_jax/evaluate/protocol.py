"""What makes two results comparable: the fingerprint of an evaluation, and the interval round a success rate."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import jax
import numpy as np

from semanticvla_jax.evaluate.rollout import Episodes

PACKAGES = ("semanticvla_jax", "jax", "jaxlib", "flax", "numpy", "pillow")
# Fields in which compared results may differ: that is what is compared. `require_alike` wants all others equal.
COMPARED = (
  "policy.policy_hash", "policy.folder", "policy.step", "policy.parameters", "preprocessing.image_size",
  "preprocessing.views", "preprocessing.pruner_text", "chunk", "told", "model_changes",
)  # fmt: skip
# Fields that are a policy's own, which nothing can make alike, or that say what computed it: `compare` lists those that
# differ. What the environment did is in none of these lists and has to agree.
OWN = ("policy", "preprocessing", "chunk", "prompt", "device", "versions")
# But where the tabletop is, jax is the simulator: the layout of a seed hangs on its random numbers.
OF_ENVIRONMENT = {"tabletop": ("versions.jax",)}
# Fields that are told and decide nothing: a comment changes the sources, too.
NOTED = ("sources",)
# Fields that say how many episodes there are: each is kept by its own seed.
COUNTED = ("seeds", "episodes", "first_states")


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


def percent(successes: int, episodes: int, decimals: int = 1) -> str:
  """A success rate as text, "79.2 %": "100 %" only where all succeeded, "0 %" only where none did, "–" of no episodes.

  Args:
    successes, episodes: what is counted; the caller prints what was left out of the count.
    decimals: fewest of a rate between 0 and 100; there are more where it would be rounded to one of these.

  Raises:
    ValueError: more successes than episodes, or negative numbers.
  """
  if not 0 <= successes <= episodes:
    raise ValueError(f"Success rate: got {successes} of {episodes}; expected 0 to {episodes}; count again.")
  if episodes == 0:
    return "–"
  if successes in (0, episodes):
    return "100 %" if successes else "0 %"
  return f"{_rounded(100 * successes / episodes, decimals, most=6)} %"


def interval_text(interval: Sequence[float], decimals: int = 0) -> str:
  """The ends of an interval as text, "30–95 %"; as in `percent`, neither becomes 0 or 100 by rounding alone."""
  low, high = (_rounded(100 * end, decimals, most=2) for end in interval)
  return f"{low}–{high} %"


def _rounded(value: float, decimals: int, most: int) -> str:
  """A number in [0, 100] with some decimals, more of them (at most `most`) where it would be rounded to an end."""
  while float(text := f"{value:.{decimals}f}") in (0, 100) and 0 < value < 100 and decimals < most:
    decimals += 1
  return text


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
  reads = (
    "image_size", "views", "crop_area", "jpeg_quality", "dct", "normalisation", "gripper", "dtype", "pruner_text",
  )  # fmt: skip
  seeds = [int(seed) for seed in seeds]
  consecutive = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
  return {
    "environment": environment, "suite": suite, "split": split,
    "seeds": f"{seeds[0]}..{seeds[-1]}" if consecutive else seeds,
    "episodes": len(seeds), "max_steps": max_steps, "replay": replay, "loop": loop, "told": told,
    "model_changes": model_changes or {},
    "policy": {key: facts.get(key) for key in ("policy_hash", "folder", "step", "dataset", "parameters")},
    "preprocessing": {key: facts.get(key) for key in reads}, "chunk": facts.get("chunk"),
    "device": f"{device.platform}: {device.device_kind} × {jax.device_count()}",
    "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
    "sources": sources(), **more,
  }  # fmt: skip


def require_alike(first: Mapping, second: Mapping, but: Sequence[str] = ()) -> None:
  """Raises ValueError unless two fingerprints are equal in all but the fields COMPARED, NOTED and `but`."""
  lines = unlike(first, second, (*COMPARED, *NOTED, *but))
  if lines:
    listing = "\n  ".join(lines)
    raise ValueError(f"Results cannot be compared: got different\n  {listing}\nexpected equal ones; run both alike.")


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
      found[name] = f"{a} against {b}"
  return found


def within(name: str, fields: Sequence[str]) -> bool:
  """Whether a name of `differences` is one of some fields or a part of one."""
  return any(name == field or name.startswith(f"{field}.") for field in fields)


def summary(episodes: Episodes, group: Callable[[str], str] | None = None) -> dict:
  """Successes, episodes, errors, rate, Wilson interval and mean steps to success, as JSON values.

  Episodes that broke (`errors`) are in no other number. Those that failed by an action that is not finite count as
  failures and are reported separately. Of no episodes at all there is no rate (None).

  Args:
    episodes: the result.
    group: a function of an instruction; adds the same numbers by its values, under "tasks".
  """
  done = [int(steps) for steps, success in zip(episodes.steps, episodes.success) if success]
  n = episodes.valid
  found = {
    "successes": episodes.successes, "episodes": n, "errors": episodes.broken, "nonfinite": episodes.spoilt,
    "rate": episodes.successes / n if n else None, "interval": [*wilson(episodes.successes, n)],
    "mean_steps_to_success": sum(done) / len(done) if done else None,
  }  # fmt: skip
  if group is not None:
    names = [group(sentence) for sentence in episodes.instruction]
    members = {name: [i for i, other in enumerate(names) if other == name] for name in sorted(set(names))}
    found["tasks"] = {name: summary(select(episodes, index)) for name, index in members.items()}
  return found


def count_text(summary: Mapping) -> str:
  """A summary's count and what is reported with it: "38/38, 10 broke, 2 by a non-finite action"."""
  errors, spoilt = summary.get("errors", 0), summary.get("nonfinite", 0)
  broke = f", {errors} broke" if errors else ""
  failed = f", {spoilt} failed by a non-finite action" if spoilt else ""
  return f"{summary['successes']}/{summary['episodes']}{broke}{failed}"


def rate_text(summary: Mapping) -> str:
  """A summary's rate as a line ends with it: "38/48, 2 broke  79.2 %  (65–88 %)", or that there is none."""
  if not summary["episodes"]:
    return f"no rate: all {summary.get('errors', 0)} episodes broke"
  percentage = percent(summary["successes"], summary["episodes"])
  return f"{count_text(summary)}  {percentage}  ({interval_text(summary['interval'])})"


def select(episodes: Episodes, index: Sequence[int]) -> Episodes:
  """Some of the episodes, without their states."""
  names = ("seeds", "success", "steps", "error", "nonfinite", "retries", "seconds")
  arrays = {name: None if (x := getattr(episodes, name)) is None else x[list(index)] for name in names}
  said = {name: [getattr(episodes, name)[i] for i in index] for name in ("instruction", "told")}
  return Episodes(**arrays, **said)


def per_episode(episodes: Episodes) -> list[dict]:
  """A dict for each episode, as JSON values; `episodes_of` reads them."""
  spoilt = np.zeros(len(episodes.seeds), bool) if episodes.nonfinite is None else episodes.nonfinite
  rows = [
    dict(seed=int(seed), success=bool(success), steps=int(steps), error=bool(error), nonfinite=bool(bad), asked=asked,
         told=told)
    for seed, success, steps, error, asked, told, bad in zip(*episodes[:6], spoilt)
  ]  # fmt: skip
  if episodes.retries is not None:
    times = zip(episodes.retries.tolist(), episodes.seconds.tolist())
    rows = [row | dict(retries=retries, seconds=seconds) for row, (retries, seconds) in zip(rows, times)]
  return rows


def episodes_of(rows: Sequence[Mapping]) -> Episodes:
  """What `per_episode` gave, without states; what an earlier version wrote lacks `nonfinite`.

  Raises:
    KeyError, TypeError, ValueError: they are something else.
  """
  column = lambda name, kind: np.array([kind(row[name]) for row in rows], kind)  # noqa: E731
  timed = all("retries" in row for row in rows) and bool(rows)
  return Episodes(
    column("seed", np.int64), column("success", bool), column("steps", np.int32), column("error", bool),
    [str(row["asked"]) for row in rows], [str(row["told"]) for row in rows],
    retries=column("retries", np.int64) if timed else None, seconds=column("seconds", np.float64) if timed else None,
    nonfinite=np.array([bool(row.get("nonfinite", False)) for row in rows], bool),
  )  # fmt: skip


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
