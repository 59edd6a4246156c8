"""Runs a policy in closed loop: wholly on the device (`OnDevice`), or step by step on the host (`OnHost`).

Both query the policy for a chunk, execute `replan_steps` of its actions, and query again. An episode ends with success,
after `max_steps` actions, or at an action that is not finite, which counts as a failure of the policy. An environment
that raises is an error, which is not counted at all. Views are rendered only for policy queries. Both give the same
successes; the first is one compiled program per batch, the second works with any `envs.environment.Environment`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from semanticvla_jax import cli
from semanticvla_jax.data import robot
from semanticvla_jax.data.spec import Gripper
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate.tabletop_query import (
  Inputs,
  Query,
  Setup,
  empty_memory,
  inputs_of,
  policy_query,
  setup_of,
)
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import physics, probes, tasks

Progress = Callable[[int, int], None]  # episodes done, successes among them


class Episodes(NamedTuple):
  """What came of n episodes.

  Attributes:
    seeds: i64[n].
    success: bool[n].
    steps: i32[n], actions taken, those that led to success included.
    error: bool[n], True where the simulator broke: such an episode says nothing of the policy.
    instruction: n sentences, what success means.
    told: n sentences, the instructions that the policy got.
    states: every state before an action and the last one, State with leading axes [t + 1, n]; None unless asked for.
    retries, seconds: i64[n], how often each broke and was started again; f64[n], its duration. None without simulators.
    nonfinite: bool[n], True where the policy gave an action that is not finite, a failure; None for nowhere.
    grounding: n dicts by view, see `grounding.of_episode`, None for an episode without; None where none was measured.
  """

  seeds: np.ndarray
  success: np.ndarray
  steps: np.ndarray
  error: np.ndarray
  instruction: list[str]
  told: list[str]
  states: tasks.State | None = None
  retries: np.ndarray | None = None
  seconds: np.ndarray | None = None
  nonfinite: np.ndarray | None = None
  grounding: list[dict | None] | None = None

  @property
  def successes(self) -> int:
    return int(self.success.sum())

  @property
  def valid(self) -> int:
    """Episodes without an error: what a success rate is a share of."""
    return int((~self.error).sum())

  @property
  def broken(self) -> int:
    """Episodes with an error."""
    return int(self.error.sum())

  @property
  def spoilt(self) -> int:
    """Failures by an action that is not finite."""
    return 0 if self.nonfinite is None else int(self.nonfinite.sum())


class Ended(NamedTuple):
  """The running record of a batch: success bool[b], nonfinite bool[b] (the policy failed so), steps i32[b]."""

  success: Bool[Array, " b"]
  nonfinite: Bool[Array, " b"]
  steps: Int[Array, " b"]


def simulate(
  query: Query,
  states: tasks.State,
  told: Int[Array, " b"],
  *,
  max_steps: int,
  replan_steps: int,
  keep_states: bool = False,
  memory: Any = None,
) -> tuple[Ended, tasks.State | None]:
  """Runs b episodes as one `lax.scan` over queries, each with an inner scan over `replan_steps` actions; pure, for jit.

  Args:
    query: states and their instructions → actions; called for all b at once, until the last episode has ended.
    states: first states, batched.
    told: indices of sentences, passed to `query`.
    max_steps, replan_steps: static.
    keep_states: True returns all states too, [t + 1, b].
    memory: what `query` is given at first, a pytree of arrays [b …] or None; then what it returned.
  """
  b = told.shape[0]

  def act(carry, actions):
    states, ended = carry
    running = ~ended.success & ~ended.nonfinite & (ended.steps < max_steps)
    spoilt = running & ~jnp.isfinite(actions).all(axis=-1)
    moves = running & ~spoilt
    after = jax.vmap(physics.step)(states, jnp.where(moves[:, None], actions, 0.0))
    states = jax.tree.map(lambda new, old: jnp.where(_like(moves, new), new, old), after, states)
    success = ended.success | (moves & jax.vmap(physics.success)(states))
    ended = Ended(success, ended.nonfinite | spoilt, ended.steps + moves)
    return (states, ended), states if keep_states else None

  def ask(carry):
    states, ended, memory = carry
    actions, memory = query(states, told, memory)
    (states, ended), seen = jax.lax.scan(act, (states, ended), actions[:, :replan_steps].swapaxes(0, 1))
    return (states, ended, memory), seen

  def rest(carry):
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (replan_steps, *x.shape)), carry[0]) if keep_states else None
    return carry, repeated

  def advance(carry, _):
    ended = carry[1]
    over = ended.success | ended.nonfinite | (ended.steps >= max_steps)
    return jax.lax.cond(over.all(), rest, ask, carry)

  start = (states, Ended(jnp.zeros(b, bool), jnp.zeros(b, bool), jnp.zeros(b, jnp.int32)), memory)
  (_, ended, _), seen = jax.lax.scan(advance, start, length=-(-max_steps // replan_steps))
  if not keep_states:
    return ended, None
  return ended, jax.tree.map(lambda first, x: jnp.concatenate([first[None], x.reshape(-1, *x.shape[2:])]), states, seen)


def _like(flags: Bool[Array, " b"], x: Array) -> Array:
  return flags.reshape(flags.shape + (1,) * (x.ndim - 1))


@functools.partial(jax.jit, static_argnames=("model", "setup"))
def _program(
  inputs: Inputs, seeds: Int[Array, " b"], told: Int[Array, " b"], *, model: nn.Module, setup: Setup
) -> tuple[Ended, Int[Array, " b"], tasks.State | None]:
  """One batch: outcomes, each episode's own sentence (an index into the suite's), and its states."""
  keys = jax.vmap(lambda seed: tasks.seed_key(seed, setup.split))(seeds)
  states = jax.vmap(lambda key: probes.reset(key, setup.suite, setup.split))(keys)
  own = states.instruction - probes.first_sentence(setup.suite)
  told = jnp.where(told < 0, own, told)
  limits = dict(max_steps=setup.max_steps, replan_steps=setup.replan_steps, keep_states=setup.keep_states)
  memory = empty_memory(model, setup, inputs, states, told)
  ended, seen = simulate(policy_query(model, setup, inputs), states, told, memory=memory, **limits)
  return ended, own, seen


class OnDevice:
  """Tabletop episodes wholly on the device, `batch` at a time; compiled at the first `run`, once for equal models.

  Args:
    policy: of two views (or one: the agent's), with the tabletop's actions and proprioception.
    suite, split: of the tabletop.
    replan_steps: actions executed per policy query; None for the policy's own.
    batch: episodes in one program.
    keep_states: True keeps every state, to render them afterwards.

  Raises:
    ValueError: the suite or split does not exist, or the policy is of another robot.
  """

  broken = 0  # pure functions do not break

  def __init__(
    self,
    policy: Policy,
    suite: str,
    split: str = "heldout",
    *,
    replan_steps: int | None = None,
    batch: int = 64,
    keep_states: bool = False,
  ):
    tasks.check_split(split)
    self.max_steps = probes.max_steps(suite)
    self.policy, self.batch = policy, batch
    self.replan_steps = policy.replan_steps if replan_steps is None else replan_steps
    _check(policy, self.replan_steps)
    self._sentences = probes.instructions(suite)
    self._setup = setup_of(policy, suite, split, self.replan_steps, self.max_steps, keep_states)
    self._inputs = inputs_of(policy, self._sentences)

  def run(
    self, seeds: Sequence[int] | np.ndarray, told: Sequence[str] | None = None, progress: Progress | None = None
  ) -> Episodes:
    """Runs one episode a seed.

    Args:
      seeds: of the split, counted from 0.
      told: a sentence of the suite for each episode, instead of its own instruction.
      progress: called after each batch.

    Raises:
      ValueError: a seed outside the split, or a sentence of another suite.
    """
    seeds = np.asarray(seeds, np.int64)
    tasks.check_seeds(seeds, self._setup.split)
    index = np.full(len(seeds), -1) if told is None else np.array([self._index(sentence) for sentence in told])
    parts, successes = [], 0
    for first in range(0, len(seeds), self.batch):
      part = slice(first, first + self.batch)
      count = len(seeds[part])
      inputs = [np.resize(x[part], self.batch).astype(np.int32) for x in (seeds, index)]  # a short batch repeats itself
      ended, own, states = _program(self._inputs, *inputs, model=self.policy.model, setup=self._setup)
      ended, own = Ended(*(np.asarray(x)[:count] for x in ended)), np.asarray(own)[:count]
      states = jax.tree.map(lambda x: np.asarray(x)[:, :count], states)  # noqa: B023
      parts.append((ended, own, states))
      successes += int(ended.success.sum())
      if progress is not None:
        progress(first + count, successes)
    return self._episodes(seeds, parts, told)

  def _episodes(self, seeds: np.ndarray, parts: list, told: Sequence[str] | None) -> Episodes:
    ended = Ended(*(np.concatenate(column) for column in zip(*(part[0] for part in parts))))
    instruction = [self._sentences[i] for part in parts for i in part[1]]
    states = None
    if self._setup.keep_states:
      states = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *(part[2] for part in parts))
    told, error = instruction if told is None else list(told), np.zeros(len(seeds), bool)
    return Episodes(seeds, ended.success, ended.steps, error, instruction, told, states, nonfinite=ended.nonfinite)

  def _index(self, sentence: str) -> int:
    if sentence not in self._sentences:
      raise refuse(
        f"Told {sentence!r}",
        "a sentence of another suite",
        f"one of {self._setup.suite!r} (probes.instructions)",
        "use OnHost to say anything",
      )
    return self._sentences.index(sentence)


def check_state(observation: Mapping[str, Any]) -> None:
  """Raises ArithmeticError if an environment's state is not finite: its physics broke, not the policy."""
  state = observation.get("observation/state")
  if state is not None and not np.isfinite(np.asarray(state, np.float64)).all():
    raise ArithmeticError(f"the environment's state is not finite: {np.asarray(state)}")


class _Outcome(NamedTuple):
  """What came of one episode on the host; see `Episodes`."""

  success: bool
  steps: int
  error: bool
  nonfinite: bool
  instruction: str
  told: str


class _Broken(Exception):
  """The environment raised what is its cause."""


class OnHost:
  """Episodes of any `envs.environment.Environment`, one at a time, through `Policy.infer`.

  Args:
    policy: anything with infer, reset and replan_steps. No actions at all end the episode.
    environment: an `envs.environment.Environment`. Whatever it raises makes an error of that episode alone.
    replan_steps: actions executed per policy query; None for the policy's own.
    instruction: of a seed; recorded for an episode that broke before its instruction was known.

  Attributes:
    broken: episodes with an error, of those that the latest `run` has finished.

  Raises:
    ValueError: `replan_steps` is less than 1.
  """

  def __init__(
    self,
    policy: Any,
    environment: Any,
    *,
    replan_steps: int | None = None,
    instruction: Callable[[int], str] = lambda seed: "",
  ):
    self.policy, self.environment, self._known = policy, environment, instruction
    self.replan_steps = policy.replan_steps if replan_steps is None else replan_steps
    if self.replan_steps < 1:
      raise refuse("Evaluation", f"replan_steps={self.replan_steps}", "at least 1 action", "raise it")
    self.max_steps, self.broken = environment.max_steps, 0

  def run(
    self, seeds: Sequence[int] | np.ndarray, told: Sequence[str] | None = None, progress: Progress | None = None
  ) -> Episodes:
    """As `OnDevice.run`; any instruction may be given."""
    rows, self.broken = [], 0
    for i, seed in enumerate(seeds):
      rows.append(self._episode(int(seed), None if told is None else told[i]))
      self.broken += rows[-1].error
      if progress is not None:
        progress(i + 1, sum(row.success for row in rows))
    success, steps, error, nonfinite, instruction, said = zip(*rows)
    flags = (np.array(success, bool), np.array(steps, np.int32), np.array(error, bool))
    seeds = np.asarray(seeds, np.int64)
    return Episodes(seeds, *flags, list(instruction), list(said), nonfinite=np.array(nonfinite, bool))

  def _episode(self, seed: int, told: str | None) -> _Outcome:
    self._instruction, self._steps = "", 0
    try:
      success, nonfinite = self._run(seed, told)
      error = False
    except _Broken as broken:
      logging.warning("Episode %d broke after %d steps: %s", seed, self._steps, cli.first_line(broken.__cause__))
      success, nonfinite, error = False, False, True
      self._instruction = self._instruction or self._known(seed)
    said = self._instruction if told is None else told
    return _Outcome(success, self._steps, error, nonfinite, self._instruction, said)

  def _run(self, seed: int, told: str | None) -> tuple[bool, bool]:
    """One episode; whether it succeeded, and whether an action was not finite."""
    observation = self._ask(lambda: self.environment.reset(seed))
    self._instruction = self._ask(lambda: self.environment.instruction)
    self.policy.reset()
    done = False
    while not done:
      self._ask(lambda: check_state(observation))  # noqa: B023
      said = self._instruction if told is None else told
      actions = self.policy.infer({**observation, "prompt": said})["actions"][: self.replan_steps]
      if not len(actions):
        break
      for i, action in enumerate(actions):
        if not np.isfinite(action).all():
          logging.warning("Episode %d failed: the policy gave %s after %d steps.", seed, action, self._steps)
          return False, True
        observation, done = self._ask(lambda: self.environment.step(action, observe=i == len(actions) - 1))  # noqa: B023
        self._steps += 1
        if done:
          break
    return bool(self._ask(lambda: self.environment.success)), False

  @staticmethod
  def _ask(work: Callable[[], Any]) -> Any:
    """What the environment answers; its exceptions are told apart from those of the policy."""
    try:
      return work()
    except Exception as error:  # a simulator may raise anything
      raise _Broken from error


_GRIPPER = (6, "binary", (-1.0, 1.0))  # of both benchmarks: dimension, kind, values that open and close


def check_robot(policy: Any, replan_steps: int) -> None:
  """Raises ValueError unless a policy is for the tabletop's robot and its chunk has at least `replan_steps` actions."""
  known = policy.metadata
  views, width, actions = len(known["views"]), known["proprio_dim"], known["action_dim"]
  if views > 2 or width not in (None, 8) or actions != 7 or policy.gripper != "command":
    raise refuse(
      "Policy is for another robot",
      f"{views} views, proprioception of width {width}, {actions} action dimensions, gripper={policy.gripper!r}",
      "1 or 2, 8, 7 and 'command'",
      "evaluate a policy trained on the tabletop",
    )
  if robot.KEY in known:
    check_grippers(robot.from_json("The policy", known[robot.KEY]).grippers, "the tabletop")
  if not 1 <= replan_steps <= policy.chunk:
    raise refuse("Evaluation", f"replan_steps={replan_steps}", f"1 to {policy.chunk}, the policy's chunk", "lower it")


def check_grippers(own: Sequence[Gripper], benchmark: str) -> None:
  """Raises ValueError unless a robot's grippers are the one that both benchmarks have, by its values."""
  if [(one.dimension, one.kind, one.answers) for one in own] != [_GRIPPER]:
    raise refuse(
      "Policy is for another robot",
      f"the grippers {[*own]}",
      "-1 open and +1 closed in dimension 6",
      f"evaluate a policy trained on {benchmark}",
    )


def _check(policy: Policy, replan_steps: int) -> None:
  check_robot(policy, replan_steps)
  if policy.metadata["jpeg_quality"] is not None:
    raise refuse(
      "Policy sees JPEGs",
      f"jpeg_quality={policy.metadata['jpeg_quality']}",
      "None on the device, where nothing is encoded",
      "evaluate it with OnHost (--host)",
    )
