"""The input pipeline: examples a second of `data.loader.BatchLoader`, of plain tf.data, and what a slice would need.

The dataset is written to a temporary folder: JPEGs of random pictures, two views. Needs TensorFlow. On one core alone:
`taskset -c 0 python -m semanticvla_jax.benchmark data`.
"""

from __future__ import annotations

import collections
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from semanticvla_jax.benchmark import compare, data_peer, flops, record
from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.data import images, loader, rlds, text, writer
from semanticvla_jax.errors import refuse
from semanticvla_jax.train import flops as peak

NAME = "tabletop_benchmark"
PEER, APART = "plain tf.data", "loader, as many processes"
_EPISODES, _LENGTH, _CHUNK = 16, 24, 8
_MANY = 8  # threads, more than small machines have cores
_CHIPS, _MFU = 16, 0.4


def measure(
  result: Result, image_size: int, batch: int, calls: int, rounds: int, step: str | None, size: str = "7b"
) -> None:
  """Times batches with one thread, one for each core, and eight; plain tf.data, and as many processes; all in turns.

  Args:
    image_size: pixels of a side as read; the pictures are stored an eighth larger.
    batch: examples. calls: timed batches of each of `rounds`, of which the best counts.
    step: a result of the verb train, whose need is held against the rate; None for none.
    size: of the model whose training on a v5e-16 slice sets the need.

  Raises:
    ValueError: `step` is not such a result.
  """
  needs = {} if step is None else needed(step)
  cores = record.cores()
  with tempfile.TemporaryDirectory() as folder:
    made = writer.write(folder, NAME, episodes(image_size * 8 // 7))
    dataset = rlds.load(folder, NAME, cache_dir=str(Path(folder) / "cache"))
    options = loader.BatchOptions(batch, _CHUNK, image_size, augmentation=images.RELEASE)
    batches = loader.BatchLoader([(dataset, 1.0)], text.load(prompt_length=64), options)
    sides = {
      "loader": lambda w: batches.batches(workers=w),
      PEER: lambda w: data_peer.batches(str(made), dataset.spec.views, image_size, batch, w),
      APART: lambda w: batches.batches(workers=w, processes=w),
    }
    _in_turns(result, sides, sorted({1, cores, _MANY}), batch, calls, rounds)
  rate = result.value(f"loader, {cores} threads")
  if cores > 1:
    alone = result.value("loader, 1 threads")
    result.add(f"loader, {cores} threads / 1", rate / alone, "ratio")
    result.add(f"loader, {cores} processes / 1 thread", result.value(f"{APART}, {cores} threads") / alone, "ratio")
  result.add(f"loader, {_MANY} threads / {cores}", result.value(f"loader, {_MANY} threads") / rate, "ratio")
  for row, need in needs.items():
    result.add(f"{row} step takes", need, "examples/s")
    result.add(f"loader / {row} step", rate / need, "ratio")
  decode, augment = _parts(image_size)
  cpu_rate = result.value("loader, 1 threads, a CPU second")
  result.add("decoding, of a thread's time", decode * cpu_rate, "ratio")
  result.add("augmentation, of a thread's time", augment * cpu_rate, "ratio")
  _add_slice(result, size, rate / cores)


def _add_slice(result: Result, size: str, rate: float) -> None:
  """What a v5e-16 slice would take if it computed at _MFU, and how many of these cores would feed it."""
  work = sum(flops.training("full", size).values())
  need = _CHIPS * peak.peak("TPU v5e") * _MFU / work
  result.add(f"v5e-16 at MFU {_MFU}, full@{size}, takes", need, "examples/s")
  result.add("these cores for each of its 4 hosts", need / 4 / rate, "cores")


def _in_turns(
  result: Result, sides: dict[str, Callable[[int], Iterator]], threads: list[int], batch: int, calls: int, rounds: int
) -> None:
  """Adds the best round of each side by the clock, and by CPU time, which other jobs disturb less."""
  seconds = collections.defaultdict(list)
  for workers, name in [*itertools.product(threads, sides)] * rounds:
    stream = sides[name](workers)
    next(stream)
    begin = time.perf_counter(), time.process_time()
    for _ in itertools.islice(stream, calls):
      pass
    seconds[workers, name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    del stream  # or its threads would work ahead while the other side is timed
  for (workers, name), found in seconds.items():
    wall, cpu = (min(column) for column in zip(*found, strict=True))
    result.add(f"{name}, {workers} threads", calls * batch / wall, "examples/s")
    if name != APART:  # the clock of this process does not count them
      result.add(f"{name}, {workers} threads, a CPU second", calls * batch / cpu, "examples")
  for workers, name in itertools.product(threads, ("loader", APART)):
    ours, theirs = (result.value(f"{side}, {workers} threads") for side in (name, PEER))
    result.add(f"{name} / {PEER}, {workers} threads", ours / theirs, "ratio")
  for workers in threads:
    ours, theirs = (result.value(f"{side}, {workers} threads, a CPU second") for side in ("loader", PEER))
    result.add(f"loader / {PEER}, {workers} threads, a CPU second", ours / theirs, "ratio")


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


def _parts(image_size: int, repeats: int = 10) -> tuple[float, float]:
  """CPU seconds to decode and to augment the two views of an example, one after the other."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
  pictures = coarse.repeat(image_size // 8, axis=1).repeat(image_size // 8, axis=2)
  encoded = [writer.jpeg(picture) for picture in pictures]
  uniform = np.stack([images.draws(0, 0, view) for view in range(2)])
  seconds = []
  for work in (lambda: [images.decode(x) for x in encoded], lambda: images.augment(pictures, uniform, images.RELEASE)):
    work()
    each = []
    for _ in range(repeats):
      begin = time.thread_time()
      work()
      each.append(time.thread_time() - begin)
    seconds.append(min(each))
  return seconds[0], seconds[1]
