"""A language-conditioned tabletop in pure JAX, with the actions, proprioception and views of LIBERO.

`reset`, `step`, `success`, `proprio` and `observe` are pure functions of `State`: they jit, vmap and scan on any
device. Movement is kinematic but earned: fingers push what they touch from the side and rest on what they touch from
above; an object is grasped only if it is between them, near its center and aligned when they close; what is let go
falls straight down onto the table, a plate, another object, or into a bowl or a slot. Containers never move.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from semanticvla_jax.tabletop import render
from semanticvla_jax.tabletop.probes import instruction, instructions, max_steps, reset
from semanticvla_jax.tabletop.render import rotation_matrix
from semanticvla_jax.tabletop.tasks import (
  BALL,
  BOWL,
  CUBE,
  CYLINDER,
  DIRECTIONS,
  FLOOR,
  GRASPABLE,
  HALF,
  INSTRUCTIONS,
  MAX_OBJECTS,
  PEG,
  PLATE,
  SLOT,
  SPLITS,
  SUITES,
  State,
  angle_between,
  in_32_bits,
  seed_key,
)

__all__ = [  # a user needs this module and `expert` only
  "INSTRUCTIONS",
  "SPLITS",
  "SUITES",
  "State",
  "TabletopEnvironment",
  "achieved",
  "instruction",
  "instructions",
  "max_steps",
  "observe",
  "proprio",
  "reset",
  "seed_key",
  "step",
  "success",
]

TRANSLATION = 0.05  # meters a unit of action
ROTATION = 0.5  # radians a unit of action
OPEN = 0.04  # meters, the widest finger position
FINGER_STEP = 0.02  # meters a finger moves in a step: two steps from open to closed
REACH = np.array([[-0.24, -0.24, 0.012], [0.24, 0.24, 0.30]], np.float32)  # limits of the gripper's position
TWIST = np.array([0.4, 0.4, 2.2], np.float32)  # limits of the gripper's axis-angle
LIFTED = 0.06  # meters under an object that counts as picked up
PUSHED = 0.06  # meters that count as pushed
_SUBSTEPS = 4
_FALL = 0.08  # meters an object falls in a step
_TIP = 0.010  # meters from the gripper's position down to the end of the fingers
_PAD = 0.006  # radius of a finger, seen from above
_OVER = 0.008  # an overlap in height of less than this means on top, of more means next to it
_SIDEWAYS, _UPRIGHT, _TURNED = 0.018, 0.020, 0.35  # a grasp: meters along the pads, meters in height, radians


@in_32_bits
def compose(a: Float[Array, "3"], b: Float[Array, "3"]) -> Float[Array, "3"]:
  """The axis-angle (angle <= pi) of rotation `b` followed by rotation `a`, both axis-angle in the world frame."""

  def quaternion(v):
    angle = jnp.sqrt(v @ v + 1e-12)
    return jnp.cos(angle / 2), v / angle * jnp.sin(angle / 2)

  (aw, av), (bw, bv) = quaternion(a), quaternion(b)
  w, v = aw * bw - av @ bv, aw * bv + bw * av + jnp.cross(av, bv)
  w, v = jnp.where(w < 0, -w, w), jnp.where(w < 0, -v, v)
  sine = jnp.sqrt(v @ v + 1e-12)
  return v / sine * 2 * jnp.arctan2(sine, w)


@in_32_bits
def heading(rotation: Float[Array, "3"]) -> Float[Array, ""]:
  """The yaw of the gripper, radians."""
  matrix = rotation_matrix(rotation)
  return jnp.arctan2(matrix[1, 0], matrix[0, 0])


def _turn(xy: Float[Array, "*n 2"], angle: Float[Array, "..."]) -> Float[Array, "*n 2"]:
  """Rotates `xy` by `angle`, which broadcasts against its leading axes."""
  c, s = jnp.cos(angle), jnp.sin(angle)
  return jnp.stack([c * xy[..., 0] - s * xy[..., 1], s * xy[..., 0] + c * xy[..., 1]], -1)


def _escape(point: Float[Array, "n 2"], half: Float[Array, "n 2"], radius: Float[Array, " n"]) -> Float[Array, "n 2"]:
  """The shortest move that takes `point` to `radius` from the rectangle +-`half` round the origin, or further."""
  nearest = jnp.clip(point, -half, half)
  out = point - nearest
  distance = jnp.sqrt(jnp.sum(out**2, -1) + 1e-12)
  outside = out * (jnp.maximum(radius - distance, 0.0) / distance)[..., None]
  depth = half - jnp.abs(point) + radius[..., None]
  side = jnp.where(point < 0, -1.0, 1.0) * depth
  x_first = (depth[..., 0] < depth[..., 1])[..., None]
  inside = side * jnp.where(x_first, jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
  return jnp.where((distance > 1e-5)[..., None], outside, inside)


def _outline(kind: Int[Array, " n"]) -> tuple[Float[Array, "n 2"], Float[Array, " n"]]:
  """An object from above: half extents f32[n 2] of a rectangle and the radius f32[n] around it."""
  half = jnp.asarray(HALF)[kind, :2]
  is_round = (kind == BALL) | (kind == CYLINDER)
  return jnp.where(is_round[:, None], 0.0, half), jnp.where(is_round, half[:, 0], 0.0)


def _top(state: State) -> Float[Array, " n"]:
  """Heights of the upper ends of all objects."""
  return state.center[:, 2] + jnp.asarray(HALF)[state.kind, 2]


def _bottom(state: State) -> Float[Array, " n"]:
  """Heights of the lower ends of all objects."""
  return state.center[:, 2] - jnp.asarray(HALF)[state.kind, 2]


def _in_groove(state: State) -> Bool[Array, "n n"]:
  """[i, j]: peg i is above the groove of slot j, aligned well enough to go in."""
  apart = _turn(state.center[:, None, :2] - state.center[None, :, :2], -state.yaw[None, :])
  turned = jnp.abs(angle_between(state.yaw[:, None] - state.yaw[None, :], math.pi))
  near = jnp.all(jnp.abs(apart) < 0.010, -1)
  return near & (turned < 0.20) & (state.kind[:, None] == PEG) & (state.kind[None, :] == SLOT)


def _support(state: State, bottom: Float[Array, " n"]) -> Float[Array, " n"]:
  """The height, in meters, of the surface under each object, whose lower end was at `bottom`.

  The tabletop is 0, so that the largest of all candidates is the surface that an object falls onto.
  """
  kind = state.kind
  apart = state.center[:, None, :2] - state.center[None, :, :2]
  distance = jnp.linalg.norm(apart, axis=-1)
  half, radius = _outline(kind)
  inside = jnp.all(jnp.abs(_turn(apart, -state.yaw[None, :])) < half + radius[:, None], -1)
  # Only what is not held and has a flat top carries an object; of those, only what was not above it before the step:
  # an object that is pushed sideways must not jump onto its neighbor.
  free = (jnp.arange(len(kind)) != state.held) & (kind != BALL) & (kind < BOWL)
  below = _top(state)[None, :] <= bottom[:, None] + _OVER
  stacked = jnp.where(inside & free & below & ~jnp.eye(len(kind), dtype=bool), _top(state), 0.0)
  # Containers carry on their floor, not on their top: bowls and plates within their radius, a slot in its groove.
  floor = jnp.asarray(FLOOR)[kind]
  round_one = jnp.where(((kind == BOWL) | (kind == PLATE)) & (distance < half[:, 0]), floor, 0.0)
  block = jnp.where((kind == SLOT) & inside & below, jnp.where(_in_groove(state), floor, _top(state)), 0.0)
  return jnp.max(jnp.maximum(jnp.maximum(stacked, round_one), block), axis=1)


def _walls(state: State, xy: Float[Array, "n 2"], bottom: Float[Array, " n"]) -> Float[Array, "n 2"]:
  """Moves objects that overlap the wall of a bowl or the body of a slot to the nearest place where they fit."""
  width = jnp.asarray(HALF)[state.kind, 0]
  groove = _in_groove(state)
  for j in range(GRASPABLE, MAX_OBJECTS):
    apart = xy - state.center[j, :2]
    distance = jnp.linalg.norm(apart, axis=-1, keepdims=True)
    rim = HALF[BOWL, 0]
    fit = jnp.where(
      distance < rim, jnp.minimum(distance, rim - 0.012 - width[:, None]), jnp.maximum(distance, rim + width[:, None])
    )
    in_wall = (state.kind[j] == BOWL) & (bottom < 2 * HALF[BOWL, 2] - _OVER)
    xy = jnp.where(in_wall[:, None], state.center[j, :2] + apart * fit / jnp.maximum(distance, 1e-6), xy)
    beside = (state.kind[j] == SLOT) & (bottom < 2 * HALF[SLOT, 2] - _OVER)
    local = _turn(apart, -state.yaw[j])
    away = _escape(local, jnp.broadcast_to(HALF[SLOT, :2], local.shape), width)
    out = xy + _turn(away, jnp.broadcast_to(state.yaw[j], width.shape))
    xy = jnp.where(beside[:, None], jnp.where(groove[:, j, None], state.center[j, :2], out), xy)
  return xy


def _fingers(state: State) -> Float[Array, "2 2"]:
  """The two fingers from above, meters."""
  across = rotation_matrix(state.rotation)[:2, 0]
  reach = state.finger + _PAD
  return jnp.stack([state.position[:2] - reach * across, state.position[:2] + reach * across])


def _carry(state: State) -> State:
  """Puts the held object where the gripper holds it."""
  holds = jnp.arange(len(state.kind)) == state.held
  center = state.position + rotation_matrix(state.rotation) @ state.grip
  return state.replace(
    center=jnp.where(holds[:, None], center, state.center),
    yaw=jnp.where(holds, heading(state.rotation) + state.grip_yaw, state.yaw),
    origin=jnp.where(holds[:, None], center[:2], state.origin),
  )


def _move(state: State, shift: Float[Array, "3"], turn: Float[Array, "3"]) -> State:
  """Moves the gripper a little; what it touches is pushed, carries it up, or stops it."""
  # Only what is not held and has a flat top carries an object; of those, only what was not above it before the step:
  # an object that is pushed sideways must not jump onto its neighbor.
  free = (jnp.arange(len(state.kind)) != state.held) & (state.kind < BOWL)
  bottom_before, tip_before = _bottom(state), state.position[2] - _TIP
  state = _carry(
    state.replace(
      position=jnp.clip(state.position + shift, REACH[0], REACH[1]),
      rotation=jnp.clip(compose(turn, state.rotation), -TWIST, TWIST),
    )
  )

  # A finger next to an object pushes it, a finger above an object rests on it.
  half, radius = _outline(state.kind)
  top, xy, floor = _top(state), state.center[:, :2], REACH[0, 2]
  beside = free & (tip_before < top - _OVER) & (state.position[2] - _TIP < top)
  for finger in _fingers(state):
    local = _turn(finger - xy, -state.yaw)
    away = _turn(_escape(local, half, radius + _PAD), state.yaw)
    touches = jnp.any(away != 0, -1)
    floor = jnp.maximum(floor, jnp.max(jnp.where(free & touches & (tip_before >= top - _OVER), top + _TIP, 0.0)))
    xy = jnp.where(beside[:, None], xy - away, xy)
  state = state.replace(center=state.center.at[:, :2].set(xy))

  # The held object rests on what is below it and stops at walls; the gripper with it.
  holds = jnp.arange(len(state.kind)) == state.held
  lift = jnp.sum(jnp.where(holds, jnp.maximum(_support(state, bottom_before) - _bottom(state), 0.0), 0.0))
  lift = jnp.maximum(lift, floor - state.position[2]).clip(0.0)
  blocked = _walls(state, state.center[:, :2], _bottom(state) + lift) - state.center[:, :2]
  slide = jnp.sum(jnp.where(holds[:, None], blocked, 0.0), axis=0)
  return _carry(state.replace(position=state.position + jnp.append(slide, lift)))


@in_32_bits
def graspable(state: State) -> Bool[Array, " n"]:
  """Which objects closing fingers would grasp: between them, at the height of the pads, aligned."""
  matrix = rotation_matrix(state.rotation)
  local = jnp.abs((state.center - state.position) @ matrix)
  period = jnp.where(state.kind == CUBE, math.pi / 2, math.pi)
  turned = jnp.abs(angle_between(state.yaw - heading(state.rotation), period))
  aligned = (turned < _TURNED) | (state.kind == BALL) | (state.kind == CYLINDER)
  fits = local[:, 0] + jnp.asarray(HALF)[state.kind, 0] < state.finger + 0.001
  near = fits & (local[:, 1] < _SIDEWAYS) & (local[:, 2] < _UPRIGHT)
  return near & aligned & (state.kind < BOWL) & (matrix[2, 2] > math.cos(_TURNED))


def _grip(state: State, command: Float[Array, ""]) -> State:
  """Closes (command > 0) or opens the fingers by one step; they grasp and let go."""
  finger = jnp.clip(state.finger + jnp.where(command > 0, -FINGER_STEP, FINGER_STEP), 0.0, OPEN)
  width = jnp.asarray(HALF)[state.kind, 0]
  holding = state.held >= 0
  keeps = holding & (finger <= width[state.held] + 0.002)

  caught = graspable(state) & (finger <= width) & ~holding
  distance = jnp.where(caught, jnp.linalg.norm(state.center - state.position, axis=-1), jnp.inf)
  held = jnp.where(caught.any(), jnp.argmin(distance), jnp.where(keeps, state.held, -1)).astype(jnp.int32)
  grip = (state.center[held] - state.position) @ rotation_matrix(state.rotation)
  grip = grip.at[0].set(0.0)  # the pads center what they close on, and align it
  period = jnp.where(state.kind[held] == CUBE, math.pi / 2, math.pi)
  yaw = state.yaw[held] - heading(state.rotation)
  is_round = (state.kind[held] == BALL) | (state.kind[held] == CYLINDER)
  grip_yaw = jnp.where(is_round, yaw, yaw - angle_between(yaw, period))
  return _carry(
    state.replace(
      held=held,
      finger=jnp.where(held >= 0, width[held], finger),
      grip=jnp.where(caught.any(), grip, state.grip),
      grip_yaw=jnp.where(caught.any(), grip_yaw, state.grip_yaw),
    )
  )


def _fall(state: State) -> State:
  """Lets free objects fall, slide off walls and each other, and drop into slots."""
  index = jnp.arange(len(state.kind))
  movable = state.kind < BOWL
  width, high = jnp.asarray(HALF)[state.kind, 0], jnp.asarray(HALF)[state.kind, 2]
  apart = state.center[:, None] - state.center[None, :]
  distance = jnp.linalg.norm(apart[..., :2], axis=-1)
  level = jnp.abs(apart[..., 2]) < high[:, None] + high[None, :] - _OVER
  overlap = jnp.maximum(width[:, None] + width[None, :] - distance, 0.0)
  pushes = level & movable[:, None] & movable[None, :] & (index[:, None] != index[None, :])
  share = jnp.where(index[None, :] == state.held, 1.0, 0.5)
  away = apart[..., :2] / jnp.maximum(distance, 1e-6)[..., None] * (jnp.where(pushes, share * overlap, 0.0))[..., None]
  free = movable & (index != state.held)
  xy = jnp.where(free[:, None], jnp.clip(state.center[:, :2] + away.sum(1), -0.22, 0.22), state.center[:, :2])
  xy = jnp.where(free[:, None], _walls(state, xy, _bottom(state)), xy)
  moved = state.replace(center=state.center.at[:, :2].set(xy))

  rest = _support(moved, _bottom(state)) + high
  z = jnp.where(free, jnp.maximum(rest, state.center[:, 2] - _FALL), state.center[:, 2])
  inserted = _in_groove(moved) & (z < rest + 0.005)[:, None] & free[:, None]
  slot = jnp.argmax(inserted, 1)
  yaw = jnp.where(inserted.any(1), state.yaw - angle_between(state.yaw - state.yaw[slot], math.pi), state.yaw)
  return moved.replace(center=moved.center.at[:, 2].set(z), yaw=yaw)


@in_32_bits
def settle(state: State) -> State:
  """Lets a state that was put together freely come to rest, with nothing inside anything else."""
  still = jnp.zeros(3)
  return jax.lax.fori_loop(0, 3, lambda _, s: _fall(_move(_carry(s), still, still)), state)


@in_32_bits
def step(state: State, action: Float[Array, "7"]) -> State:
  """Acts once: translation (x 0.05 m), rotation (axis-angle in the world frame, x 0.5 rad), gripper (> 0 closes).

  The action is clipped to [-1, 1]; the gripper moves its full way in a step unless a limit, an object or the table is
  in the way.
  """
  action = jnp.clip(jnp.asarray(action, jnp.float32), -1.0, 1.0)
  shift, turn = action[:3] * TRANSLATION / _SUBSTEPS, action[3:6] * ROTATION / _SUBSTEPS
  state = jax.lax.fori_loop(0, _SUBSTEPS, lambda _, s: _move(s, shift, turn), state)
  state = _fall(_grip(state, action[6]))
  return state.replace(time=state.time + 1)


@in_32_bits
def achieved(state: State) -> Bool[Array, "2"]:
  """Which of the two goals of the task the state fulfils; an absent goal is fulfilled."""
  target, destination = state.target, state.destination
  resting = state.held != target
  bottom, xy = _bottom(state)[target], state.center[target, :2]
  apart = xy - state.center[jnp.clip(destination, 0, MAX_OBJECTS - 1), :2]
  container = state.kind[jnp.clip(destination, 0, MAX_OBJECTS - 1)]
  lifted = ~resting & (bottom > LIFTED)
  inside = jnp.linalg.norm(apart, axis=-1) < 0.9 * jnp.asarray(HALF)[container, 0]
  put = resting & inside & (bottom < 0.02)
  moved, way = xy - state.origin[target], jnp.asarray(DIRECTIONS)[jnp.clip(destination, 0, 3)]
  along, across = jnp.sum(moved * way, -1), jnp.abs(moved[:, 0] * way[:, 1] - moved[:, 1] * way[:, 0])
  pushed = resting & (along > PUSHED) & (across < along) & (bottom < 0.012)
  inserted = resting & (bottom < HALF[SLOT, 2]) & _in_groove(state)[target, jnp.clip(destination, 0, MAX_OBJECTS - 1)]
  cases = jnp.stack([jnp.ones(2, bool), lifted, put, pushed, inserted])
  return jnp.take_along_axis(cases, state.verb[None], axis=0)[0]


@in_32_bits
def success(state: State) -> Bool[Array, ""]:
  """Whether the state fulfils its instruction, with any of the objects that its words fit."""
  if state.fitting is None:
    return achieved(state).all()
  index = jnp.arange(len(state.kind))
  one = lambda i: achieved(state.replace(target=state.target.at[0].set(i))).all()  # noqa: E731
  return (jax.vmap(one)(index) & state.fitting).any()


@in_32_bits
def proprio(state: State) -> Float[Array, "8"]:
  """Gripper position xyz (meters), axis-angle (radians), the two finger positions (meters, mirrored), as in LIBERO."""
  return jnp.concatenate([state.position, state.rotation, jnp.stack([state.finger, -state.finger])])


@in_32_bits
def observe(state: State, size: int) -> tuple[UInt8[Array, "2 size size 3"], Float[Array, "8"]]:
  """Renders the agent and wrist views and reads the proprioception."""
  return render.views(state, size), proprio(state)


class TabletopEnvironment:
  """One tabletop episode at a time, with the `Environment` protocol.

  Args:
    suite: one of SUITES, or of probes.SUITES.
    split: "train", "heldout" or "unseen"; `reset(seed)` counts seeds from 0 within the split.
    size: height and width of both views, pixels.
  """

  def __init__(self, suite: str, split: str = "train", size: int = 224):
    if size < 8:
      raise ValueError(f"Image size {size} is too small; expected at least 8 pixels: 48 to 224 are usual.")
    self.max_steps = max_steps(suite)
    self._key = functools.partial(seed_key, split=split)
    self._key(0)
    self._reset = jax.jit(functools.partial(reset, suite=suite, split=split))
    self._step = jax.jit(step)
    self._success = jax.jit(success)
    self._observe = jax.jit(functools.partial(observe, size=size))
    self.state: State | None = None

  @property
  def instruction(self) -> str:
    """What is asked in the current episode."""
    return instruction(self._current())

  @property
  def success(self) -> bool:
    """Whether the current state fulfils the instruction."""
    return bool(self._success(self._current()))

  def reset(self, seed: int) -> dict:
    """Starts episode `seed` of the split and returns its first observation."""
    self.state = self._reset(self._key(seed))
    return self.observe()

  def step(self, action: np.ndarray, observe: bool = True) -> tuple[dict | None, bool]:
    """Acts once; returns (observation or None, done). Raises ValueError for an action that is not 7 finite numbers."""
    action = np.asarray(action, np.float32)
    if action.shape != (7,) or not np.isfinite(action).all():
      raise ValueError(
        f"Action has shape {action.shape} and values {action}; expected 7 finite numbers: translation, "
        "axis-angle, gripper."
      )
    self.state = self._step(self._current(), action)
    done = self.success or int(self.state.time) >= self.max_steps
    return (self.observe() if observe else None), done

  def observe(self) -> dict:
    """Renders the current state as an observation dict, see `Environment`."""
    images, state = self._observe(self._current())
    images = np.asarray(images)
    return {
      "observation/image": images[0],
      "observation/wrist_image": images[1],
      "observation/state": np.asarray(state),
      "prompt": self.instruction,
    }

  def _current(self) -> State:
    if self.state is None:
      raise ValueError("No episode is running; expected reset(seed) before anything else: call reset first.")
    return self.state
