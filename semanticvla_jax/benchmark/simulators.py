"""Closed-loop episodes a second in the LIBERO simulator: several workers against one, on recorded actions."""

from __future__ import annotations

import time
from collections.abc import Sequence

from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.evaluate.rollout_pool import OnSimulators, stored_as_jpeg
from semanticvla_jax.libero import simulator, suites
from semanticvla_jax.libero.replay_policy import ReplayPolicy


def measure(found: Result, folder: str, suite: str, task: int, trials: int, workers: Sequence[int]) -> None:
  """Times the same episodes of one task with each number of workers, simulators started and warm.

  Args:
    folder: LIBERO's HDF5 demonstrations; the policy costs nothing, so that simulators are what is measured.
    suite, task: of LIBERO. trials: episodes.
    workers: numbers of simulators, the first is what the others are compared with.

  Adds episodes a minute of each, their ratio to the first, actions a second, and successes.
  """
  seeds = [suites.EPISODES * task + trial for trial in range(trials)]
  policy, first = ReplayPolicy(folder, suite, seeds), None
  for count in workers:
    runner = OnSimulators(
      policy,
      lambda: simulator.start(suites.Settings(suite), policy.beginnings),
      workers=count,
      prepare=stored_as_jpeg(95),
    )
    try:
      runner.run(seeds[:count])  # starts all of them
      begin = time.perf_counter()
      result = runner.run(seeds)
      rate = trials / (time.perf_counter() - begin)
    finally:
      runner.close()
    first = rate if first is None else first
    found.add(f"{count} workers", 60 * rate, "episodes/min")
    found.add(f"{count} workers, actions", float(result.steps.sum()) * rate / trials, "actions/s")
    found.add(f"{count} workers / {workers[0]}", rate / first, "ratio")
    found.add(f"{count} workers, succeeded", result.successes, f"of {result.valid} episodes")
