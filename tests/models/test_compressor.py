"""SliME's two modules: what they keep, and wrong values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.models import checks
from semanticvla_jax.models.compressor import Resampler, Router
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


@pytest.mark.parametrize("fields", [6, {"kind": "pool"}, {"kind": "router", "side": 3}, {"kind": "router", "keep": 0}])
def test_values_that_no_model_has(fields):
  with pytest.raises(
    ValueError, match=r"compressor=.*dict\(kind='resampler', side=6\) or dict\(kind='router', keep=6\)"
  ):
    checks.check(resolve({"variant": "tiny", "keep": 8, "compressor": fields}))
