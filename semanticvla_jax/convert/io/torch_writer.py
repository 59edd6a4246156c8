"""Writes a safetensors file whose tensors are made one after another."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from semanticvla_jax.convert.io import direct_io, prefetch, torch_files

_NAMES = {dtype: name for name, dtype in torch_files.DTYPES.items()}


class Out(NamedTuple):
  """One tensor to be written."""

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def save(path: Path, tensors: Mapping[str, Out], written: Callable[[int, str], None]) -> str:
  """Writes a safetensors file, a few tensors in memory at a time; calls `written` with the bytes and name of each.

  Returns:
    SHA-256 of the file.
  """
  header, at = {"__metadata__": {"format": "pt"}}, 0
  for name, x in tensors.items():
    header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
    at += x.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  digest = hashlib.sha256()
  with path.open("wb") as file, concurrent.futures.ThreadPoolExecutor(1) as hasher:
    writer = direct_io.Writer(file)

    def write(data: np.ndarray | bytes) -> None:
      hashed = hasher.submit(digest.update, data)
      writer.write(data)
      hashed.result()

    write(struct.pack("<Q", len(text)) + text)
    made = prefetch.in_turn(x.make for x in tensors.values())
    for (name, x), value in zip(tensors.items(), made, strict=True):
      value = np.asarray(value, order="C")
      if (value.shape, value.dtype) != (x.shape, x.dtype):
        raise ValueError(f"{name}: got {value.dtype}{list(value.shape)}, expected {x.dtype}{list(x.shape)}.")
      write(value.reshape(-1).view(np.uint8))
      written(x.nbytes, name)
  return digest.hexdigest()
