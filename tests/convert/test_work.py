"""Fast transpositions are the plain ones bit for bit; work ahead keeps its order and its errors."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from semanticvla_jax.convert import work


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_every_transposition_is_the_plain_one(dtype):
  rng = np.random.default_rng(0)
  for shape in ((5,), (300, 7), (3, 259), (4, 3, 70), (2, 3, 4, 5), (1, 6, 1), (0, 4)):
    x = rng.integers(0, 1 << 15, shape).astype(dtype)
    for axes in itertools.permutations(range(x.ndim)):
      for view in (x, x[:, 1:] if x.ndim > 1 else x[1:], x[::2]):
        got, wanted = work.contiguous(view.transpose(axes)), np.ascontiguousarray(view.transpose(axes))
        assert got.flags.c_contiguous and got.dtype == wanted.dtype and got.shape == wanted.shape
        assert got.tobytes() == wanted.tobytes(), (shape, axes)


def test_ahead_keeps_order_and_errors():
  assert list(work.ahead(iter(range(7)))) == list(range(7)) and list(work.ahead([])) == []

  def broken():
    yield 1
    raise ValueError("the second")

  items = work.ahead(broken())
  assert next(items) == 1
  with pytest.raises(ValueError, match="the second"):
    next(items)
