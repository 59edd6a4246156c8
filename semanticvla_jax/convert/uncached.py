"""Large files read once: what was read leaves the page cache.

A conversion moves more bytes than a machine has memory. Left to itself, the kernel keeps them all until there is no
free page, and then every new page, of a file or of an array, waits until old ones are found and dropped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

_STEP = 1 << 24  # bytes read at once
_BLOCK = 1 << 23  # bytes of a buffer that is used again


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


def _forget(file: BinaryIO, offset: int, nbytes: int) -> None:
  if hasattr(os, "posix_fadvise"):  # not on macOS
    os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)
