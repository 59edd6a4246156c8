"""Reads and writes past the page cache give the bytes of the file, wherever they begin and end."""

import ctypes
import errno
import hashlib
import os

import numpy as np
import pytest

from semanticvla_jax.convert.io import direct_io, torch_files
from semanticvla_jax.convert.to_orbax import sha256


@pytest.fixture(params=[True, False], ids=["fadvise", "no fadvise"])
def system(request, monkeypatch):
  """One that takes advice on its page cache, and one that does not."""
  if not request.param:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)


@pytest.fixture
def small_steps(monkeypatch):
  monkeypatch.setattr(direct_io, "_STEP", 4096)
  monkeypatch.setattr(direct_io, "_BLOCK", 5000)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 30_001])
def test_any_part_of_a_file(size, tmp_path, system, small_steps):
  path, content = tmp_path / "file", np.random.default_rng(0).bytes(size)
  path.write_bytes(content)
  for offset in (0, 1, 4095, 4096, 10_007):
    for nbytes in (0, 1, 4096, 8191, 12_289, 40_000):  # beyond the end: what there is
      assert direct_io.read(path, offset, nbytes).tobytes() == content[offset : offset + nbytes], (offset, nbytes)
  assert b"".join(map(bytes, direct_io.blocks(path))) == content
  assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_file_that_became_shorter_is_named(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(bytes(10))
  with pytest.raises(ValueError, match="became shorter: got 8 bytes"):
    torch_files._read(path, np.dtype(np.float32), (3,), 2)


@pytest.fixture(params=["sync", "no sync", "refused"])
def writing(request, monkeypatch, system, small_steps):
  """A system that writes back when told, one without the call, and one where it is refused; how often it was called."""
  calls, real = [], direct_io._sync_file_range

  def call(*args):
    calls.append(args)
    if request.param == "sync" and real is not None:
      return real(*args)
    ctypes.set_errno(errno.ENOSYS)
    return -1

  monkeypatch.setattr(direct_io, "_BEHIND", 2 * 4096)
  monkeypatch.setattr(direct_io, "_sync_file_range", None if request.param == "no sync" else call)
  return calls


@pytest.mark.parametrize("sizes", [[0], [1], [4096], [5, 4090, 1, 0, 4096], [3, 100_001, 7, 20_000]])
def test_a_file_is_what_was_written(sizes, tmp_path, writing):
  rng = np.random.default_rng(0)
  parts = [rng.integers(0, 256, n, np.uint8) for n in sizes]
  with (tmp_path / "file").open("wb") as file:
    writer = direct_io.Writer(file)
    writer.write(b"header")
    for part in parts:
      writer.write(part)
  assert (tmp_path / "file").read_bytes() == b"header" + b"".join(part.tobytes() for part in parts)
  if writing:
    ends = [offset + nbytes for _, offset, nbytes, flags in writing if flags == direct_io._FINISH]
    assert ends == sorted(ends) and all(end <= 6 + sum(sizes) - direct_io._BEHIND for end in ends)


def test_a_full_disk_is_heard_of(tmp_path, monkeypatch):
  def full(*_):
    ctypes.set_errno(errno.ENOSPC)
    return -1

  monkeypatch.setattr(direct_io, "_sync_file_range", full)
  with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
    direct_io.Writer(file).write(bytes(direct_io._STEP))
