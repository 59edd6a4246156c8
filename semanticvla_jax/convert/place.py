"""The place that a conversion writes to: for one run alone, and with room enough."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_SPARE = 16 * 1024 * 1024  # bytes, for indices and the small files
_MOST_WAITS = 100  # for a lock file that another run is just removing


@contextlib.contextmanager
def alone(target: Path, say: Callable[[str], None]) -> Iterator[None]:
  """Keeps other runs from writing `target` while the block runs, by a lock on `.<name>.lock` beside it.

  The lock goes with the process: what a killed run leaves is an empty promise, and taken over.

  Raises:
    ValueError: another run holds it; names its process.
    OSError: the file cannot be made.
  """
  path = target.parent / f".{target.name}.lock"
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
      raise ValueError(
        f"Target is being written: got process {owner} at work on {target}; expected one run at a time; wait for it, "
        "or choose another --target."
      ) from error
    except OSError as error:
      say(f"{path.parent} has no locks ({error}): no other run may write {target.name} at the same time")
      return descriptor
    if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
      return descriptor
    os.close(descriptor)  # it was removed by the run that held it
  raise ValueError(f"Target is being written: got no lock on {path}; expected one run at a time; try again.")


def check_room(target: Path, nbytes: int) -> None:
  """Raises ValueError where the disk of `target` has no room for `nbytes` of weights."""
  there = next(folder for folder in target.parents if folder.exists())
  free = shutil.disk_usage(there).free
  if free < nbytes + _SPARE:
    raise ValueError(
      f"Disk too small: got {free:,} bytes free in {there}; expected {nbytes + _SPARE:,}; make room or choose another "
      "--target. Nothing was written."
    )
