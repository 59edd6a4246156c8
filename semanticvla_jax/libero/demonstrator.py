"""The simulator with the scripted expert in it: one call is one recorded episode. Runs in the simulator's process."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from semanticvla_jax.data import trajectories
from semanticvla_jax.libero import expert, grasps, simulator, suites
from semanticvla_jax.libero.scene import Scene

_STRAY = 14  # steps on which the arm leaves its usual pose before an episode


class Variety(NamedTuple):
  """What differs between the episodes of a task, in addition to the benchmark's random layout.

  Attributes:
    start: meters that the gripper is moved at most on each axis before the recording begins; 0 leaves the usual pose.
    distractors: meters that each object of no part in the task is moved at most on each axis, where there is room.
    noise: of the expert's movements, see `expert.Expert`; it is part of the recorded actions.
  """

  start: float = 0.05
  distractors: float = 0.03
  noise: float = 0.1


class Recording(NamedTuple):
  """An episode: what was seen before each action, the actions that are not no-ops f64[t 7], whether it succeeded."""

  observations: list[dict]
  actions: Float[np.ndarray, "t 7"]
  success: bool


class Demonstrator(simulator.Simulator):
  """`Simulator`, whose `demonstrate` lets the expert do a task in a random layout and records it.

  Args:
    settings: with `assets` resolved; `seed` is the layouts'.
    variety: see there.
  """

  def __init__(self, settings: suites.Settings, variety: Variety):
    super().__init__(settings)
    self._variety = variety

  def demonstrate(self, task: int, attempt: int, look: bool = True) -> Recording:
    """Does a task once. Layout, start, and noise depend on (seed, task, attempt) alone.

    An action that would be dropped as a no-op is not executed, so that the recorded ones repeat the episode. Without
    `look` nothing is rendered and no observation is returned; all else is the same.
    """
    agent = self._prepare(task, attempt, look)
    seen, actions = [], np.zeros((0, 7))
    for action in agent.actions():
      longer = np.concatenate([actions, action[None]])
      if not trajectories.kept(longer)[-1]:
        continue
      if look:
        seen.append(self._observation())
      actions = longer
      self._advance(action, observe=look)
      if self._done or len(actions) >= self.max_steps:
        break
    return Recording(seen, actions, bool(self._done))

  def replay(self, task: int, attempt: int, actions: Float[np.ndarray, "t 7"]) -> bool:
    """Whether recorded actions do the task again where `demonstrate` recorded them; nothing is rendered."""
    self._prepare(task, attempt, look=False)
    for action in actions:
      self._advance(action, observe=False)
      if self._done:
        break
    return bool(self._done)

  def _prepare(self, task: int, attempt: int, look: bool) -> expert.Expert:
    """The attempt's layout, with the arm where its recording begins; returns the expert who has moved it there."""
    rng = np.random.default_rng([self.settings.seed, task, attempt])
    goals = expert.goals(self._tasks[task].bddl.read_text(encoding="utf-8"))
    self._begin(task, attempt, goals, rng)
    scene = Scene(self._environment.env)
    agent = expert.Expert(scene, goals, rng, self._variety.noise)
    elsewhere = scene.grip + rng.uniform(-1, 1, 3) * self._variety.start
    before = [*([suites.WAIT] * self.settings.wait_steps), *([None] * _STRAY)]
    for i, action in enumerate(before):
      action = agent.towards(elsewhere, expert.OPEN, noise=0.0) if action is None else action
      self._advance(action, observe=look and i == len(before) - 1)
    return agent

  def _begin(self, task: int, attempt: int, goals: list[expert.Goal], rng: np.random.Generator) -> None:
    """A new random layout of the task, its distractors moved."""
    self._open = False
    if task != self._task:
      self._create(task)
    self._seed(task, attempt)
    self._reset()
    self._done = False
    scene, environment = Scene(self._environment.env), self._environment.env
    part = {scene.owner(name) for goal in goals for name in goal[1:] if name is not None}
    for name in sorted(set(environment.objects_dict) - part):
      mine, others = scene.points(name, 0.01), scene.others(name)
      shift = grasps.room(mine, others, self._variety.distractors, rng)
      joint = environment.objects_dict[name].joints[0]
      pose = environment.sim.data.get_joint_qpos(joint)
      pose[:2] += shift
      environment.sim.data.set_joint_qpos(joint, pose)
      environment.sim.forward()

  def _advance(self, action: np.ndarray, observe: bool) -> None:
    """One step, also of the arm's way to where an episode begins; its cameras draw if `observe`."""
    self._open = observe
    self._last, _, self._done, _ = self._environment.step(np.asarray(action, np.float64).tolist())
