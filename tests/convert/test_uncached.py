"""Reads past the page cache give the bytes of the file, wherever they begin and end."""

import hashlib
import os

import numpy as np
import pytest

from semanticvla_jax.convert import files, uncached
from semanticvla_jax.convert.to_orbax import sha256


@pytest.fixture(params=[True, False], ids=["fadvise", "no fadvise"])
def system(request, monkeypatch):
  """One that takes advice on its page cache, and one that does not."""
  if not request.param:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)


@pytest.fixture
def small_steps(monkeypatch):
  monkeypatch.setattr(uncached, "_STEP", 4096)
  monkeypatch.setattr(uncached, "_BLOCK", 5000)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 30_001])
def test_any_part_of_a_file(size, tmp_path, system, small_steps):
  path, content = tmp_path / "file", np.random.default_rng(0).bytes(size)
  path.write_bytes(content)
  for offset in (0, 1, 4095, 4096, 10_007):
    for nbytes in (0, 1, 4096, 8191, 12_289, 40_000):  # beyond the end: what there is
      assert uncached.read(path, offset, nbytes).tobytes() == content[offset : offset + nbytes], (offset, nbytes)
  assert b"".join(map(bytes, uncached.blocks(path))) == content
  assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_file_that_became_shorter_is_named(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(bytes(10))
  with pytest.raises(ValueError, match="became shorter: got 8 bytes"):
    files._reader(path, np.dtype(np.float32), (3,), 2)()
