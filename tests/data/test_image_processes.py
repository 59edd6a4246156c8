"""Images made in other processes are those made here; what happens when one ends."""

import contextlib
import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from toy_rlds import batches

from semanticvla_jax.data import images
from semanticvla_jax.data.example_images import ExampleImages
from semanticvla_jax.data.image_processes import ImageProcesses


def encoded(kind: str) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 24, 3), np.uint8)).save(buffer, kind)
  return buffer.getvalue()


EXAMPLES = np.array([[0, 0, 7], [0, 1, 8]])


def test_batches_are_the_same(dataset, tokenizers):
  options = dict(count=3, start_step=2, augmentation=images.RELEASE)
  here = batches([(dataset, 1.0)], tokenizers, **options)
  for found, want in zip(batches([(dataset, 1.0)], tokenizers, processes=2, **options), here, strict=True):
    np.testing.assert_array_equal(found.observation.images, want.observation.images)
    np.testing.assert_array_equal(found.actions, want.actions)


def test_each_caller_gets_its_own_images():
  how = ExampleImages(24, seed=0, augmentation=images.RELEASE)
  sent, processes = [encoded("JPEG"), encoded("PNG")], ImageProcesses(how, 1)
  drawn = [np.array([[0, 0, n]]) for n in range(32)]
  with contextlib.closing(processes), ThreadPoolExecutor(processes.at_once + 1) as callers:
    found = callers.map(lambda one: processes(one, sent), drawn)
    for one, pictures in zip(drawn, found, strict=True):
      np.testing.assert_array_equal(pictures, how.make(one, sent))


def test_a_process_says_what_is_wrong_ignores_signals_and_its_end_is_an_error():
  how = ExampleImages(24, seed=0, augmentation=images.RELEASE)
  processes = ImageProcesses(how, 1)
  sent = [encoded("JPEG"), encoded("PNG"), b"", encoded("BMP")]
  np.testing.assert_array_equal(processes(EXAMPLES, sent), how.make(EXAMPLES, sent))
  with pytest.raises(ValueError, match="cannot be decoded|not be decoded|Undecodable|decode"):
    processes(EXAMPLES, [b"none", *sent[1:]])
  pid = processes._workers[0].process.pid
  os.kill(pid, signal.SIGTERM)
  np.testing.assert_array_equal(processes(EXAMPLES, sent), how.make(EXAMPLES, sent))
  os.kill(pid, signal.SIGKILL)
  with pytest.raises(ValueError, match=r"got its end with status -9; expected images; .*config.data.processes"):
    processes(EXAMPLES, sent)
  processes.close()


def test_they_end_with_the_batches(dataset, tokenizers, monkeypatch):
  made = []
  start = ImageProcesses.__init__
  monkeypatch.setattr(ImageProcesses, "__init__", lambda self, *args: (start(self, *args), made.append(self))[0])
  batches([(dataset, 1.0)], tokenizers, processes=2)
  assert len(made) == 1 and [one.process.poll() for one in made[0]._workers] == [0, 0]
