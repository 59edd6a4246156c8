"""A scripted expert for LIBERO's pick-and-place tasks, from what only the simulator knows.

It reads positions and collision shapes, plans a grasp from above, and steers robosuite's OSC_POSE controller: actions
in [-1, 1] of 5 cm and 0.5 rad a step, gripper -1 open, +1 closed. Goals are `In` and `On` with a movable object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from semanticvla_jax.libero import grasps
from semanticvla_jax.libero.scene import Scene

REVISION = 5  # raise it when the same layout gives other actions: episodes of different revisions are not mixed
OPEN, CLOSE = -1.0, 1.0
_TURN = 0.5  # radians of a command of 1
_CLEARANCE = 0.03  # between what is carried and what it passes over
_BELOW_RIM = 0.02  # meters that the grip site goes below the rim of what an object is put in
_TRIES = 3  # grasps of one object
_IDLE = 12  # steps without coming nearer, as where the arm is stretched out
_CLOSING = (8, 16)  # steps in which the fingers meet what they grip: at least, at most
_OPENING = 12  # steps in which the fingers let go of the widest object


class Goal(NamedTuple):
  """What has to be where: relation "in" or "on", a movable object, the object or region it goes to."""

  relation: str
  thing: str
  place: str


def goals(bddl: str) -> list[Goal] | None:
  """The goals of a task from the text of its bddl file; None where one is not a movable object in or on something."""
  objects = re.search(r"\(:objects(.*?)\)", bddl, re.DOTALL)
  wanted = re.search(r"\(:goal(.*)", bddl, re.DOTALL)
  if objects is None or wanted is None:
    return None
  movable = {name for line in objects[1].splitlines() for name in line.partition(" - ")[0].split()}
  predicates = [words.split() for words in re.findall(r"\(([A-Z]\w* [^()]+)\)", wanted[1])]
  if not all(len(words) == 3 for words in predicates):
    return None
  found = [Goal(relation.lower(), thing, place) for relation, thing, place in predicates]
  able = found and all(goal.relation in ("in", "on") and goal.thing in movable for goal in found)
  return found if able else None


class Expert:
  """Actions that reach a list of goals, one after the other.

  Args:
    scene: read anew before every action.
    goals: in this order.
    rng: of the noise.
    noise: standard deviation of each translation command, as a fraction of the command's length, so that the arm
      strays while it travels and is exact where it grasps.
  """

  def __init__(self, scene: Scene, goals: Sequence[Goal], rng: np.random.Generator, noise: float = 0.0):
    self._scene, self._goals, self._rng, self._noise = scene, goals, rng, noise
    x = scene.attitude[:, 0]
    self._yaw = float(np.arctan2(x[1], x[0]))
    self._rest = np.zeros(3)  # integral of the position's error
    self._hang = 0.0  # meters from what is gripped's lowest point up to the grip site

  def actions(self) -> Iterator[Float[np.ndarray, "7"]]:
    """Actions until all is done; each is computed when the one before has been executed."""
    for goal in self._goals:
      for _ in range(_TRIES):
        taken = yield from self._take(goal.thing)
        if taken:
          yield from self._bring(goal)
          break
        yield from self._retreat(8)

  def _take(self, thing: str) -> Iterator[Float[np.ndarray, "7"]]:
    """Goes over an object, down, and grips it; returns whether it came along."""
    scene, target, others = self._scene, self._scene.points(thing), self._scene.others(thing)
    found = grasps.find(target, others, self._yaw, scene.base)
    low, high = target.min(0), target.max(0)
    middle = np.array([*(low[:2] + high[:2]) / 2, max(high[2] - 0.02, low[2] + 0.012)])
    point, self._yaw = (middle, self._yaw) if found is None else (found.position, found.yaw)
    hover = np.array([*point[:2], max(high[2] + 0.05, point[2] + 0.07)])
    safe = max(hover[2], grasps.highest(others, scene.grip, hover, 0.12) + 0.05)
    yield from self._over(hover, safe, OPEN)
    yield from self._go(point, OPEN, 40, 0.006, 10.0, 0.6)
    yield from self._close(point)
    before = scene.position(thing)[2]
    up = scene.grip + [0, 0, 0.08]
    for _ in range(14):
      yield self.towards(up, CLOSE)
      if scene.grip[2] > up[2] - 0.03:
        break
    self._hang = scene.grip[2] - scene.points(thing)[:, 2].min()  # a bowl held at its rim tilts and slips
    return scene.position(thing)[2] > before + 0.025

  def _close(self, point: Float[np.ndarray, "3"]) -> Iterator[Float[np.ndarray, "7"]]:
    """Closes the fingers until they stand still: one that rises before slips off a thin rim."""
    least, most = _CLOSING
    for i in range(most):
      before = self._scene.opening
      yield self.towards(point, CLOSE, 10.0)
      if i + 1 >= least and before - self._scene.opening < 0.0005:
        return

  def _bring(self, goal: Goal) -> Iterator[Float[np.ndarray, "7"]]:
    """Carries what is gripped over its place, lowers it and lets go."""
    scene, place, owner = self._scene, self._scene.position(goal.place), self._scene.owner(goal.place)
    shape = np.zeros((0, 3)) if owner is None else scene.points(owner, 0.01)
    top = place[2] + 0.02
    if owner is not None and (goal.place == owner or goal.relation == "in") and len(shape):
      top = shape[:, 2].max()
    others = scene.others(goal.thing)
    way = grasps.highest(others, scene.grip, place, 0.10)
    safe = max(top, way) + self._hang + _CLEARANCE
    over = np.array([*self._held_at(goal.thing, place), safe])
    inside = goal.relation == "in"
    near = 0.025 if inside else 0.01
    yield from self._over(over, safe, CLOSE, near)
    bottom = top + self._hang - 0.005
    if inside and len(shape):  # down to its floor, as far as the hand's height over the rim allows
      bottom = max(top - _BELOW_RIM, shape[:, 2].min() + self._hang + 0.015)
    for _ in range(60):
      low = np.array([*self._held_at(goal.thing, place), bottom])
      yield self.towards(low, CLOSE, 16.0, 1.0 if scene.grip[2] - bottom > 0.08 else 0.5)
      if scene.grip[2] - bottom < 0.012 and np.linalg.norm((scene.grip - low)[:2]) < near:
        break
    yield from self._release(goal.thing)

  def _release(self, thing: str) -> Iterator[Float[np.ndarray, "7"]]:
    """Opens until the object falls or, where it rests on something, the fingers are apart; then rises and waits."""
    still, height = self._scene.grip, self._scene.position(thing)[2]
    for _ in range(_OPENING):
      yield self.towards(still, OPEN)
      if self._scene.position(thing)[2] < height - 0.01:
        break
    yield from self._retreat(20)
    still = self._scene.grip
    for _ in range(20):
      yield self.towards(still, OPEN)

  def _held_at(self, thing: str, place: Float[np.ndarray, "3"]) -> Float[np.ndarray, "2"]:
    """Where the gripper has to be for the object in it to be over a place."""
    return (place + self._scene.grip - self._scene.position(thing))[:2]

  def _over(
    self, point: Float[np.ndarray, "3"], safe: float, grip: float, near: float = 0.012
  ) -> Iterator[Float[np.ndarray, "7"]]:
    """Rises to a safe height, travels there, until it is over the point and turned, or comes no nearer."""
    least, idle = np.inf, 0
    for _ in range(90):
      here = self._scene.grip
      rising = here[2] < safe - 0.035
      yield self.towards(np.array([*(here if rising else point)[:2], safe]), grip)
      aside = np.linalg.norm((self._scene.grip - point)[:2])
      askew = np.linalg.norm(grasps.turn(self._scene.attitude, self._yaw))
      left = aside + 0.1 * askew
      least, idle = min(least, left), 0 if rising or left < least - 0.002 else idle + 1
      if (aside < near and askew < 0.08) or idle == _IDLE:
        return

  def _go(
    self, point: Float[np.ndarray, "3"], grip: float, steps: int, near: float, gain: float, fastest: float
  ) -> Iterator[Float[np.ndarray, "7"]]:
    """Moves to a point, at last vertically, until `near`; at most so many steps."""
    for _ in range(steps):
      here = self._scene.grip
      high = max(here[2] - point[2] - 0.05, 0)  # an arm stretched out up there reaches farther down here
      aside = np.linalg.norm((here - point)[:2]) > 0.008 + 0.3 * high
      yield self.towards(np.array([*point[:2], here[2]]) if aside else point, grip, gain, fastest)
      if np.linalg.norm(self._scene.grip - point) < near:
        return

  def _retreat(self, steps: int) -> Iterator[Float[np.ndarray, "7"]]:
    yield from self._go(self._scene.grip + [0, 0, 0.1], OPEN, steps, 0.02, 16.0, 1.0)

  def towards(
    self,
    point: Float[np.ndarray, "3"],
    grip: float,
    gain: float = 16.0,
    fastest: float = 1.0,
    noise: float | None = None,
  ) -> Float[np.ndarray, "7"]:
    """One action towards a point.

    OSC_POSE has no integral term and rests up to 3 cm from where it is sent, so the error is summed up here.

    Args:
      point: where the grip site shall be.
      grip: OPEN or CLOSE.
      gain: command for each meter of error.
      fastest: limit of the vertical command.
      noise: None for the expert's own.
    """
    error = point - self._scene.grip
    kept = np.where(self._rest * error < 0, 0.3, 1.0) * self._rest
    self._rest = np.where(np.abs(error) < 0.03, np.clip(kept + error, -0.1, 0.1), 0.0)
    move = np.clip(error * gain + self._rest * 2, [-1, -1, -fastest], [1, 1, fastest])
    strays = (self._noise if noise is None else noise) * np.linalg.norm(move)
    turn = np.clip(grasps.turn(self._scene.attitude, self._yaw) / _TURN, -0.6, 0.6)
    return np.array([*np.clip(move + strays * self._rng.standard_normal(3), -1, 1), *turn, grip])
