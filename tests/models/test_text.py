import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.models.text import TextEncoder

MODEL = TextEncoder(vocab=20, positions=6, width=8, depth=2, num_heads=2, mlp_dim=16)


def test_words_do_not_see_padding():
  ids = jnp.array([[5, 6, 7, 1, 1, 1]])
  mask = ids != 1
  params, apply = jax.jit(MODEL.init)(jax.random.key(0), ids, mask), jax.jit(MODEL.apply)
  states, other = (apply(params, words, mask) for words in (ids, jnp.where(mask, ids, 9)))
  np.testing.assert_allclose(states[:, :3], other[:, :3], atol=1e-6)
  assert jnp.abs(states - apply(params, ids, None)).max() > 1e-3  # plain SigLIP lets words see padding


def test_instruction_longer_than_the_positions():
  with pytest.raises(ValueError, match="an instruction of 7 tokens; expected at most the tower's 6 positions; shorten"):
    MODEL.init(jax.random.key(0), jnp.zeros((1, 7), jnp.int32), None)
