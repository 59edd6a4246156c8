"""Surveys the first states of tasks: whether objects are at rest in them, and how bright the first frame is.

    python -m semanticvla_jax.evaluate doctor --survey [--suite=libero_object] [--tasks=0,3]

prints a line for each task, of its first state after the wait, then the tasks whose objects do not rest; ends with
status 1 if there are some. MuJoCo's version decides both: docs/libero.md has the figures of those that were tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from semanticvla_jax.envs.subprocess_env import Process
from semanticvla_jax.libero import simulator, suites

RISEN = 0.1  # metres: bottles and boxes that the stored states have in the table top are pushed out by up to 4 cm
ASIDE = 0.025  # metres: at rest, nothing slides further from where the stored states have it
FALLING = 0.2  # metres a second at the end of the wait


class Motion(NamedTuple):
  """Of one object, from the stored state to the end of the wait: metres upwards and aside; its last speed in m/s."""

  up: float
  aside: float
  speed: float


class Rest(NamedTuple):
  """What happens to the objects of a task while the simulator waits, and what is seen then.

  Attributes:
    suite, task: of LIBERO, and the task's number.
    objects: by name.
    rgb: means of the front camera's first frame, 0 to 255.
  """

  suite: str
  task: int
  objects: dict[str, Motion]
  rgb: tuple[float, float, float]

  @property
  def restless(self) -> list[str]:
    """The objects that were thrown up, slid or still move; without those that only fall into place."""
    found = self.objects.items()
    return [name for name, one in found if one.up > RISEN or one.aside > ASIDE or one.speed > FALLING]

  def __str__(self) -> str:
    red, green, blue = self.rgb
    low = min(self.objects, key=lambda name: self.objects[name].up)
    high = max(self.objects, key=lambda name: self.objects[name].up)
    aside = max(self.objects, key=lambda name: self.objects[name].aside)
    return (
      f"{self.suite:14} {self.task:2}  frame {red:3.0f} {green:3.0f} {blue:3.0f}"
      f"  falls {-100 * self.objects[low].up:5.1f} cm ({low}), rises {100 * self.objects[high].up:5.1f} cm ({high}),"
      f" aside {100 * self.objects[aside].aside:4.1f} cm ({aside}),"
      f" at most {max(one.speed for one in self.objects.values()):4.2f} m/s at the end"
    )


class Settling(simulator.Simulator):
  """A simulator that knows where its objects were before it waited."""

  def _wait(self) -> None:
    self._before = self._positions()
    super()._wait()

  def motions(self) -> dict[str, Motion]:
    """Of all objects in the current episode; ValueError before the first reset."""
    self._current()
    inner, now = self._environment.env, self._positions()
    found = {}
    for name, one in inner.objects_dict.items():
      x, y, z = (now[name] - self._before[name]).tolist()
      found[name] = Motion(z, math.hypot(x, y), float(np.linalg.norm(inner.sim.data.get_body_xvelp(one.root_body))))
    return found

  def _positions(self) -> dict[str, Float[np.ndarray, "3"]]:
    inner = self._environment.env
    return {name: np.array(inner.sim.data.get_body_xpos(one.root_body)) for name, one in inner.objects_dict.items()}


def start(settings: suites.Settings, timeout: float = 900.0) -> Process:
  """A `Settling` in a separate process; see `simulator.start`."""
  return simulator.start(settings, None, timeout, Settling)


def tasks(settings: suites.Settings, chosen: Sequence[int]) -> Iterator[Rest]:
  """Surveys the first state of some tasks of a suite, one after the other.

  Raises:
    ValueError, BrokenEnvironment: the simulator cannot be started, or broke.
  """
  process = start(settings)
  try:
    for task in chosen:
      image = process.reset(suites.EPISODES * task)["observation/image"]
      yield Rest(settings.suite, task, process.ask("motions"), tuple(image.mean((0, 1)).tolist()))
  finally:
    process.close()


def run(settings: suites.Settings, names: Sequence[str], words: str | None, say: Callable[[str], None]) -> list[Rest]:
  """Surveys tasks of several suites, each line as soon as it is known; returns those that do not rest.

  Args:
    settings: of the simulator; its suite is replaced.
    names: of the suites.
    words: numbers of the tasks, "0,3"; None for all.
    say: called with a line.
  """
  restless = []
  for suite in names:
    found = []
    for one in tasks(settings._replace(suite=suite), suites.task_numbers(words, suite)):
      say(str(one))
      found.append(one)
    red, green, blue = np.mean([one.rgb for one in found], axis=0)
    restless += [one for one in found if one.restless]
    say(f"{suite}: mean frame {red:.0f} {green:.0f} {blue:.0f} over {len(found)} tasks")
  return restless
