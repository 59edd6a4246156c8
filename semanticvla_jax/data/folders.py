"""Where a dataset is on disk: its version, its shards, and whether it has the features that its spec reads."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from typing import Any

from semanticvla_jax import cli
from semanticvla_jax.data.spec import DatasetSpec
from semanticvla_jax.data.tfrecord_index import Part
from semanticvla_jax.errors import refuse


def shards(data_dir: str, name: str, spec: DatasetSpec, split: str | None = None) -> list[Part]:
  """The records of a split of the dataset's highest version.

  Args:
    data_dir, name: see `find`.
    spec: the features that must be there.
    split: tfds notation over episodes; None for the spec's.

  Raises:
    ValueError: no such dataset or split, a missing feature or one of another width, or metadata that is not complete.
  """
  split = spec.split if split is None else split
  builder = _builder(find(data_dir, name), name)
  _check_features(builder, spec, name)
  if builder.info.file_format.value != "tfrecord":
    raise refuse(f"Dataset {name!r}", f"{builder.info.file_format.value}", "tfrecord", "convert it")
  try:
    instructions = builder.info.splits[split].file_instructions
  except (KeyError, ValueError) as error:
    raise refuse(
      f"Dataset {name!r} has no split {split!r}",
      sorted(builder.info.splits),
      "one of them, or a part such as 'train[:95%]'",
      "correct the split",
    ) from error
  if not instructions:
    raise refuse(
      f"Dataset {name!r}, split {split!r}",
      "no shardLengths in dataset_info.json",
      "the number of episodes of each shard",
      "write the dataset again, or count them into dataset_info.json",
    )
  return [Part(one.filename, one.skip, one.take) for one in instructions]


def _builder(folder: str, name: str) -> Any:
  """tfds' reader of a dataset's folder. Raises ValueError where its metadata cannot be read."""
  import tensorflow_datasets as tfds

  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:  # of any kind: it parses JSON that anything may have written
    raise refuse(
      f"Dataset {name!r}",
      f"metadata that cannot be read ({cli.first_line(error)}) in {folder}",
      "dataset_info.json and features.json of tfds",
      "write the dataset again",
    ) from error


_VERSION = re.compile(r"\d+\.\d+\.\d+")


def find(data_dir: str, name: str) -> str:
  """Returns the folder of the highest version of a dataset, x.y.z; others are ignored and named once.

  Raises:
    ValueError: there is none, or the place cannot be reached.
  """
  import tensorflow as tf
  from etils import epath

  folder = epath.Path(data_dir)
  root = folder / name
  try:
    inside = sorted(root.iterdir()) if root.exists() else []
    versions = [path for path in inside if _VERSION.fullmatch(path.name) and (path / "features.json").exists()]
    have = [] if inside or not folder.exists() else sorted(path.name for path in folder.iterdir())
  except (OSError, tf.errors.OpError) as error:
    raise refuse(
      "Data cannot be reached",
      f"{type(error).__name__}: {error} from {data_dir}",
      "a folder or bucket that can be read",
      "check its address, the network, and credentials (gcloud auth application-default login)",
    ) from error
  others = [path.name for path in inside if path not in versions and not path.name.startswith(".")]
  if inside and not versions and (below := _configs(inside)):
    raise refuse(
      f"Dataset {name!r}",
      f"tfds configs {[path.name for path in below]} in {root}",
      "one of them in the name",
      f"name it '{name}/{below[0].name}'",
    )
  if inside and not versions:
    raise refuse(
      f"No dataset {name!r}",
      f"{others[:20] or 'no version'} in {root}",
      "a folder x.y.z with features.json, such as 1.0.0",
      "rename the one that is meant",
    )
  if not versions:
    close = difflib.get_close_matches(name, have, n=1, cutoff=0.0)
    raise refuse(
      f"No dataset {name!r}",
      f"{have[:20]} in {data_dir}",
      f"{name}/1.0.0/features.json",
      f"correct the name (did you mean {close[0]!r}?)" if close else "check data_dir",
    )
  newest = str(max(versions, key=lambda path: [int(part) for part in path.name.split(".")]))
  if others:
    _warn_once(f"{newest} is read; no version with features.json, ignored: {', '.join(others[:20])}")
  if older := sorted(path.name for path in versions if str(path) != newest):
    _warn_once(f"{newest} is read; older versions, ignored: {', '.join(older[:20])}")
  return newest


def unread(data_dir: str, name: str) -> list[str]:
  """What is next to the version of a dataset that is read: older versions, and what is none."""
  from etils import epath

  newest = epath.Path(find(data_dir, name))
  return sorted(x.name for x in newest.parent.iterdir() if x.name != newest.name and not x.name.startswith("."))


def _configs(inside: list[Any]) -> list[Any]:
  """Folders of tfds configs, <config>/x.y.z/features.json, among the entries of a dataset's folder."""
  return [path for path in inside if path.is_dir() and [*path.glob("*.*.*/features.json")]]


@functools.cache
def _warn_once(message: str) -> None:
  logging.warning("%s", message)


def _check_features(builder: Any, spec: DatasetSpec, name: str) -> None:
  from tensorflow_datasets.core import utils

  have = utils.flatten_nest_dict(builder.info.features.get_serialized_info())
  have = {key.removeprefix("steps/"): info for key, info in have.items() if key.startswith("steps/")}
  needed = {key: (width,) for key, width in spec.columns.items()}
  needed |= {f"observation/{view}": () for view in spec.views} | {"language_instruction": ()}
  for key, shape in needed.items():
    if key not in have:
      close = difflib.get_close_matches(key, have, n=1, cutoff=0.0)
      raise refuse(
        f"Dataset {name!r} lacks the feature {key!r}",
        f"{sorted(have)}",
        "it below steps/",
        f"pass a DatasetSpec for this dataset{f' (nearest: {close[0]!r})' if close else ''}",
      )
    if tuple(have[key].shape[1:]) != shape:
      raise refuse(
        f"Dataset {name!r}, feature {key!r}",
        f"shape {tuple(have[key].shape[1:])} a step",
        f"{shape}",
        "pass a DatasetSpec for this dataset",
      )
