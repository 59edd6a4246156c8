"""Small RLDS datasets of random pictures and numbers, and batches of them."""

import itertools

import jax
import numpy as np
from PIL import Image

from semanticvla_jax.data import loader, writer

LENGTHS = (12, 9, 5, 15, 10)  # the third is shorter than a chunk of 8
NAME = "tabletop_toy"


def episode(number: int, length: int, size: int = 32) -> writer.Episode:
  rng = np.random.default_rng(number)
  coarse = rng.integers(0, 256, (length, 2, 4, 4, 3), dtype=np.uint8)
  pictures = np.stack([[np.asarray(Image.fromarray(x).resize((size, size))) for x in pair] for pair in coarse])
  state = rng.normal(size=(length, 8)).astype(np.float32)
  action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
  action[:, 6] = np.where(np.arange(length) < length // 2, -1, 1)
  instruction = f"pick up the {('red', 'blue')[number % 2]} cube"
  return writer.Episode(pictures[:, 0], pictures[:, 1], state, action, instruction, file_path=f"episode {number}")


def episodes(offset: int = 0) -> list[writer.Episode]:
  return [episode(offset + number, length) for number, length in enumerate(LENGTHS)]


# Of BatchLoader.batches.
DEFAULTS = {"start_step": 0, "rows": None, "workers": None, "prefetch": 2, "processes": 0, "servers": ()}


def batches(mixture, tokenizers, count=1, **options):
  settings = {"batch_size": 8, "chunk": 8, "image_size": 32, "workers": 2} | options
  how = [settings.pop(name, default) for name, default in DEFAULTS.items()]
  made = loader.BatchLoader(mixture, tokenizers, loader.BatchOptions(**settings))
  return list(itertools.islice(made.batches(*how), count))


def assert_equal(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)
