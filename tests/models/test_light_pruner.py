"""LightVLA: what patches choose, and that its forms agree."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, jit_apply, random_observation, random_params, wide

from semanticvla_jax.models import checks, masks
from semanticvla_jax.models.config import resolve
from semanticvla_jax.models.decoder_pruner import DecoderPruner, Spans
from semanticvla_jax.models.light_pruner import light_states, scores, straight_through
from semanticvla_jax.models.semanticvla import build

OFT = dict(dino_pruner=None, siglip_pruner=None, film=(), dense_fuser=None, vision_layer="second_to_last")
OFT |= dict(coupler="single", mask="full", chunk=2)
LIGHT = dict(block=0, score="light", keep=64)
VISUAL = 128  # patches of two views at `tiny`


def light(**changes):
  return build(TINY | OFT | {"decoder_pruner": LIGHT | changes})


@pytest.fixture(scope="module")
def params():
  return random_params(light(), 1)


@pytest.fixture(scope="module")
def masked(params):
  model = light(form="mask")
  return jit_apply(model)(params, random_observation(model, lengths=(8, 5)))


def rerun(params, seen, views=2, training=None, rows=slice(None), model=None, **changes):
  """(states, action states, what is noted) of the decoder alone, for the sequences in `seen`."""
  model, noted = model or light(), {name: seen[name][rows] for name in ("sequence", "valid", "positions", "allowed")}
  b, length = noted["valid"].shape
  block, read = jnp.arange(length) >= length - 15, jnp.tile(jnp.arange(length - 15, length - 1), (b, 1))
  visual = seen["views"].shape[1]
  spans = Spans(views, visual, 2 + views * visual, length - 15, length, jnp.full(b, length - 16))
  pruner = DecoderPruner(**LIGHT | {"keep": visual} | changes)

  @jax.jit
  def run(params, noted):
    noted = {**noted}
    states = lambda m: light_states(m, pruner, noted, block, read, spans, training)  # noqa: E731
    return *nn.apply(states, model)({"params": params}, rngs={"noise": jax.random.key(7)}), noted

  return run(params, noted)


def test_what_is_hidden_and_what_is_gathered_agree(params, masked):
  model = light()
  gathered = jit_apply(model)(params, random_observation(model, lengths=(8, 5)))
  kept, seen = np.asarray(masked.intermediates["visual_kept"]), gathered.intermediates
  assert (kept > 1).all() and (kept < VISUAL).all()
  np.testing.assert_allclose(gathered.actions, masked.actions, atol=2e-6)
  np.testing.assert_array_equal(seen["visual_kept"], kept)
  assert seen["visual_overflow"].tolist() == [0, 0]


def test_too_few_places_are_counted_and_go_to_the_most_frequent(params, masked):
  seen = masked.intermediates
  states, _, noted = rerun(params, seen, keep=1)
  kept = np.asarray(seen["visual_kept"])
  np.testing.assert_array_equal(noted["visual_overflow"], kept - 2)
  assert states.shape[1] == noted["sequence"].shape[1] - VISUAL + 2
  votes = np.stack([np.bincount(row, minlength=VISUAL) for row in np.asarray(noted["visual_picks"])])
  best = np.sort(np.argsort(-votes, axis=1, kind="stable")[:, :2])
  x, positions = seen["sequence"], seen["positions"]
  on = np.concatenate([np.zeros((2, 1), int), 1 + best, np.tile(np.arange(1 + VISUAL, x.shape[1]), (2, 1))], axis=1)
  x, positions, valid = (
    np.take_along_axis(np.asarray(y), i, axis=1) for y, i in ((x, on[..., None]), (positions, on), (seen["valid"], on))
  )
  allowed = masks.attention_mask(jnp.asarray(valid), jnp.zeros(on.shape[1], bool), "full")
  decode = lambda m: m.llm(jnp.asarray(x), jnp.asarray(positions), allowed)[0]  # noqa: E731
  want = jax.jit(nn.apply(decode, light()))({"params": params})
  np.testing.assert_allclose(states, want, atol=5e-5)


def test_what_nobody_chose_is_as_if_it_were_not_there(params, masked):
  """The same decoder over a sequence without it, with the positions that things had."""
  seen, model = masked.intermediates, light()
  chosen = np.unique(seen["visual_picks"][0])
  length = seen["sequence"].shape[1]
  on = np.array([0, *(1 + chosen), *range(1 + VISUAL, length)])
  x, valid, positions = (seen[name][:1, on] for name in ("sequence", "valid", "positions"))
  allowed = masks.attention_mask(valid, jnp.zeros(len(on), bool), "full")
  read = jnp.arange(len(on) - 15, len(on) - 1)[None]
  want = jax.jit(nn.apply(lambda m: m.llm.states_at(x, positions, allowed, read)[1], model))({"params": params})
  np.testing.assert_allclose(rerun(params, seen, form="mask")[1][:1], want, atol=5e-6)


def test_scores_by_hand():
  """Every patch asks for what is like the words that it is like; hidden patches and padding are not there."""
  patches = 3 * jnp.eye(4, 16)[None]
  others = jnp.concatenate([2 * jnp.eye(4, 16)[None], 9 * jnp.eye(4, 16)[None, ::-1]], axis=1)
  seen, real = jnp.ones((1, 4), bool), jnp.arange(8)[None] < 4
  found = scores(patches, others, seen, real)
  assert found.argmax(axis=-1).tolist() == [[0, 1, 2, 3]]
  # rms makes each entry 4 and scores 16 / √16: exp(4) of one word against exp(0) of three, and again by a norm of 4
  share = np.array([np.exp(4), 1, 1, 1]) / (np.exp(4) + 3)
  np.testing.assert_allclose(found[0, 0], 4 * share / np.linalg.norm(share), rtol=1e-4)
  assert np.isneginf(scores(patches, others, seen.at[0, 1].set(False), real)[0, :, 1]).all()
  zeros = scores(
    patches, jnp.pad(others, ((0, 0), (0, 5), (0, 0))), seen, jnp.pad(real, ((0, 0), (0, 5)), constant_values=True)
  )
  np.testing.assert_allclose(zeros[0, 0, 0], found[0, 0, 0], atol=0.1)
  assert zeros[0, 0, 0] != found[0, 0, 0], "placeholders are asked, too"


@pytest.mark.parametrize("form", ["drop", "mask", "train"])
def test_all_chosen_is_no_pruning(params, form):
  """Eight patches like eight words: each chooses itself."""
  words = [jnp.tile(a * jnp.eye(8, 32), (2, 1, 1)) for a in (3.0, 2.0)]
  x = jnp.pad(jnp.concatenate([jnp.full((2, 1, 32), 0.1), *words], axis=1), ((0, 0), (0, 15), (0, 0)))
  length, valid = x.shape[1], jnp.ones(x.shape[:2], bool)
  allowed = masks.attention_mask(valid, jnp.zeros(length, bool), "full")
  seen = dict(sequence=x, valid=valid, positions=masks.positions(valid), allowed=allowed, views=words[0])
  how = dict(training=(0, None)) if form == "train" else dict(form=form)
  read = jnp.tile(jnp.arange(length - 15, length - 1), (2, 1))
  with jax.enable_x64(True):  # in float32 1 + share - share is not quite 1
    model, x = wide(light()), x.astype(jnp.float64)
    *states, noted = rerun(params, seen | {"sequence": x}, views=1, model=model, **how)
    states_at = lambda m: m.llm.states_at(x, seen["positions"], allowed, read)  # noqa: E731
    dense = jax.jit(nn.apply(states_at, model))({"params": params})
  assert noted["visual_picks"].tolist() == [[*range(8)]] * 2
  for ours, theirs in zip(states, dense):
    np.testing.assert_allclose(ours, theirs, atol=1e-9 if form == "train" else 0)


def test_training_puts_choices_into_all_places(params, masked):
  seen = masked.intermediates
  quiet = np.asarray(seen["visual_picks"])
  states, _, noted = rerun(params, seen, training=(10, None), noise_steps=10)
  np.testing.assert_array_equal(noted["visual_picks"], quiet, err_msg="noise is over")
  assert states.shape == seen["sequence"].shape
  on = jnp.concatenate(
    [jnp.zeros((2, 1), int), 1 + quiet, *[jnp.tile(jnp.arange(129, states.shape[1]), (2, 1))]], axis=1
  )
  x, positions = (
    jnp.take_along_axis(seen[name], i, axis=1) for name, i in (("sequence", on[..., None]), ("positions", on))
  )
  want = jax.jit(nn.apply(lambda m: m.llm(x, positions, seen["allowed"])[0], light()))({"params": params})
  np.testing.assert_allclose(states, want, atol=5e-5, err_msg="with the positions of what was chosen")


def test_noise_falls_and_is_that_of_the_batch(params, masked):
  seen = masked.intermediates
  picks = lambda updates, part, rows=slice(None): np.asarray(  # noqa: E731
    rerun(params, seen, training=(updates, part), rows=rows, noise_steps=10)[2]["visual_picks"]
  )
  moved = [(picks(updates, None) != seen["visual_picks"]).mean() for updates in (0, 9, 10, 11)]
  assert moved[0] > moved[1] >= moved[2] == moved[3] == 0
  np.testing.assert_array_equal(picks(0, (jnp.int32(1), 2), slice(1, None, 2)), picks(0, None)[1::2])


def test_the_model_hands_the_number_of_updates_on(params):
  model = light(noise_steps=10)
  observation = random_observation(model, lengths=(8, 5))
  rngs = {"noise": jax.random.key(0)}
  run = jax.jit(
    lambda p, o, updates: model.apply({"params": p}, o, train=True, updates=updates, rngs=rngs).intermediates
  )
  early, late = (run(params, observation, jnp.int32(updates)) for updates in (0, 10))
  assert (early["visual_picks"] != late["visual_picks"]).any()
  assert early["hidden"].shape[1] == early["sequence"].shape[1]


def test_choices_are_hard_and_their_gradient_is_that_of_the_softmax():
  rng = np.random.default_rng(0)
  wanted = jnp.asarray(rng.normal(size=(1, 6, 6)), jnp.float32)
  patches, direction = (jnp.asarray(rng.normal(size=(1, n, 8)), jnp.float32) for n in (6, 6))
  picks = jnp.argmax(wanted, axis=-1)
  made = straight_through(wanted, picks, patches)
  np.testing.assert_allclose(made, jnp.take_along_axis(patches, picks[..., None], axis=1), atol=1e-6)
  ours = jax.grad(lambda w: (straight_through(w, picks, patches) * direction).sum())(wanted)
  soft = jax.grad(lambda w: (jnp.einsum("bij,bjd->bid", jax.nn.softmax(w), patches) * direction).sum())(wanted)
  np.testing.assert_allclose(ours, soft, atol=1e-6)
  hard = jax.grad(lambda p: (straight_through(wanted, picks, p) * direction).sum())(patches)
  want = jax.grad(lambda p: (jnp.take_along_axis(p, picks[..., None], axis=1) * direction).sum())(patches)
  np.testing.assert_allclose(hard, want, atol=1e-6)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"decoder_pruner": LIGHT | {"block": 1}}, "block=0 with score='light'"),
    ({"decoder_pruner": LIGHT | {"noise_steps": 0}}, "noise_steps from 1, or None"),
    ({"decoder_pruner": dict(block=1, keep=4, noise_steps=9), "scan": False}, "noise_steps with score='light' alone"),
    ({"decoder_pruner": LIGHT, "mask": "block"}, r"set model\.mask='full'"),
  ],
)
def test_values_that_no_model_has(changes, message):
  with pytest.raises(ValueError, match=message):
    checks.check(resolve({"variant": "tiny", "keep": 8} | OFT | changes))
