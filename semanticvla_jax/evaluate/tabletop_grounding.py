"""Grounding of tabletop episodes, from their states: which patches were kept at each query, and where the objects were.

The renderer knows which object each pixel shows; `grounding` defines the figures.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from semanticvla_jax.evaluate import grounding, visualize
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.evaluate.tabletop_query import Inputs, Setup, inputs_of, observed, setup_of
from semanticvla_jax.observation_dict import VIEWS
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import probes, render, tasks

_BATCH = 64  # queries looked at together


@functools.partial(jax.jit, static_argnames="size")
def named_masks(states: tasks.State, size: int) -> Bool[Array, "b 2 {size} {size}"]:
  """The pixels of both views that show an object which the task of each of b states names."""

  def one(state):
    which = render.visible_objects(state, size)
    return tasks.named_objects(state)[which] & (which >= 0)

  return jax.vmap(one)(states)


@functools.partial(jax.jit, static_argnames=("model", "setup"))
def _kept(
  inputs: Inputs, states: tasks.State, told: Int[Array, " b"], *, model: nn.Module, setup: Setup
) -> Bool[Array, "b v n"]:
  """The patches that the ID-Pruner keeps in b states."""
  return visualize.kept_of(inputs.params, observed(setup, inputs, states, told), model=model)


def queries(episodes: Episodes, index: int, replan_steps: int) -> list[int]:
  """The steps of an episode at which the policy was asked."""
  return [*range(0, max(int(episodes.steps[index]), 1), replan_steps)]


def measure(policy: Policy, suite: str, split: str, episodes: Episodes, replan_steps: int) -> list[dict[str, dict]]:
  """The figures of each episode by view, see `grounding.of_episode`.

  Args:
    policy: with an ID-Pruner.
    suite, split: of the episodes.
    episodes: with their states.
    replan_steps: actions between two queries.
  """
  sentences = probes.instructions(suite)
  inputs, setup = inputs_of(policy, sentences), setup_of(policy, suite, split, replan_steps, probes.max_steps(suite))
  at = [(step, i) for i in range(len(episodes.seeds)) for step in queries(episodes, i, replan_steps)]
  kept, filled = [], []
  for first in range(0, len(at), _BATCH):
    part = at[first : first + _BATCH]
    steps, index = np.resize(np.array(part), (_BATCH, 2)).T  # a short batch repeats itself
    states = jax.tree.map(lambda x: jnp.asarray(x[steps, index]), episodes.states)  # noqa: B023
    told = jnp.asarray([sentences.index(episodes.told[i]) for i in index], jnp.int32)
    kept.append(np.asarray(_kept(inputs, states, told, model=policy.model, setup=setup))[: len(part)])
    masks = np.asarray(named_masks(states, policy.image_size))[: len(part), : setup.views]
    filled.append(grounding.filling(masks, round(kept[-1].shape[-1] ** 0.5), setup.crop_area))
  all_kept, all_filled = np.concatenate(kept), np.concatenate(filled)
  owners = np.array([i for _, i in at])
  views = VIEWS[setup.views]
  return [
    grounding.of_episode(all_kept[owners == i], all_filled[owners == i], views) for i in range(len(episodes.seeds))
  ]


def picture(policy: Policy, suite: str, split: str, episodes: Episodes, index: int) -> list[visualize.Tile]:
  """The first query of an episode: each view with the kept patches and the outline of the named objects."""
  inputs, setup = (
    inputs_of(policy, probes.instructions(suite)),
    setup_of(policy, suite, split, 1, probes.max_steps(suite)),
  )
  state = jax.tree.map(lambda x: jnp.asarray(x[0, index])[None], episodes.states)
  told = jnp.asarray([probes.instructions(suite).index(episodes.told[index])], jnp.int32)
  kept = np.asarray(_kept(inputs, state, told, model=policy.model, setup=setup))[0]
  views = visualize.pictures(state, visualize.SIZE)[0, : setup.views]
  masks = np.asarray(named_masks(state, views.shape[1]))[0, : setup.views]
  return visualize.grounding_tiles(views, kept, masks, setup.crop_area, VIEWS[setup.views])
