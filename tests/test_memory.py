"""A policy whose answers depend on earlier queries of an episode: what it remembers, of whom, and until when."""

import numpy as np
import policies
import pytest

from semanticvla_jax.exported import ExportedPolicy
from semanticvla_jax.serve import server

SEEN = [policies.observation(i) for i in range(5)]
OTHER = [policies.observation(10 + i, prompt="pick up the green ball") for i in range(5)]


@pytest.fixture(scope="module")
def ready():
  return policies.remembering(batch_sizes=(1, 2))


def asked(policy, observations):
  """The actions of an episode's queries."""
  policy.reset()
  return [policy.infer(one)["actions"] for one in observations]


def test_a_reset_makes_the_next_query_a_first_one(ready):
  first, *_ = asked(ready, SEEN)
  later = asked(ready, [*OTHER, SEEN[0]])[-1]
  assert np.abs(later - first).max() > 1e-3 and len(ready.memories) == 1
  ready.reset()
  assert not ready.memories
  np.testing.assert_array_equal(ready.infer(SEEN[0])["actions"], first)
  ready.reset()
  np.testing.assert_array_equal(ready.device_step(ready.observe(SEEN[:1])), ready.device_step(ready.observe(SEEN[:1])))
  assert not ready.memories, "a device step is a first query"


def test_episodes_in_batches_are_each_alone(ready):
  """In any place of a batch, in parts of the largest size, with another episode's queries between."""
  alone = [asked(ready, SEEN), asked(ready, OTHER), asked(ready, OTHER)]
  ready.reset()
  for i in range(5):
    names, rows = ["a", 7, None], [SEEN[i], OTHER[i], OTHER[i]]
    order = [[0, 1, 2], [2, 0, 1]][i % 2]
    found = ready.infer_batch([rows[j] for j in order], [names[j] for j in order])
    for j, one in zip(order, found):
      np.testing.assert_allclose(one["actions"], alone[j][i], atol=1e-5)
  assert {*ready.memories} == {"a", 7, None}
  ready.reset(["a", "unknown"])
  np.testing.assert_allclose(ready.infer_batch([SEEN[0]], ["a"])[0]["actions"], alone[0][0], atol=1e-5)
  for names in (["a", "a"], ["a"]):
    with pytest.raises(ValueError, match="1 episodes for 2 observations; expected one episode each"):
      ready.infer_batch(SEEN[:2], names)


def test_copies_remember_for_themselves(ready):
  asked(ready, SEEN)
  assert not ready.blind().memories and len(ready.memories) == 1
  plain = ready.variant(decoder_pruner=None)
  plain.infer(SEEN[0])
  assert ready.remembers and not plain.remembers and not plain.memories


def test_an_exported_one_answers_alike(ready, tmp_path):
  ready.export(tmp_path / "policy.svla", platforms=("cpu",))
  loaded = ExportedPolicy.load(tmp_path / "policy.svla")
  assert loaded.remembers
  np.testing.assert_array_equal(asked(loaded, SEEN), asked(ready, SEEN))
  with pytest.raises(ValueError, match="--policy: got one that remembers earlier queries"):
    server.load(tmp_path / "policy.svla", sizes=(1,))
