"""The expert: it succeeds in every suite, in every split, from anywhere, and what it does is what a policy can do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.tabletop import expert, physics, tasks

SEEDS = 128
STEPS = max(tasks.MAX_STEPS)


@functools.partial(jax.jit, static_argnames="split")
def starts(split: str) -> tuple[tasks.State, jax.Array]:
  """SEEDS first states of each suite, and a key for each."""
  keys = jax.vmap(lambda seed: physics.seed_key(seed, split))(jnp.tile(jnp.arange(SEEDS), len(tasks.SUITES)))
  suites = jnp.repeat(jnp.arange(len(tasks.SUITES)), SEEDS)
  return jax.vmap(lambda key, suite: physics.reset(key, suite, split))(keys, suites), keys


@jax.jit
def run(states: tasks.State, keys: jax.Array, noise: float) -> expert.Rollout:
  """Batched rollouts."""
  return jax.vmap(lambda state, key: expert.rollout_from(state, key, noise, STEPS))(states, keys)


@pytest.fixture(scope="module")
def clean() -> expert.Rollout:
  """Rollouts without noise from first states of the training split."""
  return run(*starts("train"), 0.0)


def rates(result: expert.Rollout) -> dict:
  """Success within the steps allowed, by suite."""
  inside = np.asarray(result.first).reshape(-1, SEEDS) < np.array(tasks.MAX_STEPS)[:, None]
  return dict(zip(tasks.SUITES, inside.mean(1)))


def test_the_expert_succeeds_in_every_suite(clean):
  assert min(rates(clean).values()) >= 0.99, rates(clean)
  ever = np.asarray(clean.success.any(1))
  np.testing.assert_array_equal(clean.first, np.where(ever, np.argmax(clean.success, 1), STEPS))


def test_its_actions_leave_room_for_noise(clean):
  actions = np.asarray(clean.actions)
  assert np.linalg.norm(actions[..., :3], axis=-1).max() <= expert.SPEED + 1e-5
  assert np.linalg.norm(actions[..., 3:6], axis=-1).max() <= expert.SPEED + 1e-5
  assert set(np.unique(actions[..., 6])) == {-1.0, 1.0}
  np.testing.assert_array_equal(actions[..., 6], clean.executed[..., 6])


@pytest.mark.slow
def test_it_recovers_from_any_moment_and_from_noise():
  states, keys = starts("unseen")
  changed = jax.jit(jax.vmap(expert.perturbed_state))(keys, states)
  assert not jax.jit(jax.vmap(physics.success))(changed).any()
  held = np.asarray(changed.held)
  assert 0.3 < np.mean(held >= 0) < 0.5 and np.any((held >= 0) & (held != np.asarray(changed.target[:, 0])))
  result = run(changed, keys, 0.2)
  assert min(rates(result).values()) >= 0.97, rates(result)
  assert jnp.abs(result.executed).max() <= 1.0 and jnp.abs(result.executed - result.actions).max() > 0.1

  few = slice(0, None, 96)  # the executed actions lead from each state to the next
  before = jax.tree.map(lambda x: x[few, :-1].reshape(-1, *x.shape[2:]), result.states)
  expected = jax.tree.map(lambda x: x[few, 1:].reshape(-1, *x.shape[2:]), result.states)
  after = jax.jit(jax.vmap(physics.step))(before, result.executed[few, :-1].reshape(-1, 7))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=0), after, expected)


def test_rollout_draws_its_own_episode():
  result = jax.eval_shape(lambda key: expert.rollout(key, "long", "unseen", 0.1, 7), physics.seed_key(0, "unseen"))
  assert result.actions.shape == (7, 7) and result.states.center.shape == (7, tasks.MAX_OBJECTS, 3)
