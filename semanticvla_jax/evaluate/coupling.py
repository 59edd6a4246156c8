"""How large errors of translation and rotation are, and how much they go together, against the tabletop's expert.

    python -m semanticvla_jax.evaluate coupling --policy=runs/align/grouped/policy --suite=align --episodes=64

The policy is asked at every fourth step of the expert's episodes on held-out layouts, and each action of its chunk is
compared with what the expert would do from there, up to success. Printed are the mean errors, |Δ translation| in
millimeters and |Δ rotation| in degrees a step, and their Pearson correlation over all actions. Episodes are few and
their actions alike, so its 95 % interval is a bootstrap over episodes.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import tabletop_flags
from semanticvla_jax.evaluate.evaluation import check_minimum
from semanticvla_jax.evaluate.rollout import check_robot
from semanticvla_jax.evaluate.tabletop_query import inputs_of, policy_query, setup_of
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import expert, physics, probes, tasks

NOISE = 0.1  # of the expert's episodes, as in the quickstart's demonstrations
_EVERY = 4  # steps between two questions
_BATCH = 64  # questions together
_RESAMPLES = 1000


class Errors(NamedTuple):
  """Errors of m actions: translation in meters, rotation in radians, and the episode that each is of."""

  translation: Float[np.ndarray, " m"]
  rotation: Float[np.ndarray, " m"]
  episode: Int[np.ndarray, " m"]


@functools.partial(jax.jit, static_argnames=("suite", "split"))
def _states(seeds: Int[Array, " n"], suite: str, split: str) -> tuple[tasks.State, Bool[Array, "n t"]]:
  """The moments of each seed's episode at which the policy is asked, [n t …], and which come before success."""
  steps = probes.max_steps(suite)

  def one(seed):
    k_reset, k_noise = jax.random.split(tasks.seed_key(seed, split))
    found = expert.rollout_from(probes.reset(k_reset, suite, split), k_noise, NOISE, steps)
    at = jnp.arange(0, steps, _EVERY)
    return jax.tree.map(lambda x: x[at], found.states), at <= found.first

  return jax.vmap(one)(seeds)


@functools.partial(jax.jit, static_argnames="chunk")
def _wanted(states: tasks.State, chunk: int) -> tuple[Float[Array, "b k 7"], Bool[Array, "b k"]]:
  """The expert's next actions from b states, and which of them come no later than success."""
  future = jax.vmap(lambda state: expert.rollout_from(state, jax.random.key(0), 0.0, chunk))(states)
  return future.actions, jnp.cumsum(future.success, axis=1) - future.success == 0


def errors(policy: Policy, suite: str, split: str, seeds: Sequence[int]) -> Errors:
  """The errors of a policy's actions in the episodes of some seeds.

  Raises:
    ValueError: the policy is of another robot, or remembers earlier queries.
  """
  check_robot(policy, policy.chunk)
  if policy.remembers:
    raise refuse(
      "Coupling", "a policy whose model.decoder_pruner has a history", "one without", "measure its `variant`"
    )
  setup, sentences = setup_of(policy, suite, split, policy.chunk, probes.max_steps(suite)), probes.instructions(suite)
  query = jax.jit(lambda inputs, states, told: policy_query(policy.model, setup, inputs)(states, told, None)[0])
  states, asked = jax.tree.map(np.asarray, _states(jnp.asarray(seeds, jnp.int32), suite, split))
  owners, moments = np.nonzero(asked)
  inputs, parts = inputs_of(policy, sentences), []
  for first in range(0, len(owners), _BATCH):
    index = [np.resize(x[first : first + _BATCH], _BATCH) for x in (owners, moments)]  # a short batch repeats itself
    some = jax.tree.map(lambda x: jnp.asarray(x[tuple(index)]), states)  # noqa: B023
    wanted, counts = (np.asarray(x) for x in _wanted(some, policy.chunk))
    away = np.asarray(query(inputs, some, some.instruction - probes.first_sentence(suite))) - wanted
    counts = counts & (np.arange(_BATCH) < len(owners) - first)[:, None]
    both = (np.linalg.norm(away[..., part], axis=-1)[counts] for part in (slice(0, 3), slice(3, 6)))
    parts.append((*both, np.broadcast_to(index[0][:, None], counts.shape)[counts]))
  translation, rotation, episode = (np.concatenate(column) for column in zip(*parts))
  return Errors(translation * physics.TRANSLATION, rotation * physics.ROTATION, episode)


def correlation(found: Errors) -> tuple[float, tuple[float, float]]:
  """Pearson's correlation of both errors, NaN where one never varies, and its 95 % interval over episodes."""
  rng, pearson = np.random.default_rng(0), lambda a, b: float(np.corrcoef(a, b)[0, 1])
  own = [np.flatnonzero(found.episode == one) for one in np.unique(found.episode)]
  with np.errstate(invalid="ignore"):
    drawn = []
    for _ in range(_RESAMPLES):
      index = np.concatenate([own[i] for i in rng.integers(0, len(own), len(own))])
      drawn.append(pearson(found.translation[index], found.rotation[index]))
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return pearson(found.translation, found.rotation), (float(low), float(high))


def line(found: Errors) -> str:
  """The figures as text."""
  value, (low, high) = correlation(found)
  return (
    f"{len(found.episode)} actions of {len(np.unique(found.episode))} episodes: "
    f"translation {1000 * found.translation.mean():.2f} mm, "
    f"rotation {math.degrees(found.rotation.mean()):.2f} degrees, correlation {value:.2f} ({low:.2f} to {high:.2f})"
  )


def main(argv: Sequence[str]) -> None:
  """Prints the line; problems end the program with their message."""
  parser = tabletop_flags.parser("coupling", __doc__, "align", 64, "the expert's episodes")
  parser.add_argument("--seed", type=int, default=0, help="seed of the first episode (default: 0)")
  args = parser.parse_args(argv)
  try:
    check_minimum(args, {"episodes": 2})
    seeds = range(args.seed, args.seed + args.episodes)
    tasks.check_seeds(seeds, args.split)
    probes.base(args.suite)
    policy = Policy.load(args.policy, dataset=args.dataset, batch_sizes=())
    print(f"{args.suite}: {line(errors(policy, args.suite, args.split, seeds))}")
  except ValueError as error:
    sys.exit(f"error: {error}")
