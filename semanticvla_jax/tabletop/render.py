"""An analytic ray-caster: both views of a tabletop state, as pure JAX.

Every pixel is a ray; every object gives the distance and the brightness of its nearest hit, and the nearest wins. All
arrays are single components over [sample, view, pixel], so that XLA fuses the arithmetic of an object into few loops
over pixels, and a scan takes the objects one after the other: nothing of shape [pixel, object, 3] exists, and the
program is small. There is one distant light. Shadows are soft: a point is darker the nearer its way to the light passes
by the ball round an object, which is cheap and shows height above the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, UInt8

from semanticvla_jax.tabletop.tasks import (
  BALL,
  BOWL,
  CYLINDER,
  FLOOR,
  GROOVE,
  HALF,
  NONE,
  PLATE,
  SLOT,
  State,
  containers,
  in_32_bits,
)

# Red, green, blue, yellow, purple, orange, and the white of plates.
PALETTE = np.array(
  [
    [0.86, 0.08, 0.10],
    [0.10, 0.66, 0.16],
    [0.10, 0.26, 0.92],
    [0.96, 0.88, 0.08],
    [0.56, 0.14, 0.76],
    [0.98, 0.50, 0.04],
    [0.97, 0.97, 0.97],
  ],
  np.float32,
)
AGENT_EYE, AGENT_AIM, AGENT_FIELD = (0.0, -0.50, 0.60), (0.0, 0.010, 0.035), 34.5  # meters, degrees
WRIST_EYE, WRIST_AIM, WRIST_FIELD = (0.0, -0.078, 0.088), (0.0, -0.006, -0.020), 76.0  # in the gripper's frame
_TABLE, _BACKGROUND = (0.70, 0.66, 0.60), (0.30, 0.34, 0.38)
_EDGE = 0.27  # half extent of the table
_LIGHT = (0.3, -0.38, 0.875)  # towards the light, a unit vector
_AMBIENT, _DIRECT = 0.42, 0.66
_FAR = 1e3  # the length of a ray that meets nothing

# The gripper in its frame: middles (the fingers' x follows their opening), half extents and colors of its four boxes.
_PARTS = np.array([[0, 0, 0.026], [0, 0, 0.026], [0, 0, 0.074], [0, 0, 0.140]], np.float32)
_PART_HALF = np.array([[0.006, 0.010, 0.036]] * 2 + [[0.056, 0.016, 0.013], [0.018, 0.016, 0.055]], np.float32)
_PART_COLOR = np.array([[0.16, 0.17, 0.19]] * 2 + [[0.36, 0.38, 0.42]] * 2, np.float32)

# What casts shadows: the objects, then the two fingertips and the palm. Radii of objects are relative to their width.
_HAND = np.array([[0, 0, 0.012], [0, 0, 0.012], [0, 0, 0.070]], np.float32)
_WIDE, _WIDE_CONTAINER = 1.25, 1.05
_HAND_RADIUS = np.array([0.017, 0.017, 0.045], np.float32)
_DARK, _DARK_CONTAINER = 0.6, 0.35
_HAND_DARK = np.array([0.5, 0.5, 0.4], np.float32)

Number = Float[Array, "..."] | float  # broadcasts to [sample, view, pixel]
Vector = tuple[Number, Number, Number]  # x, y, z, or red, green, blue


class Hit(NamedTuple):
  """The nearest surface so far: ray length, cosine of the angle to the light (may be negative), albedo."""

  t: Number
  lambert: Number
  red: Number
  green: Number
  blue: Number


class Surface(NamedTuple):
  """Where rays meet one object: ray length or _FAR, cosine of the angle to the light, and a factor on its color."""

  t: Number
  lambert: Number
  shade: Number = 1.0


@in_32_bits
def rotation_matrix(rotation: Float[Array, "3"]) -> Float[Array, "3 3"]:
  """The matrix of an axis-angle (Rodrigues), exact at zero."""
  x, y, z = rotation
  angle = jnp.sqrt(x * x + y * y + z * z + 1e-12)
  cross = jnp.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
  sine, versine = jnp.sin(angle) / angle, 2 * (jnp.sin(angle / 2) / angle) ** 2
  return jnp.eye(3) + sine * cross + versine * (cross @ cross)


def _look(eye: tuple, aim: tuple) -> np.ndarray:
  """Columns: right, down and forward of a camera that is not tilted sideways."""
  forward = np.subtract(aim, eye) / np.linalg.norm(np.subtract(aim, eye))
  right = np.cross(forward, [0.0, 0.0, 1.0])
  right /= np.linalg.norm(right)
  return np.stack([right, np.cross(forward, right), forward], 1).astype(np.float32)


def _rays(state: State, size: int, samples: int) -> tuple[Vector, Vector]:
  """Origins [1 2 1] and unit directions [samples^2 2 size^2] of both views, in the world."""
  turn = rotation_matrix(state.rotation)
  eyes = jnp.stack([jnp.asarray(AGENT_EYE), state.position + turn @ jnp.asarray(WRIST_EYE)])
  cameras = jnp.stack([jnp.asarray(_look(AGENT_EYE, AGENT_AIM)), turn @ _look(WRIST_EYE, WRIST_AIM)])
  line = ((np.arange(size * samples) + 0.5) / (size * samples) * 2 - 1).astype(np.float32)
  down, right = np.meshgrid(line, line, indexing="ij")
  right, down = (rearrange(v, "(h s) (w r) -> (s r) 1 (h w)", s=samples, r=samples) for v in (right, down))
  forward = (1 / np.tan(np.radians([AGENT_FIELD, WRIST_FIELD]) / 2)).astype(np.float32)[:, None]
  length = np.sqrt(right**2 + down**2 + forward**2)
  local = (right / length, down / length, forward / length)
  direction = tuple(sum(cameras[:, i, k : k + 1] * local[k] for k in range(3)) for i in range(3))
  return tuple(eyes[None, :, i : i + 1] for i in range(3)), direction


def _into(matrix: Float[Array, "3 3"], v: Vector) -> Vector:
  """`v` in the frame whose axes are the columns of `matrix`."""
  return tuple(matrix[0, i] * v[0] + matrix[1, i] * v[1] + matrix[2, i] * v[2] for i in range(3))


def _dot(a: Vector, b: Vector) -> Number:
  """The scalar product."""
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _inverse(d: Vector) -> Vector:
  """1/d, finite everywhere."""
  return tuple(1.0 / jnp.where(jnp.abs(c) < 1e-6, 1e-6, c) for c in d)


def _slab(o: Number, inverse: Number, half: Number) -> tuple[Number, Number]:
  """Where a ray enters and leaves -half..half along one axis."""
  middle, reach = -o * inverse, half * jnp.abs(inverse)
  return middle - reach, middle + reach


def _box(o: Vector, d: Vector, inverse: Vector, light: Vector, half: Vector) -> Surface:
  """A box of half extents `half` round the origin."""
  (x0, x1), (y0, y1), (z0, z1) = (_slab(a, b, c) for a, b, c in zip(o, inverse, half))
  near, far = jnp.maximum(jnp.maximum(x0, y0), z0), jnp.minimum(jnp.minimum(x1, y1), z1)
  side = [-jnp.sign(c) * l for c, l in zip(d, light)]
  lambert = jnp.where(near == x0, side[0], jnp.where(near == y0, side[1], side[2]))
  return Surface(jnp.where((near < far) & (near > 0), near, _FAR), lambert)


def _ball(o: Vector, d: Vector, light: Vector, radius: Number) -> Surface:
  """A ball round the origin."""
  b = _dot(o, d)
  inner = b**2 - _dot(o, o) + radius**2
  t = jnp.where(inner > 0, -b - jnp.sqrt(jnp.maximum(inner, 0.0)), _FAR)
  return Surface(t, (_dot(o, light) + t * _dot(d, light)) / radius)


def _cylinder(o: Vector, d: Vector, inverse: Vector, light: Vector, radius: Number, half: Number) -> Surface:
  """An upright cylinder round the origin."""
  a = jnp.maximum(d[0] ** 2 + d[1] ** 2, 1e-9)
  b, c = o[0] * d[0] + o[1] * d[1], o[0] ** 2 + o[1] ** 2 - radius**2
  inner = b**2 - a * c
  root = jnp.sqrt(jnp.maximum(inner, 0.0))
  z0, z1 = _slab(o[2], inverse[2], half)
  side, far = (-b - root) / a, jnp.minimum((-b + root) / a, z1)
  t = jnp.maximum(side, z0)
  l_side = (o[0] * light[0] + o[1] * light[1] + side * (d[0] * light[0] + d[1] * light[1])) / radius
  lambert = jnp.where(side > z0, l_side, -jnp.sign(d[2]) * light[2])
  return Surface(jnp.where((inner > 0) & (t < far), t, _FAR), lambert)


def _bowl(o: Vector, d: Vector, inverse: Vector, light: Vector) -> Surface:
  """The part of a sphere below a rim: its outside where the ray enters, or else its inside where the ray leaves."""
  rim, high = float(HALF[BOWL, 0]), 2 * float(HALF[BOWL, 2])
  radius = (rim**2 + high**2) / (2 * high)
  from_middle = (o[0], o[1], o[2] - radius)
  b = _dot(from_middle, d)
  inner = b**2 - _dot(from_middle, from_middle) + radius**2
  root = jnp.sqrt(jnp.maximum(inner, 0.0))
  outside = (o[2] + (-b - root) * d[2] < high) & (-b - root > 0)
  within = (o[2] + (-b + root) * d[2] < high) & (-b + root > 0)
  t = jnp.where(outside, -b - root, -b + root)
  lambert = jnp.where(outside, 1.0, -1.0) * (_dot(from_middle, light) + t * _dot(d, light)) / radius
  depth = (o[2] + t * d[2]) / high
  shade = jnp.where(outside, 0.95, 0.70 + 0.25 * depth)  # less light reaches the bottom of a bowl than its rim
  t = jnp.where((inner > 0) & (outside | within), t, _FAR)

  t_rim = (high - o[2]) * inverse[2]
  r2 = (o[0] + t_rim * d[0]) ** 2 + (o[1] + t_rim * d[1]) ** 2
  on_rim = (r2 < rim**2) & (r2 > (rim - 0.006) ** 2) & (t_rim > 0) & (t_rim < t)
  return Surface(jnp.where(on_rim, t_rim, t), jnp.where(on_rim, 1.0, lambert), jnp.where(on_rim, 1.15, shade))


def _plate(o: Vector, d: Vector, inverse: Vector, light: Vector) -> Surface:
  """A disc with a darker ring."""
  t = (float(FLOOR[PLATE]) - o[2]) * inverse[2]
  r2 = (o[0] + t * d[0]) ** 2 + (o[1] + t * d[1]) ** 2
  wide = float(HALF[PLATE, 0])
  shade = jnp.where((r2 > (wide - 0.018) ** 2) & (r2 < (wide - 0.013) ** 2), 0.72, 1.0)
  return Surface(jnp.where((r2 < wide**2) & (t > 0), t, _FAR), light[2], shade)


def _slot(o: Vector, d: Vector, inverse: Vector, light: Vector) -> Surface:
  """A box; a ray that enters through the hole in its upper face goes on to where it leaves the hole."""
  half = tuple(float(v) for v in HALF[SLOT])
  t, lambert, _ = _box((o[0], o[1], o[2] - half[2]), d, inverse, light, half)
  x, y, z = (a + t * b for a, b in zip(o, d))
  hole = (z > 2 * half[2] - 1e-4) & (jnp.abs(x) < float(GROOVE[0])) & (jnp.abs(y) < float(GROOVE[1]))
  walls = [_slab(o[i], inverse[i], float(GROOVE[i]))[1] for i in range(2)]
  floor = (float(FLOOR[SLOT]) - o[2]) * inverse[2]
  t_hole = jnp.minimum(jnp.minimum(*walls), floor)
  shade = jnp.where(hole, jnp.where(t_hole == floor, 0.25, 0.45), 1.0)
  return Surface(jnp.where(hole, t_hole, t), jnp.where(hole, 0.7, lambert), shade)


def _solid(o: Vector, d: Vector, light: Vector, kind: Int[Array, ""]) -> Surface:
  """A graspable object in its own frame, from its center."""
  half, inverse = jnp.asarray(HALF)[kind], _inverse(d)
  box, ball = _box(o, d, inverse, light, tuple(half)), _ball(o, d, light, half[0])
  cylinder = _cylinder(o, d, inverse, light, half[0], half[2])
  t, lambert = (jnp.select([kind == BALL, kind == CYLINDER], [b, c], a) for a, b, c in zip(box[:2], ball, cylinder))
  return Surface(jnp.where((t > 0) & (kind != NONE), t, _FAR), lambert)


def _container(o: Vector, d: Vector, light: Vector, kind: Int[Array, ""]) -> Surface:
  """A container in its own frame, from the middle of its underside."""
  surfaces = [surface(o, d, _inverse(d), light) for surface in (_bowl, _plate, _slot)]
  t, lambert, shade = (jnp.where(kind == BOWL, a, jnp.where(kind == PLATE, b, c)) for a, b, c in zip(*surfaces))
  return Surface(jnp.where(kind == NONE, _FAR, t), lambert, shade)


def _nearer(hit: Hit, surface: Surface, color: Float[Array, "3"]) -> Hit:
  """Keeps the nearer of a surface and what was hit so far."""
  t, lambert, shade = surface
  new = (lambert, shade * color[0], shade * color[1], shade * color[2])
  return Hit(jnp.minimum(t, hit.t), *(jnp.where(t < hit.t, a, b) for a, b in zip(new, hit[1:])))


def _table(o: Vector, d: Vector) -> Hit:
  """The table, and the background around it."""
  t = -o[2] * _inverse(d)[2]
  on = (t > 0) & (jnp.abs(o[0] + t * d[0]) < _EDGE) & (jnp.abs(o[1] + t * d[1]) < _EDGE)
  return Hit(
    jnp.where(on, t, _FAR), jnp.where(on, _LIGHT[2], 1.0), *(jnp.where(on, a, b) for a, b in zip(_TABLE, _BACKGROUND))
  )


def _placed(state: State) -> tuple[Float[Array, "n 3"], Float[Array, "n 3 3"], Int[Array, " n"]]:
  """Where the frames of all objects are, their axes, and the objects' kinds."""
  about_z = jax.vmap(lambda yaw: rotation_matrix(jnp.array([0.0, 0.0, 1.0]) * yaw))
  held = rotation_matrix(state.rotation) @ about_z(state.grip_yaw[None])[0]
  turns = jnp.where((jnp.arange(len(state.kind)) == state.held)[:, None, None], held, about_z(state.yaw))
  under = jnp.where(containers(state), jnp.asarray(HALF)[state.kind, 2], 0.0)
  return state.center.at[:, 2].add(-under), turns, state.kind


def _objects(hit: Hit, state: State, o: Vector, d: Vector) -> Hit:
  """Everything that is on the table or held."""
  things = (*_placed(state), jnp.asarray(PALETTE)[state.color])

  def add(surface, hit, thing):
    origin, turn, kind, color = thing
    local = _into(turn, tuple(a - b for a, b in zip(o, origin)))
    return _nearer(hit, surface(local, _into(turn, d), _into(turn, _LIGHT), kind), color), None

  for surface, some in _parts(state):
    hit, _ = jax.lax.scan(functools.partial(add, surface), hit, tuple(x[some] for x in things))
  return hit


def _parts(state: State) -> list[tuple[Callable[..., Surface], Int[np.ndarray, " m"]]]:
  """The surfaces of what can be grasped and of containers, and which objects have them."""
  inside = containers(state)
  return [(_solid, np.flatnonzero(~inside)), (_container, np.flatnonzero(inside))]


def _spread(points: np.ndarray, state: State) -> Float[Array, "p 3"]:
  """Points of the gripper in its frame, the first two moved out with the fingers."""
  reach = state.finger + 0.006
  return jnp.asarray(points).at[:2, 0].set(jnp.stack([-reach, reach]))


def _gripper(hit: Hit, state: State, o: Vector, d: Vector) -> Hit:
  """Two fingers, a palm and a wrist."""
  turn = rotation_matrix(state.rotation)
  o = _into(turn, tuple(a - b for a, b in zip(o, state.position)))
  d, light = _into(turn, d), _into(turn, _LIGHT)
  inverse = _inverse(d)

  def add(hit, part):
    middle, half, color = part
    return _nearer(hit, _box(tuple(a - b for a, b in zip(o, middle)), d, inverse, light, tuple(half)), color), None

  return jax.lax.scan(add, hit, (_spread(_PARTS, state), jnp.asarray(_PART_HALF), jnp.asarray(_PART_COLOR)))[0]


def _light(hit: Hit, state: State, o: Vector, d: Vector) -> Number:
  """The share of the direct light that reaches each hit, 0..1."""
  hand = state.position + _spread(_HAND, state) @ rotation_matrix(state.rotation).T
  inside = containers(state)
  wide = np.where(inside, np.float32(_WIDE_CONTAINER), np.float32(_WIDE))
  dark = np.append(np.where(inside, np.float32(_DARK_CONTAINER), np.float32(_DARK)), _HAND_DARK)
  radius = jnp.append(jnp.asarray(HALF)[state.kind, 0] * wide, _HAND_RADIUS).clip(1e-3)
  point = tuple(a + hit.t * b for a, b in zip(o, d))

  def add(light, ball):
    center, radius, dark = ball
    away = tuple(a - b for a, b in zip(center, point))
    along = _dot(away, _LIGHT)
    cover = jnp.clip(1.5 - 1.5 * (_dot(away, away) - along**2) / radius**2, 0.0, 1.0)
    return light * (1.0 - dark * cover * jnp.clip(along / 0.012, 0.0, 1.0)), None

  return jax.lax.scan(add, jnp.ones_like(hit.t), (jnp.concatenate([state.center, hand]), radius, jnp.asarray(dark)))[0]


@in_32_bits
def views(state: State, size: int, samples: int = 1) -> UInt8[Array, "2 {size} {size} 3"]:
  """The agent view (from the front, above) and the wrist view (down between the fingers), RGB, upright.

  Args:
    state: one state; vmap for a batch.
    size: height and width in pixels, static.
    samples: rays along either side of a pixel, static; 2 smooths the edges and costs five times as much on a CPU.
  """
  o, d = _rays(state, size, samples)
  hit = _gripper(_objects(_table(o, d), state, o, d), state, o, d)
  bright = _AMBIENT + _DIRECT * jnp.clip(hit.lambert, 0.0, 1.0) * _light(hit, state, o, d)
  rgb = jnp.stack([jnp.clip(c * bright, 0.0, 1.0) for c in hit[2:]], -1).mean(0)
  return (rgb * 255 + 0.5).astype(jnp.uint8).reshape(2, size, size, 3)


@in_32_bits
def visible_objects(state: State, size: int) -> Int[Array, "2 {size} {size}"]:
  """Which object each pixel of `views` shows: its index in the state, or -1 (table, background, gripper)."""
  o, d = _rays(state, size, 1)
  table = _table(o, d)

  def add(surface, found, thing):
    nearest, which = found
    (origin, turn, kind), index = thing
    local = _into(turn, tuple(a - b for a, b in zip(o, origin)))
    t = surface(local, _into(turn, d), _into(turn, _LIGHT), kind).t
    return (jnp.minimum(t, nearest), jnp.where(t < nearest, index, which)), None

  found = (table.t, jnp.full(table.t.shape, -1))
  for surface, some in _parts(state):
    things = (tuple(x[some] for x in _placed(state)), jnp.asarray(some, jnp.int32))
    found, _ = jax.lax.scan(functools.partial(add, surface), found, things)
  nearest, which = found
  hidden = _gripper(table._replace(t=nearest), state, o, d).t < nearest
  return jnp.where(hidden, -1, which).reshape(2, size, size)


@in_32_bits
def project(state: State, point: Float[Array, "3"]) -> Float[Array, "2 2"]:
  """Where a point of the world (meters) appears: (row, column) in [0, 1) of both views, outside when out of sight."""
  turn = rotation_matrix(state.rotation)
  eyes = jnp.stack([jnp.asarray(AGENT_EYE, jnp.float32), state.position + turn @ jnp.asarray(WRIST_EYE)])
  cameras = jnp.stack([jnp.asarray(_look(AGENT_EYE, AGENT_AIM)), turn @ _look(WRIST_EYE, WRIST_AIM)])
  right, down, forward = jnp.moveaxis(jnp.einsum("vij,vi->vj", cameras, point - eyes), -1, 0)
  scale = 1 / np.tan(np.radians([AGENT_FIELD, WRIST_FIELD]) / 2)
  depth = jnp.maximum(forward, 1e-3)
  at = jnp.stack([down / depth * scale, right / depth * scale], axis=-1) / 2 + 0.5
  return jnp.where(forward[:, None] > 1e-3, at, -1.0)
