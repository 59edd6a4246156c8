"""Closed-loop episodes a second: wholly on the device, against a Python loop over the same policy and environment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.evaluate.rollout import OnDevice, OnHost
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import physics


def measure(result: Result, folder: str, suite: str, batch: int, host_episodes: int, repeats: int = 3) -> None:
  """Times both loops on held-out episodes, compiled and warm, best of `repeats`.

  Args:
    folder: policy folder. suite: of the tabletop.
    batch: episodes run together on the device.
    host_episodes: the first of the same episodes, one after the other, through `Policy.infer`.

  Adds episodes a second of each, their ratio, actions a second, and in how many of the shared episodes both loops agree
  about success (all, unless rounding tips one over the edge).
  """
  policy = Policy.load(folder, batch_sizes=(1,))
  device = OnDevice(policy, suite, batch=batch)
  host = OnHost(policy, physics.TabletopEnvironment(suite, "heldout", policy.image_size))
  fast, fast_result = _best(device, range(batch), repeats)
  slow, slow_result = _best(host, range(host_episodes), repeats)
  agree = fast_result.success[:host_episodes] == slow_result.success
  result.models["policy"] = dict(policy.config["model"])
  result.add("on device", batch / fast, "episodes/s")
  result.add("Python loop", host_episodes / slow, "episodes/s")
  result.add("on device / Python loop", batch / fast * slow / host_episodes, "ratio")
  result.add("actions on device", int(fast_result.steps.sum()) / fast, "actions/s")
  result.add("actions in the Python loop", int(slow_result.steps.sum()) / slow, "actions/s")
  result.add("same success", int(agree.sum()), f"of {host_episodes} episodes")


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
