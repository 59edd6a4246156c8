import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jit_apply

from semanticvla_jax.models import masks
from semanticvla_jax.models.llama import Llama, rope, stack_layers, unstack_layers

SIZES = dict(vocab=20, width=16, depth=3, num_heads=2, mlp_dim=24)
VALID = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
X = jax.random.normal(jax.random.key(0), (2, 5, 16))
ARGS = (masks.positions(VALID), masks.attention_mask(VALID, jnp.zeros(5, bool), "causal"))


@pytest.fixture(scope="module")
def params():
  return jax.jit(Llama(**SIZES).init)(jax.random.key(1), X, *ARGS)["params"]


def test_scan_equals_unrolled_bit_for_bit_in_parameters(params):
  scanned, _ = jit_apply(Llama(**SIZES))(params, X, *ARGS)
  apart = unstack_layers(params)
  unrolled, _ = jit_apply(Llama(**SIZES, scan=False))(apart, X, *ARGS)
  np.testing.assert_allclose(scanned, unrolled, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, stack_layers(apart), params)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_neither_values_nor_gradients(params, remat):
  def loss(remat):
    return jax.jit(jax.value_and_grad(lambda p: Llama(**SIZES, remat=remat).apply({"params": p}, X, *ARGS)[0].std()))

  (a, da), (b, db) = loss(None)(params), loss(remat)(params)
  np.testing.assert_allclose(a, b, rtol=1e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), da, db)
  with pytest.raises(ValueError, match="got remat 'some'"):
    Llama(**SIZES, remat="some").init(jax.random.key(0), X, *ARGS)


@pytest.mark.parametrize("scan", [True, False])
def test_cache_equals_one_pass(params, scan):
  """Three positions at once, then two one by one, give the states of all five at once."""
  model = Llama(**SIZES, scan=scan)
  params = params if scan else unstack_layers(params)
  x, positions = X[:1], jnp.arange(5)[None]
  allowed = jnp.tri(5, dtype=bool)[None]
  apply = jit_apply(model)
  whole, _ = apply(params, x, positions, allowed)
  cache = model.empty_cache(1, 5)
  parts = []
  for start, stop in ((0, 3), (3, 4), (4, 5)):
    part = slice(start, stop)
    states, cache = apply(params, x[:, part], positions[:, part], allowed[:, part], cache, start)
    parts.append(states)
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_layers_left_out_are_as_if_they_were_not_there(params):
  """Layer 1 of three, in every way to run: with and without a cache, at some positions, in pieces."""
  params, two = unstack_layers(params), Llama(**SIZES | {"depth": 2}, scan=False)
  without = {**params, "layers_1": params["layers_2"]}
  del without["layers_2"]
  model = Llama(**SIZES, scan=False, skip=(1,))
  at = jnp.array([[4, 2], [0, 1]])

  @functools.partial(jax.jit, static_argnums=(0, 2))
  def states(model, params, start):
    _, cache = model.apply({"params": params}, X, *ARGS, model.empty_cache(2, 5), 0)
    x, weights = model.apply({"params": params}, X, *ARGS, 1, at, method="begin")
    return (
      *model.apply({"params": params}, X, *ARGS, at, method="states_at"),
      *model.apply({"params": params}, x, *ARGS, at, start, method="states_at"),
      model.apply({"params": params}, X, *ARGS)[0],
      cache[0][-1],
      weights,
    )

  for ours, theirs in zip(states(model, params, 1), states(two, without, 1)):
    np.testing.assert_array_equal(ours, theirs)
  made = jax.eval_shape(model.init, jax.random.key(0), X, *ARGS)["params"]
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params), "names and shapes stay"


def test_rope_is_relative_and_keeps_norms():
  x = jax.random.normal(jax.random.key(2), (1, 2, 1, 8))
  a, b = (rope(x, jnp.array([[p, p + 3]]), 10000.0) for p in (0, 40))
  np.testing.assert_allclose(jnp.linalg.norm(a, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
  dots = [float((y[0, 0, 0] * y[0, 1, 0]).sum()) for y in (a, b)]
  np.testing.assert_allclose(*dots, atol=1e-4)
