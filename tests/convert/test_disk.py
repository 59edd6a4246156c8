"""A full disk and paths without permission are said in one line, and nothing is left behind."""

import contextlib
import errno
import os

import checkpoints
import disks
import pytest

from semanticvla_jax import files
from semanticvla_jax.convert import to_torch
from semanticvla_jax.convert.detect import recognize
from semanticvla_jax.convert.to_orbax import to_orbax


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
  """A folder that takes 400 kB, which nobody sees beforehand."""
  monkeypatch.setattr(files, "check_room", lambda target, nbytes: None)
  with disks.small(tmp_path / "small", "400k") as folder:
    yield folder


def test_to_orbax_onto_a_full_disk(small_disk, made):
  with pytest.raises(ValueError, match="Disk full: got no more room"):
    to_orbax([made("openvla")[0]], small_disk / "policy", checkpoints.config("openvla"))
  assert not list(small_disk.iterdir())


def test_to_torch_onto_a_full_disk(small_disk, made):
  with pytest.raises(ValueError, match="Disk full: got no more room"):
    to_torch.to_torch(made("openvla")[1], small_disk / "back")
  assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_where_none_can_be_mounted(made, tmp_path, monkeypatch):
  def full(path, tensors, written):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(to_torch, "save", full)
  with pytest.raises(ValueError, match="Disk full.*after 4 bytes"):
    to_torch.to_torch(made("openvla")[1], tmp_path / "back")
  assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def nobody():
  """Root may do everything: be another user for a while."""
  if os.geteuid() != 0:
    yield
    return
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


def test_a_source_without_permission(tmp_path):
  folder = checkpoints.openvla(tmp_path / "source")
  folder.chmod(0)
  try:
    with nobody(), pytest.raises(ValueError, match="Source cannot be read.*Permission denied"):
      recognize([folder])
  finally:
    folder.chmod(0o700)


def test_a_target_without_permission(made, tmp_path):
  folder, _ = made("openvla")
  closed = tmp_path / "closed"
  closed.mkdir(mode=0o500)
  config = checkpoints.config("openvla")
  with nobody(), pytest.raises(ValueError, match=r"(Target|Source) cannot be.*Permission denied"):
    to_orbax([folder], closed / "policy", config)
  assert not list(closed.iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_written(made, tmp_path, monkeypatch):
  monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil_usage(free=1000))
  with pytest.raises(ValueError, match="Disk too small: got 1,000 bytes free"):
    to_orbax([made("openvla")[0]], tmp_path / "policy", checkpoints.config("openvla"))
  assert not list(tmp_path.iterdir())


def shutil_usage(free):
  return type("Usage", (), {"free": free})
