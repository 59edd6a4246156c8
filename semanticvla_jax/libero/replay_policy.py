"""A policy that replays recorded actions, to validate everything between a policy and its simulator.

Run through the whole evaluation, it must succeed where a plain replay of the same actions does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from semanticvla_jax.errors import refuse
from semanticvla_jax.libero import hdf5, suites


class ReplayPolicy:
  """Answers with the actions of demonstrations, without no-ops; with none after the last, which ends the episode.

  Args:
    folder: of `<task>_demo.hdf5` files, or the one above it.
    suite: of LIBERO.
    seeds: episode numbers, 50 k + i is the i-th demonstration of task k.
    replan_steps: actions per query.

  Raises:
    ValueError: there is no such demonstration.
  """

  def __init__(self, folder: str, suite: str, seeds: Sequence[int], replan_steps: int = 8):
    self.replan_steps = replan_steps
    found, tasks = hdf5.folder(folder, suite), suites.tasks(suite)
    self._actions: dict[int, np.ndarray] = {}
    self.beginnings: dict[int, suites.Beginning] = {}
    for task in sorted({seed // suites.EPISODES for seed in seeds}):
      rows = hdf5.read(found / f"{tasks[task].name}_demo.hdf5")
      for seed in (seed for seed in seeds if seed // suites.EPISODES == task):
        if seed % suites.EPISODES >= len(rows):
          raise refuse(
            "Recorded actions",
            f"trial {seed % suites.EPISODES} of task {task}",
            f"0 to {len(rows) - 1}, the demonstrations there are",
            "lower --trials",
          )
        row = rows[seed % suites.EPISODES]
        self._actions[seed], self.beginnings[seed] = row.moving, suites.Beginning(row.first, row.seed)
    digests = "".join(hdf5.digest(path) for path in sorted(found.glob("*_demo.hdf5")))
    self.metadata = {
      "folder": f"recorded actions of {suite}",
      "policy_hash": hashlib.sha256(digests.encode()).hexdigest()[:16],
      "chunk": replan_steps,
      "replay": replan_steps,
      "jpeg_quality": None,
    }

  def infer_batch(self, observations: Sequence[Mapping]) -> list[dict]:
    """The next actions of each episode, by its number and the steps taken: [{"actions": f64[<=replan_steps 7]}, …]."""
    rows = [(self._actions[one["episode"]], one["step"]) for one in observations]
    return [{"actions": actions[step : step + self.replan_steps]} for actions, step in rows]
