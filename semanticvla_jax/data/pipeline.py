"""Images of training batches as one `tf.data` pipeline: range → parallel map → batch → prefetch.

Python's lock decides how such a pipeline scales. JPEGs are decoded by TensorFlow's operation, outside the lock, where
its pixels are those of `images.decode`. Finding and reading bytes, resizing and augmenting are numpy, the code that
evaluation calls, in `tf.numpy_function`. Reading waits for a disk or network, so it has threads of its own, as many as
are asked for. tf.data has a thread a core and no more: any further one would take a core from the one that holds the
lock. Where that is too slow, other processes do it (`Stages.make`).
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import io
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from semanticvla_jax import cli
from semanticvla_jax.data import images
from semanticvla_jax.errors import refuse

_FRAMES = (0xC0, 0xC1, 0xC2)  # markers of baseline, extended and progressive JPEGs
_SAMPLINGS = (0x11, 0x21, 0x22, 0x41)  # of luma, horizontal and vertical, with chroma at 0x11
_QUIET = 1.0  # seconds in which a pipeline that still works calls Python: TensorFlow decodes in between
_METHODS = {"accurate": "INTEGER_ACCURATE", "fast": ""}  # TensorFlow's names of images.DCTS; "" is its default


class Stages(NamedTuple):
  """What a pipeline does: functions of numpy arrays, called from several threads but for `draw`.

  Attributes:
    draw: number of a batch → its examples, i64[b 3].
    read: some examples, i64[g 3] → their encoded images, `views` each, one example after the other; b"" for none.
    finish: some examples and their decoded images, u8[h w 3] each (u8[0 0 3] for none) → u8[g v s s 3].
    check: some examples → raises the ValueError that names the image that cannot be used.
    views: images of an example.
    size: height and width of finished images.
    dct: see images.decode.
    make: some examples and their encoded images → u8[g v s s 3], in other processes; None decodes and finishes here.
    at_once: calls of `make` at a time.
  """

  draw: Callable[[int], Int[np.ndarray, "b 3"]]
  read: Callable[[Int[np.ndarray, "g 3"]], Sequence[bytes]]
  finish: Callable[[Int[np.ndarray, "g 3"], Sequence[np.ndarray]], UInt8[np.ndarray, "g v s s 3"]]
  check: Callable[[Int[np.ndarray, "g 3"]], None]
  views: int
  size: int
  dct: str
  make: Callable[[Int[np.ndarray, "g 3"], Sequence[bytes]], UInt8[np.ndarray, "g v s s 3"]] | None = None
  at_once: int = 0


class Readers:
  """Threads that read: `begin` gives a read to them, `take` waits for what it found. `close` ends them.

  Args:
    workers: threads.
  """

  def __init__(self, workers: int):
    self.workers = workers
    self._threads = concurrent.futures.ThreadPoolExecutor(workers, "reader")
    self._numbers, self._reads = itertools.count(), {}

  def begin(self, read: Callable, *arguments: Any) -> int:
    """The number under which `take` has what the call returns."""
    number = next(self._numbers)
    self._reads[number] = self._threads.submit(read, *arguments)
    return number

  def take(self, number: int) -> Any:
    """Waits for what a read found, or raises what it raised; once each."""
    return self._reads.pop(number).result()

  def close(self) -> None:
    self._threads.shutdown(wait=False, cancel_futures=True)


class Calls:
  """Calls of Python by tf.data's threads, so that they can be brought to an end before what waits for these threads
  while it holds Python's lock, which would be for ever."""

  def __init__(self):
    self._changing, self._running, self._latest, self._ended = threading.Lock(), 0, 0.0, False

  def counted(self, function: Callable) -> Callable:
    """The function, which raises after `end`."""

    def call(*arguments):
      with self._changing:
        self._running += 1
      try:
        if self._ended:
          raise RuntimeError("what makes these batches is being closed")
        return function(*arguments)
      finally:
        with self._changing:
          self._running, self._latest = self._running - 1, time.monotonic()

    return call

  def end(self) -> None:
    """Lets further calls fail, and returns when none is under way or has come for a second."""
    self._ended = True
    while self._running or time.monotonic() - self._latest < _QUIET:
      time.sleep(0.02)


def dataset(
  stages: Stages,
  start: int,
  rows: int,
  readers: Readers,
  *,
  stride: int = 1,
  group: int,
  prefetch: int,
  calls: Calls | None = None,
) -> Any:
  """A tf.data.Dataset of batches start, start + stride, … without end, each a pair of the examples, i64[b/g g 3], and
  their images, u8[b/g g v s s 3], in groups of g.

  Args:
    stages: what is done.
    start: number of the first batch.
    rows: examples of a batch.
    readers: threads that read; to be closed after the last batch. As many decode and finish, but of these no more than
      there are cores.
    stride: from one batch's number to the next.
    group: most examples to work on together.
    prefetch: batches worked on ahead.
    calls: counts the calls of `stages`.
  """
  import tensorflow as tf

  images.hide_accelerators()
  group = max(size for size in range(1, min(group, rows) + 1) if rows % size == 0)

  counted = (calls or Calls()).counted
  begin, wait = _reading(stages, group, readers, counted)
  work = _work(stages, group, counted)
  at_once = min(readers.workers, cores()) if stages.make is None else stages.at_once
  numbers = tf.data.Dataset.range(start, np.iinfo(np.int64).max, stride)
  reads = numbers.map(_plain(begin)).unbatch().prefetch(readers.workers)
  made = reads.map(_plain(lambda *read: work(*wait(*read))), num_parallel_calls=at_once, deterministic=True)
  batches = made.batch(rows // group, drop_remainder=True)
  return (batches.prefetch(prefetch) if prefetch else batches).with_options(_options(at_once))


def stream(
  batches: list[Iterator], stages: Stages, start: int, rows: int
) -> Iterator[tuple[Int[np.ndarray, "b 3"], UInt8[np.ndarray, "b v s s 3"]]]:
  """Yields the examples and images of batches start, start + 1, … without end; the arrays are read-only.

  The pipelines' threads end when the iterator is closed or collected, or the interpreter ends.

  Args:
    batches: iterators over n datasets (see `dataset`) with stride n, which begin at start, start + 1, … start + n - 1.
      The list is emptied at the end, and should hold the only references.
    stages: what was done.
    start: number of the first batch.
    rows: examples of a batch.

  Raises:
    ValueError: an image cannot be used (see Stages.check), or TensorFlow failed otherwise.
  """
  import tensorflow as tf

  several = len(batches)
  atexit.register(batches.clear)  # before its threads would wait for an interpreter that is gone
  try:
    for number in itertools.count(start):
      try:
        examples, pictures = next(batches[(number - start) % several])
      except tf.errors.OpError as error:
        stages.check(stages.draw(number))
        raise _unexplained(number, error) from error
      yield examples.reshape(rows, 3), pictures.reshape(rows, *pictures.shape[2:])
  finally:
    batches.clear()
    atexit.unregister(batches.clear)


def _unexplained(number: int, error: Exception) -> ValueError:
  return refuse(
    f"Batch {number}",
    cli.first_line(error),
    "images that can be read, as they can be now",
    "look at the disk or network that holds the dataset and run the command again",
  )


def _plain(function: Callable) -> Callable:
  """Python left as written: none of it becomes control flow of a graph."""
  import tensorflow as tf

  return tf.autograph.experimental.do_not_convert(function)


def _options(threads: int) -> Any:
  """Private threads, and nothing that depends on the machine's load."""
  import tensorflow as tf

  options = tf.data.Options()
  options.deterministic = True
  options.autotune.enabled = False
  options.threading.private_threadpool_size = threads
  options.threading.max_intra_op_parallelism = 1
  return options


def _reading(stages: Stages, group: int, readers: Readers, counted: Callable) -> tuple[Callable, Callable]:
  """Two functions of a graph: one draws a batch and begins to read it, the other waits for what one read found.

  Number of a batch → its examples, i64[b/g g 3], and the numbers of their reads, i64[b/g]. The examples of one read,
  i64[g 3], and its number → the examples, their encoded images [g v], and which of them TensorFlow decodes, bool[g v].
  """
  import tensorflow as tf

  native = stages.make is None and _decodes_alike(stages.dct)

  def read(examples):
    encoded = stages.read(examples)
    return np.array(encoded, object), np.array([native and _is_color_jpeg(one) for one in encoded])

  def draw(number):
    examples = stages.draw(int(number)).reshape(-1, group, 3)
    return examples, np.array([readers.begin(read, some) for some in examples])

  def begin(number):
    examples, reads = tf.numpy_function(counted(draw), [number], (tf.int64, tf.int64))
    return tf.ensure_shape(examples, [None, group, 3]), tf.ensure_shape(reads, [None])

  def wait(examples, number):
    encoded, is_jpeg = tf.numpy_function(counted(lambda n: readers.take(int(n))), [number], (tf.string, tf.bool))
    count = [group * stages.views]
    return examples, tf.ensure_shape(encoded, count), tf.ensure_shape(is_jpeg, count)

  return begin, wait


def _work(stages: Stages, group: int, counted: Callable) -> Callable:
  """What `_reading` gives in the end → its examples and their images u8[g v s s 3], as operations of a graph."""
  import tensorflow as tf

  def decode(encoded):
    return images.decode(encoded, stages.dct) if encoded else np.zeros((0, 0, 3), np.uint8)

  def finish(examples, *decoded):
    return stages.finish(examples, decoded)

  def picture(encoded, is_jpeg):
    method = _METHODS.get(stages.dct, "")
    return tf.cond(
      is_jpeg,
      lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method=method),
      lambda: tf.ensure_shape(tf.numpy_function(counted(decode), [encoded], tf.uint8), [None, None, 3]),
    )

  def made_elsewhere(examples, encoded):
    return stages.make(examples, encoded.tolist())

  def work(examples, encoded, is_jpeg):
    if stages.make is None:
      decoded = [picture(encoded[i], is_jpeg[i]) for i in range(group * stages.views)]
      pictures = tf.numpy_function(counted(finish), [examples, *decoded], tf.uint8)
    else:
      pictures = tf.numpy_function(counted(made_elsewhere), [examples, encoded], tf.uint8)
    return examples, tf.ensure_shape(pictures, [group, stages.views, stages.size, stages.size, 3])

  return work


def cores() -> int:
  """How many CPU cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(workers: int | None) -> int:
  """How many threads of a pipeline read: as many as asked for; None for one per core, at most 16."""
  return max(min(cores(), 16) if workers is None else workers, 1)


def _is_color_jpeg(encoded: bytes) -> bool:
  """Whether the bytes begin as a usual JPEG: three components of 8 bits, chroma at 4:4:4, 4:2:2, 4:2:0 or 4:1:1."""
  at = 2
  if encoded[:at] != b"\xff\xd8":
    return False
  while at + 17 < len(encoded) and encoded[at] == 0xFF:
    if encoded[at + 1] in _FRAMES:
      luma, *chroma = encoded[at + 11 : at + 18 : 3]
      return encoded[at + 4] == 8 and encoded[at + 9] == 3 and luma in _SAMPLINGS and chroma == [0x11, 0x11]
    at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
  return False


@functools.cache
def _decodes_alike(dct: str) -> bool:
  """Whether TensorFlow's libjpeg gives the pixels of `images.decode` on this machine."""
  import tensorflow as tf
  from PIL import Image

  if dct not in _METHODS:
    return False
  picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8).repeat(5, axis=0).repeat(5, axis=1)
  for sampling, progressive in itertools.product(range(3), (False, True)):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90, subsampling=sampling, progressive=progressive)
    with contextlib.suppress(tf.errors.OpError):
      found = tf.io.decode_jpeg(buffer.getvalue(), channels=3, dct_method=_METHODS[dct]).numpy()
      if np.array_equal(found, images.decode(buffer.getvalue(), dct)):
        continue
    return False
  return True
