"""A scripted expert for LIBERO's tasks, from what only the simulator knows.

It reads positions and collision shapes, plans a grasp, and steers robosuite's OSC_POSE controller: actions in [-1, 1]
of 5 cm and 0.5 rad a step, gripper -1 open, +1 closed. Goals are `In` and `On` with a movable object, `Open` of a
drawer, and `Turnon`. What is too wide to grip is pushed where the table is the goal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from semanticvla_jax.libero import fixtures, grasps
from semanticvla_jax.libero.scene import Scene

REVISION = 5  # raise it when the same layout gives other actions: episodes of different revisions are not mixed
OPEN, CLOSE = -1.0, 1.0
_TURN = 0.5  # radians of a command of 1
_CLEARANCE = 0.03  # between what is carried and what it passes over
_BELOW_RIM = 0.02  # meters that the grip site goes below the rim of what an object is put in
_TRIES = 3  # grasps of one object
_IDLE = 12  # steps without coming nearer, as where the arm is stretched out
_CLOSING = (8, 16)  # steps in which the fingers meet what they grip: at least, at most
_DIP = np.deg2rad(15)  # of the gripper at a drawer's handle: its hand stays above what stands in front
_DEEPER = 0.006  # meters that the finger tips reach behind a handle's middle
_PULLS, _OPENED = 70, 0.148  # steps that a drawer is pulled; meters that it is open then, of 0.16
_PUSHES, _FLOOR = 150, 0.016  # steps that a plate is pushed; meters of the grip site above the table
_TURNS = 50  # steps that a knob is turned
_OPENING = 12  # steps in which the fingers let go of the widest object


class Goal(NamedTuple):
  """What has to be: relation "in" or "on" of a movable object and where it goes; "open" of a drawer's region; "turnon".

  `place` is the object or region that the thing goes to, None for the relations of one thing.
  """

  relation: str
  thing: str
  place: str | None = None


def goals(bddl: str) -> list[Goal] | None:
  """The goals of a task from the text of its bddl file; None where the expert cannot do one of them."""
  objects = re.search(r"\(:objects(.*?)\)", bddl, re.DOTALL)
  wanted = re.search(r"\(:goal(.*)", bddl, re.DOTALL)
  if objects is None or wanted is None:
    return None
  movable = {name for line in objects[1].splitlines() for name in line.partition(" - ")[0].split()}
  predicates = [words.split() for words in re.findall(r"\(([A-Z]\w* [^()]+)\)", wanted[1])]
  if not predicates or not all(len(words) in (2, 3) for words in predicates):
    return None
  found = [Goal(words[0].lower(), *words[1:]) for words in predicates]
  return found if all(_is_able(goal, movable) for goal in found) else None


def _is_able(goal: Goal, movable: set[str]) -> bool:
  if goal.place is not None:
    return goal.relation in ("in", "on") and goal.thing in movable
  return goal.relation == "turnon" or (goal.relation == "open" and goal.thing.endswith("_region"))


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
    self._look_down(float(np.arctan2(x[1], x[0])))
    self._rest = np.zeros(3)  # integral of the position's error
    self._hang = 0.0  # meters from what is gripped's lowest point up to the grip site

  def actions(self) -> Iterator[Float[np.ndarray, "7"]]:
    """Actions until all is done; each is computed when the one before has been executed."""
    for goal in self._goals:
      if goal.place is not None:
        yield from self._put(goal)
      elif goal.relation == "open":
        yield from self._open(goal.thing)
      else:
        yield from self._turn_on(goal.thing)

  def _look_down(self, yaw: float) -> None:
    """From now on the gripper looks straight down, its fingers closing along `yaw`."""
    self._yaw, self._attitudes = yaw, grasps.either_way(yaw)

  def _put(self, goal: Goal) -> Iterator[Float[np.ndarray, "7"]]:
    """Brings an object to its place, for which a closed drawer is opened; a plate is pushed there."""
    scene = self._scene
    if goal.relation == "in" and scene.is_in_drawer(goal.place) and not scene.holds("open", goal.place):
      yield from self._open(goal.place)
    if goal.relation == "on" and scene.owner(goal.place) is None and self._is_flat(goal.thing):
      yield from self._push(goal)
      return
    for _ in range(_TRIES):
      taken = yield from self._take(goal.thing)
      if taken:
        yield from self._bring(goal)
        return
      yield from self._retreat(8)

  def _is_flat(self, thing: str) -> bool:
    """Whether an object is too wide everywhere to be gripped from above."""
    scene = self._scene
    return grasps.find(scene.points(thing), scene.others(thing), self._yaw, scene.base) is None

  def _push(self, goal: Goal) -> Iterator[Float[np.ndarray, "7"]]:
    """Moves a plate on the table with closed fingers inside its rim; again where they slip over it."""
    scene = self._scene
    for _ in range(_TRIES):
      point, radius = scene.position(goal.thing), np.ptp(scene.points(goal.thing)[:, :2], axis=0).max() / 2
      point[2] = scene.points(goal.thing)[:, 2].min() + _FLOOR
      yield from self._descend(point, self._yaw, point[2] + 0.05, scene.others(goal.thing), CLOSE)
      for _ in range(_PUSHES):
        left = (scene.position(goal.place) - scene.position(goal.thing))[:2]
        if np.linalg.norm(left) < 0.01:
          yield from self._retreat(20)
          return
        if np.linalg.norm((scene.grip - scene.position(goal.thing))[:2]) > radius:
          break
        ahead = left * min(1.0, 0.04 / np.linalg.norm(left))
        yield self.towards(np.array([*scene.grip[:2] + ahead, point[2]]), CLOSE, 10.0)

  def _open(self, region: str) -> Iterator[Float[np.ndarray, "7"]]:
    """Takes a drawer's handle from in front, fingers above and below it, and pulls."""
    scene, drawer = self._scene, self._scene.part(region)
    point, out = fixtures.handle(drawer), drawer.axis
    ahead = grasps.sideways(-out, _DIP)
    self._attitudes = (ahead, ahead @ np.diag([-1.0, -1.0, 1.0]))
    point = point + _DEEPER * ahead[:, 2]
    yield from self._straight(point - 0.13 * ahead[:, 2], OPEN, 80, 0.015)
    yield from self._straight(point, OPEN, 50, 0.01)
    yield from self._close(point)
    for _ in range(_PULLS):
      if scene.moved(region) > _OPENED:
        break
      yield self.towards(point + out * (out @ (scene.grip - point) + 0.03), CLOSE)
    yield from self._let_go()
    yield from self._straight(scene.grip + 0.08 * out, OPEN, 20, 0.02)

  def _turn_on(self, name: str) -> Iterator[Float[np.ndarray, "7"]]:
    """Takes a knob's bar from above and turns it."""
    part = self._scene.part(name)
    point, yaw = fixtures.knob(part)
    yield from self._descend(point, yaw, point[2] + 0.07, self._scene.others())
    yield from self._close(point)
    for turned in np.arange(1, _TURNS) * 0.08:
      if self._scene.holds("turnon", name):
        break
      self._look_down(yaw + np.sign(part.axis[2]) * min(turned, 1.3))
      yield self.towards(point, CLOSE)
    yield from self._let_go()
    yield from self._retreat(20)

  def _let_go(self) -> Iterator[Float[np.ndarray, "7"]]:
    still = self._scene.grip
    for _ in range(_OPENING):
      yield self.towards(still, OPEN)

  def _take(self, thing: str) -> Iterator[Float[np.ndarray, "7"]]:
    """Goes over an object, down, and grips it; returns whether it came along."""
    scene, target, others = self._scene, self._scene.points(thing), self._scene.others(thing)
    found = grasps.find(target, others, self._yaw, scene.base)
    low, high = target.min(0), target.max(0)
    middle = np.array([*(low[:2] + high[:2]) / 2, max(high[2] - 0.02, low[2] + 0.012)])
    point, yaw = (middle, self._yaw) if found is None else (found.position, found.yaw)
    yield from self._descend(point, yaw, max(high[2] + 0.05, point[2] + 0.07), others)
    yield from self._close(point)
    before = scene.position(thing)[2]
    up = scene.grip + [0, 0, 0.08]
    for _ in range(14):
      yield self.towards(up, CLOSE)
      if scene.grip[2] > up[2] - 0.03:
        break
    self._hang = scene.grip[2] - scene.points(thing)[:, 2].min()  # a bowl held at its rim tilts and slips
    return scene.position(thing)[2] > before + 0.025

  def _descend(
    self,
    point: Float[np.ndarray, "3"],
    yaw: float,
    height: float,
    others: Float[np.ndarray, "n 3"],
    grip: float = OPEN,
  ) -> Iterator[Float[np.ndarray, "7"]]:
    """Goes over a point, to `height` or as high as the others on the way ask for, then down to it."""
    self._look_down(yaw)
    hover = np.array([*point[:2], height])
    yield from self._over(hover, max(height, grasps.highest(others, self._scene.grip, hover, 0.12) + 0.05), grip)
    yield from self._go(point, grip, 40, 0.006, 10.0, 0.6)

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
      askew = self._askew()
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

  def _straight(
    self, point: Float[np.ndarray, "3"], grip: float, steps: int, near: float
  ) -> Iterator[Float[np.ndarray, "7"]]:
    """Moves straight to a point at half speed until it is `near` and turned; at most so many steps."""
    for _ in range(steps):
      way = point - self._scene.grip
      yield self.towards(self._scene.grip + way * min(1.0, 0.05 / max(np.linalg.norm(way), 1e-9)), grip, 10.0)
      if np.linalg.norm(self._scene.grip - point) < near and self._askew() < 0.12:
        return

  def _askew(self) -> float:
    """Radians from how the gripper shall look."""
    return float(np.linalg.norm(grasps.turn(self._scene.attitude, self._attitudes)))

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
    turn = np.clip(grasps.turn(self._scene.attitude, self._attitudes) / _TURN, -0.6, 0.6)
    return np.array([*np.clip(move + strays * self._rng.standard_normal(3), -1, 1), *turn, grip])
