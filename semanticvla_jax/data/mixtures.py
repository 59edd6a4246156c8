"""Named, weighted mixtures of datasets."""

from __future__ import annotations

import difflib

from semanticvla_jax.errors import refuse

_SUITES = ("libero_spatial_no_noops", "libero_object_no_noops", "libero_goal_no_noops", "libero_10_no_noops")

MIXTURES = {"libero_4_task_suites_no_noops": tuple((name, 1.0) for name in _SUITES)}


def mixture(name: str) -> tuple[tuple[str, float], ...]:
  """Lists the (dataset, weight) pairs of a mixture; any other name is a dataset of weight 1, or several with commas.

  A weight is relative to the size of the dataset: equal weights mean that every transition is equally likely
  (`rlds/dataset.py:515-517` of the release).

  Raises:
    ValueError: the name is a near miss of a mixture's.
  """
  if name in MIXTURES:
    return MIXTURES[name]
  if close := difflib.get_close_matches(name, MIXTURES, n=1, cutoff=0.9):
    raise refuse("Unknown mixture", f"{name!r}", f"a dataset or one of {sorted(MIXTURES)}", f"use {close[0]!r}")
  return tuple((one.strip(), 1.0) for one in name.split(","))
