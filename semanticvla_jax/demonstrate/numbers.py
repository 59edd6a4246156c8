"""dataset_statistics.json beside the shards of a new dataset."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from semanticvla_jax.data import standardise, statistics


def write(folder: pathlib.Path, name: str, kept: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
  """Writes the statistics of the standardised numbers: those that training computes from the dataset.

  Args:
    folder: of the dataset. name: of the dataset, which decides how it is read.
    kept: (action f32[t 7], state f32[t 8]) of each episode, as stored.
  """
  recipe = standardise.recipe(name)
  found = [recipe.standardise({"action": action, "observation/state": state}) for action, state in kept]
  actions, proprio = (np.concatenate([getattr(one, key) for one in found]) for key in ("actions", "proprio"))
  stats = statistics.DatasetStatistics(
    statistics.compute(actions, recipe.normalised), statistics.compute(proprio), len(actions), len(found)
  )
  statistics.save_openvla(folder / "dataset_statistics.json", {name: stats})
