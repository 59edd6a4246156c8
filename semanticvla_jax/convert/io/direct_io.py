"""Large files read or written once: what was read, or is on the disk, leaves the page cache.

A conversion moves more bytes than a machine has memory. Left to itself, the kernel keeps them all until there is no
free page, and then every new page, of a file or of an array, waits until old ones are found and dropped.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

_STEP = 1 << 24  # bytes read at once
_BLOCK = 1 << 23  # bytes of a buffer that is used again
_BEHIND = 8 * _STEP  # bytes that may be on their way to the disk
_DISK_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # others: a file system or sandbox without this call
_START, _FINISH = 2, 7  # flags of sync_file_range: begin to write; write and wait


def read(path: Path, offset: int, nbytes: int) -> np.ndarray:
  """`nbytes` of a file from `offset` on; fewer where it ends before."""
  out, at = np.empty(nbytes, np.uint8), 0
  with path.open("rb", buffering=0) as file:
    file.seek(offset)
    while n := file.readinto(out[at : at + _STEP]):
      _forget(file, offset + at, n)
      at += n
  return out[:at]


def blocks(path: Path) -> Iterator[memoryview]:
  """All bytes of a file, block by block; each lasts until the next is asked for."""
  buffer, at = memoryview(bytearray(_BLOCK)), 0
  with path.open("rb", buffering=0) as file:
    while n := file.readinto(buffer):
      yield buffer[:n]
      _forget(file, at, n)
      at += n


class Writer:
  """Writes a new file from its beginning; the disk is busy from the first bytes on, and waited for 128 MiB behind.

  Args:
    file: open for writing, empty.
  """

  def __init__(self, file: BinaryIO):
    self._file, self._started, self._gone = file, 0, 0

  def write(self, data: np.ndarray | bytes) -> None:
    """Appends bytes, or an array of uint8."""
    for i in range(0, len(data), _STEP):
      self._file.write(data[i : i + _STEP])
      if _sync_file_range is not None and self._file.tell() - self._started >= _STEP:
        self._push()

  def _push(self) -> None:
    self._file.flush()
    begin, self._started = self._started, self._file.tell()
    _sync(self._file, begin, self._started - begin, _START)
    behind = self._started - _BEHIND - self._gone
    if behind > 0:
      _sync(self._file, self._gone, behind, _FINISH)
      _forget(self._file, self._gone, behind)
      self._gone += behind


def _linux_call() -> Callable[[int, int, int, int], int] | None:
  call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
  if call is not None:
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
  return call


_sync_file_range = _linux_call()  # None elsewhere: the kernel writes when it likes


def _sync(file: BinaryIO, offset: int, nbytes: int, flags: int) -> None:
  """Raises OSError where the disk is full or broken, which nobody would hear of again."""
  if _sync_file_range(file.fileno(), offset, nbytes, flags) and (code := ctypes.get_errno()) in _DISK_ERRORS:
    raise OSError(code, os.strerror(code))


def _forget(file: BinaryIO, offset: int, nbytes: int) -> None:
  if hasattr(os, "posix_fadvise"):  # not on macOS
    os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)
