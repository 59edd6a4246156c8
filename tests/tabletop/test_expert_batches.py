"""Batches made on the device by the tabletop's expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.data import text
from semanticvla_jax.tabletop import auxiliary_losses, expert_batches, physics, render, tasks

IMAGE, PATCH = 48, 8


@pytest.fixture(scope="module")
def batch():
  tokenizers = text.load(prompt_length=32, instruction_length=24)
  stats = expert_batches.measure(episodes=64)
  make = expert_batches.make_batches(
    batch_size=64,
    chunk=4,
    image=IMAGE,
    patch=PATCH,
    suites=(1, 1, 0, 0, 0, 0),
    tokenizers=tokenizers,
    stats=stats,
    seed=0,
  )
  return make, make(3), tokenizers


def test_shapes_ranges_and_determinism(batch):
  make, b, _ = batch
  assert b.observation.images.shape == (64, 2, IMAGE, IMAGE, 3) and b.observation.images.dtype == jnp.uint8
  assert b.actions.shape == (64, 4, 7) and b.action_mask.shape == (64, 4)
  assert np.abs(b.observation.proprio).max() <= 1 and np.abs(b.actions).max() <= 1
  assert set(np.unique(b.actions[..., 6])) <= {0.0, 1.0}  # 1 open, 0 closed, not normalized
  assert b.action_mask[:, 0].all() and not b.action_mask.all()  # moments lie before success, chunks may pass it
  again, other = make(3), make(4)
  jax.tree.map(np.testing.assert_array_equal, again, b)
  assert (np.asarray(other.observation.images) != np.asarray(b.observation.images)).any()
  targets = b.aux
  totals = np.asarray(targets.where.sum(axis=-1))  # [b g v]
  assert totals.shape == (64, 4, 2) and np.all(np.isclose(totals, 1) | np.isclose(totals, 0))
  assert totals[:, :, 0].mean() > 0.9  # the agent sees nearly all
  assert targets.words.shape == (64, 3, 24) and np.abs(targets.displacement).max() < 6


def test_prompts_are_those_of_the_instructions(batch):
  _, b, tokenizers = batch
  known = {tuple(ids) for ids in tokenizers.prompt(tasks.instructions("pick") + tasks.instructions("place"))[0]}
  assert {tuple(ids) for ids in np.asarray(b.observation.prompt)} <= known


def test_projection_lands_on_the_object():
  """In the agent's view, the pixel where the target should be has the target's hue in most scenes."""
  keys = jax.vmap(lambda i: physics.seed_key(i, "heldout"))(jnp.arange(64))
  states = jax.jit(jax.vmap(lambda key: tasks.reset(key, tasks.PICK, "heldout")))(keys)
  views = jax.jit(jax.vmap(lambda s: render.views(s, 96)))(states)
  at = jax.vmap(lambda s: render.project(s, s.center[s.target[0]]))(states)[:, 0]
  row, column = np.floor(np.asarray(at) * 96).astype(int).T
  pixels = np.asarray(views)[np.arange(64), 0, row, column].astype(float)
  colors = render.PALETTE[np.asarray(states.color)[np.arange(64), np.asarray(states.target[:, 0])]]
  cosine = (pixels * colors).sum(-1) / np.linalg.norm(pixels, axis=-1) / np.linalg.norm(colors, axis=-1)
  assert (cosine > 0.97).mean() > 0.85


def test_targets_name_the_objects_and_where_they_are():
  states = jax.jit(jax.vmap(lambda i: tasks.reset(physics.seed_key(i), tasks.PLACE)))(jnp.arange(16))
  found = jax.jit(jax.vmap(lambda s: expert_batches.targets(s, IMAGE // PATCH)))(states)
  where, sentences, away, shapes, edges, aim = (np.asarray(x) for x in found)
  project = jax.jit(render.project)
  np.testing.assert_array_equal(aim, edges[:, 0])  # object 0 is the target
  for i in range(16):
    state = jax.tree.map(lambda x: x[i], states)  # noqa: B023
    for j in range(3):
      shape, color = tasks.SHAPES[states.kind[i, j]], tasks.COLORS[states.color[i, j]]
      assert tasks.INSTRUCTIONS[sentences[i, 1 + j]] == f"pick up the {color} {shape}"
      assert tasks.SHAPES[shapes[i, j]] == shape
      yaw = np.arctan2(edges[i, j, :, 1], edges[i, j, :, 0]) / 4  # the gripper hangs straight: both views agree
      np.testing.assert_allclose(yaw, states.yaw[i, j] if shape == "cube" else 0, atol=1e-5)
    assert tasks.INSTRUCTIONS[sentences[i, 0]] == tasks.INSTRUCTIONS[states.instruction[i]]
    row, column = np.divmod(np.arange(36), 6)
    for j in range(3):  # the mean of a distribution is where the object is, to within the picture's border
      at = np.asarray(project(state, state.center[j]))[0] * 6 - 0.5
      if (at > 0).all() and (at < 5).all():
        np.testing.assert_allclose([where[i, 1 + j, 0] @ row, where[i, 1 + j, 0] @ column], at, atol=1e-4)
  reach = np.asarray(states.center[:, 3] - states.position) / 0.1  # the bowl
  np.testing.assert_allclose(away[:, 3:6], reach, atol=1e-5)
  turn = jnp.asarray(away[0, 6:] * auxiliary_losses.TURN)
  turned = physics.compose(turn, states.rotation[0])  # where the expert will have turned
  assert np.abs(turned[:2]).max() < 1e-5 and abs(turned[2]) < np.pi / 2


def test_out_of_sight_is_outside():
  state = jax.jit(lambda: tasks.reset(physics.seed_key(0), tasks.PICK))()
  behind = render.project(state, jnp.array([0.0, -2.0, 0.6]))
  assert (np.asarray(behind[0]) < 0).all()


@pytest.mark.slow
def test_a_fraction_of_initial_states():
  """`reset` lets the gripper hang straight, and noise turns it at every step; two of five starts are perturbed."""
  keys, suites = jax.random.split(jax.random.key(0), 128), jnp.array([1.0, 0, 0, 0, 0, 0])
  sample = lambda key, share: expert_batches.sample_state(key, suites, "train", share)  # noqa: E731
  make = jax.jit(jax.vmap(sample, in_axes=(0, None)))
  straight = [float(jnp.all(make(keys, share).rotation == 0, axis=-1).mean()) for share in (0.0, 1.0)]
  assert straight[0] < 0.2 and 0.45 < straight[1] < 0.75


@pytest.mark.slow
def test_a_fraction_of_strongly_rotated_cubes():
  keys = jax.random.split(jax.random.key(0), 256)

  def make(fraction):
    return jax.jit(jax.vmap(lambda key: expert_batches.initial_state(key, jnp.asarray(0), "train", fraction)))(keys)

  def share(fraction):
    states = make(fraction)
    i, target = jnp.arange(256), states.target[:, 0]
    turned = jnp.abs(tasks.angle_between(states.yaw[i, target], np.pi / 2))
    return float(((states.kind[i, target] == tasks.CUBE) & (turned > 0.35)).mean())

  assert share(0.0) < 0.17 and share(1.0) > 0.3
  plain = jax.jit(jax.vmap(lambda key: tasks.reset(key, jnp.asarray(0), "train")))(keys)
  jax.tree.map(np.testing.assert_array_equal, make(0.0), plain)
