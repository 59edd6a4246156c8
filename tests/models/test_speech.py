"""Action tokens of a chunk: spoken one by one, and all at once until they stay."""

import functools

import jax
import numpy as np
import pytest
from helpers import TINY, random_observation, random_params

from semanticvla_jax.models.semanticvla import build

OPENVLA = dict(dino_pruner=None, siglip_pruner=None, film=(), dense_fuser=None, vision_layer="second_to_last")
OPENVLA |= dict(coupler=None, mask="causal", chunk=2)


@functools.cache
def spoken(decoding):
  model = build(TINY | OPENVLA | {"decoding": decoding})
  observation = random_observation(model, lengths=[8, 6])
  say = jax.jit(lambda p, o: (model.apply({"params": p}, o, method="generate"), model.apply({"params": p}, o).actions))
  return jax.tree.map(np.asarray, say(random_params(model, scale=3.0), observation))


def test_jacobi_says_what_greedy_decoding_does():
  greedy, actions = spoken("greedy")
  found, same = spoken("jacobi")
  np.testing.assert_array_equal(found.ids, greedy.ids)
  np.testing.assert_allclose(found.logits, greedy.logits, atol=2e-4)
  np.testing.assert_array_equal(same, actions)
  assert actions.shape == (2, 2, 7) and len({*greedy.ids[0].tolist()}) > 2, "tokens that differ"
  assert greedy.passes == 14 and 2 <= found.passes <= 14


def test_guesses_that_see_one_another_end_too():
  found, actions = spoken("jacobi_bidirectional")
  greedy, _ = spoken("greedy")
  np.testing.assert_array_equal(found.ids[:, 0], greedy.ids[:, 0])
  assert found.passes <= 14 and np.isfinite(actions).all()
  assert (found.ids != greedy.ids).any()


def test_a_decoding_that_does_not_exist():
  with pytest.raises(ValueError, match="decoding='beam'; expected one of"):
    build(TINY | OPENVLA | {"decoding": "beam"})
