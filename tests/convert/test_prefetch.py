"""Fast transpositions are the plain ones bit for bit; work ahead keeps its order and its errors."""

import itertools
import threading

import ml_dtypes
import numpy as np
import pytest

from semanticvla_jax.convert.io import prefetch, transpose
from semanticvla_jax.convert.io.progress import Progress


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_every_transposition_is_the_plain_one(dtype):
  rng = np.random.default_rng(0)
  for shape in ((5,), (300, 7), (3, 259), (4, 3, 70), (2, 3, 4, 5), (1, 6, 1), (0, 4)):
    x = rng.integers(0, 1 << 15, shape).astype(dtype)
    for axes in itertools.permutations(range(x.ndim)):
      for view in (x, x[:, 1:] if x.ndim > 1 else x[1:], x[::2]):
        got, wanted = transpose.contiguous(view.transpose(axes)), np.ascontiguousarray(view.transpose(axes))
        assert got.flags.c_contiguous and got.dtype == wanted.dtype and got.shape == wanted.shape
        assert got.tobytes() == wanted.tobytes(), (shape, axes)


def test_ahead_keeps_order_and_errors():
  assert list(prefetch.ahead(iter(range(7)))) == list(range(7)) and list(prefetch.ahead([])) == []

  def broken():
    yield 1
    raise ValueError("the second")

  items = prefetch.ahead(broken())
  assert next(items) == 1
  with pytest.raises(ValueError, match="the second"):
    next(items)


def test_calls_in_turn_keep_order_and_errors_and_run_together():
  assert list(prefetch.in_turn([])) == []
  assert list(prefetch.in_turn((lambda i=i: i) for i in range(7))) == list(range(7))
  both = threading.Barrier(2, timeout=20)  # passes only where two run at once
  assert list(prefetch.in_turn([both.wait, both.wait])) in ([0, 1], [1, 0])

  def broken():
    raise ValueError("the second")

  results = prefetch.in_turn([lambda: 1, broken, lambda: 3])
  assert next(results) == 1
  with pytest.raises(ValueError, match="the second"):
    next(results)


def test_progress_says_share_rate_and_time_left():
  lines = []
  progress = Progress(2_000, lines.append, every=0.0)
  progress.add(500, "a kernel")
  assert progress.done == 500 and len(lines) == 1
  assert lines[0].startswith(" 25.0%") and "MB/s" in lines[0] and "s left  a kernel" in lines[0]
  assert not Progress(10, lines.append).add(5, "x") and len(lines) == 1  # not yet
