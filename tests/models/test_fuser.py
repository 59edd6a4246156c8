import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.models.fuser import DenseFuser, SparseFuser, check_pairs
from semanticvla_jax.models.mlp import MLP

DINO, SIGLIP = jnp.ones((2, 5, 4)), jnp.ones((2, 5, 6))


def test_each_level_has_its_own_weights_and_returns_each_encoders_width():
  fuser = DenseFuser(((0, 0), (1, 2)))
  params = fuser.init(jax.random.key(0), 1, DINO, SIGLIP)["params"]
  assert sorted(params) == ["pair_1_first", "pair_1_second"]
  a, b = fuser.apply({"params": params}, 1, DINO, SIGLIP)
  assert a.shape == DINO.shape and b.shape == SIGLIP.shape
  assert params["pair_1_first"]["Dense_0"]["kernel"].shape == (10, 10)


@pytest.mark.parametrize("pairs", [((-2, 1),), ((0, 0), (0, 1)), ((2, 1), (1, 2)), ((3, 0),)])
def test_bad_pairs(pairs):
  with pytest.raises(ValueError, match=r"dense fuser: got blocks.*model\.dense_fuser"):
    check_pairs(pairs, (3, 4))


def test_sparse_fuser_orders_cues_then_fused():
  fuser = SparseFuser(width=8)
  kept, cues = {"dino_aggregated": DINO, "siglip_anchors": SIGLIP}, {"siglip": SIGLIP[:, :2]}
  params = fuser.init(jax.random.key(0), kept, cues)["params"]
  out = fuser.apply({"params": params}, kept, cues)
  assert out.shape == (2, 2 + 5, 8)
  assert params["projector"]["Dense_0"]["kernel"].shape == (10, 40)
  moved = fuser.apply({"params": params}, kept, {"siglip": cues["siglip"] + 1})
  changed = np.abs(np.asarray(moved - out)).max(axis=(0, 2)) > 0
  assert changed.tolist() == [True] * 2 + [False] * 5


def test_separate_projection_lists_token_sets():
  fuser = SparseFuser(width=8, how="separate")
  kept = {"dino_aggregated": DINO, "siglip_anchors": SIGLIP[:, :3]}
  out, _ = fuser.init_with_output(jax.random.key(0), kept, {})
  assert out.shape == (2, 5 + 3, 8)


def test_a_mixture_weighs_the_encoders_by_the_instruction():
  fuser, instruction = SparseFuser(width=8, how="mixture"), jnp.array([[1.0] * 8, [-1.0] * 8])
  kept = {"dino_aggregated": DINO, "siglip_aggregated": SIGLIP}
  out, variables = fuser.init_with_output(jax.random.key(0), kept, {}, instruction)
  params = variables["params"]
  assert sorted(params) == ["dino_aggregated_projector", "router", "siglip_aggregated_projector"]
  each = [MLP((8, 8)).apply({"params": params[f"{name}_projector"]}, x) for name, x in kept.items()]
  weights = jax.nn.softmax(MLP((8, 2)).apply({"params": params["router"]}, instruction))
  np.testing.assert_allclose(out, sum(w[:, None, None] * x for w, x in zip(weights.T, each)), atol=1e-6)
  assert np.abs(out[0] - out[1]).max() > 1e-3, "instructions differ"


def test_unequal_token_counts_cannot_be_fused():
  with pytest.raises(ValueError, match="'dino_aggregated': 5, 'siglip_anchors': 3.*expected as many"):
    SparseFuser(width=8).init(jax.random.key(0), {"dino_aggregated": DINO, "siglip_anchors": SIGLIP[:, :3]}, {})
