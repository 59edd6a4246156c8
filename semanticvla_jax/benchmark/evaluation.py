"""Closed-loop episodes a second: wholly on the device, against a Python loop over the same policy and environment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from semanticvla_jax.evaluate.rollout import OnDevice, OnHost
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import physics


def measure(folder: Path, suite: str, batch: int, host_episodes: int, repeats: int = 3) -> dict[str, Any]:
  """Times both loops on held-out episodes, compiled and warm, best of `repeats`.

  Args:
    folder: policy folder. suite: of the tabletop.
    batch: episodes run together on the device.
    host_episodes: the first of the same episodes, one after the other, through `Policy.infer`.

  Returns:
    Episodes a second of each, their ratio, the actions a second, and in how many of the shared episodes both loops
    agree about success (all, unless rounding tips one over the edge).
  """
  policy = Policy.load(folder, batch_sizes=(1,))
  device = OnDevice(policy, suite, batch=batch)
  host = OnHost(policy, physics.TabletopEnvironment(suite, "heldout", policy.image_size))
  fast, fast_result = _best(device, range(batch), repeats)
  slow, slow_result = _best(host, range(host_episodes), repeats)
  agree = fast_result.success[:host_episodes] == slow_result.success
  return {
    "device": jax.devices()[0].device_kind,
    "policy": str(folder),
    "suite": suite,
    "batch": batch,
    "on device, episodes/s": batch / fast,
    "Python loop, episodes/s": host_episodes / slow,
    "ratio": batch / fast * slow / host_episodes,
    "on device, actions/s": int(fast_result.steps.sum()) / fast,
    "Python loop, actions/s": int(slow_result.steps.sum()) / slow,
    "same success": f"{int(agree.sum())} of {host_episodes}",
  }


def _best(runner: Any, seeds: Sequence[int], repeats: int) -> tuple[float, Any]:
  """Seconds of the fastest run after a first one that compiles, and its result."""
  result = runner.run(seeds)
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    again = runner.run(seeds)
    seconds.append(time.perf_counter() - start)
    np.testing.assert_array_equal(again.success, result.success)
  return min(seconds), result
