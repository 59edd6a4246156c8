"""A synthetic dataset as large as LIBERO's four suites: time of its index, memory over many batches, resuming.

Four episodes of two 256-pixel JPEGs a frame, written again and again; the folder is kept for the next time.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.data import images, loader, rlds, text, writer

_LENGTH, _DISTINCT, _SHARD, _PIXELS = 270, 4, 50, 256  # frames, episodes, episodes of a shard, pixels of a side
_CHUNK = 8


def measure(result: Result, folder: str, frames: int, batch: int, batches: int, image_size: int) -> None:
  """Writes the dataset if need be, loads it, draws batches and resumes at the last.

  Args:
    folder: where it is kept. frames: about how many.
    batch: examples. batches: how many are drawn. image_size: as read.
  """
  name = f"tabletop_scale_{frames}"
  if not (Path(folder) / name / "1.0.0").exists():
    _add_time(result, "writing it", lambda: _write(Path(folder), name, frames))
  cache = Path(folder) / "cache"
  shutil.rmtree(cache, ignore_errors=True)
  load = lambda: rlds.load(folder, name, cache_dir=str(cache))  # noqa: E731
  _add_time(result, "index and statistics", load)
  _add_time(result, "both again, from the cache", load)
  options = loader.BatchOptions(batch, _CHUNK, image_size, augmentation=images.RELEASE)
  loaded = load()
  result.add("frames", len(loaded.frames), "frames")
  stream = loader.BatchLoader([(loaded, 1.0)], text.load(prompt_length=64), options).batches()
  resident = []
  for number in range(batches):
    next(stream)
    if number % max(batches // 20, 1) == 0:
      resident.append(_resident())
  half = len(resident) // 2
  result.add("resident after the first batch", resident[0], "MB")
  result.add("resident, highest", max(resident), "MB")
  result.add(
    "resident, mean of the second half minus first", float(np.mean(resident[half:]) - np.mean(resident[:half])), "MB"
  )
  stream.close()
  begin = time.perf_counter()
  made = loader.BatchLoader([(load(), 1.0)], text.load(prompt_length=64), options)
  next(made.batches(batches))
  result.add("resuming at the last batch", time.perf_counter() - begin, "s")


def _add_time(result: Result, name: str, work: Callable[[], Any]) -> None:
  """Adds how long some work takes by the clock, and how much CPU time."""
  begin = time.perf_counter(), time.process_time()
  work()
  result.add(name, time.perf_counter() - begin[0], "s")
  result.add(f"{name}, CPU", time.process_time() - begin[1], "s")


def _resident() -> float:
  """Megabytes of memory that the process holds."""
  return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _write(folder: Path, name: str, frames: int) -> None:
  import tensorflow as tf

  small = writer.write(folder / "parts", name, _episodes(), episodes_per_shard=_DISTINCT)
  (shard,) = small.glob("*tfrecord*")
  records = [*tf.data.TFRecordDataset(str(shard)).as_numpy_iterator()]
  made = folder / "parts" / "whole"
  made.mkdir()
  size, vectors = (_PIXELS, _PIXELS, 3), {"state": 8, "joint_state": 7}
  features = writer.features_of({"image": size, "wrist_image": size}, vectors, 7)
  episodes = max(frames // _LENGTH, 1)
  counts = [min(_SHARD, episodes - first) for first in range(0, episodes, _SHARD)]
  endless, num_bytes = itertools.cycle(records), 0
  for number, count in enumerate(counts):
    with tf.io.TFRecordWriter(str(made / f"{number:05d}")) as out:
      for record in itertools.islice(endless, count):
        out.write(record)
        num_bytes += len(record)
  writer.complete(made, name, features, counts, num_bytes)
  (folder / name).mkdir(exist_ok=True)
  made.rename(folder / name / "1.0.0")
  shutil.rmtree(folder / "parts")


def _episodes() -> Iterator[writer.Episode]:
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (64, 32, 32, 3), np.uint8)
  pictures = [writer.jpeg(np.asarray(Image.fromarray(one).resize((_PIXELS, _PIXELS)))) for one in coarse]
  for number in range(_DISTINCT):
    views = [
      writer.Encoded([pictures[i] for i in rng.integers(0, len(pictures), _LENGTH)], _PIXELS, _PIXELS) for _ in range(2)
    ]
    state = rng.normal(size=(_LENGTH, 8)).astype(np.float32)
    action = rng.uniform(-1, 1, (_LENGTH, 7)).astype(np.float32)
    action[:, 6] = np.where(np.arange(_LENGTH) < _LENGTH // 2, -1, 1)
    yield writer.Episode(*views, state, action, f"pick up the {('red', 'blue')[number % 2]} cube")
