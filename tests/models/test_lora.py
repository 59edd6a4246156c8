import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import jit_apply, random_observation, random_params, tiny

from semanticvla_jax.models.lora import ALL_LINEAR_TARGETS, LoRA, merge

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
