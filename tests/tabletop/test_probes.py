"""Suites for measurement: what they change of `place`, and that nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.tabletop import expert, physics, probes, render, tasks
from semanticvla_jax.tabletop.tasks import COLORS, FOOT, NONE, SHAPES

COUNT = 32  # episodes looked at
STEPS = tasks.max_steps("place")


@functools.cache
def states(suite: str, split: str = "heldout") -> tasks.State:
  """First states of the first episodes, as numpy arrays."""
  draw = jax.vmap(lambda seed: probes.reset(tasks.seed_key(seed, split), suite, split))
  return jax.tree.map(np.asarray, jax.jit(draw)(jnp.arange(COUNT)))


RUN = jax.jit(jax.vmap(lambda state: expert.rollout_from(state, jax.random.key(0), 0.0, STEPS)))


@functools.cache
def rollouts(suite: str) -> expert.Rollout:
  """The expert on them; one program for all ambiguous suites."""
  return RUN(states(suite))


def equal(one: tasks.State, other: tasks.State, but: tuple[str, ...] = ()) -> None:
  """Compares all fields of two states, except some."""
  for name in set(one.__dataclass_fields__) - {*but}:
    a, b = getattr(one, name), getattr(other, name)
    assert (a is None) == (b is None), name
    np.testing.assert_array_equal(a, b, err_msg=name)


def test_two_distractors_are_suite_place():
  equal(states("place_clutter2"), states("place"))


@pytest.mark.slow
def test_each_number_adds_one_distractor():
  for n in (0, 1, 2, 7):
    fewer, more = states(f"place_clutter{n}"), states(f"place_clutter{n + 1}")
    equal(fewer, more, but=("kind", "color", "center", "yaw", "origin"))
    count = (fewer.kind != NONE).sum(axis=1)
    np.testing.assert_array_equal(count, n + 3)  # the target and two bowls
    np.testing.assert_array_equal((more.kind != NONE).sum(axis=1), count + 1)
    stays = fewer.kind != NONE
    np.testing.assert_array_equal(fewer.center[stays], more.center[:, : fewer.kind.shape[1]][stays])


@pytest.mark.parametrize("split", ["heldout", "unseen"])
def test_the_most_cluttered_table_names_one_object_and_has_room(split):
  found, gaps = states("place_clutter8", split), []
  for kind, color, center in zip(found.kind, found.color, found.center[..., :2]):
    solid = ~np.isin(np.arange(len(kind)), (3, 4))
    things = list(zip(kind[solid], color[solid]))
    assert len(set(things)) == len(things) == 9 and kind[solid].max() < tasks.PEG
    names = {(COLORS[c], SHAPES[k]) for k, c in things}
    assert split == "unseen" or not names & tasks.HELD_OUT
    gap = np.linalg.norm(center[:, None] - center, axis=-1) - FOOT[kind][:, None] - FOOT[kind]
    gaps.append(gap[~np.eye(len(kind), dtype=bool)].min())
    assert np.abs(center).max() < 0.2
  assert min(gaps) > 0 and np.mean(gaps) > 0.008, (min(gaps), np.mean(gaps))


def test_the_expert_succeeds_among_eight_distractors():
  assert np.mean(np.asarray(rollouts("place_clutter8").first) < STEPS) >= 0.9


def test_further_distractors_are_seen_and_can_be_pushed():
  state = jax.tree.map(lambda x: x[0], states("place_clutter8"))
  seen = np.asarray(jax.jit(lambda s: render.visible_objects(s, 64))(state))[0]
  assert {*range(5, 11)} <= {*np.unique(seen)}
  last = state.replace(position=np.append(state.center[10, :2] - np.array([0.06, 0.0]), 0.025), finger=np.float32(0.0))
  for _ in range(2):
    last = jax.jit(physics.step)(last, jnp.array([1.0, 0, 0, 0, 0, 0, 1.0]))
  assert float(last.center[10, 0] - state.center[10, 0]) > 0.02


@pytest.mark.parametrize("suite", [*probes.AMBIGUOUS])
def test_several_objects_fit_the_words_and_any_of_them_will_do(suite):
  found, place = states(suite), states("place")
  equal(found, place, but=("fitting", "instruction", "kind", "color"))
  assert (found.fitting.sum(axis=1) >= 2).all() and found.fitting[:, 0].all() and not found.fitting[:, 3:].any()
  for i in range(COUNT):
    sentence = probes.SENTENCES[found.instruction[i]]
    assert sentence in probes.instructions(suite)
    words = sentence.split(" and ")[0].split()
    for kind, color, fits in zip(found.kind[i, :3], found.color[i, :3], found.fitting[i]):
      meant = {"twins": [COLORS[color], SHAPES[kind]], "shape": [SHAPES[kind]], "color": [COLORS[color], "one"]}
      assert fits == (words[3:] == meant[suite.removeprefix("place_")])
    assert sentence.endswith(f"the {COLORS[found.color[i, 3]]} bowl")

  result = rollouts(suite)  # of the first of them
  assert np.mean(np.asarray(result.first) < STEPS) >= 0.95
  at = (np.arange(COUNT), np.minimum(result.first + 1, STEPS - 1))
  end = jax.tree.map(lambda x: np.asarray(x)[at], result.states)
  other = np.argmax(found.fitting[:, 1:3], axis=1) + 1  # another of them, where the first was laid
  swapped = np.array(end.center)
  rows = np.arange(COUNT)
  swapped[rows, 0], swapped[rows, other] = end.center[rows, other], end.center[rows, 0]
  done = jax.jit(jax.vmap(physics.success))
  ends = done(end)
  heights = tasks.HALF[end.kind[rows, 0], 2] == tasks.HALF[end.kind[rows, other], 2]
  np.testing.assert_array_equal(np.asarray(done(end.replace(center=swapped)))[heights], np.asarray(ends)[heights])
  alone = end.replace(center=swapped, fitting=None)
  assert not np.asarray(done(alone)).any() and np.mean(ends) >= 0.95


def test_names_that_do_not_exist():
  with pytest.raises(ValueError, match="did you mean 'place_clutter"):
    physics.reset(physics.seed_key(0), "place_clutter9")
  with pytest.raises(ValueError, match="did you mean 'place_twins'"):
    probes.instructions("place_twin")
