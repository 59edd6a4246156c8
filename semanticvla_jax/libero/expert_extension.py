"""Adds episodes to a finished dataset of the scripted expert: it is taken apart into what it was made from."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from semanticvla_jax import cli
from semanticvla_jax.data import datasets, folders, tfrecord_index
from semanticvla_jax.errors import refuse
from semanticvla_jax.libero import episode_files

_COLUMNS = {"action": 7, "observation/state": 8, "observation/joint_state": 7}


def check(folder: pathlib.Path, facts: Mapping, names: set[str], episodes: int) -> None:
  """Raises ValueError where a finished dataset cannot become the one that is asked for.

  Args:
    folder: of the dataset's version.
    facts: what all episodes have to be made with.
    names: of the tasks that are asked for. episodes: of each of them.
  """
  before = _read(folder)
  unlike = [(key, before.get(key), value) for key, value in facts.items() if before.get(key) != value]
  if unlike:
    raise refuse(f"{folder} was made differently", f"(what, then, now) {unlike}", "the same", "choose another --name")
  counts = _counts(before)
  if not counts.keys() <= names:
    raise refuse(f"{folder} has other tasks", sorted(counts.keys() - names), "those as well", "add them to --tasks")
  most = max(counts.values())
  if episodes < most or (episodes == most and counts.keys() == names):
    got = f"{folder} with {most} episodes of each task, --episodes={episodes}"
    raise refuse("Dataset exists", got, "more episodes or a new folder", "raise --episodes, or choose another --name")


def check_kept(folder: pathlib.Path, names: set[str]) -> None:
  """Raises ValueError where a finished dataset has episodes of tasks that are not in `names`, and would lose them."""
  lost = sorted(_counts(_read(folder)).keys() - names)
  if lost:
    remedy = "lower --bar; what is recorded waits"
    raise refuse("Tasks fell below the bar", lost, f"all tasks of {folder}", remedy)


def take_apart(folder: pathlib.Path, numbers: Mapping[tuple[str, int], int], waiting: pathlib.Path) -> None:
  """Stores the episodes of a finished dataset, failed ones too, where they waited before it was written.

  Args:
    folder: of the dataset's version; it stays as it is.
    numbers: of the files, by name of the task and attempt.
    waiting: folder of the files; what is there already and sound is kept.
  """
  facts, name = _read(folder), folder.parent.name
  spec = datasets.spec(name)
  parts = folders.shards(str(folder.parent.parent), name, spec, "train")
  index = tfrecord_index.index(parts, _COLUMNS, spec.views, "", name)
  reader, shape = tfrecord_index.Reader(index), (facts["simulator"]["size"],) * 2 + (3,)
  ends = np.cumsum(index.lengths).tolist()
  episodes = iter([[*range(end - length, end)] for end, length in zip(ends, index.lengths.tolist(), strict=True)])
  for task, table in facts["tasks"].items():
    kept = set(table["kept_attempts"])
    for attempt in range(table["attempts"] if kept else 0):
      path = episode_files.path(waiting, numbers[task, attempt])
      frames = next(episodes) if attempt in kept else []
      if not episode_files.is_sound(path):
        columns = {key.split("/")[-1]: index.columns[key][frames] for key in _COLUMNS}
        views = [[reader.image(frame, view) for frame in frames] for view in range(len(spec.views))]
        episode_files.store_encoded(path, columns, views, shape)


def _counts(facts: Mapping) -> dict[str, int]:
  """Episodes by name of the task, of those that a dataset has."""
  return {name: len(table["kept_attempts"]) for name, table in facts["tasks"].items() if table["kept_attempts"]}


def _read(folder: pathlib.Path) -> dict:
  path = folder / "demonstrations.json"
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    remedy = "choose another --name"
    raise refuse(str(path), cli.first_line(error), "what the expert's dataset was made with", remedy) from error
