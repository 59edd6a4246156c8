"""Visual tokens that later layers of the decoder do without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, jit_apply, random_observation, random_params, wide

from semanticvla_jax.models import checks
from semanticvla_jax.models.config import resolve
from semanticvla_jax.models.decoder_pruner import (
  ATTENTION,
  CONTROLS,
  DecoderPruner,
  Spans,
  most_different,
  raters,
  rows,
)
from semanticvla_jax.models.llama import attention_weights
from semanticvla_jax.models.semanticvla import build

OFT = dict(dino_pruner=None, siglip_pruner=None, film=(), dense_fuser=None, vision_layer="second_to_last")
OFT |= dict(coupler="single", mask="full", chunk=2, scan=False)
PATCHES = 64  # of a view at `tiny`


def act(lengths=None, double=False, **pruner):
  """(actions, intermediates) of a tiny OpenVLA-OFT with a decoder pruner; `double`: its decoder in float64."""
  model = build(TINY | OFT | {"decoder_pruner": pruner or None})
  params, observation = random_params(model, 1), random_observation(model, lengths=lengths)
  with jax.enable_x64(double):
    out = jit_apply(wide(model) if double else model)(params, observation)
  return np.asarray(out.actions), out.intermediates


@pytest.fixture(scope="module")
def dense():
  return act()


def test_all_kept_is_no_pruning_bit_for_bit(dense):
  for score in ("last", "random"):
    np.testing.assert_array_equal(act(block=1, keep=PATCHES, score=score)[0], dense[0])


@pytest.mark.parametrize("score", ["last", "raters", "mean+action"])
def test_dropping_gives_what_hiding_gives(dense, score):
  case = dict(lengths=(8, 5), double=True, block=1, keep=6, score=score)
  dropped, seen = act(**case)
  hidden, _ = act(**case, form="mask")
  np.testing.assert_allclose(dropped, hidden, atol=1e-6)
  kept = np.asarray(seen["kept_visual"])
  assert (np.diff(kept) > 0).all() and ((kept < PATCHES).sum(axis=1) == 6).all(), "ascending, of each view as many"
  assert seen["hidden"].shape[1] == seen["sequence"].shape[1] - 2 * (PATCHES - 6)
  assert np.abs(dropped[0] - dense[0][0]).max() > 1e-4


def test_weights_are_those_of_the_attention():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(2, n, 3, 5)), jnp.float32) for n in (2, 5))
  mask = jnp.asarray(rng.random((2, 2, 5)) < 0.7).at[:, :, 0].set(True)
  values = jnp.broadcast_to(jnp.eye(5)[None, :, None], k.shape)
  want = jax.nn.dot_product_attention(q, k, values, mask=mask[:, None]).mean(axis=2)
  np.testing.assert_allclose(attention_weights(q, k, mask), want, atol=1e-6)


SPANS = Spans(views=2, visual=4, prompt=10, block=13, length=18, last=jnp.array([11, 12]))
PATCHES_OF_BOTH = jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 5)), jnp.float32)


def test_every_score_has_rows_of_its_own():
  parts = {part for score in ATTENTION for part in DecoderPruner(1, 2, score).parts}
  assert {part: np.asarray(rows(part, SPANS)[0]).tolist() for part in parts} == {
    "last": [11],
    "stop": [17],
    "mean": [*range(13)],
    "text": [10, 11, 12],
    "raters": [10, 11, 12],
    "action": [13, 14, 15, 16],
  }
  assert [DecoderPruner(1, 2, score).parts for score in CONTROLS] == [()] * len(CONTROLS)


def test_what_is_kept():
  weights = jnp.zeros((2, 3, 18)).at[0, 1, 3].set(0.5).at[0, 2, 4].set(9.0).at[0, :, 8].set(0.1).at[1, 0, 1].set(1.0)
  real = jnp.array([[True, True, False], [True, True, True]])
  kept = DecoderPruner(1, 1, "text").choose([weights], [real], PATCHES_OF_BOTH, SPANS)
  assert np.asarray(kept).tolist() == [[2, 7], [0, 4]], "padding does not count; ties go to the first"
  assert np.asarray(DecoderPruner(1, 1).positions(kept, SPANS))[0].tolist() == [0, 3, 8, *range(9, 18)]
  even = DecoderPruner(0, 2, "uniform").choose([], [], PATCHES_OF_BOTH, SPANS)
  assert np.asarray(even).tolist() == [[0, 2, 4, 6]] * 2
  both = DecoderPruner(1, 2, "mean+action")
  same = both.choose([weights] * 2, [real] * 2, PATCHES_OF_BOTH, SPANS)
  np.testing.assert_array_equal(same, DecoderPruner(1, 2).choose([weights], [real], PATCHES_OF_BOTH, SPANS))


def test_the_most_different_of_a_union():
  tokens = jnp.asarray([[[1, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 0.9, 0.1], [-1, 0, 0], [0, 0, 1]]], jnp.float32)
  everyone = jnp.ones((1, 6), bool)
  assert np.asarray(most_different(tokens, everyone, 4)).tolist()[0][-2:] == [4, 5]
  assert not {0, 1} <= {*np.asarray(most_different(tokens, everyone, 4))[0].tolist()}
  few = jnp.array([[True, False, False, True, False, True]])
  assert np.asarray(most_different(tokens, few, 3)).tolist() == [[0, 3, 5]], "as many as are wanted: all of them"


def test_raters_are_words_that_look_like_the_image():
  patches = jnp.tile(jnp.array([[[4.0, 0.0]]]), (2, 6, 1))
  words = jnp.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]] * 2)
  real = jnp.array([[True, True, True], [True, True, False]])
  assert np.asarray(raters(patches, words, real)).tolist() == [[True, False, True], [True, False, False]]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"decoder_pruner": 3}, "a dict of .*block and keep at least"),
    ({"decoder_pruner": {"block": 1}}, "a dict of"),
    ({"decoder_pruner": {"block": 1, "keep": 4, "score": "first"}}, "score one of .*'last'"),
    ({"decoder_pruner": {"block": 0, "keep": 4}}, "block from 1 to 1"),
    ({"decoder_pruner": {"block": 2, "keep": 4, "score": "random"}}, "block from 0 to 1"),
    ({"decoder_pruner": {"block": 1, "keep": 4}, "scan": True}, "set model.scan=False"),
    ({"decoder_pruner": {"block": 1, "keep": 4}, "coupler": None}, "speaks in tokens"),
  ],
)
def test_values_that_no_model_has(changes, message):
  with pytest.raises(ValueError, match=f"decoder_pruner=.*{message}"):
    checks.check(resolve({"variant": "tiny", "keep": 8} | OFT | changes))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"skip_layers": 1}, "different ones of the layers 0 to 1"),
    ({"skip_layers": (2,)}, "different ones of the layers 0 to 1"),
    ({"skip_layers": (0, 0)}, "different ones of the layers 0 to 1"),
    ({"skip_layers": (0,), "scan": True}, r"set model\.scan=False"),
    ({"skip_layers": (0, 1)}, "one of the layers 0 to 1 left"),
    ({"skip_layers": (1,), "decoder_pruner": {"block": 1, "keep": 4}}, "one of the layers 1 to 1 left"),
    ({"skip_layers": (0,), "decoder_pruner": {"block": 1, "keep": 4}}, "not layer 0, whose attention"),
  ],
)
def test_layers_that_cannot_be_left_out(changes, message):
  with pytest.raises(ValueError, match=f"skip_layers=.*{message}"):
    checks.check(resolve({"variant": "tiny", "keep": 8} | OFT | changes))


def test_a_layer_that_is_remembered_cannot_be_left_out():
  history = {"window": 3, "decay": 0.8, "block": 2}
  pruner = {"block": 1, "keep": 4, "score": "mean+action", "history": history}
  changes = {"variant": "small", "keep": 8, "skip_layers": (2,), "decoder_pruner": pruner}
  with pytest.raises(ValueError, match="skip_layers=.*not layer 2, whose attention"):
    checks.check(resolve(OFT | changes))
  checks.check(resolve(OFT | changes | {"skip_layers": (1,)}))


def test_more_than_there_are():
  with pytest.raises(ValueError, match=r"65 visual tokens of a view \(decoder_pruner\) to keep of 64"):
    act(block=1, keep=65)
