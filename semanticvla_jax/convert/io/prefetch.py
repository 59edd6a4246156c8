"""Work done ahead in threads, in order, with a bounded number of results in memory."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


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
