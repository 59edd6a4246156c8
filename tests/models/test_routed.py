"""CogVLA's routed layers: which they are, what they see, and that the others pass by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.models import checks, masks
from semanticvla_jax.models.config import resolve
from semanticvla_jax.models.llama import Block, RoutedBlock
from semanticvla_jax.models.routed import Router, Routing

SIZES = dict(num_heads=2, mlp_dim=24, eps=1e-6, theta=10000.0)
X = jax.random.normal(jax.random.key(0), (2, 9, 16))  # <s>, four visual tokens, two words, two actions
VALID = jnp.ones((2, 9), bool).at[1, 6].set(False)
BLOCK = jnp.arange(9) >= 7
WORDS = VALID & (jnp.arange(9) > 4) & ~BLOCK
MASK, POSITIONS = masks.attention_mask(VALID, BLOCK, "block"), masks.positions(VALID)


@pytest.fixture(scope="module")
def params():
  init = jax.jit(RoutedBlock(**SIZES, share=1.0).init, static_argnums=5)
  return init(jax.random.key(1), X, MASK, VALID, WORDS, 4)["params"]


def run(params, share):
  layer = RoutedBlock(**SIZES, share=share)
  apply = jax.jit(lambda p: layer.apply({"params": p}, X, MASK, VALID, WORDS, 4, mutable=["intermediates"]))
  out, noted = apply(params)
  return np.asarray(out), np.asarray(noted["intermediates"]["kept_visual"][0])


def weighing(params, bias):
  router = params["router"] | {"weights": params["router"]["weights"] | {"bias": jnp.array([0.0, bias])}}
  return params | {"router": router}


def test_the_published_schedule():
  """Layers 8 to 31 of 32, the last eight of them with the least share."""
  shares = Routing(0.15, 0.85).shares(32)
  assert [i for i, share in enumerate(shares) if share is not None] == [*range(8, 32)]
  assert [i for i, share in enumerate(shares) if share == 0.15] == [*range(24, 32)]
  assert shares[8] == pytest.approx(0.8445, abs=1e-4) and shares[16] == pytest.approx(0.4747, abs=1e-4)


def test_all_tokens_of_weight_one_are_an_ordinary_layer(params):
  ordinary = {name: params[name] for name in params if name != "router"}
  want, _ = Block(**SIZES).apply({"params": ordinary}, X, POSITIONS, MASK, None, 0)
  out, kept = run(weighing(params, 60.0), 1.0)
  np.testing.assert_allclose(out[VALID], want[VALID], atol=1e-5)
  assert kept.tolist() == [[0, 1, 2, 3]] * 2


def test_of_weight_zero_only_attention_is_left(params):
  without = {name: params[name] for name in params if name != "router"}
  without["mlp"] = jax.tree.map(jnp.zeros_like, without["mlp"])
  want, _ = Block(**SIZES).apply({"params": without}, X, POSITIONS, MASK, None, 0)
  np.testing.assert_allclose(run(weighing(params, -60.0), 1.0)[0][VALID], want[VALID], atol=1e-5)


def test_visual_tokens_of_small_weights_pass_by_and_the_others_are_renumbered(params):
  out, kept = run(params, 0.6)  # two of four
  h = X / jnp.sqrt((X**2).mean(axis=-1, keepdims=True) + 1e-6) * params["input_norm"]["scale"]
  weights = np.asarray(Router().apply({"params": params["router"]}, h, 4, WORDS))
  np.testing.assert_array_equal(kept, np.sort(np.argsort(-weights[:, 1:5], axis=1)[:, :2]))
  for b in range(2):
    passed = [1 + i for i in range(4) if i not in kept[b]]
    np.testing.assert_array_equal(out[b, passed], X[b, passed])
    on = np.array([0, *(1 + kept[b]), *range(5, 9)])
    x, mask, valid, words = (
      X[b : b + 1, on],
      MASK[b : b + 1][:, on][:, :, on],
      VALID[b : b + 1, on],
      WORDS[b : b + 1, on],
    )
    short = RoutedBlock(**SIZES, share=1.0).apply({"params": params}, x, mask, valid, words, 2)
    np.testing.assert_allclose(out[b, on][valid[0]], short[0][valid[0]], atol=1e-5)


def test_the_router_reads_words_and_not_padding(params):
  apply = lambda x: np.asarray(Router().apply({"params": params["router"]}, x, 4, WORDS))  # noqa: E731
  weights = apply(X)
  np.testing.assert_array_equal(apply(X.at[1, 6].add(1.0))[:, :6], weights[:, :6])
  moved = np.abs(apply(X.at[1, 5, 0].add(3.0)) - weights)[1]
  assert (moved[1:6] > 0).all() and (moved[[0, 6, 7, 8]] == 0).all(), "it modulates visual tokens alone"


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"routing": 0.5}, r"dict\(least, most\)"),
    ({"routing": dict(least=0.5)}, r"dict\(least, most\)"),
    ({"routing": dict(least=0, most=1)}, "shares above 0"),
    ({"scan": True}, r"set model\.scan=False"),
    ({"decoder_pruner": dict(block=1, keep=4)}, "leave one of them out"),
    ({"coupler": None}, "leave one of them out"),
  ],
)
def test_values_that_no_model_has(changes, message):
  fields = dict(variant="tiny", keep=8, scan=False, routing=dict(least=0.15, most=0.85))
  with pytest.raises(ValueError, match=f"routing=.*{message}"):
    checks.check(resolve(fields | changes))
