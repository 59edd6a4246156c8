"""Lines about how far a conversion has come."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
  """Reports a conversion's progress about every ten seconds: share, bytes per second, seconds left.

  Args:
    total: bytes to be written. say: is called with the lines. every: seconds between them.
  """

  def __init__(self, total: int, say: Callable[[str], None], every: float = 10.0):
    self.total, self.done, self.begin = total, 0, time.monotonic()
    self._say, self._every, self._said = say, every, self.begin

  @property
  def rate(self) -> float:
    """Bytes per second so far."""
    return self.done / max(time.monotonic() - self.begin, 1e-9)

  def add(self, nbytes: int, what: str) -> None:
    """Counts `nbytes` more, of `what`."""
    self.done += nbytes
    if time.monotonic() - self._said >= self._every:
      self._said, rate = time.monotonic(), self.rate
      left = (self.total - self.done) / rate
      self._say(f"{self.done / self.total:6.1%}  {rate / 1e6:8.1f} MB/s  {left:6.0f} s left  {what}")
