"""Training batches of RLDS datasets: frames in the sampler's order, decoded, augmented and normalized.

Batch n is a function of the options and n alone: a run resumes at any batch without the ones before it, and a host
computes its rows of each global batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import PIL
from jaxtyping import Bool, Float, Int, Int32, UInt8

import semanticvla_jax
from semanticvla_jax.data import image_server, images, pipeline, sampler, statistics, text, tfrecord_index, trajectories
from semanticvla_jax.data.example_images import ExampleImages
from semanticvla_jax.data.image_processes import ImageProcesses
from semanticvla_jax.data.rlds import Dataset
from semanticvla_jax.errors import refuse
from semanticvla_jax.types import Batch, Observation

_STREAM = 3  # of random numbers of one seed; sampler.py and images.py have the others
_PIXELS = 1 << 16  # worked on together: small images in groups, so that numpy's calls are worth their overhead


class Jitter(NamedTuple):
  """How far the arm is displaced from the demonstrated path, see trajectories.displaced: standard deviations.

  Attributes:
    meters: of each axis of its position.
    radians: of each axis of its attitude.
  """

  meters: float = 0.0
  radians: float = 0.0


NO_JITTER = Jitter()


@dataclasses.dataclass(frozen=True)
class BatchOptions:
  """What the batches of a mixture depend on besides its datasets.

  Attributes:
    batch_size: examples of all hosts together.
    chunk: actions an example predicts.
    image_size: height and width in pixels.
    seed: of order and augmentation.
    trajectory_end: "cut" (release) or "pad", see trajectories.starts.
    augmentation: images.RELEASE for the released training, None for none.
    crop_area: center crop instead, as in evaluation.
    dct: see images.decode.
    jitter: displaces the arm of each example, for datasets whose actions are displacements.
    window: None shuffles frames; a number shuffles that many episodes at a time (see rlds.py). Then `cache_bytes`
      should hold `window` episodes of every dataset, or episodes are read more than once.
    cache_bytes: memory for encoded images of each dataset where they are cached, see tfrecord_index.Reader.
  """

  batch_size: int
  chunk: int
  image_size: int = 224
  seed: int = 0
  trajectory_end: str = "cut"
  augmentation: images.Augmentation | None = None
  crop_area: float | None = None
  dct: str = "accurate"
  jitter: Jitter = NO_JITTER
  window: int | None = None
  cache_bytes: int = 2 << 30


class _Source(NamedTuple):
  """A dataset made ready for one chunk length: candidate frames and its instructions as ids."""

  dataset: Dataset
  reader: tfrecord_index.Reader
  starts: Int[np.ndarray, " m"]
  prompt: tuple[Int32[np.ndarray, "i t"], Bool[np.ndarray, "i t"]]
  instruction: tuple[Int32[np.ndarray, "i s"], Bool[np.ndarray, "i s"]] | None


class BatchLoader:
  """The batches of a mixture of datasets.

  Args:
    mixture: datasets and weights; a dataset is drawn in proportion to weight times its number of transitions, so equal
      weights make every transition equally likely (the release's rule). Each is normalized by its own statistics.
    tokenizers: of the policy.
    options: see BatchOptions. Another `batch_size` changes which examples a step holds.

  Raises:
    ValueError: options that do not fit the datasets, or datasets that do not fit together.
  """

  def __init__(self, mixture: Sequence[tuple[Dataset, float]], tokenizers: text.Tokenizers, options: BatchOptions):
    _check_mixture(mixture, options)
    _check_crop(options)
    self.options = options
    self._sources = [_source(dataset, tokenizers, options) for dataset, _ in mixture]
    self._weights = [float(weight * len(dataset.actions)) for dataset, weight in mixture]
    episodes = [one.dataset.episodes[one.starts] for one in self._sources]
    self._sequence = sampler.IndexSampler(episodes, self._weights, options.seed, options.window)
    self._taking = threading.Lock()  # pipelines draw in their own threads
    self._images = ExampleImages(options.image_size, options.seed, options.augmentation, options.crop_area, options.dct)

  def batches(
    self,
    start_step: int = 0,
    rows: Int[np.ndarray, " rows"] | None = None,
    workers: int | None = None,
    prefetch: int = 2,
    processes: int = 0,
    servers: Sequence[str] = (),
  ) -> Iterator[Batch]:
    """Yields rows of the global batches start_step, start_step + 1, … without end.

    Args:
      start_step: number of the first batch; a run that resumes passes the number of updates made.
      rows: which examples of each global batch, ascending; None for all. A host passes its own.
      workers: threads that read, and as many that decode and augment, but of these no more than there are cores; None
        for one per core, at most 16.
      prefetch: batches worked on ahead.
      processes: other processes that decode and augment, for a host that one process cannot feed, since Python's lock
        holds its threads back. 0 for none; the batches are the same.
      servers: "host:port" of image servers (see data/image_server.py) that read, decode and augment in turn, in place
        of threads and processes here. () for none; the batches are the same.

    Returns:
      Batches of numpy arrays, see types.Batch; `instruction` is None if the tokenizers have no SigLIP part.

    Raises:
      ValueError: at once for bad arguments, and for a server that does not answer or has other data or options; while
        iterating, for an image that cannot be decoded, or the end of the last server.
    """
    rows = np.arange(self.options.batch_size) if rows is None else np.asarray(rows)
    _check_rows(rows, start_step, self.options.batch_size)
    if servers:
      image_server.check_servers(servers, self.image_facts())
      return self._served(start_step, rows, tuple(servers))
    return self._generate(start_step, rows, pipeline.threads(workers), prefetch, processes)

  def _generate(
    self, start_step: int, rows: np.ndarray, workers: int, prefetch: int, processes: int
  ) -> Iterator[Batch]:
    with self.stages(rows, processes) as stages, contextlib.closing(pipeline.Readers(workers)) as readers:
      made = pipeline.dataset(stages, start_step, len(rows), readers, group=self.group, prefetch=prefetch)
      with contextlib.closing(pipeline.stream([made.as_numpy_iterator()], stages, start_step, len(rows))) as pairs:
        for examples, pictures in pairs:
          yield self._batch(*examples.T, pictures)

  def _served(self, start_step: int, rows: np.ndarray, servers: tuple[str, ...]) -> Iterator[Batch]:
    """Batches of the servers; one that ends after the first batch is left out, since the others make the same ones."""
    left, number = list(servers), start_step
    while True:
      try:
        for examples, pictures in self._from_servers(number, rows, tuple(left)):
          yield self._batch(*examples.T, pictures)
          number += 1
      except image_server.Unreachable as error:
        left = [server for server in left if server != error.address]
        if not left or number == start_step:
          raise
        logging.warning("%s Batches from %d on come from %s.", error, number, ", ".join(left))

  def _from_servers(
    self, start: int, rows: np.ndarray, servers: tuple[str, ...]
  ) -> Iterator[tuple[Int[np.ndarray, "b 3"], UInt8[np.ndarray, "b v s s 3"]]]:
    several = len(servers)
    with self.stages(rows) as stages:
      made = [image_server.batches(server, start + i, rows, several) for i, server in enumerate(servers)]
      with contextlib.closing(pipeline.stream(made, stages, start, len(rows))) as pairs:
        for i, (examples, pictures) in enumerate(pairs):
          image_server.check(servers[i % several], start + i, examples, stages.draw(start + i))
          yield examples, pictures

  @contextlib.contextmanager
  def stages(self, rows: Int[np.ndarray, " b"], processes: int = 0) -> Iterator[pipeline.Stages]:
    """What a pipeline does for rows of the global batches; `processes` live as long as the context."""
    stages = pipeline.Stages(
      draw=functools.partial(self._draw, rows),
      read=self._read,
      finish=self._images.finish,
      check=self._check,
      views=len(self._sources[0].dataset.spec.views),
      size=self.options.image_size,
      dct=self.options.dct,
    )
    if not processes:
      yield stages
      return
    with contextlib.closing(ImageProcesses(self._images, processes)) as make:
      yield stages._replace(make=make, at_once=make.at_once)

  @property
  def group(self) -> int:
    """Most examples that a pipeline works on together."""
    return max(1, _PIXELS // (self.options.image_size**2 * len(self._sources[0].dataset.spec.views)))

  def image_facts(self) -> dict[str, str]:
    """What decides the order of its examples and their images, as text by name: where equal, so are they."""
    options = dataclasses.asdict(self.options)
    for name in ("jitter", "cache_bytes"):
      del options[name]
    datasets = [(one.dataset.digest, one.dataset.spec.views, len(one.starts)) for one in self._sources]
    versions = {"numpy": np.__version__, "pillow": PIL.__version__, "semanticvla_jax": semanticvla_jax.__version__}
    facts = options | {"datasets": datasets, "weights": self._weights} | versions
    return {name: str(value) for name, value in facts.items()}

  def _draw(self, rows: Int[np.ndarray, " b"], step: int) -> Int[np.ndarray, "b 3"]:
    """Dataset, candidate and number of each example of a batch."""
    first = step * self.options.batch_size
    with self._taking:
      datasets, candidates = self._sequence.take(first, int(rows[-1]) + 1)
    return np.stack([datasets[rows], candidates[rows], first + rows], axis=1)

  def _places(self, examples: Int[np.ndarray, "g 3"]) -> Iterator[tuple[_Source, int, int]]:
    """Where the images of some examples are: source, frame of its index, view."""
    for dataset, candidate, _ in examples.tolist():
      source = self._sources[dataset]
      frame = int(source.dataset.frames[source.starts[candidate]])
      yield from ((source, frame, view) for view in range(len(source.dataset.spec.views)))

  def _read(self, examples: Int[np.ndarray, "g 3"]) -> list[bytes]:
    return [source.reader.image(frame, view) for source, frame, view in self._places(examples)]

  def _check(self, examples: Int[np.ndarray, "g 3"]) -> None:
    """Raises ValueError with the name of the first image that cannot be decoded or prepared."""
    for source, frame, view in self._places(examples):
      encoded = source.reader.image(frame, view)
      try:
        self._images.prepare(self._images.decode(encoded))
      except ValueError as error:
        name = source.dataset.spec.views[view]
        raise ValueError(
          f"Dataset {source.dataset.name!r}, {name!r} of {source.reader.where(frame)}: {error}"
        ) from error

  def _batch(
    self,
    datasets: Int[np.ndarray, " b"],
    candidates: Int[np.ndarray, " b"],
    examples: Int[np.ndarray, " b"],
    pictures: UInt8[np.ndarray, "b v h w 3"],
  ) -> Batch:
    """The examples of each dataset together, back in the order in which they were drawn."""
    options, parts, rows = self.options, [], []
    for number in np.unique(datasets):
      here = np.flatnonzero(datasets == number)
      shifts = _shifts(options.jitter, options.seed, examples[here])
      parts.append(_columns(self._sources[number], candidates[here], options.chunk, shifts))
      rows.append(here)
    back = np.argsort(np.concatenate(rows), kind="stable")
    proprio, actions, inside, prompt, prompt_mask, *instruction = (
      None if part[0] is None else np.concatenate(part)[back] for part in zip(*parts, strict=True)
    )
    observation = Observation(pictures, proprio, prompt, prompt_mask, *instruction)
    return Batch(observation, actions, inside)


def _source(dataset: Dataset, tokenizers: text.Tokenizers, options: BatchOptions) -> _Source:
  sentences = dataset.index.instructions
  whole_records = options.window is not None
  return _Source(
    dataset,
    tfrecord_index.Reader(dataset.index, whole_records=whole_records, cache_bytes=options.cache_bytes),
    dataset.starts(options.chunk, options.trajectory_end),
    tokenizers.prompt(sentences),
    None if tokenizers.siglip is None else tokenizers.instruction(sentences),
  )


def _columns(
  source: _Source, candidates: Int[np.ndarray, " b"], chunk: int, shift: Float[np.ndarray, "b 6"] | None
) -> tuple[np.ndarray | None, ...]:
  """Everything of some examples of one dataset but the images, displaced, normalized and tokenized."""
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


def _shifts(jitter: Jitter, seed: int, examples: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b 6"] | None:
  """How far the arm of each example is displaced, in meters and radians: the same for the same arguments."""
  if jitter == NO_JITTER:
    return None
  bits = [np.random.Philox(key=[seed, _STREAM], counter=[0, 0, example, 0]) for example in examples.tolist()]
  return np.stack([np.random.Generator(one).standard_normal(6) for one in bits]) * np.repeat(jitter, 3)


def _check_rows(rows: np.ndarray, start_step: int, batch_size: int) -> None:
  if start_step < 0 or not len(rows) or rows.min() < 0 or rows.max() >= batch_size or (np.diff(rows) <= 0).any():
    raise refuse(
      "Bad rows of a batch",
      f"{len(rows)} rows of {batch_size} examples ({rows[:8].tolist()} …), start_step {start_step}",
      "some of its rows, ascending, and a step of at least 0",
      "pass the rows of this host",
    )


def _check_mixture(mixture: Sequence[tuple[Dataset, float]], options: BatchOptions) -> None:
  if options.batch_size < 1:
    raise refuse("Bad batch size", options.batch_size, "at least 1", "raise config.data.batch_size")
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
  _check_jitter(mixture, options.jitter)


def _check_crop(options: BatchOptions) -> None:
  if options.augmentation is not None and options.crop_area is not None:
    raise refuse(
      "Two crops",
      f"augmentation and crop_area={options.crop_area}",
      "a random crop in training or the center crop of evaluation",
      "leave one of the two None",
    )


def _check_jitter(mixture: Sequence[tuple[Dataset, float]], jitter: Jitter) -> None:
  if not (0 <= jitter.meters < 0.1 and 0 <= jitter.radians < 0.5):
    raise refuse(
      "Jitter",
      f"{jitter.meters} meters and {jitter.radians} radians",
      "0 to 0.1 and 0 to 0.5, for images stay as they are",
      "lower config.data.jitter",
    )
  for dataset, _ in mixture if jitter != NO_JITTER else ():
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
