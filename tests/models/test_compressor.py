"""SliME's two modules and Compressor-VLA's: what they keep, and wrong values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.models import checks
from semanticvla_jax.models.compressor import Resampler, Router, TaskSpatial
from semanticvla_jax.models.config import resolve

RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.normal(size=(2, 16, 8)), jnp.float32)
WORDS = jnp.asarray(RNG.normal(size=(2, 3, 8)), jnp.float32)
MASK = jnp.array([[True, True, True], [True, False, False]])


def test_the_router_keeps_what_is_nearest_the_words_that_are_there():
  kept = Router(4).apply({}, TOKENS, WORDS, MASK)
  for i, words in ((0, WORDS[0]), (1, WORDS[1, :1])):
    unit = lambda x: np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    near = np.sort(np.argsort(-(unit(TOKENS[i]) @ unit(words).T).sum(axis=1))[:4])
    np.testing.assert_array_equal(kept[i], TOKENS[i][near])
  with pytest.raises(ValueError, match=r"17 visual tokens of a view \(compressor\) to keep of 16"):
    Router(17).apply({}, TOKENS, WORDS, MASK)


def test_the_resampler_looks_at_tokens_where_they_are():
  module = Resampler(3)
  params = module.init(jax.random.key(0), TOKENS, WORDS, MASK)
  made = module.apply(params, TOKENS, WORDS, MASK)
  assert made.shape == (2, 9, 8)
  np.testing.assert_allclose(made.mean(axis=-1), 0, atol=1e-5)
  elsewhere = module.apply(params, TOKENS[:, ::-1], WORDS, MASK)
  assert np.abs(made - elsewhere).max() > 1e-2, "keys have positions"
  same = jnp.broadcast_to(TOKENS[:, :1], TOKENS.shape)
  np.testing.assert_allclose(
    np.ptp(module.apply(params, same, WORDS, MASK), axis=1), 0, atol=1e-5, err_msg="values none"
  )
  with pytest.raises(ValueError, match="15 tokens a view; expected a square grid"):
    module.apply(params, TOKENS[:, :15], WORDS, MASK)


@pytest.fixture(scope="module")
def task_spatial():
  module = TaskSpatial(queries=3, window=2)
  params = module.init(jax.random.key(0), TOKENS, WORDS, MASK)
  return lambda tokens, words=WORDS, mask=MASK: np.asarray(module.apply(params, tokens, words, mask))


def test_a_window_is_seen_by_its_own_query_and_by_those_of_the_task(task_spatial):
  made = task_spatial(TOKENS)
  assert made.shape == (2, 3 + 4, 8)
  elsewhere = task_spatial(TOKENS.at[:, 7].add(1.0))  # row 1, column 3 of the 4 × 4 grid: the second window
  changed = np.abs(made - elsewhere).max(axis=(0, 2)) > 1e-6
  assert changed.tolist() == [True] * 3 + [False, True, False, False]


def test_only_the_task_s_queries_see_a_view_as_a_set(task_spatial):
  made, turned = task_spatial(TOKENS), task_spatial(TOKENS[:, ::-1])
  np.testing.assert_allclose(made[:, :3], turned[:, :3], atol=1e-5)
  np.testing.assert_allclose(made[:, 3:], turned[:, :2:-1], atol=1e-5, err_msg="windows in raster order")


def test_the_instruction_modulates_every_query_and_padding_does_not(task_spatial):
  made = task_spatial(TOKENS)
  other = task_spatial(TOKENS, WORDS.at[:, 0].add(1.0))
  assert (np.abs(made - other).max(axis=2) > 1e-6).all()
  padding = task_spatial(TOKENS, WORDS.at[1, 1:].add(1.0))
  np.testing.assert_array_equal(made, padding)


def test_windows_that_do_not_fit():
  with pytest.raises(ValueError, match="windows of 3 patches in a grid of 4; expected a divisor of 4; set window"):
    TaskSpatial(2, 3).init(jax.random.key(0), TOKENS, WORDS, MASK)
  with pytest.raises(ValueError, match="15 tokens a view; expected a square grid"):
    TaskSpatial(2, 3).init(jax.random.key(0), TOKENS[:, :15], WORDS, MASK)


@pytest.mark.parametrize(
  "fields",
  [
    6,
    {"kind": "pool"},
    {"kind": "router", "side": 3},
    {"kind": "router", "keep": 0},
    {"kind": "task_spatial", "queries": 4},
    {"kind": "task_spatial", "queries": 4, "window": 0},
  ],
)
def test_values_that_no_model_has(fields):
  with pytest.raises(
    ValueError,
    match=r"compressor=.*dict\(kind='resampler', side=6\) or .* or dict\(kind='task_spatial', queries=6, window=6\)",
  ):
    checks.check(resolve({"variant": "tiny", "keep": 8, "compressor": fields}))
