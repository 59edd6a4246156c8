"""Two folders change their names, in one step where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # a file system or sandbox without this call


def _system_call() -> Callable[..., int] | None:
  """renameat2, or None where the system has none."""
  try:
    function = ctypes.CDLL(None, use_errno=True).renameat2
  except (AttributeError, OSError):
    return None
  function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
  return function


_renameat2 = _system_call()


def exchange(new: Path, old: Path) -> None:
  """Gives each of two folders the other's name.

  Where this takes three renames, a run that is killed between two of them leaves `old` as `aside(old)`.

  Raises:
    OSError: they cannot be renamed.
  """
  if _renameat2 is not None:
    if _renameat2(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE) == 0:
      return
    if (code := ctypes.get_errno()) not in _CANNOT:
      raise OSError(code, os.strerror(code), str(old))
  old.rename(aside(old))
  new.rename(old)
  aside(old).rename(new)


def aside(folder: Path) -> Path:
  """Where a folder is while another takes its name."""
  return folder.with_name(f".{folder.name}.replaced")
