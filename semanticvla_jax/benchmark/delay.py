"""Success on the tabletop against the delay between an observation and its actions, by how a client uses chunks.

All episodes of a cell run in lock step; which action is executed when is decided by `serve.chunks.Chunks`, as on a
robot. Delays are in robot time. A robot without an action to execute does not move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import results, tabletop_query
from semanticvla_jax.policy import Policy
from semanticvla_jax.serve.chunks import Chunks
from semanticvla_jax.tabletop import physics, probes, tasks

PERIOD = 50  # milliseconds between two actions
GRIPPER = 6  # dimension of the action
REPLAN = 4  # actions executed before an asynchronous client asks again


class Mode(NamedTuple):
  """How a client uses chunks: see `Chunks`."""

  replan_steps: int | None
  align: bool
  blend: int


MODES = {
  "waits for each chunk": Mode(None, False, 0),
  "asynchronous, not aligned": Mode(REPLAN, False, 0),
  "asynchronous, blended": Mode(REPLAN, False, REPLAN),
  "asynchronous, aligned": Mode(REPLAN, True, 0),
}


def measure(result: Result, folder: str, suite: str, delays: Sequence[int], episodes: int) -> None:
  """Success of a policy folder on held-out layouts for every mode and delay.

  Args:
    suite: of the tabletop. delays: milliseconds of robot time, rounded up to whole actions. episodes: of each cell.
  """
  policy = Policy.load(folder, batch_sizes=())
  ask, begin, act = programs(policy, suite, episodes)
  result.models["policy"] = dict(policy.config["model"])
  for name, mode in MODES.items():
    for milliseconds in delays:
      steps = -(-milliseconds // PERIOD)
      success = int(run(ask, begin, act, mode, steps, probes.max_steps(suite)).sum())
      result.add(f"{name}, {milliseconds} ms", success, f"of {episodes}")
      low, high = (100 * end for end in results.wilson(success, episodes))
      result.note(f"Wilson 95 % interval {low:.0f}–{high:.0f} %")


def programs(policy: Policy, suite: str, episodes: int, split: str = "heldout") -> tuple[Callable, Callable, Callable]:
  """Compiled for a batch of episodes, three functions.

  states → actions f32[k b 7]; nothing → first states; (states, actions f32[b 7]) → (states, success bool[b]).
  """
  if policy.remembers:
    raise refuse("Delay", "a policy whose model.decoder_pruner has a history", "one without", "measure its `variant`")
  setup = tabletop_query.setup_of(policy, suite, split, policy.chunk, probes.max_steps(suite))
  sentences = probes.instructions(suite)
  inputs = tabletop_query.inputs_of(policy, sentences)

  @jax.jit
  def ask(states: tasks.State) -> jax.Array:
    asked = states.instruction - probes.first_sentence(suite)
    return tabletop_query.policy_query(policy.model, setup, inputs)(states, asked, None)[0].swapaxes(0, 1)

  @jax.jit
  def begin() -> tasks.State:
    keys = jax.vmap(lambda seed: tasks.seed_key(seed, split))(jnp.arange(episodes))
    return jax.vmap(lambda key: probes.reset(key, suite, split))(keys)

  @jax.jit
  def act(states: tasks.State, actions: jax.Array) -> tuple[tasks.State, jax.Array]:
    states = jax.vmap(physics.step)(states, actions)
    return states, jax.vmap(physics.success)(states)

  return ask, begin, act


def run(ask: Callable, begin: Callable, act: Callable, mode: Mode, delay: int, max_steps: int) -> np.ndarray:
  """Which episodes succeed, bool[b], if every answer comes `delay` actions after its observation."""
  states, chunks = begin(), Chunks(mode.replan_steps, align=mode.align, blend=mode.blend, discrete=[GRIPPER])
  success, coming = np.zeros(len(states.instruction), bool), None
  still: Any = np.tile(np.float32([0, 0, 0, 0, 0, 0, -1]), (len(success), 1))
  for step in range(max_steps):
    if coming is None and chunks.wants:
      coming = (step + delay, np.asarray(ask(states)), chunks.executed)
    if coming is not None and step >= coming[0]:
      chunks.add(coming[1], coming[2])
      coming = None
    action = chunks.next()
    if action is None:
      action = still
    else:
      still = np.concatenate([np.zeros_like(action[:, :GRIPPER]), action[:, GRIPPER:]], axis=1)
    states, now = act(states, action)
    success |= np.asarray(now)
    if success.all():
      break
  return success
