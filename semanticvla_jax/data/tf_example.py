"""The wire format of a serialized tf.train.Example, walked without copying what is large."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def values(record: bytes, keys: set[str]) -> dict[str, np.ndarray]:
  """Reads features of a serialized tf.train.Example without copying what is large.

  Returns:
    Per key: byte strings as ranges i64[n 2] (start, stop) inside the record, floats as f32[n]. Other keys, and integer
    features, are left out.

  Raises:
    IndexError: the bytes are not a tf.train.Example.
  """
  found = {}
  for _, start, stop in _fields(record, 0, len(record)):  # Example.features
    for _, entry, end in _fields(record, start, stop):  # Features.feature, a map of key (1) to Feature (2)
      parts = {number: (first, last) for number, first, last in _fields(record, entry, end)}
      key = record[slice(*parts.get(1, (0, 0)))].decode()
      if key not in keys:
        continue
      for kind, first, last in _fields(record, *parts.get(2, (0, 0))):
        if kind == 1:
          ranges = [part[1:] for part in _fields(record, first, last)]
          found[key] = np.array(ranges, np.int64).reshape(-1, 2)
        elif kind == 2:
          packed = [np.frombuffer(record[a:b], "<f4") for _, a, b in _fields(record, first, last)]
          found[key] = np.concatenate([np.zeros(0, np.float32), *packed])
  return found


def _fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
  """Yields (number, start, stop) of the length-delimited fields of a protobuf message."""
  while start < stop:
    tag, start = _varint(data, start)
    if tag & 7 != 2:
      raise IndexError(f"unexpected wire type {tag & 7} at byte {start}")
    size, start = _varint(data, start)
    if start + size > stop:
      raise IndexError(f"field of {size} bytes leaves its message at byte {start}")
    yield tag >> 3, start, start + size
    start += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
  result = shift = 0
  while True:
    byte = data[at]
    at += 1
    result |= (byte & 127) << shift
    if byte < 128:
      return result, at
    shift += 7
