"""How a compiled program of the tabletop asks a policy: its settings, its inputs, and what the model reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from semanticvla_jax.data import statistics
from semanticvla_jax.data.gripper import to_commands
from semanticvla_jax.data.images import center_crop
from semanticvla_jax.models import programs
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import physics, tasks
from semanticvla_jax.types import Observation, Statistics

# (states [b], told i32[b], memory) → (actions f32[b k 7], memory); a memory is None where the model has none.
Query = Callable[[tasks.State, Array, Any], tuple[Array, Any]]


class Setup(NamedTuple):
  """What is compiled into a program, apart from the model: all static.

  Attributes:
    image_size, views, crop_area, mode: of the policy: pixels, how many, what is cropped, and which bounds normalize.
    suite, split: of the tabletop.
    replan_steps, max_steps, keep_states: see `simulate`.
  """

  image_size: int
  views: int
  crop_area: float | None
  mode: str
  suite: str
  split: str
  replan_steps: int
  max_steps: int
  keep_states: bool


def setup_of(
  policy: Policy, suite: str, split: str, replan_steps: int, max_steps: int, keep_states: bool = False
) -> Setup:
  """The setup of a policy's program on a suite of the tabletop."""
  crop_area, views = policy.metadata["crop_area"], policy.bare.num_views
  own = (policy.image_size, views, crop_area, policy.mode)
  return Setup(*own, suite, split, replan_steps, max_steps, keep_states)


class Inputs(NamedTuple):
  """What a program is given: parameters, statistics (action, proprio), and tables of words, a row a sentence.

  As arguments, so that another policy of the same model runs in the same program.
  """

  params: Any
  stats: tuple[Statistics, Statistics | None]
  words: tuple


def inputs_of(policy: Policy, sentences: Sequence[str]) -> Inputs:
  """A policy's inputs, with a row of words for each sentence."""
  stats = (policy.stats.action, None if policy.bare.proprio_dim is None else policy.stats.proprio)
  return Inputs(policy.params, *(jax.tree.map(jnp.asarray, part) for part in (stats, policy.words(sentences))))


def observed(setup: Setup, inputs: Inputs, states: tasks.State, told: Int[Array, " b"]) -> Observation:
  """What the model reads in b states, inside jit: render, read the gripper, gather the words."""
  proprio = inputs.stats[1]
  images, state = jax.vmap(functools.partial(physics.observe, size=setup.image_size))(states)
  read = None if proprio is None else statistics.normalize(state, proprio, mode=setup.mode)
  tokens = (None if table is None else table[told] for table in inputs.words)
  images = images[:, : setup.views]
  images = images if setup.crop_area is None else center_crop(images, setup.crop_area)
  return Observation(images, read, *tokens)


def policy_query(model: nn.Module, setup: Setup, inputs: Inputs) -> Query:
  """Asks a policy inside jit: observe, run the model, un-normalize."""
  action = inputs.stats[0]

  def query(states: tasks.State, told: Int[Array, " b"], memory: Any) -> tuple[Float[Array, "b k 7"], Any]:
    output = model.apply({"params": inputs.params}, observed(setup, inputs, states, told), memory=memory)
    return to_commands(statistics.unnormalize(output.actions, action, mode=setup.mode), action.mask), output.memory

  return query


def empty_memory(model: nn.Module, setup: Setup, inputs: Inputs, states: tasks.State, told: Int[Array, " b"]) -> Any:
  """What a model remembers before the first query of b episodes, for `policy_query`."""
  if not programs.bare(model).remembers:
    return None
  return programs.empty_memory(model, inputs.params, jax.eval_shape(lambda: observed(setup, inputs, states, told)))
