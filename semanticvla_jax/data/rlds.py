"""RLDS on disk to training batches: index, order, decode, augment, normalise.

The choice made here: an index of all frames without their images (records.py, about 25 MB for LIBERO's 273,465
frames), frames drawn in an order that is a pure function of (seed, position) (order.py), and single JPEGs read by
byte range and decoded when their turn comes. So shuffling is perfect and costs no buffer, the n-th batch is computed
without the n-1 before it, memory does not grow with the images, and the order does not depend on the number of hosts:
a host computes its rows of each global batch.

For sets too large or too remote for random reads (tens of millions of frames, gs://), `window` shuffles episodes and
then the frames of `window` episodes at a time, reading whole episodes into a bounded cache: just as deterministic, at
the price that every host reads every episode.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import difflib
import functools
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt8

from semanticvla_jax.data import datasets, images, sampler, statistics, text, tfrecord_index, trajectories
from semanticvla_jax.errors import refuse
from semanticvla_jax.types import Batch, Observation

_STREAM = 3  # of random numbers of one seed; order.py and images.py have the others
_PIXELS = 1 << 16  # worked on together: small images in groups, so that numpy's calls are worth their overhead


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One dataset, standardised, in raw units, without its images: `n` frames.

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
    """Metres that one unit of a translation command moves the arm in a step."""
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
  """Indexes `<data_dir>/<name>/<version>` (the highest version), standardises it and computes its statistics.

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
    raise ValueError(
      f"Dataset {name!r} has no split {split!r}: got {sorted(builder.info.splits)}; expected one of them, or a part "
      "such as 'train[:95%]'."
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
    raise ValueError(
      f"No dataset {name!r}: got {have[:20]} in {data_dir}; expected {name}/1.0.0/features.json; "
      + (f"did you mean {close[0]!r}?" if close else "check data_dir.")
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
  """Standardises the episodes of an index and computes (or takes `given`) and checks their statistics.

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
    raise ValueError(f"Dataset {name!r} is empty: got {len(index.lengths)} episodes; expected some with language.")
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


class Jitter(NamedTuple):
  """How far the arm is made to stand off the demonstrated path, see trajectories.displaced: standard deviations.

  Attributes:
    metres: of each axis of its position.
    radians: of each axis of its attitude.
  """

  metres: float = 0.0
  radians: float = 0.0


STILL = Jitter()


class _Source(NamedTuple):
  """A dataset made ready for one chunk length: candidate frames and its instructions as ids."""

  dataset: Dataset
  reader: tfrecord_index.Reader
  starts: Int[np.ndarray, "m"]
  prompt: tuple[Int32[np.ndarray, "i t"], Bool[np.ndarray, "i t"]]
  instruction: tuple[Int32[np.ndarray, "i s"], Bool[np.ndarray, "i s"]] | None


def batches(
  mixture: Sequence[tuple[Dataset, float]],
  tokenizers: text.Tokenizers,
  *,
  batch_size: int,
  chunk: int,
  image_size: int = 224,
  seed: int = 0,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  rows: Int[np.ndarray, "rows"] | None = None,
  trajectory_end: str = "cut",
  augmentation: images.Augmentation | None = None,
  crop_area: float | None = None,
  dct: str = "accurate",
  jitter: Jitter = STILL,
  window: int | None = None,
  cache_bytes: int = 2 << 30,
  workers: int | None = None,
  prefetch: int = 2,
) -> Iterator[Batch]:
  """Yields this host's rows of the global batches start_step, start_step + 1, ... without end.

  Batch n is a function of the arguments and n alone: `start_step=n` resumes exactly, and the rows of all hosts, one
  after the other, are the batch of one host. Changing `batch_size` changes which examples a step holds.

  Args:
    mixture: datasets and weights; a dataset is drawn in proportion to weight times its number of transitions, so equal
      weights make every transition equally likely (the release's rule). Each is normalised by its own statistics.
    tokenizers: of the policy.
    batch_size: of all hosts together; a multiple of `process_count`.
    chunk: actions an example predicts.
    image_size: pixels of a side.
    seed: of order and augmentation.
    start_step: number of the first batch.
    process_index, process_count: which of how many hosts this is.
    rows: which examples of each global batch this host reads, ascending; None for its equal share, in order. Give them
      where devices do not hold the batch in the order of their hosts.
    trajectory_end: "cut" (release) or "pad", see trajectories.starts.
    augmentation: images.RELEASE for the released training, None for none.
    crop_area: centre crop instead, as in evaluation.
    dct: see images.decode.
    jitter: displaces the arm of each example, for datasets whose actions are displacements.
    window: None shuffles frames; a number shuffles that many episodes at a time (see the module's docstring). Then
      `cache_bytes` should hold `window` episodes of every dataset, or episodes are read more than once.
    cache_bytes: memory for encoded images of each dataset where they are cached, see tfrecord_index.Reader.
    workers: threads that read, decode and augment; None for one a core, at most 16.
    prefetch: batches worked on ahead.

  Returns:
    Batches of numpy arrays, see types.Batch; `instruction` is None if the tokenisers have no SigLIP part.

  Raises:
    ValueError: at once for bad arguments; while iterating, for an image that cannot be decoded.
  """
  _check_batches(mixture, batch_size, process_index, process_count, start_step)
  _check_jitter(mixture, jitter)
  whole = window is not None
  sources = [_source(dataset, tokenizers, chunk, trajectory_end, whole, cache_bytes) for dataset, _ in mixture]
  weights = [weight * len(dataset.actions) for dataset, weight in mixture]
  sequence = sampler.IndexSampler([one.dataset.episodes[one.starts] for one in sources], weights, seed, window)
  prepare = functools.partial(images.prepare, size=image_size, crop_area=crop_area)
  picture = functools.partial(_pictures, sources, seed=seed, dct=dct, prepare=prepare, augmentation=augmentation)
  share = batch_size // process_count
  rows = np.arange(process_index * share, (process_index + 1) * share) if rows is None else np.asarray(rows)
  firsts = (step * batch_size for step in itertools.count(start_step))
  workers = min(os.cpu_count() or 1, 16) if workers is None else workers
  group = max(1, _PIXELS // (image_size**2 * len(mixture[0][0].spec.views)))
  columns = functools.partial(_batch, sources, chunk=chunk, jitter=jitter, seed=seed)
  return _generate(sequence, firsts, rows, picture, columns, group, workers, prefetch)


def _check_jitter(mixture: Sequence[tuple[Dataset, float]], jitter: Jitter) -> None:
  if not (0 <= jitter.metres < 0.1 and 0 <= jitter.radians < 0.5):
    raise refuse(
      "Jitter",
      f"{jitter.metres} metres and {jitter.radians} radians",
      "0 to 0.1 and 0 to 0.5, for images stay as they are",
      "lower config.data.jitter",
    )
  for dataset, _ in mixture if jitter != STILL else ():
    if any(dataset.spec.absolute[:6]):
      raise refuse(
        "Jitter",
        f"the dataset {dataset.name!r}, whose actions are targets",
        "displacements, which can lead back",
        "set config.data.jitter=(0.0, 0.0)",
      )
    if dataset.stride < 1e-5:
      raise refuse(
        "Jitter",
        f"the dataset {dataset.name!r}, whose arm moves {dataset.stride:.2g} a unit of its commands",
        "more than 1e-5, for them to lead back",
        "set config.data.jitter=(0.0, 0.0)",
      )


def _check_batches(
  mixture: Sequence[tuple[Dataset, float]], batch_size: int, process_index: int, process_count: int, start_step: int
) -> None:
  if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count or start_step < 0:
    raise refuse(
      "Bad sharding",
      f"batch_size={batch_size}, process {process_index} of {process_count}, start_step {start_step}",
      "a batch that divides by the processes",
      "change the batch size",
    )
  if not mixture:
    raise refuse("Empty mixture", "no datasets", "at least one", "name one in the config")
  shapes = {
    dataset.name: (
      len(dataset.spec.views),
      dataset.actions.shape[1],
      dataset.proprio.shape[1],
      dataset.spec.absolute,
    )
    for dataset, _ in mixture
  }
  if len(set(shapes.values())) > 1:
    raise refuse(
      "Datasets do not fit together",
      f"(views, action dims, proprio dims, absolute dims) {shapes}",
      "the same for all",
      "train on them apart",
    )


def _source(
  dataset: Dataset, tokenizers: text.Tokenizers, chunk: int, trajectory_end: str, whole: bool, cache_bytes: int
) -> _Source:
  sentences = dataset.index.instructions
  return _Source(
    dataset,
    tfrecord_index.Reader(dataset.index, whole_records=whole, cache_bytes=cache_bytes),
    dataset.starts(chunk, trajectory_end),
    tokenizers.prompt(sentences),
    None if tokenizers.siglip is None else tokenizers.instruction(sentences),
  )


def _generate(sequence, firsts, rows, picture, columns, group, workers, prefetch) -> Iterator[Batch]:
  pool = concurrent.futures.ThreadPoolExecutor(max(workers, 1), thread_name_prefix="frames")
  pending = collections.deque()
  try:
    for first in firsts:
      datasets, candidates = (part[rows] for part in sequence.take(first, int(rows[-1]) + 1))
      drawn = list(zip(datasets.tolist(), candidates.tolist(), (first + rows).tolist()))
      futures = [pool.submit(picture, drawn[i : i + group]) for i in range(0, len(rows), group)]
      pending.append((datasets, candidates, first + rows, futures))
      if len(pending) > prefetch:
        *chosen, futures = pending.popleft()
        yield columns(*chosen, np.concatenate([future.result() for future in futures]))
  finally:
    for future in itertools.chain.from_iterable(futures for *_, futures in pending):
      future.cancel()
    pool.shutdown(wait=False)


def _pictures(
  sources: Sequence[_Source],
  drawn: Sequence[tuple[int, int, int]],
  *,
  seed: int,
  dct: str,
  prepare: Callable[..., np.ndarray],
  augmentation: images.Augmentation | None,
) -> UInt8[np.ndarray, "b v h w 3"]:
  """Reads, decodes and prepares the views of some examples (dataset, candidate, number of the example)."""
  found, uniform = [], []
  for dataset, candidate, example in drawn:
    source = sources[dataset]
    frame = int(source.dataset.frames[source.starts[candidate]])
    for view, name in enumerate(source.dataset.spec.views):
      try:
        found.append(prepare(images.decode(source.reader.image(frame, view), dct)))
      except ValueError as error:
        raise ValueError(
          f"Dataset {source.dataset.name!r}, {name!r} of {source.reader.where(frame)}: {error}"
        ) from error
      uniform.append(images.draws(seed, example, view))
  pictures = np.stack(found)
  if augmentation is not None:
    pictures = images.augment(pictures, np.stack(uniform), augmentation)
  return pictures.reshape(len(drawn), -1, *pictures.shape[1:])


def _batch(
  sources: Sequence[_Source],
  datasets: Int[np.ndarray, "b"],
  candidates: Int[np.ndarray, "b"],
  examples: Int[np.ndarray, "b"],
  pictures: UInt8[np.ndarray, "b v h w 3"],
  *,
  chunk: int,
  jitter: Jitter,
  seed: int,
) -> Batch:
  parts, rows = [], []
  for number in np.unique(datasets):
    here = np.flatnonzero(datasets == number)
    parts.append(_columns(sources[number], candidates[here], chunk, _shifts(jitter, seed, examples[here])))
    rows.append(here)
  back = np.argsort(np.concatenate(rows), kind="stable")
  proprio, actions, inside, prompt, prompt_mask, *instruction = (
    None if part[0] is None else np.concatenate(part)[back] for part in zip(*parts, strict=True)
  )
  observation = Observation(pictures, proprio, prompt, prompt_mask, *instruction)
  return Batch(observation, actions, inside)


def _shifts(jitter: Jitter, seed: int, examples: Int[np.ndarray, "b"]) -> Float[np.ndarray, "b 6"] | None:
  """How far the arm of each example is displaced, in metres and radians: the same for the same arguments."""
  if jitter == STILL:
    return None
  bits = [np.random.Philox(key=[seed, _STREAM], counter=[0, 0, example, 0]) for example in examples.tolist()]
  return np.stack([np.random.Generator(one).standard_normal(6) for one in bits]) * np.repeat(jitter, 3)


def _columns(
  source: _Source, candidates: Int[np.ndarray, "b"], chunk: int, shift: Float[np.ndarray, "b 6"] | None
) -> tuple[np.ndarray | None, ...]:
  """Everything of some examples of one dataset but the images, displaced, normalised and tokenised."""
  dataset, spec = source.dataset, source.dataset.spec
  frames = source.starts[candidates]
  absolute = np.array(spec.absolute)
  actions, inside = trajectories.windows(dataset.actions, frames, dataset.ends[frames], chunk, absolute)
  proprio = dataset.proprio[frames]
  if shift is not None:
    proprio, actions = trajectories.displaced(proprio, actions, shift, dataset.stride, inside)
  said = dataset.index.instruction[dataset.frames[frames]]
  prompt, prompt_mask = (table[said] for table in source.prompt)
  instruction = (None, None) if source.instruction is None else tuple(table[said] for table in source.instruction)
  return (
    statistics.normalize(proprio, dataset.statistics.proprio, mode=spec.mode),
    statistics.normalize(actions, dataset.statistics.action, mode=spec.mode),
    inside,
    prompt,
    prompt_mask,
    *instruction,
  )
