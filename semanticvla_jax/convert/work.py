"""What conversions share: transpositions that stay in the cache, work done ahead in threads, lines of progress."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_END = object()
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


def ahead(items: Iterable[T], most: int = 2) -> Iterator[T]:
  """The same items, up to `most` of them made in a thread while one is used; what making them raises is raised here."""
  items = iter(items)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    made = collections.deque(pool.submit(next, items, _END) for _ in range(most))
    while (item := made.popleft().result()) is not _END:
      made.append(pool.submit(next, items, _END))
      yield item


def in_turn(calls: Iterable[Callable[[], T]], workers: int = 2) -> Iterator[T]:
  """What each call returns, in order; `workers` of them run in threads while one result is used.

  For calls that do not depend on each other; at most workers + 1 results are in memory. What a call raises is raised
  here.
  """
  calls = iter(calls)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    made = collections.deque(pool.submit(call) for call in itertools.islice(calls, workers))
    while made:
      result = made.popleft().result()
      made.extend(pool.submit(call) for call in itertools.islice(calls, 1))
      yield result


class Progress:
  """Says how far a conversion is, about every ten seconds: share, bytes a second, seconds left.

  Args:
    total: bytes there will be. say: is given the lines. every: seconds between them.
  """

  def __init__(self, total: int, say: Callable[[str], None], every: float = 10.0):
    self.total, self.done, self.begin = total, 0, time.monotonic()
    self._say, self._every, self._said = say, every, self.begin

  @property
  def rate(self) -> float:
    """Bytes a second so far."""
    return self.done / max(time.monotonic() - self.begin, 1e-9)

  def add(self, nbytes: int, what: str) -> None:
    """Counts `nbytes` more, of `what`."""
    self.done += nbytes
    if time.monotonic() - self._said >= self._every:
      self._said, rate = time.monotonic(), self.rate
      left = (self.total - self.done) / rate
      self._say(f"{self.done / self.total:6.1%}  {rate / 1e6:8.1f} MB/s  {left:6.0f} s left  {what}")
