"""The input pipeline: examples a second of `data.loader.BatchLoader` on a small RLDS dataset, and where its time goes.

The dataset is written to a temporary folder: JPEGs of random pictures, two views. Needs TensorFlow.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from semanticvla_jax.benchmark import compare, record
from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.data import images, loader, rlds, text, writer
from semanticvla_jax.errors import refuse

NAME = "tabletop_benchmark"
_EPISODES, _LENGTH, _CHUNK = 16, 24, 8


def measure(result: Result, image_size: int, batch: int, calls: int, step: str | None) -> None:
  """Times batches with all threads and with one, and decoding and augmentation alone.

  Args:
    image_size: pixels of a side, as stored and as read. batch: examples. calls: timed batches.
    step: a result of the verb train, whose need is held against the rate; None for none.

  Raises:
    ValueError: `step` is not such a result.
  """
  needs = {} if step is None else needed(step)
  with tempfile.TemporaryDirectory() as folder:
    writer.write(folder, NAME, episodes(image_size))
    dataset = rlds.load(folder, NAME, cache_dir=str(Path(folder) / "cache"))
    options = loader.BatchOptions(batch, _CHUNK, image_size, augmentation=images.RELEASE)
    tokenizers = text.load(prompt_length=64)
    batches = loader.BatchLoader([(dataset, 1.0)], tokenizers, options)
    cores = record.cores()
    for workers in dict.fromkeys((1, cores)):
      rate = _rate(batches, batch, calls, workers)
      result.add(f"loader, {workers} threads", rate, "examples/s")
  for row, need in needs.items():
    result.add(f"{row} step takes", need, "examples/s")
    result.add(f"loader / {row} step", rate / need, "ratio")
  decode, augment = _parts(image_size)
  result.add("decoding, of a thread's time", decode * rate / cores, "ratio")
  result.add("augmentation, of a thread's time", augment * rate / cores, "ratio")


def needed(path: str) -> dict[str, float]:
  """{row: examples/s} of a result of the verb train. Raises ValueError for another file."""
  found = compare.load(path)
  if found["verb"] != "train":
    raise refuse("--step", f"a result of {found['verb']}", "one of train", "name another file")
  rates = {name: figure["value"] for name, figure in found["figures"].items() if figure["unit"] == "examples/s"}
  return {name.removesuffix(" examples"): value for name, value in rates.items()}


def episodes(image_size: int) -> Iterator[writer.Episode]:
  """Episodes of smooth random pictures and made-up numbers, as the tabletop's are."""
  for number in range(_EPISODES):
    rng = np.random.default_rng(number)
    side = max(image_size // 8, 1)
    coarse = rng.integers(0, 256, (_LENGTH, 2, 8, 8, 3), dtype=np.uint8)
    pictures = coarse.repeat(side, axis=2).repeat(side, axis=3)
    state = rng.normal(size=(_LENGTH, 8)).astype(np.float32)
    action = rng.uniform(-1, 1, (_LENGTH, 7)).astype(np.float32)
    action[:, 6] = np.where(np.arange(_LENGTH) < _LENGTH // 2, -1, 1)
    yield writer.Episode(pictures[:, 0], pictures[:, 1], state, action, "pick up the red cube", file_path=str(number))


def _rate(batches: loader.BatchLoader, batch: int, calls: int, workers: int) -> float:
  stream = batches.batches(workers=workers)
  next(stream)
  begin = time.perf_counter()
  for _ in itertools.islice(stream, calls):
    pass
  return calls * batch / (time.perf_counter() - begin)


def _parts(image_size: int, repeats: int = 10) -> tuple[float, float]:
  """Seconds to decode and to augment the two views of an example, one after the other, on one thread."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
  pictures = coarse.repeat(image_size // 8, axis=1).repeat(image_size // 8, axis=2)
  encoded = [writer.jpeg(picture) for picture in pictures]
  uniform = np.stack([images.draws(0, 0, view) for view in range(2)])
  seconds = []
  for work in (lambda: [images.decode(x) for x in encoded], lambda: images.augment(pictures, uniform, images.RELEASE)):
    work()
    begin = time.perf_counter()
    for _ in range(repeats):
      work()
    seconds.append((time.perf_counter() - begin) / repeats)
  return seconds[0], seconds[1]
