"""The folder that a conversion writes: whole or not at all, and what is reported of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from semanticvla_jax import files
from semanticvla_jax.convert.io import direct_io, swap
from semanticvla_jax.errors import refuse


def check_target(target: Path) -> None:
  """Raises ValueError where the target exists, or where this cannot be seen."""
  try:
    exists = target.exists()
  except OSError as error:
    raise _cannot_write(target, error) from error
  if exists:
    raise refuse("Target exists", f"{target}", "a new folder", "remove it or choose another name")


@contextlib.contextmanager
def whole(target: Path, nbytes: int, say: Callable[[str], None], replace: bool = False) -> Iterator[Path]:
  """Yields an empty folder `.<name>.partial` that is renamed to `target` if the block succeeds, and removed if not.

  It is flushed to the disk before the renaming, so that a power cut leaves a complete target or none. The leftovers of
  a killed run are removed first.

  Args:
    target: the folder to make.
    nbytes: what will be written, to check the room on the disk.
    say: is called with lines for the user.
    replace: whether `target` exists and is replaced.

  Raises:
    ValueError: another run is writing there, the folder cannot be made, or the disk is full.
  """
  with contextlib.ExitStack() as stack:
    try:
      files.check_room(target, nbytes)
      stack.enter_context(files.alone(target, say))
      partial = _empty(target, say)
    except OSError as error:
      raise _cannot_write(target, error) from error
    yield from _renamed(partial, target, replace)


def _empty(target: Path, say: Callable[[str], None]) -> Path:
  partial = target.parent / f".{target.name}.partial"
  if partial.exists():
    say(f"removing {partial}, left by a run that did not finish; starting again")
    shutil.rmtree(partial)
  partial.mkdir()
  return partial


def _renamed(partial: Path, target: Path, replace: bool) -> Iterator[Path]:
  try:
    yield partial
    _put_on_disk(partial)
    if replace:
      swap.exchange(partial, target)
    else:
      check_target(target)
      partial.rename(target)
    files.fsync(target.parent)
  except Exception as error:
    if getattr(error, "errno", None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
      raise
    wrote = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    raise refuse(
      "Disk full",
      f"no more room in {target.parent} after {wrote:,} bytes",
      "room for the whole checkpoint",
      "make room or choose another --target. Nothing is left there",
    ) from error
  finally:
    if partial.exists():
      shutil.rmtree(partial)


def _put_on_disk(folder: Path) -> None:
  """Waits until all files below a folder, and their names, are on the disk."""
  for top, _, names in os.walk(folder, topdown=False):
    for path in (*(Path(top, name) for name in names), Path(top)):
      files.fsync(path)


def _cannot_write(target: Path, error: OSError) -> ValueError:
  return refuse(
    "Target cannot be written",
    f"{error}",
    f"a folder that may be made in {target.parent}",
    "choose another",
  )


def sha256(path: Path) -> str:
  """Of a file, in hex."""
  digest = hashlib.sha256()
  for block in direct_io.blocks(path):
    digest.update(block)
  return digest.hexdigest()


def peak_rss() -> int:
  """Largest resident memory of this process so far, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024
