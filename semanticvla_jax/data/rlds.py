"""RLDS on disk, read for training: an index of all frames, standardized numbers and statistics.

The choice made here: an index of all frames without their images (tfrecord_index.py, about 25 MB for LIBERO's 273,465
frames), frames drawn in an order that is a pure function of (seed, position) (sampler.py), and single JPEGs read by
byte range and decoded when their turn comes. So shuffling is perfect and costs no buffer, the n-th batch is computed
without the n-1 before it, memory does not grow with the images, and the order does not depend on the number of hosts:
a host computes its rows of each global batch.

For sets too large or too remote for random reads (tens of millions of frames, gs://), `window` shuffles episodes and
then the frames of `window` episodes at a time, reading whole episodes into a bounded cache: just as deterministic, at
the price that every host reads every episode.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import logging
import re

import numpy as np
from jaxtyping import Float32, Int

from semanticvla_jax.data import datasets, images, statistics, tfrecord_index, trajectories
from semanticvla_jax.errors import refuse


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One dataset, standardized, in raw units, without its images: `n` frames.

  Attributes:
    name: of the folder and of the statistics.
    spec: how it was read.
    index: where its images lie.
    statistics: of actions and proprioception.
    actions, proprio: f32[n a], f32[n p].
    frames: i64[n], numbers of these frames in the index.
    episodes: i64[n], 0, 1, ... in order; ends: i64[n], one past the last frame of the same episode.
  """

  name: str
  spec: datasets.DatasetSpec
  index: tfrecord_index.Index
  statistics: statistics.DatasetStatistics
  actions: Float32[np.ndarray, "n a"]
  proprio: Float32[np.ndarray, "n p"]
  frames: Int[np.ndarray, "n"]
  episodes: Int[np.ndarray, "n"]
  ends: Int[np.ndarray, "n"]

  @property
  def digest(self) -> str:
    """16 hex digits that tell its data from others under the same name, the same on every machine.

    Of where each episode is in its shard and how long it is, and of each frame's instruction: shards written anew
    from other images differ in their lengths, copies do not. The numbers themselves are in the statistics.
    """
    digest = hashlib.sha256("\n".join(self.index.instructions).encode())
    for part in (self.index.record_offset, self.index.record_bytes, self.index.instruction[self.frames]):
      digest.update(np.ascontiguousarray(part).view(np.uint8).reshape(-1))
    return digest.hexdigest()[:16]

  @functools.cached_property
  def stride(self) -> float:
    """Meters that one unit of a translation command moves the arm in a step."""
    return trajectories.stride(self.actions, self.proprio, self.ends)

  def instruction(self, frame: int) -> str:
    """The instruction of frame `frame` of this dataset."""
    return self.index.instructions[self.index.instruction[self.frames[frame]]]

  def starts(self, chunk: int, trajectory_end: str) -> Int[np.ndarray, "m"]:
    """Frames that may start an example, ascending; logs how many episodes have none."""
    first = np.flatnonzero(np.diff(self.episodes, prepend=-1))
    lengths = np.diff(np.append(first, len(self.episodes)))
    parts = [at + trajectories.starts(int(t), chunk, trajectory_end) for at, t in zip(first, lengths, strict=True)]
    short = sum(len(part) == 0 for part in parts)
    if short:
      logging.warning(
        "%s: %d of %d episodes are shorter than the chunk of %d and are skipped", self.name, short, len(parts), chunk
      )
    if short == len(parts):
      raise refuse(
        f"Dataset {self.name!r} has no examples",
        f"episodes of at most {max(lengths, default=0)} frames",
        f"{chunk} or more",
        "use a shorter chunk or trajectory_end='pad'",
      )
    return np.concatenate(parts)


def load(
  data_dir: str,
  name: str,
  *,
  spec: datasets.DatasetSpec | None = None,
  split: str = "train",
  given: statistics.DatasetStatistics | None = None,
  cache_dir: str | None = None,
) -> Dataset:
  """Indexes `<data_dir>/<name>/<version>` (the highest version), standardizes it and computes its statistics.

  Episodes without language are dropped, as in the release; their number is logged.

  Args:
    data_dir: local or gs://.
    name: of the dataset; also chooses the spec if none is passed.
    spec: how to read it.
    split: tfds notation over episodes, e.g. "train" or "train[:95%]"; the statistics are those of this split.
    given: statistics to use instead, e.g. of a checkpoint.
    cache_dir: local folder in which the index is kept from one run to the next; None for records.CACHE, "" for none.

  Raises:
    ValueError: no such dataset or split, a missing feature, a corrupt shard, non-finite numbers, a gripper of another
      convention, unusable statistics.
  """
  import tensorflow_datasets as tfds

  spec = datasets.spec(name) if spec is None else spec
  images.hide_accelerators()
  builder = tfds.builder_from_directory(find(data_dir, name))
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
  parts = [tfrecord_index.Part(one.filename, one.skip, one.take) for one in instructions]
  return assemble(name, spec, tfrecord_index.index(parts, spec.columns, spec.views, cache_dir, name), given)


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
  return newest


@functools.cache
def _warn_once(message: str) -> None:
  logging.warning("%s", message)


def _check_features(builder, spec: datasets.DatasetSpec, name: str) -> None:
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


def assemble(
  name: str,
  spec: datasets.DatasetSpec,
  index: tfrecord_index.Index,
  given: statistics.DatasetStatistics | None = None,
) -> Dataset:
  """Standardizes the episodes of an index and computes (or takes `given`) and checks their statistics.

  Raises:
    ValueError: non-finite numbers (naming the shard, episode and frame), gripper commands of another convention, no
      usable episode, unusable statistics.
  """
  reader = tfrecord_index.Reader(index)
  for key, column in index.columns.items():
    if not np.isfinite(column).all():
      frame, dimension = np.argwhere(~np.isfinite(column))[0]
      raise refuse(
        f"Dataset {name!r}, {key!r}",
        f"{column[frame, dimension]} in dimension {dimension} of {reader.where(int(frame))}",
        "finite numbers",
        "repair the episode or write the dataset without it",
      )
  datasets.check_gripper(name, spec, index.columns["action"])
  found, silent, first = [], 0, 0
  spoken = np.array([bool(instruction) for instruction in index.instructions], bool)
  for length in index.lengths.tolist():
    part = slice(first, first + length)
    if spoken[index.instruction[part]].any():
      trajectory = spec.standardize({key: column[part] for key, column in index.columns.items()})
      found.append(trajectory._replace(frames=first + trajectory.frames))
    else:
      silent += 1
    first += length
  if silent:
    logging.warning("%s: %d of %d episodes have no instruction and are dropped", name, silent, len(index.lengths))
  if not found:
    raise refuse(
      f"Dataset {name!r} is empty",
      f"{len(index.lengths)} episodes without an instruction",
      "some with language",
      "name another split or dataset",
    )
  actions, proprio, frames = (np.concatenate(parts) for parts in zip(*found, strict=True))
  lengths = np.array([len(trajectory.actions) for trajectory in found])
  if given is None:
    given = statistics.DatasetStatistics(
      statistics.compute(actions, spec.normalized), statistics.compute(proprio), len(actions), len(found)
    )
  widths = {"action_dim": len(spec.normalized), "proprio_dim": spec.proprio_dim}
  statistics.check(name, given, mode=spec.mode, **widths)
  episodes, ends = np.repeat(np.arange(len(found)), lengths), np.repeat(np.cumsum(lengths), lengths)
  return Dataset(name, spec, index, given, actions, proprio, frames, episodes, ends)
