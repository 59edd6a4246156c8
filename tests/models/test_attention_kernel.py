"""The GPU kernel of attention, its steps run as jax operations: XLA's attention but for the order of sums."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import random_observation, random_params, tiny

from semanticvla_jax.models import attention_kernel, serving
from semanticvla_jax.models.attention_kernel import Heads
from semanticvla_jax.models.semanticvla import build

INTERPRETED = functools.partial(attention_kernel.attention, interpret=True)


def random(*shape, dtype=jnp.float32, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(
  ("b", "length", "s", "heads", "c", "mask", "dtype"),
  [
    (2, 296, 296, 1, 64, "keys", "float32"),  # DINOv2: queries and keys beyond whole blocks
    (2, 256, 256, 1, 72, None, "float32"),  # SigLIP: heads that are no power of two
    (2, 136, 136, 2, 128, "each", "bfloat16"),  # the decoder
    (1, 24, 136, 2, 128, "each", "float32"),  # its last layer, in which few tokens ask
    (1, 5, 9, 1, 8, "keys", "bfloat16"),
  ],
)
def test_it_is_xlas_attention(b, length, s, heads, c, mask, dtype):
  q, k, v = (random(b, n, heads, c, dtype=dtype, seed=i) for i, n in enumerate((length, s, s)))
  if mask is not None:
    shape = (1, 1, s) if mask == "keys" else (b, length, s)
    mask = (jnp.asarray(np.random.default_rng(3).random(shape) < 0.6)).at[..., 0].set(True)
  wanted = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None])
  got = jax.jit(INTERPRETED)(*(Heads(x[:, :, None]) for x in (q, k, v)), mask)
  assert got.dtype == wanted.dtype
  error = {"float32": 5e-6, "bfloat16": 2e-2}[dtype]
  np.testing.assert_allclose(got.astype(jnp.float32), wanted.astype(jnp.float32), atol=error)


def test_joined_queries_keys_and_values_are_read_in_place():
  joined = random(2, 70, 3, 2, 16)
  wanted = jax.nn.dot_product_attention(*(joined[:, :, i] for i in range(3)))
  np.testing.assert_allclose(INTERPRETED(*(Heads(joined, i) for i in range(3))), wanted, atol=5e-6)


def test_large_logits_and_queries_without_a_key_give_numbers():
  q, k, v = (200 * random(1, 70, 1, 16, seed=i) for i in range(3))
  mask = jnp.ones((1, 70, 70), bool).at[0, 3].set(False)
  got = INTERPRETED(*(Heads(x[:, :, None]) for x in (q, k, v)), mask)
  assert np.isfinite(got).all()
  wanted = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
  np.testing.assert_allclose(np.delete(got, 3, axis=1), np.delete(wanted, 3, axis=1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
  "fields",
  [
    {
      "token_multiple": 8
    },  # an encoder's last block runs for its queries alone, the decoder's last layer for few states
    dict(dino_pruner=None, siglip_pruner=None, film=(), dense_fuser=None, coupler="single", mask="full"),
  ],
)
def test_a_model_gives_the_same_actions(monkeypatch, fields):
  monkeypatch.setattr(attention_kernel, "attention", INTERPRETED)
  laid_out = {"variant": "tiny", "keep": 8, "scan": False, "fused": True} | fields
  model, params = tiny(**fields), random_params(tiny(**fields))
  params, observation = serving.lay_out(flatten_dict(params, sep="/")), random_observation(model)
  plain, kernel = (build(laid_out | {"attention": name}) for name in serving.ATTENTION)
  of = lambda model: jax.jit(lambda p, x: model.apply({"params": p}, x).actions)(params, observation)  # noqa: E731
  np.testing.assert_allclose(of(kernel), of(plain), atol=5e-5)


def test_a_device_on_which_it_is_wrong_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(attention_kernel, "attention", INTERPRETED)
  for dtype in (jnp.float32, jnp.bfloat16):
    serving.verify_attention.__wrapped__("triton", dtype)
  monkeypatch.setattr(attention_kernel, "attention", lambda q, k, v, mask: INTERPRETED(q, k, v))  # reads hidden keys
  with pytest.raises(ValueError, match="attention: got results that differ from XLA's by .*; expected 0.03 at most"):
    serving.verify_attention.__wrapped__("triton", jnp.float32)


def test_it_is_for_policies_on_a_gpu():
  assert serving.layout("cuda", "triton")["attention"] == "triton"
  with pytest.raises(ValueError, match="attention: got 'triton' on cpu; expected a GPU"):
    serving.layout("cpu", "triton")
  with pytest.raises(ValueError, match="attention: got 'flash'; expected one of"):
    serving.layout("cuda", "flash")
  with pytest.raises(ValueError, match="attention='triton'; expected 'xla' without model.fused"):
    tiny(attention="triton")


@pytest.mark.parametrize(
  "attention, platform, reason",
  [
    ("xla", "cpu", "XLA's, the only one here for a CPU"),
    ("xla", "tpu", "XLA's, the only one here for a TPU"),
    ("xla", "gpu", "XLA's: .*nobody has timed it"),
    ("triton", "cuda", "one kernel a layer, as asked for"),
  ],
)
def test_the_choice_is_logged_with_its_reason(attention, platform, reason, caplog):
  with caplog.at_level("INFO"):
    serving.log_choices("float32", attention, platform)
  (record,) = caplog.records
  assert re.match(f"attention: {reason}", record.getMessage())
