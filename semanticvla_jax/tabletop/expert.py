"""A scripted expert for the tabletop: it reads the state, decides from geometry alone, and so recovers from anything.

Every decision is a waypoint: where the gripper should be, which way it should face, and whether it should be closed.
The expert has no memory: a dropped object, a missed grasp or a wrong object in the gripper is just another waypoint.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from semanticvla_jax.tabletop import physics
from semanticvla_jax.tabletop.probes import reset
from semanticvla_jax.tabletop.tasks import (
  BALL,
  BOWL,
  CUBE,
  CYLINDER,
  DIRECTIONS,
  FLOOR,
  FOOT,
  HALF,
  INSERT,
  LIFT,
  MAX_OBJECTS,
  NOTHING,
  PUSH,
  SLOT,
  Leaf,
  State,
  angle_between,
  containers,
  in_32_bits,
)

SPEED = 0.5  # of the greatest translation and rotation a step, so that noise is seldom clipped
_TRAVEL = 0.095  # height of the gripper, and
_CARRY = 0.075  # height under a held object, at which nothing on the table is in the way
_REST = 0.15  # length of a command that noise sees at least
_FLIP = 0.05  # chance of the wrong gripper command in a step, at noise 1


class Waypoint(NamedTuple):
  """Where the gripper should go: position f32[3] meters, yaw f32[] radians, command f32[] (-1 open, +1 closed)."""

  position: jax.Array
  yaw: jax.Array
  command: jax.Array


@flax.struct.dataclass
class Rollout:
  """One episode of the expert, `t` steps; it goes on after success, so cut it at `first`.

  Attributes:
    states: State with a leading axis t, each before its action.
    actions: f32[t 7], what the expert would do without noise: the label to learn.
    executed: f32[t 7], what was done, with noise.
    success: bool[t], after each action.
    first: i32[], the step whose action brought success; t if none did.
  """

  states: State
  actions: Leaf
  executed: Leaf
  success: Leaf
  first: Leaf


def _choose(condition: Array, a: Waypoint, b: Waypoint) -> Waypoint:
  """`a` where the condition holds, else `b`."""
  return Waypoint(*(jnp.where(condition, x, y) for x, y in zip(a, b)))


def _above(xy: Float[Array, "2"], z: float | Float[Array, ""]) -> Float[Array, "3"]:
  """The point at height z over xy."""
  return jnp.append(xy, z)


def _via_height(state: State, ready: Array, height: float, xy: Float[Array, "2"], z: Array) -> Float[Array, "3"]:
  """Straight to (xy, z) if `ready`; else over xy at `height`, rising before moving sideways."""
  low = state.position[2] < height - 0.015
  detour = jnp.where(low, _above(state.position[:2], height), _above(xy, height))
  return jnp.where(ready, _above(xy, z), detour)


def _grasp_yaw(state: State, i: Int[Array, ""]) -> Float[Array, ""]:
  """The smallest yaw that fits the fingers round object `i`, or one to either side if a neighbor is in the way."""
  is_round = (state.kind[i] == BALL) | (state.kind[i] == CYLINDER)
  is_cube = state.kind[i] == CUBE
  first = jnp.where(is_round, 0.0, angle_between(state.yaw[i], jnp.where(is_cube, math.pi / 2, math.pi)))
  yaws = first + jnp.where(is_round, 0.8, jnp.where(is_cube, math.pi / 2, 0.0)) * jnp.array([0.0, 1.0, -1.0])
  across = physics.OPEN * jnp.stack([jnp.cos(yaws), jnp.sin(yaws)], -1)
  fingers = state.center[i, :2] + jnp.stack([across, -across])[:, :, None]  # [2 3 1 2]
  (solid,) = np.nonzero(~containers(state))
  gap = jnp.linalg.norm(fingers - state.center[solid, :2], axis=-1) - jnp.asarray(FOOT)[state.kind[solid]]
  room = jnp.min(jnp.where(solid == i, jnp.inf, gap), axis=(0, 2))
  return yaws[jnp.argmax(jnp.minimum(room, 0.010))]


def _fetch(state: State, i: Int[Array, ""]) -> Waypoint:
  """Over the object, down around it with open fingers, then close."""
  center, yaw = state.center[i], _grasp_yaw(state, i)
  width, high = jnp.asarray(HALF)[state.kind[i], 0], jnp.asarray(HALF)[state.kind[i], 2]
  lateral = jnp.linalg.norm(state.position[:2] - center[:2])
  is_low = state.position[2] < center[2] + high + 0.01
  turned = jnp.abs(yaw - physics.heading(state.rotation)) + jnp.linalg.norm(state.rotation[:2])
  over = (lateral < jnp.where(is_low, 0.016, 0.012)) & (turned < jnp.where(is_low, 0.33, 0.25))
  is_open = state.finger > width + 0.013
  position = _via_height(state, over & (is_open | is_low), _TRAVEL, center[:2], center[2])
  there = over & (jnp.abs(state.position[2] - center[2]) < 0.012) & physics.graspable(state)[i]
  stay = Waypoint(state.position, physics.heading(state.rotation), jnp.asarray(1.0))
  return _choose(there, stay, Waypoint(position, yaw, jnp.asarray(-1.0)))


def _lay(
  state: State,
  i: Int[Array, ""],
  xy: Float[Array, "2"],
  low: Float[Array, ""],
  yaw: Float[Array, ""],
  near: float | Array,
) -> Waypoint:
  """Carries held object `i` over xy, lowers it until its lower end is at height `low`, and opens the fingers."""
  bottom = state.center[i, 2] - jnp.asarray(HALF)[state.kind[i], 2]
  shift = xy - state.center[i, :2]
  lateral = jnp.linalg.norm(shift)
  turned = jnp.abs(yaw - physics.heading(state.rotation)) + jnp.linalg.norm(state.rotation[:2])
  is_low = bottom < _CARRY - 0.03
  over = (lateral < jnp.where(is_low, 1.3 * near, near)) & (turned < jnp.where(is_low, 0.25, 0.18))
  rise = _CARRY - bottom
  detour = state.position + jnp.where(rise > 0.015, _above(jnp.zeros(2), rise), _above(shift, rise))
  down = state.position + _above(shift, low - bottom)
  there = over & (bottom < low + 0.006)
  return Waypoint(jnp.where(there, state.position, jnp.where(over, down, detour)), yaw, jnp.where(there, -1.0, 1.0))


def _free_spot(state: State, i: Int[Array, ""]) -> Float[Array, "2"]:
  """The nearest place where object `i` can be laid with room round it."""
  line = np.linspace(-0.16, 0.16, 9, dtype=np.float32)
  spots = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
  gap = jnp.linalg.norm(spots[:, None] - state.center[:, :2], axis=-1) - jnp.asarray(FOOT)[state.kind]
  room = jnp.min(jnp.where(jnp.arange(len(state.kind)) == i, jnp.inf, gap), axis=1)
  far = jnp.linalg.norm(spots - state.center[i, :2], axis=-1)
  return jnp.asarray(spots)[jnp.argmin(far + 10 * (0.06 - room).clip(0))]


def _push(state: State, i: Int[Array, ""], way: Float[Array, "2"]) -> Waypoint:
  """Closed fingers behind the object, down, then along `way`."""
  width = jnp.asarray(HALF)[state.kind[i], 0]
  center = state.center[i, :2]
  apart = state.position[:2] - center
  along = apart @ way
  across = apart - along * way
  behind = center - (width + 0.032) * way
  is_low, closed = state.position[2] < 0.040, state.finger < 0.005
  lined = is_low & closed & (along < -0.6 * width) & (jnp.linalg.norm(across) < 0.012)
  near = jnp.linalg.norm(state.position[:2] - behind) < jnp.where(is_low, 0.030, 0.010)
  position = _via_height(state, near & closed & (along < -width - 0.010), _TRAVEL, behind, jnp.asarray(0.025))
  forward = _above(center - across + 0.05 * way, 0.025)
  return Waypoint(jnp.where(lined, forward, position), jnp.asarray(0.0), jnp.asarray(1.0))


def _waypoint(state: State) -> Waypoint:
  """What to do now: the first goal that is not achieved decides."""
  achieved = physics.achieved(state)
  goal = jnp.where(achieved[0], 1, 0)
  verb, i, destination = state.verb[goal], state.target[goal], state.destination[goal]
  container = jnp.clip(destination, 0, MAX_OBJECTS - 1)
  kind, bottom = state.kind[container], state.center[i, 2] - jnp.asarray(HALF)[state.kind[i], 2]
  now = physics.heading(state.rotation)

  lift = Waypoint(_above(state.position[:2], state.position[2] + 0.085 - bottom), jnp.asarray(0.0), jnp.asarray(1.0))
  slot_yaw = angle_between(now + state.yaw[container] - state.yaw[i], math.pi)
  low = jnp.asarray(FLOOR)[kind] + jnp.where(kind == BOWL, 0.022, jnp.where(kind == SLOT, 0.003, 0.010))
  near = jnp.where(kind == SLOT, 0.009, 0.025)
  deliver = _lay(state, i, state.center[container, :2], low, jnp.where(verb == INSERT, slot_yaw, 0.0), near)
  deliver = _choose(verb == LIFT, lift, deliver)
  fetch = _choose(verb == PUSH, _push(state, i, jnp.asarray(DIRECTIONS)[jnp.clip(destination, 0, 3)]), _fetch(state, i))
  other = jnp.maximum(state.held, 0)
  put_down = _lay(state, other, _free_spot(state, other), jnp.asarray(0.008), jnp.asarray(0.0), 0.020)
  rest = Waypoint(state.position, now, jnp.where(state.held >= 0, 1.0, -1.0))

  wrong = (state.held >= 0) & ((state.held != i) | (verb == PUSH))
  point = _choose(wrong, put_down, _choose(state.held == i, deliver, fetch))
  return _choose(achieved.all() | (verb == NOTHING), rest, point)


def _limit(v: Float[Array, "3"]) -> Float[Array, "3"]:
  """Shortens a vector to SPEED."""
  return v * jnp.minimum(1.0, SPEED / jnp.sqrt(v @ v + 1e-12))


def _turn(state: State, point: Waypoint) -> Float[Array, "3"]:
  """The rotation vector in radians from the gripper's attitude to the waypoint's: upright, at its yaw."""
  return physics.compose(jnp.append(jnp.zeros(2), point.yaw), -state.rotation)


@in_32_bits
def turn_left(state: State) -> Float[Array, "3"]:
  """The rotation vector in radians that the expert has still to turn, however many steps that takes."""
  return _turn(state, _waypoint(state))


@in_32_bits
def disturb(action: Float[Array, "7"], key: PRNGKeyArray, noise: float | Float[Array, ""]) -> Float[Array, "7"]:
  """Adds noise that, as in human movement, grows with the command.

  The standard deviation added to translation and to rotation is `noise` times their length (counted as 0.15 where
  shorter); the gripper command turns round with probability noise / 20. At 0.2 a stride of 25 mm strays by 5 mm along
  each axis, and the expert still succeeds in over 99 of 100 episodes of every suite; at 0.4 it often runs out of time.
  """
  k_motion, k_grip = jax.random.split(key)
  size = jnp.repeat(jnp.linalg.norm(action[:6].reshape(2, 3), axis=-1), 3)
  wrong = jax.random.uniform(k_grip) < _FLIP * noise
  moved = action[:6] + noise * jnp.maximum(size, _REST) * jax.random.normal(k_motion, (6,))
  return jnp.clip(jnp.append(moved, jnp.where(wrong, -action[6], action[6])), -1.0, 1.0)


@in_32_bits
def act(state: State, key: PRNGKeyArray | None = None, noise: float | Float[Array, ""] = 0.0) -> Float[Array, "7"]:
  """The expert's action in [-1, 1]; with a key, disturbed by `noise` (see `disturb`)."""
  point = _waypoint(state)
  move = _limit((point.position - state.position) / physics.TRANSLATION)
  turn = _limit(_turn(state, point) / physics.ROTATION)
  action = jnp.concatenate([move, turn, point.command[None]])
  return action if key is None else disturb(action, key, noise)


@in_32_bits
def rollout_from(state: State, key: PRNGKeyArray, noise: float | Float[Array, ""], steps: int) -> Rollout:
  """Runs the expert from `state` for `steps` actions (static)."""

  def advance(state, key):
    action = act(state)
    executed = disturb(action, key, noise)
    after = physics.step(state, executed)
    return after, (state, action, executed, physics.success(after))

  _, (states, actions, executed, success) = jax.lax.scan(advance, state, jax.random.split(key, steps))
  first = jnp.where(success.any(), jnp.argmax(success), steps).astype(jnp.int32)
  return Rollout(states, actions, executed, success, first)


@in_32_bits
def rollout(
  key: PRNGKeyArray,
  suite: str | int | Int[Array, ""],
  split: str = "train",
  noise: float | Float[Array, ""] = 0.0,
  steps: int = 60,
) -> Rollout:
  """Draws an episode and runs the expert on it; the arguments are those of `reset` and `act`."""
  k_reset, k_noise = jax.random.split(key)
  return rollout_from(reset(k_reset, suite, split), k_noise, noise, steps)


@in_32_bits
def perturbed_state(key: PRNGKeyArray, state: State) -> State:
  """A random state from which the task of `state` can still be done, for broad coverage of states in training.

  The gripper is anywhere, or near the next target or its destination; the fingers are open, half or closed; in two of
  five cases it holds an object, one in four of them a wrong one; a second goal may be all that is left.
  """
  k_uniform, k_normal = jax.random.split(key)
  u, spread = jax.random.uniform(k_uniform, (16,)), 0.02 * jax.random.normal(k_normal, (2,))

  # With two goals, the first may already be achieved.
  first, container = state.target[0], jnp.clip(state.destination, 0, MAX_OBJECTS - 1)
  ahead = (state.verb[1] != NOTHING) & (u[0] < 0.4)
  laid = (
    state.center[container[0]]
    .at[2]
    .set(jnp.asarray(FLOOR)[state.kind[container[0]]] + jnp.asarray(HALF)[state.kind[first], 2])
  )
  state = state.replace(center=state.center.at[first].set(jnp.where(ahead, laid, state.center[first])))
  goal = jnp.where(ahead, 1, 0)
  target, verb = state.target[goal], state.verb[goal]

  # A wrong object in the gripper teaches the expert's recovery: it lets go and takes the right one.
  wrong = (u[1] < 0.25) | (verb == PUSH)  # a push counts from where the object was let go, so its target stays
  other = jnp.where(ahead, 2, jnp.where(u[2] < 0.5, 1, 2))
  held = jnp.where(u[3] < 0.4, jnp.where(wrong, other, target), -1).astype(jnp.int32)
  holds = held >= 0
  width = jnp.asarray(HALF)[state.kind[held], 0]
  finger = jnp.where(holds, width, jnp.where(u[4] < 0.6, physics.OPEN, jnp.where(u[4] < 0.8, 0.02, 0.0)))

  # Half of the positions are near what matters next, where a few millimeters decide; the others cover the workspace.
  anywhere = jnp.array([-0.20, -0.20, 0.08]) + u[5:8] * jnp.array([0.40, 0.40, 0.16])
  focus = jnp.where(holds & (verb != PUSH), state.center[container[goal]], state.center[target])
  position = jnp.where(u[8] < 0.5, focus + jnp.append(spread, 0.10 * u[9]), anywhere)
  grasping = holds & (held == target) & (verb == LIFT)  # but not yet lifted
  position = jnp.where(grasping, position.at[2].min(0.055), position)

  turn = (2 * u[10:13] - 1) * jnp.array([0.12, 0.12, 0.6])
  state = state.replace(
    position=jnp.clip(position, physics.REACH[0], physics.REACH[1]),
    rotation=turn,
    finger=finger,
    held=held,
    grip_yaw=jnp.zeros(()),
    grip=jnp.append(0.0, 0.010 * (2 * u[13:15] - 1)),
  )
  return physics.settle(state)
