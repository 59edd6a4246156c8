"""The tf.data side of the loader: which JPEGs TensorFlow decodes, order, errors, and how it ends."""

import dataclasses
import io
import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from toy_rlds import batches

from semanticvla_jax.data import images, loader, pipeline


def encoded(size=(32, 24), mode="RGB", kind="JPEG", **options) -> bytes:
  picture = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(picture).convert(mode).save(buffer, kind, **options)
  return buffer.getvalue()


@pytest.mark.parametrize("size", [(32, 24), (17, 31), (1, 1)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
def test_tensorflow_decodes_color_jpegs_to_the_same_pixels(size, subsampling, progressive):
  import tensorflow as tf

  one = encoded(size, subsampling=subsampling, progressive=progressive, quality=91)
  assert pipeline._is_color_jpeg(one) and pipeline._decodes_alike("accurate")
  found = tf.io.decode_jpeg(one, channels=3, dct_method="INTEGER_ACCURATE").numpy()
  np.testing.assert_array_equal(found, images.decode(one))


def test_other_images_are_left_to_pillow():
  for one in (encoded(mode="L"), encoded(mode="CMYK"), encoded(kind="PNG"), b"", b"\xff\xd8\xff", encoded()[:20]):
    assert not pipeline._is_color_jpeg(one)


def stream(stages, start, rows, workers, **how):
  made = pipeline.dataset(stages, start, rows, pipeline.Readers(workers), **how)
  return pipeline.stream([made.as_numpy_iterator()], stages, start, rows)


def stages(pictures, views=1, check=lambda examples: None, **fields) -> pipeline.Stages:
  return pipeline.Stages(
    draw=lambda step: np.arange(4 * step, 4 * step + 4)[:, None] * [1, 1, 1],
    read=lambda examples: [pictures[int(n) % len(pictures)] for n in examples[:, 0] for _ in range(views)],
    finish=lambda examples, decoded: np.stack(decoded).reshape(len(examples), views, 24, 24, 3),
    check=check,
    views=views,
    size=24,
    dct="accurate",
  )._replace(**fields)


def test_jpegs_and_pngs_come_in_order_from_any_step():
  pictures = [encoded((24, 24), quality=70 + i) for i in range(3)] + [encoded((24, 24), kind="PNG")]
  want = np.stack([images.decode(one) for one in pictures])[:, None]
  for group, workers, prefetch in ((1, 1, 0), (2, 3, 2), (3, 2, 1), (99, 8, 4)):
    made = stream(stages(pictures), 5, 4, group=group, workers=workers, prefetch=prefetch)
    for step, (examples, found) in zip(range(5, 9), made):  # the iterator is endless
      assert examples[:, 2].tolist() == [*range(4 * step, 4 * step + 4)]
      np.testing.assert_array_equal(found, want[examples[:, 0] % 4])
    made.close()


def test_numpy_runs_in_no_more_threads_than_there_are_cores():
  busy, most, lock = 0, 0, threading.Lock()

  def finish(examples, decoded):
    nonlocal busy, most
    with lock:
      busy, most = busy + 1, max(most, busy + 1)
    time.sleep(0.01)
    with lock:
      busy -= 1
    return np.stack(decoded)[:, None]

  made = stream(stages([encoded((24, 24))], finish=finish), 0, 4, group=1, workers=8, prefetch=2)
  assert len(list(itertools.islice(made, 8))) == 8 and most <= pipeline.cores()
  made.close()


def test_more_examples_are_read_at_a_time_than_there_are_cores():
  many = 4 * pipeline.cores()
  all_read = threading.Barrier(many, timeout=60)

  def draw(step):
    return np.zeros((many, 3), np.int64)

  def read(examples):
    all_read.wait()
    return [encoded((24, 24))] * len(examples)

  made = stream(stages([], draw=draw, read=read), 0, many, many, group=1, prefetch=0)
  assert len(next(made)[0]) == many
  made.close()


def test_what_fails_once_is_said_with_the_batch():
  def finish(examples, decoded):
    if examples[0, 0] >= 8:
      raise OSError("the disk is gone")
    return np.stack(decoded)[:, None]

  made = stream(stages([encoded((24, 24))], finish=finish), 0, 4, group=4, workers=2, prefetch=1)
  assert len(list(itertools.islice(made, 2))) == 2
  with pytest.raises(ValueError, match=r"^Batch 2: got .*the disk is gone.*; expected images that can be read"):
    next(made)


def test_a_missing_shard_is_named_as_the_system_names_it(dataset, tokenizers):
  gone = dataclasses.replace(dataset, index=dataset.index._replace(files=("/nowhere/shard",) * 3))
  with pytest.raises(FileNotFoundError, match="/nowhere/shard"):
    batches([(gone, 1.0)], tokenizers)


def test_threads_end_with_the_iterator(dataset, tokenizers):
  made = loader.BatchLoader([(dataset, 1.0)], tokenizers, loader.BatchOptions(4, 8, 32, augmentation=images.RELEASE))
  warm = made.batches(workers=2)
  next(warm)
  warm.close()

  def threads() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
      return next(int(line.split()[1]) for line in file if line.startswith("Threads:"))

  before = threads()
  for _ in range(5):
    stream = made.batches(workers=3)
    next(stream)
    del stream
  deadline = time.monotonic() + 20
  while threads() > before and time.monotonic() < deadline:
    time.sleep(0.05)
  assert threads() <= before


ENDS = """
import itertools
import numpy as np
from semanticvla_jax.data import pipeline
stages = pipeline.Stages(
  lambda step: np.zeros((2, 3), np.int64), lambda examples: [b"x"],
  lambda examples, decoded: np.stack(decoded)[:, None], lambda examples: None, 1, 8, "accurate")
pipeline.images.decode = lambda encoded, dct: np.zeros((8, 8, 3), np.uint8)
dataset = pipeline.dataset(stages, 0, 2, pipeline.Readers(2), group=1, prefetch=2)
made = pipeline.stream([dataset.as_numpy_iterator()], stages, 0, 2)
print(len(list(itertools.islice(made, 3))), flush=True)
raise SystemExit(3)
"""


def test_a_program_ends_while_the_pipeline_runs():
  run = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=600)
  assert (run.returncode, run.stdout) == (3, "3\n"), run.stderr[-2000:]
