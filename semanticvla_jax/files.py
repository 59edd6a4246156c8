"""Files and folders that commands write: whole or not at all, by one run at a time, on a disk with room for them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from semanticvla_jax.errors import refuse

_SPARE = 16 * 1024 * 1024  # bytes, for indices and the small files
_MOST_WAITS = 100  # for a lock file that another run is just removing


def write(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file under another name, waits until it is on the disk, and renames it: it is never seen half written.

  Text is stored as UTF-8. An object of a bucket (gs://…) appears as a whole by itself.

  Raises:
    OSError: it cannot be written, or the disk is full; what stood at `path` before is still there.
  """
  content = content.encode() if isinstance(content, str) else content
  if "://" in os.fspath(path):
    from etils import epath

    epath.Path(path).write_bytes(content)
    return
  path = Path(path)
  partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.partial")
  try:
    with partial.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise
  fsync(path.parent)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON value as `write` does, indented, with a line end."""
  write(path, json.dumps(value, indent=2) + "\n")


def fsync(path: Path) -> None:
  """Waits until a file, or the names in a folder, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def alone(
  target: str | os.PathLike, say: Callable[[str], None] = logging.warning, *, inside: bool = False
) -> Iterator[None]:
  """Keeps other runs from writing `target` while the block runs, by a lock file.

  The lock goes with its process: a lock file that a killed run left is taken over. A bucket (gs://…) has no locks.

  Args:
    target: file or folder that is written.
    say: is called with a message where the file system has no locks; the block then runs without one.
    inside: whether the lock is `<target>/.lock`, in a folder that exists, or `.<name>.lock` next to it.

  Raises:
    ValueError: another run holds it; names its process.
    OSError: the lock file cannot be made.
  """
  if "://" in os.fspath(target):
    yield
    return
  target = Path(target)
  path = target / ".lock" if inside else target.parent / f".{target.name}.lock"
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor = _locked(path, target, say)
  try:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    yield
  finally:
    path.unlink(missing_ok=True)
    os.close(descriptor)


def _locked(path: Path, target: Path, say: Callable[[str], None]) -> int:
  """Descriptor of the lock file, locked; where the file system knows no locks, as it is, which is said."""
  for _ in range(_MOST_WAITS):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      owner = os.read(descriptor, 20).decode() or "unknown"
      os.close(descriptor)
      raise refuse(
        f"{target} is being written",
        f"process {owner} at work on it",
        "one run at a time",
        "wait for that run, or choose another folder",
      ) from error
    except OSError as error:
      say(f"{path.parent} has no locks ({error}): no other run may write {target.name} at the same time")
      return descriptor
    if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
      return descriptor
    os.close(descriptor)  # it was removed by the run that held it
  raise refuse(f"{target} is being written", f"no lock on {path}", "one run at a time", "try again")


def check_room(target: Path, nbytes: int) -> None:
  """Raises ValueError where the disk of `target` has no room for `nbytes` of weights."""
  there = next(folder for folder in target.parents if folder.exists())
  free = shutil.disk_usage(there).free
  if free < nbytes + _SPARE:
    raise refuse(
      "Disk too small",
      f"{free:,} bytes free in {there}",
      f"{nbytes + _SPARE:,}",
      "make room or choose another --target. Nothing was written",
    )
