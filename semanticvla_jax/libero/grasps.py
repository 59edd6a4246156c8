"""Where a parallel gripper can take an object from above, and how high a path has to be. Pure numpy.

Positions in meters with z up, angles in radians. Objects are sets of points inside their collision boxes; the gripper
is the Panda's: two fingers that open 8 cm, below a hand that is 21 cm wide along the axis on which they close.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

WIDEST = 0.074  # what is gripped, of an opening of 0.08
_DEPTH = 0.024  # of the grip site below the object's top
_FLOOR = 0.012  # of the grip site above the object's lowest point
_PAD = 0.011  # half of a finger pad across the closing axis
_FINGER = (0.0365, 0.0645)  # from the grip site to the inner and the outer side of an open finger
# Half of the hand along and across the closing axis; how far above the grip site it begins, less 1 cm as it may tilt.
_HAND = (0.107, 0.036, 0.032)
_YAWS = np.deg2rad(np.arange(-90, 90, 7.5))
_ALONG = np.arange(-16, 17) * 0.005  # offsets from the object's middle along the closing axis, which find a rim
_ACROSS = np.array([0.0, -0.02, 0.02, -0.04, 0.04])
REACH = 0.72  # from the arm's base, horizontally: farther away its elbow is nearly straight when the gripper looks down
_EASY = 0.55  # the same, where the arm is neither folded nor stretched out


class Grasp(NamedTuple):
  """A grasp from above: the grip site's position f64[3], the closing axis' yaw, what is between the fingers in meters.

  `blocked` says that something else is where the open gripper would be.
  """

  position: np.ndarray
  yaw: float
  width: float
  blocked: bool


def fill(
  center: Float[np.ndarray, "3"],
  rotation: Float[np.ndarray, "3 3"],
  half: Float[np.ndarray, "3"],
  spacing: float = 0.006,
) -> Float[np.ndarray, "n 3"]:
  """Points of a grid inside a box and on its surface, at most `spacing` apart; `half` are half its sides."""
  axes = [np.linspace(-side, side, 2 + int(2 * side / spacing)) for side in half]
  grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
  return grid @ rotation.T + center


def downward(yaw: float) -> Float[np.ndarray, "3 3"]:
  """The grip site's rotation that looks straight down and closes along `yaw` in the plane."""
  x, z = np.array([np.cos(yaw), np.sin(yaw), 0.0]), np.array([0.0, 0.0, -1.0])
  return np.stack([x, np.cross(z, x), z], 1)


def sideways(direction: Float[np.ndarray, "3"], dip: float) -> Float[np.ndarray, "3 3"]:
  """The grip site's rotation that looks along a horizontal unit vector, `dip` radians down, and closes vertically."""
  down = np.array([0.0, 0.0, -1.0])
  z, x = np.cos(dip) * direction + np.sin(dip) * down, np.sin(dip) * direction - np.cos(dip) * down
  return np.stack([x, np.cross(z, x), z], 1)


def rotation_vector(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3"]:
  """Axis times angle of a rotation of less than π."""
  angle = np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1))
  if angle < 1e-6:
    return np.zeros(3)
  skew = rotation - rotation.T
  return np.array([skew[2, 1], skew[0, 2], skew[1, 0]]) / (2 * np.sin(angle)) * angle


def turn(rotation: Float[np.ndarray, "3 3"], wanted: Sequence[Float[np.ndarray, "3 3"]]) -> Float[np.ndarray, "3"]:
  """The shortest rotation vector from `rotation` to one of the wanted."""
  return min((rotation_vector(one @ rotation.T) for one in wanted), key=np.linalg.norm)


def either_way(yaw: float) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "3 3"]]:
  """The two rotations of a downward grip at a yaw: a gripper turned by π is the same."""
  return downward(yaw), downward(yaw + np.pi)


def highest(
  points: Float[np.ndarray, "n 3"], start: Float[np.ndarray, "3"], end: Float[np.ndarray, "3"], radius: float
) -> float:
  """Height of the highest point within `radius` of the horizontal way from `start` to `end`; -inf if none is."""
  way = end[:2] - start[:2]
  at = np.clip((points[:, :2] - start[:2]) @ way / max(way @ way, 1e-9), 0, 1)
  near = np.linalg.norm(points[:, :2] - start[:2] - at[:, None] * way, axis=1) < radius
  return float(points[near, 2].max(initial=-np.inf))


def find(
  target: Float[np.ndarray, "n 3"], obstacles: Float[np.ndarray, "m 3"], yaw: float, base: Float[np.ndarray, "2"]
) -> Grasp | None:
  """The best grasp of `target` from above, or None where it is too wide everywhere; `base` is where the arm stands.

  Tries yaws and offsets from the object's middle: what is between the open fingers has to fit, and the fingers need
  free room, so that a bowl is taken by its rim. Of those, the one nearest the middle, the narrowest, the best centered,
  with the fingers in line with the middle (a rim held askew slips), the least turned from `yaw`, where the arm moves
  easily, not beyond REACH, and above all one where no obstacle is in the gripper's way.
  """
  low, high = target.min(0), target.max(0)
  height, middle = high[2] - low[2], (low[:2] + high[:2]) / 2
  z = max(high[2] - min(_DEPTH, height * (0.6 if height > 0.02 else 0.7)), low[2] + _FLOOR)
  band = target[target[:, 2] > z - 0.015, :2]
  others = obstacles[(obstacles[:, 2] > z - 0.011) & (np.linalg.norm(obstacles[:, :2] - middle, axis=1) < 0.25)]
  offsets = np.stack(np.meshgrid(_ALONG, _ACROSS, indexing="ij"), -1).reshape(-1, 2)
  best, least = None, np.inf
  for angle in _YAWS:
    axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centers = offsets @ axes + middle
    fits, between = _between(band, centers, axes)
    blocked = _blocked(others, centers, axes, z)
    turned = abs((angle - yaw + np.pi / 2) % np.pi - np.pi / 2)
    width, center = between[:, 1] - between[:, 0], between.mean(1)
    costs = 150 * abs(center) + 25 * width + 0.5 * turned + 50 * np.linalg.norm(offsets, axis=1) + 8 * blocked
    reach = np.linalg.norm(centers - base, axis=1)
    costs += 60 * abs(offsets[:, 1]) + 5 * abs(reach - _EASY) + 80 * np.maximum(reach - REACH, 0)
    costs[~fits] = np.inf
    i = int(costs.argmin())
    if costs[i] < least:
      best, least = Grasp(np.array([*centers[i], z]), float(angle), float(width[i]), bool(blocked[i])), costs[i]
  return best


def room(
  mine: Float[np.ndarray, "n 3"],
  others: Float[np.ndarray, "m 3"],
  spread: float,
  rng: np.random.Generator,
  margin: float = 0.015,
  tries: int = 20,
) -> Float[np.ndarray, "2"]:
  """A random horizontal shift of an object, at most `spread` on each axis, that leaves a margin to everything else.

  Zero where no try finds room, and where the object touches or carries something already.
  """
  low, high = mine[:, :2].min(0), mine[:, :2].max(0)
  middle, radius = (low + high) / 2, np.linalg.norm(high - low) / 2
  gaps = np.linalg.norm(others[:, :2] - middle, axis=1)
  if spread == 0 or (gaps < radius).any():
    return np.zeros(2)
  for shift in rng.uniform(-spread, spread, (tries, 2)):
    if np.linalg.norm(others[:, :2] - middle - shift, axis=1).min(initial=np.inf) > radius + margin:
      return shift
  return np.zeros(2)


def _between(
  band: Float[np.ndarray, "n 2"], centers: Float[np.ndarray, "k 2"], axes: Float[np.ndarray, "2 2"]
) -> tuple[Bool[np.ndarray, " k"], Float[np.ndarray, "k 2"]]:
  """Whether each center is a grasp of the object, and from where to where it is gripped along the closing axis."""
  place = (band[None] - centers[:, None]) @ axes.T
  along, strip = place[..., 0], abs(place[..., 1]) < _PAD
  inside = strip & (abs(along) < 0.04)
  first = np.where(inside, along, np.inf).min(1, initial=np.inf)
  last = np.where(inside, along, -np.inf).max(1, initial=-np.inf)
  fingers = (strip & (abs(along) > _FINGER[0]) & (abs(along) < _FINGER[1])).any(1)
  fits = (inside.sum(1) >= 4) & ~fingers & (last - first <= WIDEST)
  return fits, np.where(fits[:, None], np.stack([first, last], 1), 0.0)


def _blocked(
  others: Float[np.ndarray, "m 3"], centers: Float[np.ndarray, "k 2"], axes: Float[np.ndarray, "2 2"], z: float
) -> Bool[np.ndarray, " k"]:
  """Whether an obstacle is where the open fingers or the hand would be."""
  place = abs((others[None, :, :2] - centers[:, None]) @ axes.T)
  along, across = place[..., 0], place[..., 1]
  fingers = (across < _PAD + 0.002) & (along > 0.03) & (along < 0.068)
  hand = (across < _HAND[1]) & (along < _HAND[0]) & (others[:, 2] > z + _HAND[2])
  return (fingers | hand).any(1)
