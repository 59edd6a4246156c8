"""FAST's tokens in the model: decoding as on the host, and chunks that are whole by construction."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, random_observation, random_params

from semanticvla_jax.action_tokens import ActionTokenizer
from semanticvla_jax.data import fit_action_tokens
from semanticvla_jax.models import fast
from semanticvla_jax.models.semanticvla import STOP, build

OPENVLA = dict(dino_pruner=None, siglip_pruner=None, film=(), dense_fuser=None, vision_layer="second_to_last")
OPENVLA |= dict(coupler=None, mask="causal", chunk=2)
VOCAB = 448  # of the tiny language model's tokenizer


@functools.cache
def tokenizer(k=2, vocab=100):
  rng = np.random.default_rng(0)
  return fit_action_tokens.fit(rng.normal(0, 0.1, (200, k, 7)).astype(np.float32), "bounds_q99", vocab)


@pytest.mark.parametrize("k", [2, 8, 25])
def test_the_device_decodes_to_the_last_bit_what_the_host_does(k):
  own = tokenizer(k, 300)
  actions = np.random.default_rng(k).uniform(-1, 1, (30, k, 7)).astype(np.float32)
  actions[:15] *= 0.1  # of which tokens merge
  labels = own.labels(actions, VOCAB, STOP)
  ids = jnp.asarray(np.where(labels < 0, STOP, labels))
  found, whole = jax.jit(lambda ids: fast.actions(ids, own, VOCAB))(ids)
  assert whole.all()
  np.testing.assert_array_equal(found, own.decode(own.encode(actions)))


def test_anything_but_a_whole_chunk_is_one_of_zero_coefficients():
  own = tokenizer()
  good = own.labels(np.full((1, 2, 7), 0.3, np.float32), VOCAB, STOP)[0]
  good, n = np.where(good < 0, STOP, good), int((good >= 0).sum()) - 1
  short, long, foreign, after = good.copy(), good.copy(), good.copy(), good.copy()
  short[n - 1] = STOP
  long[n] = VOCAB - 1 - own.largest  # one more coefficient
  foreign[0] = 5
  after[n + 1] = 7  # behind </s> nothing counts
  found, whole = fast.actions(jnp.asarray([good, short, long, foreign, after]), own, VOCAB)
  assert whole.tolist() == [True, False, False, False, True]
  assert (np.asarray(found)[1:4] == 0).all() and np.abs(np.asarray(found)[[0, 4]] - 0.3).max() <= own.error_bound


@functools.cache
def spoken(decoding, scale=3.0):
  own = tokenizer()
  model = build(TINY | OPENVLA | {"codec": own, "decoding": decoding})
  observation = random_observation(model, batch=4, lengths=[8, 6, 7, 8])

  @jax.jit
  def say(params, observation):
    out = model.apply({"params": params}, observation)
    return out.actions, out.intermediates

  return [jax.tree.map(np.asarray, say(random_params(model, seed, scale), observation)) for seed in range(3)]


def test_constrained_chunks_are_whole_whatever_the_model_would_say():
  own = tokenizer()
  for actions, seen in spoken("constrained"):
    assert not seen["malformed"].any() and actions.shape == (4, 2, 7)
    stopped = seen["ids"] == STOP
    count = stopped.argmax(axis=1)  # tokens before </s>, behind which there is nothing else
    assert (stopped == (np.arange(15) >= count[:, None])).all() and seen["passes"] == count.max() - 1
    tokens = np.where(stopped, -1, VOCAB - 1 - seen["ids"])
    np.testing.assert_array_equal(own.decode(tokens), actions)


def test_unconstrained_chunks_of_a_random_model_are_malformed_and_zero():
  for actions, seen in spoken("greedy"):
    assert seen["malformed"].all() and (actions == 0).all()
    assert seen["passes"] <= 14


def test_a_constraint_changes_the_first_token_only_where_it_may_not_come():
  """Greedy decoding under a constraint that bars nothing: the same token where the model's own choice is an action."""
  own = tokenizer()
  for (_, free), (_, bound) in zip(spoken("greedy"), spoken("constrained")):
    first = free["ids"][:, 0]
    fits = fast.id_lengths(own, VOCAB, 512)[first] > 0
    assert (bound["ids"][:, 0] == first)[fits].all()


def test_a_config_of_json_values_builds_the_same_model():
  own = tokenizer()
  as_json = json.loads(json.dumps(own.to_json()))
  fields = TINY | OPENVLA | {"decoding": "constrained"}
  assert build(fields | {"codec": as_json}) == build(fields | {"codec": own})
  with pytest.raises(ValueError, match="model.codec holds no action tokens"):
    build(fields | {"codec": {"kind": "bins"}})


def test_what_does_not_fit_together():
  cases = {
    r"codec='slow'; expected one of \('bins', 'fast'\)": {"codec": "slow"},
    "decoding='constrained'; expected another one with codec='bins'": {"decoding": "constrained"},
    "decoding='jacobi'; expected 'constrained' or 'greedy'": {"codec": "fast", "decoding": "jacobi"},
    "codec='fast'; expected 'bins' with coupler='single'": {"codec": "fast", "coupler": "single"},
    r"action tokens of chunks \(2, 7\); expected \(4, 7\)": {"codec": tokenizer(), "chunk": 4},
    "got 449 action tokens; expected at most 445": {"codec": ActionTokenizer(2, 7, merges=((0, 0),) * 420)},
  }
  for words, fields in cases.items():
    with pytest.raises(ValueError, match=words):
      build(TINY | OPENVLA | fields)
