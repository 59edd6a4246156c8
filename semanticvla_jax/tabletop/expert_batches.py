"""Batches straight from the tabletop's expert, made on the device: no dataset, no TensorFlow, endless variety.

An example is a moment of an episode (the expert under noise, or a random moment from which the task can still be
done) with the views rendered there, and the undisturbed expert's next actions from that moment as its chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from semanticvla_jax.data import gripper, statistics
from semanticvla_jax.data.text import Tokenizers
from semanticvla_jax.tabletop import auxiliary_losses, expert, physics, render, tasks
from semanticvla_jax.tabletop.auxiliary_losses import PHRASES
from semanticvla_jax.types import Batch, Observation

NOISE = 0.3
EPISODE = 48  # steps of the noisy expert among which the moment is drawn
GRIPPER_PASSES = np.array([True] * 6 + [False])


def gripper_to_model(actions: Float[Array, "*b 7"]) -> Float[Array, "*b 7"]:
  """The gripper command −1 open, +1 closed → 1 open, 0 closed (the released LIBERO convention)."""
  return actions.at[..., 6].set(gripper.to_opening(actions[..., 6]))


def initial_state(key: PRNGKeyArray, suite: Int[Array, ""], split: str, hard_yaw_fraction: float = 0.0) -> tasks.State:
  """The initial state of an episode. With probability `hard_yaw_fraction`, the one of four draws whose target cube is
  turned furthest from the table's edges."""
  if hard_yaw_fraction == 0:
    return tasks.reset(key, suite, split)
  k_which, *keys = jax.random.split(key, 5)
  states = jax.vmap(lambda one: tasks.reset(one, suite, split))(jnp.stack(keys))
  target = states.target[:, 0, None]
  yaw, kind = (jnp.take_along_axis(x, target, axis=1)[:, 0] for x in (states.yaw, states.kind))
  turned = jnp.abs(tasks.angle_between(yaw, math.pi / 2)) * (kind == tasks.CUBE)
  chosen = jnp.where(jax.random.bernoulli(k_which, hard_yaw_fraction), jnp.argmax(turned), 0)
  return jax.tree.map(lambda x: x[chosen], states)


def sample_state(
  key: PRNGKeyArray,
  suites: Float[Array, " s"],
  split: str,
  initial_fraction: float | Float[Array, ""] = 0.0,
  hard_yaw_fraction: float = 0.0,
) -> tasks.State:
  """A random state of one episode, before its success, of a suite drawn by `suites` (probabilities).

  A fraction `initial_fraction` are initial states: the expert turns first, so that it is aligned in nearly all later
  states, from which a model would only learn to keep its attitude. For `hard_yaw_fraction` see `initial_state`.
  """
  k_suite, k_reset, k_perturb, k_noise, k_time, k_which = jax.random.split(key, 6)
  suite = jax.random.choice(k_suite, len(suites), p=suites)
  state = initial_state(k_reset, suite, split, hard_yaw_fraction)
  perturbed = expert.perturbed_state(k_perturb, state)
  start = jax.tree.map(lambda a, b: jnp.where(jax.random.bernoulli(k_which, 0.4), a, b), perturbed, state)
  episode = expert.rollout_from(start, k_noise, NOISE, EPISODE)
  at = (jax.random.uniform(k_time) * jnp.minimum(episode.first + 1, EPISODE)).astype(jnp.int32)
  at = jnp.where(jax.random.bernoulli(jax.random.fold_in(k_time, 1), initial_fraction), 0, at)
  return jax.tree.map(lambda x: x[at], episode.states)


def labels(state: tasks.State, chunk: int) -> tuple[Float[Array, "k 7"], Any]:
  """The undisturbed expert's next `chunk` actions, raw, and which of them come no later than success."""
  future = expert.rollout_from(state, jax.random.key(0), 0.0, chunk)
  done_before = jnp.cumsum(future.success) - future.success > 0
  return gripper_to_model(future.actions), ~done_before


def spot(state: tasks.State, index: Int[Array, ""], side: int) -> Float[Array, "2 n"]:
  """Where an object's center is in both views: bilinear weights on the nearest patches, zeros where it is not seen."""
  at = render.project(state, state.center[index]) * side - 0.5
  seen = jnp.all((at >= -0.5) & (at < side - 0.5), axis=-1)
  low = jnp.floor(at)
  out = jnp.zeros((2, side * side))
  for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
    corner = jnp.asarray(corner)
    row, column = jnp.clip(low + corner, 0, side - 1).astype(jnp.int32).T
    weight = jnp.prod(jnp.where(corner == 1, at - low, 1 - at + low), axis=-1)
    out += jax.nn.one_hot(row * side + column, side * side) * weight[:, None]
  return out * seen[:, None]


class StateTargets(NamedTuple):
  """Targets of one state, see auxiliary_losses.Targets. `sentences` are indices in INSTRUCTIONS."""

  where: Float[Array, "g 2 n"]
  sentences: Int[Array, " g"]
  displacement: Float[Array, "9"]
  shape: Int[Array, " g-1"]
  edges: Float[Array, "g-1 2 2"]
  aim: Float[Array, "2 2"]


def targets(state: tasks.State, side: int) -> StateTargets:
  """Where the named objects are, for the task's own sentence and for "pick up the …" of every object that can be.

  Pegs get zero targets, since no instruction of suite `pick` names one.
  """
  target, puts = state.target[0], (state.verb[0] == tasks.PUT) | (state.verb[0] == tasks.INSERT)
  destination = jnp.where(puts, state.destination[0], target)
  own = spot(state, target, side) + spot(state, destination, side)
  where = jnp.stack([own] + [spot(state, jnp.asarray(i), side) for i in range(PHRASES)])
  where = where / jnp.maximum(where.sum(axis=-1, keepdims=True), 1e-6)
  kind, color = state.kind[:PHRASES], state.color[:PHRASES]
  is_named = kind < tasks.PEG
  sentences = jnp.append(state.instruction, jnp.where(is_named, kind * len(tasks.COLORS) + color, 0))
  where = where * jnp.append(True, is_named)[:, None, None]
  away = jnp.concatenate([state.center[i] - state.position for i in (target, destination)]) / auxiliary_losses.UNIT
  turn = expert.turn_left(state) / auxiliary_losses.TURN
  yaw = 4 * (state.yaw[:PHRASES, None] - jnp.stack([jnp.zeros(()), physics.heading(state.rotation)]))
  edges = jnp.stack([jnp.cos(yaw), jnp.sin(yaw)], axis=-1) * (kind == tasks.CUBE)[:, None, None]
  aim = edges[target] * (target < PHRASES)
  return StateTargets(where, sentences, jnp.append(away, turn), jnp.where(is_named, kind, 0), edges, aim)


def measure(split: str = "train", episodes: int = 1024, seed: int = 0) -> statistics.DatasetStatistics:
  """Statistics of actions and proprioception over noisy expert episodes of all suites, up to success."""

  def episode(key, suite):
    r = expert.rollout(key, suite, split, NOISE, EPISODE)
    used = jnp.arange(EPISODE) <= r.first
    return gripper_to_model(r.actions), jax.vmap(physics.proprio)(r.states), used

  keys = jax.random.split(jax.random.key(seed), episodes)
  actions, proprio, used = jax.jit(jax.vmap(episode))(keys, jnp.arange(episodes) % len(tasks.SUITES))
  used = np.asarray(used)
  values = [np.asarray(x, np.float32)[used] for x in (actions, proprio)]
  return statistics.DatasetStatistics(
    statistics.compute(values[0], GRIPPER_PASSES), statistics.compute(values[1]), len(values[0]), episodes
  )


def make_batches(
  *,
  batch_size: int,
  chunk: int,
  image: int,
  patch: int,
  suites: Sequence[float | int],
  tokenizers: Tokenizers,
  stats: statistics.DatasetStatistics,
  seed: int,
  split: str = "train",
  initial_fraction: float = 0.0,
  hard_yaw_fraction: float = 0.0,
) -> Callable[[Any], Batch]:
  """batch(step) → Batch with Targets as `aux`, compiled; a function of (seed, step) alone, so that a resumed run sees
  the same batches.

  Args:
    batch_size, chunk: b and k. image, patch: pixels. suites: weights in the order of tasks.SUITES.
    tokenizers: of the policy; all instructions are tokenized once. stats: see `measure`.
    split, initial_fraction, hard_yaw_fraction: see `sample_state`.
  """
  texts = list(tasks.INSTRUCTIONS)
  prompts, prompt_masks = (jnp.asarray(x) for x in tokenizers.prompt(texts))
  has_instruction = tokenizers.siglip is not None
  tokenize = tokenizers.instruction if has_instruction else tokenizers.prompt
  words, word_masks = (jnp.asarray(x) for x in tokenize(texts))
  weights = jnp.asarray(suites, jnp.float32) / sum(suites)

  def example(key):
    state = sample_state(key, weights, split, initial_fraction, hard_yaw_fraction)
    actions, mask = labels(state, chunk)
    views, proprio = physics.observe(state, image)
    proprio = statistics.normalize(proprio, stats.proprio)
    actions = statistics.normalize(actions, stats.action)
    return views, proprio, actions, mask, targets(state, image // patch)

  @jax.jit
  def batch(step):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), batch_size)
    views, proprio, actions, mask, one = jax.vmap(example)(keys)
    index, others = one.sentences[:, 0], one.sentences[:, 1:]
    own = (words[index], word_masks[index]) if has_instruction else (None, None)
    observation = Observation(views, proprio, prompts[index], prompt_masks[index], *own)
    aux = auxiliary_losses.Targets(
      one.where, words[others], word_masks[others], one.displacement, one.shape, one.edges, one.aim
    )
    return Batch(observation, actions, mask, aux)

  return batch
