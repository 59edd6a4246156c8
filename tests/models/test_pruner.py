import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, random_observation, random_params

from semanticvla_jax.models.pruner import (
  ANCHOR_RULES,
  Encoded,
  IDPruner,
  SAPruner,
  Words,
  anchor_rule,
  anchor_scores,
  dynamic_count,
)
from semanticvla_jax.models.semanticvla import build

B, N, M, D = 2, 16, 6, 8
PATCHES = jax.random.normal(jax.random.key(0), (B, N, D))
WORDS = jax.random.normal(jax.random.key(1), (B, M, D))
MASK = jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]], bool)


def prune(words=WORDS, mask=MASK, normal=None, **fields):
  given = dict(anchors=5, cues=3, temperature=1.0, noise=0.1, anchor_rule="similarity") | fields
  return IDPruner(**given).select(PATCHES, words, mask, normal)


@pytest.fixture
def own_rules():
  """The table of rules; what a test registers is forgotten after it."""
  before = dict(ANCHOR_RULES)
  yield ANCHOR_RULES
  ANCHOR_RULES.clear()
  ANCHOR_RULES.update(before)


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


def test_cues_pool_by_the_maximum_and_have_a_temperature_of_their_own():
  mean, best = prune(), prune(cue_pool="max")
  expected = np.sort(np.argsort(-np.asarray(mean.similarity).max(axis=1), axis=1)[:, :3], axis=1)
  np.testing.assert_array_equal(best.salient, expected)
  assert not np.array_equal(mean.salient, best.salient), "the two could not be distinguished"
  sharp = prune(cue_temperature=0.1)
  np.testing.assert_array_equal(sharp.cue_weights, prune(temperature=0.1).cue_weights)
  np.testing.assert_array_equal(sharp.kept, mean.kept)


def test_stop_words_are_cues_only_where_too_few_others_are_there():
  stop = jnp.array([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]], bool)
  out = IDPruner(5, 3, 1.0, 0.1, "similarity").select(PATCHES, WORDS, MASK, None, stop)
  scores = np.asarray(out.similarity).mean(axis=1)
  better = max((0, 2), key=lambda i: scores[0, i])
  assert out.salient[0].tolist() == sorted([1, 3, better]), "both others, then the better stop word, never padding"
  assert out.salient[1].tolist() == sorted(np.argsort(-scores[1, :4])[:3].tolist())
  np.testing.assert_array_equal(out.kept, prune().kept)


def test_stop_words_reach_the_pruner_by_their_ids():
  model, plain = build(TINY | {"cue_stop": (3, 4)}), build(TINY)
  observation = random_observation(plain, 2)
  ids = np.resize(np.arange(3, 9), observation.instruction.shape)
  observation = observation.replace(instruction=jnp.asarray(ids, jnp.int32), instruction_mask=jnp.ones(ids.shape, bool))
  params = {"params": random_params(plain)}
  look = lambda m: jax.jit(lambda p, o: m.apply(p, o).intermediates["siglip_pruned"].salient)(params, observation)  # noqa: E731
  chosen, before = (np.asarray(look(m)) for m in (model, plain))
  rows = np.repeat(ids, 2, axis=0)
  assert not np.isin(np.take_along_axis(rows, chosen, axis=1), (3, 4)).any()
  assert np.isin(np.take_along_axis(rows, before, axis=1), (3, 4)).any()


@pytest.mark.parametrize("field, value", [("cue_stop", (1.5,)), ("cue_temperature", 0.0), ("cue_pool", "sum")])
def test_values_that_no_cues_can_be_chosen_by(field, value):
  with pytest.raises(ValueError, match=f"model config: got {field}="):
    build(TINY | {field: value})


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


def test_center_and_uniform_controls_are_what_they_say():
  scores = anchor_scores("centre", jnp.zeros((1, 16, 1)), PATCHES[:1], PATCHES[:1, :1], MASK[:1, :1])
  assert sorted(np.argsort(-np.asarray(scores[0]))[:4].tolist()) == [5, 6, 9, 10]
  assert prune(anchor_rule="uniform", anchors=4).kept[0].tolist() == [0, 4, 8, 12]


def test_too_many_tokens_and_unknown_rule():
  with pytest.raises(
    ValueError, match=r"got 17 anchors \(patches\) to keep of 16; expected 16 or fewer; lower model\.keep"
  ):
    prune(anchors=17)
  with pytest.raises(ValueError, match=r"got 7 cues \(instruction tokens\) to keep of 6"):
    prune(cues=7)
  with pytest.raises(ValueError, match=r"got 'best'.*model\.anchor_rule.*register your own with pruner\.anchor_rule"):
    prune(anchor_rule="best")


def test_a_rule_of_ones_own(own_rules):
  """It sees patches, projected words and their mask; a model is built, checked and run with it by its name."""
  seen = []

  @anchor_rule("first")
  def first(similarity, patches, words, mask):
    seen.append([x.shape for x in (similarity, patches, words, mask)])
    return -jnp.arange(patches.shape[1])

  assert prune(anchor_rule="first").kept.tolist() == [[0, 1, 2, 3, 4]] * B
  assert seen == [[(B, N, M), (B, N, D), (B, M, D), (B, M)]]
  model = build(TINY | dict(anchor_rule="first"))
  params, observation = random_params(model), random_observation(model)
  run = jax.jit(lambda p, x: model.apply({"params": p}, x).intermediates["siglip_pruned"].kept)
  np.testing.assert_array_equal(run(params, observation), [[*range(8)]] * 4)
  del own_rules["first"]
  with pytest.raises(ValueError, match="got anchor_rule='first'; expected one of .*; set .*, or register your own"):
    build(TINY | dict(anchor_rule="first"))


@pytest.mark.parametrize(
  ("scores", "got"),
  [
    (lambda s, p, w, m: s, r"float32\[2, 16, 6\]"),
    (lambda s, p, w, m: None, "NoneType"),
    (lambda s, p, w, m: p[..., 0] > 0, r"bool\[2, 16\]"),
    (lambda s, p, w, m: s[0, 0], r"float32\[6\]"),
  ],
)
def test_a_rule_gives_one_number_for_each_patch(own_rules, scores, got):
  anchor_rule("bad")(scores)
  with pytest.raises(ValueError, match=rf"rule 'bad': got scores {got}; expected numbers \[2, 16\] or \[16\]; return"):
    prune(anchor_rule="bad")


def test_what_cannot_be_registered(own_rules):
  for name in ("similarity", "", 3):
    with pytest.raises(ValueError, match="got the name .*; expected a text other than .*; choose a name of your own"):
      anchor_rule(name)
  for rule in (lambda similarity: similarity, "norm"):
    with pytest.raises(ValueError, match="anchor rule 'bad': got .*; expected a function of .*; give it these four"):
      anchor_rule("bad")(rule)
  assert "bad" not in own_rules


def test_aggregation_tokens():
  def queries(pruner):
    return pruner.init(jax.random.key(0), method="queries")["params"]["queries"]

  normal = queries(SAPruner(3, 400, std=1.0))
  assert normal.shape == (1, 3, 400) and 0.9 < float(normal.std()) < 1.1
  assert not queries(SAPruner(3, 4, std=0.0)).any()


def test_each_pruner_gets_its_own_queries_and_words():
  """An encoder with both kinds: the token sets, what they are made of, and the parts by their parameters' names."""
  one = dict(encoders=("siglip",), film=("siglip",), dense_fuser=None, vision_layer="second_to_last")
  model = build(TINY | one | dict(siglip_pruner="sa+id"))
  assert [type(x) for x in model.pruners["siglip"]] == [SAPruner, IDPruner]
  params, observation = random_params(model), random_observation(model)
  assert model.parts().keys() == params.keys()
  assert {"siglip_sa_pruner", "siglip_id_pruner"} <= params.keys()
  seen = jax.jit(lambda p, x: model.apply({"params": p}, x).intermediates)(params, observation)
  np.testing.assert_array_equal(seen["siglip_aggregated"], seen["siglip_queries"])
  np.testing.assert_array_equal(seen["siglip_anchors"], seen["siglip_pruned"].anchors)
  assert seen["siglip_attention"].shape[2] == 8
  own = params["siglip_id_pruner"]
  words = Words(jnp.repeat(seen["words"], 2, axis=0), jnp.repeat(observation.instruction_mask, 2, axis=0))
  again = model.pruner("siglip", "id").apply({"params": own}, Encoded(seen["siglip_patches"]), words, method="prune")
  np.testing.assert_array_equal(again.info["pruned"].kept, seen["siglip_pruned"].kept)
  assert model.pruner("dino", "sa") is None and model.prunes_by_instruction
  assert not build(TINY | dict(siglip_pruner="sa")).prunes_by_instruction


def test_the_number_of_patches_follows_the_entropy_of_their_scores():
  flat, one = jnp.zeros(8), jnp.zeros(8).at[3].set(50.0)
  assert np.asarray(dynamic_count(jnp.stack([flat, one]), 1.0, 2, 6)).tolist() == [6, 2]
  found = prune(anchors=4, cues=0, least=1, temperature=0.03)
  shown, scores = np.asarray(found.shown), np.asarray(found.similarity.mean(axis=2))
  count = np.asarray(dynamic_count(jnp.asarray(scores), 0.03, 1, 4))
  assert (shown.sum(axis=1) == count).all()
  for i in range(len(shown)):
    own = scores[i][np.asarray(found.kept)[i]]
    assert own[shown[i]].min() >= own[~shown[i]].max(initial=-9)


def test_patches_that_are_not_shown_are_hidden_from_the_language_model():
  params, observation = random_params(build(TINY)), random_observation(build(TINY))

  def run(**fields):
    model = build(TINY | fields)
    return jax.jit(lambda p, o: model.apply({"params": p}, o))(params, observation)

  every, same = run(), run(keep_least=TINY["keep"])
  np.testing.assert_array_equal(same.actions, every.actions)
  few = run(keep_least=1, temperature=0.001)
  shown = few.intermediates["siglip_pruned"].shown.reshape(2, 2, -1).sum(axis=(1, 2))
  dropped = every.intermediates["valid"].sum(axis=1) - few.intermediates["valid"].sum(axis=1)
  np.testing.assert_array_equal(dropped, 2 * TINY["keep"] - shown)
  assert (dropped > 0).all() and np.abs(few.actions - every.actions).max() > 1e-4
