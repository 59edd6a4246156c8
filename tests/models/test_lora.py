import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import jit_apply, random_observation, random_params, tiny

from semanticvla_jax.models import lora
from semanticvla_jax.models.lora import ALL_LINEAR_TARGETS, LoRA, merge
from semanticvla_jax.train import flops

MODEL = tiny()
OBSERVATION = random_observation(MODEL, lengths=[8, 5])


def without_b(params):
  return jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if path[-1].key == "lora_b" else x, params)


@pytest.fixture(scope="module")
def params():
  return random_params(LoRA(MODEL.clone(), 4, 8.0))


def test_zero_b_is_the_base_model(params):
  adapted = LoRA(MODEL.clone(), 4, 8.0)
  base = {k: x for k, x in flatten_dict(params).items() if not k[-1].startswith("lora")}
  from flax.traverse_util import unflatten_dict

  ours = jit_apply(adapted)(without_b(params), OBSERVATION).actions
  np.testing.assert_allclose(ours, jit_apply(MODEL)(unflatten_dict(base), OBSERVATION).actions, atol=1e-6)


def test_merged_equals_adapted_and_differs_from_base(params):
  adapted = jit_apply(LoRA(MODEL.clone(), 4, 8.0))
  kept = adapted(params, OBSERVATION).actions
  merged = jit_apply(MODEL)(merge(params, 4, 8.0), OBSERVATION).actions
  np.testing.assert_allclose(kept, merged, atol=1e-4)
  assert np.abs(kept - adapted(without_b(params), OBSERVATION).actions).max() > 0.05


def test_release_targets_and_nothing_else(params):
  layers = {"/".join(path[:-1]) for path in flatten_dict(params) if path[-1] == "lora_a"}
  dino = MODEL.dino.depth * 6
  siglip = MODEL.siglip.depth * 6
  assert len(layers) == dino + siglip + 7  # the language model's seven are stacked
  assert not any(
    name.startswith(("text", "sparse_fuser", "dense_fuser", "coupler")) or "film" in name for name in layers
  )


def test_merging_twice_is_refused(params):
  merged = merge(params, 4, 8.0)
  with pytest.raises(ValueError, match="already merged"):
    merge(merged, 4, 8.0)
  with pytest.raises(ValueError, match="got rank 4; expected 8; pass the rank"):
    merge(params, 8, 8.0)


def test_initialization_follows_peft():
  layer = LoRA(nn.Dense(300), 16, 32.0, targets=".*")
  params = layer.init(jax.random.key(0), jnp.ones((1, 400)))["params"]
  assert params["lora_a"].shape == (400, 16) and params["lora_b"].shape == (16, 300)
  assert abs(float(params["lora_a"].std()) - 1 / 16) < 0.005 and not params["lora_b"].any()
  with pytest.raises(ValueError, match="got rank 0"):
    LoRA(nn.Dense(3), 0, 1.0).init(jax.random.key(0), jnp.ones((1, 4)))


def test_convolution_and_heads_merge():
  """The patch embedding is a convolution, attention has two-axis outputs and inputs."""
  rng = np.random.default_rng(0)
  cases = [
    (nn.Conv(6, (2, 2), (2, 2), padding="VALID"), (2, 4, 4, 3)),
    (nn.DenseGeneral((2, 5)), (3, 7)),
    (nn.DenseGeneral(5, axis=(-2, -1)), (3, 2, 4)),
  ]
  for layer, shape in cases:
    x = rng.standard_normal(shape).astype(np.float32)
    adapted = LoRA(layer, 3, 6.0, targets=".*")
    params = adapted.init(jax.random.key(0), x)["params"]
    params["lora_b"] = rng.standard_normal(params["lora_b"].shape).astype(np.float32)
    ours = adapted.apply({"params": params}, x)
    np.testing.assert_allclose(ours, layer.apply({"params": merge(params, 3, 6.0)}, x), atol=1e-5)


def test_under_scan_and_remat():
  plain, remat = (LoRA(tiny(remat=r).clone(), 4, 8.0) for r in (None, "full"))
  params = random_params(plain)
  np.testing.assert_allclose(*(jit_apply(m)(params, OBSERVATION).actions for m in (plain, remat)), atol=1e-5)


def test_all_linear_reaches_patch_embedding_projector_and_lm_head():
  model = LoRA(tiny(coupler=None, mask="causal", num_views=1, proprio_dim=None).clone(), 2, 4.0, ALL_LINEAR_TARGETS)
  layers = {"/".join(path[:-1]) for path in flatten_dict(random_params(model)) if path[-1] == "lora_a"}
  assert {"dino/embedding", "siglip/embedding", "sparse_fuser/projector/Dense_0", "llm/lm_head"} <= layers


LAYERS = {  # module, shape of its input, which of the input's axes it contracts
  "dense": (nn.Dense(16, dtype=jnp.float32), (6, 40, 16), 1),
  "heads": (nn.DenseGeneral((2, 8), dtype=jnp.float32), (6, 40, 16), 1),
  "out": (nn.DenseGeneral(16, axis=(-2, -1), use_bias=False, dtype=jnp.float32), (6, 40, 2, 8), 2),
}


def apart(layer, rank, alpha, axes):
  """(params, x) → x·W + b + (α/r)·x·A·B, written out."""

  def run(params, x):
    base = {name: leaf for name, leaf in params.items() if not name.startswith("lora_")}
    low = jnp.tensordot(x, params["lora_a"].astype(x.dtype), axes)
    return layer.apply({"params": base}, x) + alpha / rank * jnp.tensordot(low, params["lora_b"].astype(x.dtype), 1)

  return run


def drawn(layer, shape, rank, dtype=jnp.float32):
  """Parameters with a B that is not zero, and an input."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal(shape), dtype)
  params = LoRA(layer, rank, 2.0 * rank, targets=".*").init(jax.random.key(0), x)["params"]
  return params | {"lora_b": jnp.asarray(rng.standard_normal(params["lora_b"].shape) / 4, jnp.float32)}, x


def value_and_gradients(function):
  return jax.jit(jax.value_and_grad(lambda params, x: jnp.sin(function(params, x)).mean(), argnums=(0, 1)))


@pytest.mark.parametrize("name", LAYERS)
def test_a_rank_as_large_as_the_width_is_summed_into_the_kernel(name):
  """The same output and gradients, in fewer FLOPs, whatever the axes of the kernel."""
  layer, shape, axes = LAYERS[name]
  params, x = drawn(layer, shape, 16)
  model = LoRA(layer, 16, 32.0, targets=".*")
  ours, reference = (lambda params, x: model.apply({"params": params}, x)), apart(layer, 16, 32.0, axes)
  np.testing.assert_allclose(jax.jit(ours)(params, x), jax.jit(reference)(params, x), atol=5e-6)
  one, other = value_and_gradients(ours)(params, x), value_and_gradients(reference)(params, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), one, other)

  def cost(function):  # of training: the kernel and the bias are frozen
    def loss(adapters, x):
      return function(params | adapters, x).sum()

    adapters = {name: params[name] for name in ("lora_a", "lora_b")}
    return flops.count(jax.grad(loss, argnums=(0, 1)), adapters, x)

  tokens = 6 * 40
  assert cost(reference) == 2 * (tokens * 16 * 16 + 5 * tokens * 16 * 16)  # sum(): no forward product with B
  assert cost(ours) == 2 * (2 * tokens * 16 * 16 + 3 * 16**3) < cost(reference) / 2


@pytest.mark.parametrize(
  ("width", "rank", "tokens", "dtype"),
  [(96, 4, 4096, jnp.float32), (32, 32, 8, jnp.float32), (16, 16, 256, jnp.bfloat16)],
  ids=["wide", "few tokens", "16 bits"],
)
def test_elsewhere_the_adapters_stay_apart(width, rank, tokens, dtype):
  layer = nn.Dense(width, dtype=dtype)
  params, x = drawn(layer, (tokens, width), rank, dtype)
  model = LoRA(layer, rank, 2.0 * rank, targets=".*")
  ours, reference = (lambda params, x: model.apply({"params": params}, x)), apart(layer, rank, 2.0 * rank, 1)
  assert flops.count(ours, params, x) == flops.count(reference, params, x)
  np.testing.assert_array_equal(*(jax.jit(f)(params, x).astype(jnp.float32) for f in (ours, reference)))


def test_which_is_cheaper():
  assert not lora.summing_is_cheaper(1 << 20, 4096, 32, 4096), "7b with the release's rank"
  assert lora.summing_is_cheaper(4096, 64, 64, 128) and not lora.summing_is_cheaper(40, 64, 64, 128)
  assert not lora.summing_is_cheaper(1 << 20, 384, 64, 384) and lora.summing_is_cheaper(1 << 20, 383, 64, 383)


@pytest.mark.slow
def test_a_model_computes_the_same_either_way(params, monkeypatch):
  """Scanned layers of the language model and the encoders' among them, forward and backward."""
  adapted, found = LoRA(MODEL.clone(), 4, 8.0), []
  for summed in (True, False):
    monkeypatch.setattr(lora, "summing_is_cheaper", lambda *sizes: summed)  # noqa: B023
    adapters = lambda params: adapted.apply({"params": params}, OBSERVATION).actions.mean()  # noqa: E731
    found.append(jax.jit(jax.value_and_grad(adapters))(params))
  for (path, one), (_, other) in zip(*(jax.tree_util.tree_leaves_with_path(x) for x in found)):
    np.testing.assert_allclose(one, other, atol=2e-5, err_msg=str(path))  # after all layers of the model
