import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jit_apply, tiny

from semanticvla_jax.models.vit import ViT, sincos_2d

SIZES = dict(image=8, patch=4, width=8, depth=3, num_heads=2, mlp_dim=16)


def make(**fields):
  model = ViT(**SIZES | fields)
  pixels = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  return model, jax.jit(model.init)(jax.random.key(0), pixels)["params"], pixels


def test_embed_is_prefix_patches_queries():
  model, params, pixels = make(registers=4, queries=3)
  queries = jnp.full((1, 3, 8), 7.0)
  embed = jit_apply(model, method="embed")
  x = embed(params, pixels, queries)
  assert x.shape == (2, 1 + 4 + 4 + 3, 8)
  np.testing.assert_array_equal(x[:, :1], jnp.broadcast_to(params["cls"], (2, 1, 8)))
  np.testing.assert_array_equal(x[:, -3:], 7.0)  # no position embedding on queries
  moved = params | {"pos_embedding": params["pos_embedding"] + 1}
  shifted = embed(moved, pixels, queries)
  changed = np.abs(np.asarray(shifted - x)).max(axis=(0, 2)) > 0.5
  assert changed.tolist() == [False] * 5 + [True] * 4 + [False] * 3


def test_running_in_pieces_is_running_at_once():
  model, params, pixels = make(registers=4, layer_scale=0.5)
  run = jax.jit(lambda x, *blocks: model.apply({"params": params}, x, *blocks, method="run")[0], static_argnums=(1, 2))
  x = jit_apply(model, method="embed")(params, pixels)
  whole, second = run(x, 0, 3), run(run(x, 0, 2), 2, 3)
  np.testing.assert_allclose(whole, second, atol=1e-6)


def test_film_exists_only_with_a_condition_and_moves_every_token():
  model = ViT(**SIZES, registers=1)
  pixels, condition = jnp.ones((1, 8, 8, 3)), jnp.ones((1, 5))

  def forward(module, condition):
    return module.run(module.embed(pixels), 0, 1, condition)[0]

  init = jax.jit(lambda c: model.init(jax.random.key(0), c, method=forward)["params"])
  params = init(condition)
  assert params["Transformer"]["encoderblock_0"]["film"]["scale"]["kernel"].shape == (5, 8)
  assert "film" not in init(None)["Transformer"]["encoderblock_0"]
  a, b = (jit_apply(model, method=forward)(params, c) for c in (condition, 2 * condition))
  assert (jnp.abs(a - b).max(axis=-1) > 1e-3).all()


def test_attention_weights_of_queries_sum_to_one():
  model, params, pixels = make(queries=2)
  look = lambda m: m.run(m.embed(pixels, jnp.ones((1, 2, 8))), 0, 3)[1]  # noqa: E731
  weights = jit_apply(model, method=look)(params)
  assert weights.shape == (2, 2, 2, 6)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_normalize_uses_the_encoders_own_constants():
  model, params, _ = make(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
  white = jnp.full((1, 8, 8, 3), 255, jnp.uint8)
  x = model.apply({"params": params}, white, method="normalize")
  np.testing.assert_allclose(x[0, 0, 0], [1.0, 3.0, 1.0], rtol=1e-6)


def test_image_size_errors():
  with pytest.raises(ValueError, match="image size 10 is not a multiple of the patch size 4; use 8"):
    make(image=10)
  model, params, _ = make()
  with pytest.raises(ValueError, match="got images of 12×12 pixels, expected 8×8.*resize"):
    model.apply({"params": params}, jnp.zeros((1, 12, 12, 3)), method="embed")


def test_heads_must_divide_the_width():
  with pytest.raises(ValueError, match="width 8 is not a multiple of 3 heads"):
    make(num_heads=3)


def test_positions_that_begin_as_sines_tell_places_apart():
  vit = ViT(**SIZES | dict(image=16, position_init="sincos"))
  at = np.asarray(jax.jit(vit.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]["pos_embedding"])
  np.testing.assert_allclose(at, sincos_2d(4, 8))
  near, far = (np.linalg.norm(at[0, 0] - at[0, i]) for i in (1, 3))
  assert 0 < near < far and np.abs(at).max() <= 1
  assert len({tuple(row) for row in at[0].round(5)}) == vit.num_patches
  with pytest.raises(ValueError, match="expected 'normal' or 'sincos'"):
    make(position_init="sine")
  with pytest.raises(ValueError, match="multiple of 4"):
    sincos_2d(2, 6)


def test_a_sequence_filled_up_to_a_multiple_gives_the_same_tokens():
  how = dict(image=24, patch=8, width=16, depth=3, num_heads=2, mlp_dim=24, registers=1, layer_scale=0.5, queries=2)
  plain, filled = ViT(**how), ViT(**how, multiple=8)  # 2 + 9 + 2 tokens, and 3 more
  assert (plain.num_prefix, filled.num_prefix) == (2, 5)
  pixels, queries = (
    jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((2, 24, 24, 3), (1, 2, 16)))
  )

  @functools.partial(jax.jit, static_argnums=0)
  def outputs(vit, params):
    run = lambda method, *args: vit.apply({"params": params}, *args, method=method)  # noqa: E731
    x, weights = run("run", run("embed", pixels, queries), 0, 2)
    return run("patches", x), x[:, -2:], run("tail", x, 2), weights

  params = jax.jit(plain.init)(jax.random.key(2), pixels)["params"]
  expected, got = outputs(plain, params), outputs(filled, params)
  for one, other in zip(expected[:3], got[:3], strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)
  np.testing.assert_allclose(expected[3], np.delete(got[3], [2, 3, 4], axis=-1), atol=1e-6)  # what queries look at
  assert not np.any(got[3][..., 2:5])


@pytest.mark.parametrize("value", [0, -8, 2.0, None])
def test_a_multiple_that_is_not_one_is_refused(value):
  with pytest.raises(ValueError, match="token_multiple=.*; expected a whole number from 1; "):
    tiny(token_multiple=value)
