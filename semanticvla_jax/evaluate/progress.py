"""Progress of an evaluation on the terminal: one line that is rewritten, or a line per episode."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from semanticvla_jax.evaluate.results import percent
from semanticvla_jax.evaluate.rollout import Progress


def none_broken() -> int:
  """The number of broken episodes where nothing can break."""
  return 0


def one_line(name: str, total: int, broken: Callable[[], int] = none_broken) -> Progress:
  """Rewrites one line on stderr after each batch; nothing is printed where stderr is not a terminal.

  Args:
    name: of what is measured.
    total: number of its episodes.
    broken: returns how many episodes broke so far.
  """
  start = time.perf_counter()

  def show(done: int, successes: int) -> None:
    rate = done / (time.perf_counter() - start)
    if sys.stderr.isatty():
      end = "\n" if done == total else ""
      broke = f", {broken()} broke" if broken() else ""
      line = f"\r{name}: {done}/{total}, {successes} succeeded{broke}, {rate:.1f} episodes/s"
      print(line, end=end, file=sys.stderr, flush=True)

  return show


def line_per_episode(name: str, total: int, broken: Callable[[], int] = none_broken) -> Progress:
  """Prints, after each episode, how many are done, succeeded and broke, and how long the rest will take.

  Args:
    name: of what is measured.
    total: number of its episodes.
    broken: returns how many episodes broke so far; they are in no rate.
  """
  start, first = time.perf_counter(), []

  def show(done: int, successes: int) -> None:
    first.append(done - 1)  # episodes of an earlier command are not counted in the speed
    rate = (done - first[0]) / (time.perf_counter() - start)
    left, broke = (total - done) / rate / 60, broken()
    share = percent(successes, done - broke, 0) + (f" of {done - broke}, {broke} broke" if broke else "")
    times = f"{60 * rate:.1f} episodes/min, {left:.0f} min left"
    print(f"{name}: {done}/{total}, {successes} succeeded ({share}), {times}", flush=True)

  return show
