"""What a decoder pruner remembers between queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, random_observation, random_params

from semanticvla_jax.models import checks
from semanticvla_jax.models.config import VARIANTS, resolve
from semanticvla_jax.models.history import History
from semanticvla_jax.models.semanticvla import build

THREE = VARIANTS["tiny"] | {"llm": VARIANTS["tiny"]["llm"] | {"depth": 3}}
OFT = dict(dino_pruner=None, siglip_pruner=None, film=(), dense_fuser=None, vision_layer="second_to_last")
OFT |= dict(coupler="single", mask="full", chunk=2, scan=False, variant=THREE)
PATCHES, KEEP = 64, 6  # of a view
NOW = dict(block=1, keep=KEEP, score="mean+action")
HERE, LATER = (NOW | {"history": dict(window=3, decay=0.8, block=block)} for block in (0, 1))


class Query:
  """A tiny OpenVLA-OFT: (observation, memory) → Output, without the intermediates but the kept tokens."""

  def __init__(self, pruner):
    self.model = build(TINY | OFT | {"decoder_pruner": pruner})
    self.params = random_params(self.model, 1)

    @jax.jit
    def run(params, observation, memory):
      out = self.model.apply({"params": params}, observation, memory=memory)
      return out.replace(intermediates={"kept_visual": out.intermediates["kept_visual"]})

    self._run = run

  def __call__(self, observation, memory=None):
    if memory is None and self.model.remembers:
      memory = History().empty(len(observation.images), 2 * PATCHES)
    return self._run(self.params, observation, memory)

  def kept(self, observations):
    """The kept tokens at the last of several queries."""
    memory = None
    for one in observations:
      out = self(one, memory)
      memory = out.memory
    return np.asarray(out.intermediates["kept_visual"])


query = functools.cache(lambda name: Query({"now": NOW, "here": HERE, "later": LATER}[name]))


def seen(seed=0):
  return random_observation(query("now").model, lengths=(8, 5), seed=seed)


def rows_of(tree, *rows):
  return jax.tree.map(lambda x: x[np.array(rows)], tree)


def test_without_history_nothing_is_remembered():
  assert query("now")(seen()).memory is None and not query("now").model.remembers


def test_the_same_query_again_is_what_it_expects():
  """Of the layer that scores, three equal queries expect what the fourth finds: VLA-Pruner without a history."""
  now = query("now").kept([seen()])
  np.testing.assert_array_equal(query("here").kept([seen()] * 4), now)
  assert (query("here").kept([seen()] * 3) != now).any()


def test_until_the_history_is_full_the_other_score_decides():
  other = Query(dict(block=1, keep=KEEP, score="mean"))
  for name in ("here", "later"):
    for queries in ([0], [1, 0], [1, 2, 0]):
      np.testing.assert_array_equal(query(name).kept([seen(i) for i in queries]), other.kept([seen()]))
  assert (query("later").kept([seen(i) for i in (1, 2, 3, 0)]) != other.kept([seen()])).any()


def test_a_memory_of_none_is_an_empty_one():
  model, params = query("later").model, query("later").params
  first = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, seen())
  same = query("later")(seen())
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), (first.actions, first.memory), (same.actions, same.memory)
  )


def test_what_is_remembered_is_the_attention_of_the_actions_to_what_was_kept():
  """Dropping and hiding remember the same: 0 at what the layer did not see, positive at what it saw."""
  hidden = Query(LATER | {"form": "mask"})
  memories = [query("later")(seen()).memory] * 3
  memories = [None, *(one | {"queries": jnp.full(2, 3)} for one in memories[:1])]
  for memory in memories:
    dropped, masked = query("later")(seen(1), memory), hidden(seen(1), memory)
    np.testing.assert_array_equal(dropped.intermediates["kept_visual"], masked.intermediates["kept_visual"])
    np.testing.assert_allclose(dropped.actions, masked.actions, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), dropped.memory, masked.memory)
    newest = np.asarray(dropped.memory["attention"][:, 0])
    assert [np.flatnonzero(row).tolist() for row in newest] == np.asarray(dropped.intermediates["kept_visual"]).tolist()


def test_the_newest_weighs_most_and_the_oldest_is_forgotten():
  history = History(window=3, decay=0.5, block=0)
  memory = history.empty(1, 4)
  for i in range(4):
    assert np.asarray(history.estimate(memory)[1]).tolist() == [i >= 3]
    memory = history.add(memory, jax.nn.one_hot(jnp.array([i]), 4))
  expected, known = history.estimate(memory)
  np.testing.assert_allclose(expected, np.array([[0, 1, 2, 4]]) / 7, rtol=1e-6)
  assert np.asarray(known).all() and np.asarray(memory["queries"]).tolist() == [3]


def test_episodes_in_one_batch_do_not_touch_each_other():
  """Of two interleaved episodes one begins later; in a batch both choose what they choose alone."""
  run, both = query("later"), None
  long, short = [rows_of(seen(i), 0) for i in range(5)], [rows_of(seen(10 + i), 1) for i in range(4)]
  alone = [run.kept(long), run.kept(short)]
  memory = run(long[0]).memory
  fresh = jax.tree.map(jnp.zeros_like, memory)
  memory = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), memory, fresh)
  for one, other in zip(long[1:], short, strict=True):
    both = run(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, other), memory)
    memory = both.memory
  np.testing.assert_array_equal(both.intermediates["kept_visual"], np.concatenate(alone))
  assert np.asarray(memory["queries"]).tolist() == [3, 3]


@pytest.mark.parametrize(
  "pruner, message",
  [
    (NOW | {"history": 3}, "a history of None or a dict of"),
    (NOW | {"history": {"length": 3}}, r"a dict of \('window', 'decay', 'block'\)"),
    (NOW | {"history": {"block": 0, "window": 0}}, "window from 1"),
    (NOW | {"history": {"block": 0, "decay": 0.0}}, "decay above 0 and at most 1"),
    (NOW | {"history": {"block": 2}}, "block from 0, the layer of the score, to 1, the last but one"),
    (NOW | {"block": 2, "history": {"block": 0}}, "block from 1, the layer of the score"),
    (dict(block=1, keep=KEEP, score="action", history={"block": 0}), "score='mean\\+action' alone"),
  ],
)
def test_values_that_no_model_has(pruner, message):
  with pytest.raises(ValueError, match=f"decoder_pruner=.*{message}"):
    checks.check(resolve(TINY | OFT | {"decoder_pruner": pruner}))
