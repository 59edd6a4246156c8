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

import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator, Set

import numpy as np
from jaxtyping import Bool, Float32, Int

from semanticvla_jax.data import datasets, faults, folders, images, statistics, tfrecord_index, trajectories
from semanticvla_jax.data.folders import find  # noqa: F401 (where a dataset is)
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
  frames: Int[np.ndarray, " n"]
  episodes: Int[np.ndarray, " n"]
  ends: Int[np.ndarray, " n"]

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

  def starts(self, chunk: int, trajectory_end: str) -> Int[np.ndarray, " m"]:
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
  split: str | None = None,
  given: statistics.DatasetStatistics | None = None,
  cache_dir: str | None = None,
  skip_bad: bool = False,
) -> Dataset:
  """Indexes `<data_dir>/<name>/<version>` (the highest version), standardizes it and computes its statistics.

  Episodes without language are dropped, as in the release; their number is logged.

  Args:
    data_dir: local or gs://.
    name: of the dataset; also chooses the spec if none is passed.
    spec: how to read it.
    split: tfds notation over episodes, e.g. "train" or "train[:95%]"; None for the spec's. The statistics are of it.
    given: statistics to use instead, e.g. of a checkpoint.
    cache_dir: local folder in which the index is kept from one run to the next; None for records.CACHE, "" for none.
    skip_bad: leaves out episodes that cannot be used, and logs how many and why. Every image is decoded for it once;
      which cannot be is stored next to the index.

  Raises:
    ValueError: no such dataset or split, a missing feature, a corrupt shard, non-finite numbers, an empty image of a
      view that is not optional, a gripper of another convention, unusable statistics.
  """
  spec = datasets.spec(name) if spec is None else spec
  images.hide_accelerators()
  parts = folders.shards(data_dir, name, spec, split)
  lost = [] if skip_bad else None
  index = tfrecord_index.index(parts, spec.columns, spec.views, cache_dir, name, lost)
  if not skip_bad:
    return assemble(name, spec, index, given)
  bad = [faults.Fault(faults.RECORDS, None, error) for _, error in lost]
  kept = tfrecord_index.kept_at(parts, spec.columns, spec.views, cache_dir, name)
  memory = None if kept is None else kept.with_suffix(".images.json")
  bad += [*faults.of_numbers(name, spec, index), *faults.remembered_of_images(name, spec, index, memory)]
  skipped, missing = {fault.episode for fault in bad} - {None}, sum(count for count, _ in lost)
  if bad:
    count, total = len(skipped) + missing, len(index.lengths) + missing
    logging.warning("%s: %d of %d episodes are skipped (skip_bad):\n%s", name, count, total, faults.summary(bad))
  return assemble(name, spec, index, given, skipped)


def assemble(
  name: str,
  spec: datasets.DatasetSpec,
  index: tfrecord_index.Index,
  given: statistics.DatasetStatistics | None = None,
  skipped: Set[int] | None = None,
  problems: list[ValueError] | None = None,
) -> Dataset:
  """Standardizes the episodes of an index and computes (or takes `given`) and checks their statistics.

  Args:
    skipped: episodes to leave out, all others being sound; None looks for unusable ones itself.
    problems: takes what is wrong with grippers and statistics, which is raised otherwise.

  Raises:
    ValueError: non-finite numbers (naming the shard, episode and frame), gripper commands of another convention, no
      usable episode, unusable statistics.
  """
  if skipped is None:
    for fault in faults.of_numbers(name, spec, index):
      raise fault.error
  skipped = skipped or set()
  kept = np.repeat([i not in skipped for i in range(len(index.lengths))], index.lengths)
  with _collected(problems):
    _check_gripper(name, spec, index, kept)
  found, silent = _trajectories(name, spec, index, skipped)
  if silent:
    logging.warning("%s: %d of %d episodes have no instruction and are dropped", name, silent, len(index.lengths))
  if not found:
    raise refuse(
      f"Dataset {name!r} is empty",
      f"{silent} episodes without an instruction" + (f" and {len(skipped)} that are skipped" if skipped else ""),
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
  with _collected(problems):
    statistics.check(name, given, mode=spec.mode, openings=spec.openings, **widths)
  episodes, ends = np.repeat(np.arange(len(found)), lengths), np.repeat(np.cumsum(lengths), lengths)
  return Dataset(name, spec, index, given, actions, proprio, frames, episodes, ends)


@contextlib.contextmanager
def _collected(problems: list[ValueError] | None) -> Iterator[None]:
  """Puts a ValueError of the block into a list, if there is one."""
  try:
    yield
  except ValueError as error:
    if problems is None:
      raise
    problems.append(error)


def _check_gripper(
  name: str, spec: datasets.DatasetSpec, index: tfrecord_index.Index, kept: Bool[np.ndarray, " n"]
) -> None:
  """`datasets.check_gripper` over the kept frames of an index, where it has the columns of the action."""
  if spec.grippers and set(spec.action) <= set(index.columns):
    stored = np.concatenate([index.columns[key] for key in spec.action], axis=1)
    datasets.check_gripper(name, spec, stored[kept])


def _trajectories(
  name: str, spec: datasets.DatasetSpec, index: tfrecord_index.Index, skipped: Set[int]
) -> tuple[list[datasets.Trajectory], int]:
  """The usable episodes, standardized, `frames` counted through the index; and how many have no instruction."""
  found, silent, first = [], 0, 0
  spoken = np.array([bool(instruction) for instruction in index.instructions], bool)
  for episode, length in enumerate(index.lengths.tolist()):
    part = slice(first, first + length)
    if episode not in skipped and not spoken[index.instruction[part]].any():
      silent += 1
    elif episode not in skipped:
      trajectory = spec.read({key: column[part] for key, column in index.columns.items()})
      _check_widths(name, spec, trajectory)
      found.append(trajectory._replace(frames=first + trajectory.frames))
    first += length
  return found, silent


def _check_widths(name: str, spec: datasets.DatasetSpec, trajectory: datasets.Trajectory) -> None:
  """Raises ValueError where a standardizing function returns something else than its spec says."""
  length, have = len(trajectory.frames), [trajectory.actions.shape, trajectory.proprio.shape]
  want = [(length, len(spec.absolute)), (length, spec.proprio_dim)]
  if have != want:
    raise refuse(
      f"Dataset {name!r}, standardize",
      f"actions {[*have[0]]} and proprioception {[*have[1]]} of {length} frames",
      f"{[*want[0]]} and {[*want[1]]}",
      "correct the function, or `absolute` and `proprio_dim` of the DatasetSpec",
    )
