import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.models.pruner import ANCHOR_RULES, IDPruner, SAPruner, anchor_scores

B, N, M, D = 2, 16, 6, 8
PATCHES = jax.random.normal(jax.random.key(0), (B, N, D))
WORDS = jax.random.normal(jax.random.key(1), (B, M, D))
MASK = jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]], bool)


def prune(words=WORDS, mask=MASK, normal=None, **fields):
  return IDPruner(**dict(anchors=5, cues=3) | fields).select(PATCHES, words, mask, normal)


def test_anchors_are_the_best_patches_in_raster_order():
  out = prune()
  expected = np.sort(np.argsort(-np.asarray(out.similarity).mean(-1), axis=1)[:, :5], axis=1)
  np.testing.assert_array_equal(out.kept, expected)
  np.testing.assert_array_equal(out.anchors, np.take_along_axis(np.asarray(PATCHES), expected[..., None], axis=1))


def test_cues_and_anchors_ignore_padding():
  scrambled = jnp.where(MASK[..., None], WORDS, 100 * WORDS[:, ::-1])
  a, b = prune(), prune(words=scrambled)
  np.testing.assert_array_equal(a.kept, b.kept)
  np.testing.assert_array_equal(a.salient, b.salient)
  np.testing.assert_allclose(a.cues, b.cues, atol=1e-6)


def test_cues_are_weighted_sums_of_patches_in_text_order():
  out = prune(temperature=0.1)
  np.testing.assert_allclose(out.cue_weights.sum(axis=1), 1, atol=1e-6)
  np.testing.assert_allclose(out.cues, jnp.einsum("bnk,bnd->bkd", out.cue_weights, PATCHES), atol=1e-6)
  assert (jnp.diff(out.salient, axis=1) > 0).all()


def test_noise_moves_similarities_by_its_standard_deviation():
  normal = jax.random.normal(jax.random.key(2), (B, N, M))
  difference = prune(normal=normal).similarity - prune().similarity
  np.testing.assert_allclose(difference, jnp.where(MASK[:, None], 0.1 * normal, 0), atol=1e-6)


def test_anchors_only():
  out = prune(cues=0)
  assert out.cues is None and out.salient is None and out.anchors.shape == (B, 5, D)


@pytest.mark.parametrize("rule", [r for r in ANCHOR_RULES if r != "similarity"])
def test_controls_do_not_look_at_the_instruction(rule):
  a, b = prune(anchor_rule=rule), prune(words=-WORDS, anchor_rule=rule)
  np.testing.assert_array_equal(a.kept, b.kept)
  assert len(set(np.asarray(a.kept[0]).tolist())) == 5


def test_centre_and_uniform_controls_are_what_they_say():
  scores = anchor_scores("centre", jnp.zeros((1, 16, 1)))
  assert sorted(np.argsort(-np.asarray(scores[0]))[:4].tolist()) == [5, 6, 9, 10]
  assert prune(anchor_rule="uniform", anchors=4).kept[0].tolist() == [0, 4, 8, 12]


def test_too_many_tokens_and_unknown_rule():
  with pytest.raises(ValueError, match=r"keep 17 anchors \(patches\) of 16, expected 16 or fewer; lower model\.keep"):
    prune(anchors=17)
  with pytest.raises(ValueError, match=r"keep 7 cues \(instruction tokens\) of 6"):
    prune(cues=7)
  with pytest.raises(ValueError, match=r"got 'best'.*model\.anchor_rule"):
    prune(anchor_rule="best")


def test_aggregation_tokens():
  normal = SAPruner(3, 400).init(jax.random.key(0))["params"]["queries"]
  assert normal.shape == (1, 3, 400) and 0.9 < float(normal.std()) < 1.1
  assert not SAPruner(3, 4, std=0.0).init(jax.random.key(0))["params"]["queries"].any()
  np.testing.assert_array_equal(SAPruner(3, D).aggregated(PATCHES), PATCHES[:, -3:])
