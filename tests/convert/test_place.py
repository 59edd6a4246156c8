"""One run at a time writes a target, on a disk with room for it; what a killed run left is said to be removed."""

import os
import subprocess
import sys

import checkpoints
import pytest

from semanticvla_jax.convert import place
from semanticvla_jax.convert.to_orbax import to_orbax, whole

HELD = """
import sys, pathlib
from semanticvla_jax.convert import place
with place.alone(pathlib.Path(sys.argv[1]), print):
  print("held", flush=True)
  sys.stdin.read()
"""


def test_two_runs_do_not_write_one_target(tmp_path):
  target = tmp_path / "deep" / "policy"
  command = [sys.executable, "-c", HELD, str(target)]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
    assert other.stdout.readline() == "held\n"
    left = target.parent / ".policy.partial"
    left.mkdir()
    with pytest.raises(ValueError, match=f"got process {other.pid} at work"), whole(target, 0, print):
      pass
    assert left.exists()  # the other's
    other.kill()
  said = []
  with whole(target, 0, said.append) as partial:
    (partial / "x").write_text("")
  assert [line for line in said if "left by a run that did not finish; starting again" in line]
  assert [p.name for p in target.parent.iterdir()] == ["policy"]


def test_a_lock_that_was_removed_is_no_lock(tmp_path, monkeypatch):
  path, flock, removed = tmp_path / ".policy.lock", place.fcntl.flock, []

  def remove_once(descriptor, how):
    if not removed:
      removed.append(path.unlink())
    flock(descriptor, how)

  monkeypatch.setattr(place.fcntl, "flock", remove_once)
  with place.alone(tmp_path / "policy", print):
    assert path.read_text() == str(os.getpid())
  assert removed and not path.exists()


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch):
  def none(descriptor, how):
    raise OSError(45, "Operation not supported")

  monkeypatch.setattr(place.fcntl, "flock", none)
  said = []
  with place.alone(tmp_path / "policy", said.append):
    pass
  assert "has no locks" in said[0]


def test_a_disk_without_room_is_refused_before_anything_is_written(made, tmp_path, monkeypatch):
  monkeypatch.setattr(place.shutil, "disk_usage", lambda path: shutil_usage(free=1000))
  with pytest.raises(ValueError, match="Disk too small: got 1,000 bytes free"):
    to_orbax([made("openvla")[0]], tmp_path / "policy", checkpoints.config("openvla"))
  assert not list(tmp_path.iterdir())


def shutil_usage(free):
  return type("Usage", (), {"free": free})
