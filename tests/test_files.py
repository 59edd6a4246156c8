"""One run at a time writes a target, on a disk with room for it; what a killed run left is said to be removed."""

import os
import subprocess
import sys

import pytest

from semanticvla_jax import files
from semanticvla_jax.convert.io.target import whole

HELD = """
import sys, pathlib
from semanticvla_jax import files
with files.alone(pathlib.Path(sys.argv[1]), print):
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
  path, flock, removed = tmp_path / ".policy.lock", files.fcntl.flock, []

  def remove_once(descriptor, how):
    if not removed:
      removed.append(path.unlink())
    flock(descriptor, how)

  monkeypatch.setattr(files.fcntl, "flock", remove_once)
  with files.alone(tmp_path / "policy", print):
    assert path.read_text() == str(os.getpid())
  assert removed and not path.exists()


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch):
  def none(descriptor, how):
    raise OSError(45, "Operation not supported")

  monkeypatch.setattr(files.fcntl, "flock", none)
  said = []
  with files.alone(tmp_path / "policy", said.append):
    pass
  assert "has no locks" in said[0]


def test_a_file_is_written_whole_or_what_was_there_stays(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  files.write_json(path, {"“": 1})
  assert path.read_bytes() == b'{\n  "\\u201c": 1\n}\n'
  files.write(path, "grün")
  assert path.read_text(encoding="utf-8") == "grün"

  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files.os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    files.write(path, b"something longer")
  assert path.read_text(encoding="utf-8") == "grün" and [*tmp_path.iterdir()] == [path]


def test_a_folder_can_be_locked_from_inside(tmp_path):
  lock = files.alone(tmp_path, inside=True)
  with lock, pytest.raises(ValueError, match=f"got process {os.getpid()} at work"), files.alone(tmp_path, inside=True):
    pass
  assert not [*tmp_path.iterdir()]
