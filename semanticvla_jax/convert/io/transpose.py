"""Transposing large arrays into C order without leaving the processor's cache."""

from __future__ import annotations

import math

import numpy as np

_ROWS = 256  # of the source, transposed together


def contiguous(x: np.ndarray) -> np.ndarray:
  """`x` in C order, copied only where needed; bit for bit in any dtype.

  A transposed matrix is copied through a buffer of a few source rows, each a little longer than in the source: rows
  that lie a power of two apart would push one another out of the cache (eight times slower at 4096 columns).
  """
  if x.flags.c_contiguous:
    return x
  if x.dtype.kind == "V":  # numpy moves integers several times faster than bfloat16
    return contiguous(x.view(f"u{x.dtype.itemsize}")).view(x.dtype)
  order = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
  first = order[0]
  if order != [*range(first, x.ndim), *range(first)]:
    return np.ascontiguousarray(x)
  source = x.transpose(order).reshape(math.prod(x.shape[first:]), -1)
  out = np.empty(source.shape[::-1], x.dtype)
  buffer = np.empty((min(_ROWS, len(source)), source.shape[1] + 64 // x.itemsize), x.dtype)[:, : source.shape[1]]
  for i in range(0, len(source), _ROWS):
    rows = buffer[: len(source) - i]
    rows[...] = source[i : i + _ROWS]
    out[:, i : i + _ROWS] = rows.T
  return out.reshape(x.shape)
