"""LIBERO's simulator, with the interface of `envs.environment.Environment`.

It loads OpenGL, which crashes in one process with TensorFlow; `start` runs it in a separate process.
"""

from __future__ import annotations

import functools
import os
import pathlib
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from semanticvla_jax.envs.subprocess_env import LOGGER, Process
from semanticvla_jax.errors import refuse
from semanticvla_jax.libero import objects, opengl, suites

_EARLIER = 100  # resets that a recorded one may have come after
MASK = "objects/"  # a view's mask of the objects that the task names is under this and the view's name
_CAMERAS = {"observation/image": "agentview_image", "observation/wrist_image": "robot0_eye_in_hand_image"}


def start(
  settings: suites.Settings,
  beginnings: Mapping[int, suites.Beginning] | None = None,
  timeout: float = 900.0,
  make: Callable[..., Simulator] | None = None,
) -> Process:
  """A simulator in a separate process.

  Args:
    settings: see there.
    beginnings: by episode number, instead of the benchmark's first states; see `Simulator`.
    timeout: seconds without an answer after which it counts as broken.
    make: called in the process with the settings, for another kind of simulator; picklable.

  Raises:
    ValueError: a setting is wrong, benchmark or assets are missing, or OpenGL cannot draw.
  """
  suites.check(settings)
  settings = settings._replace(assets=str(suites.find_assets(settings.assets)))
  suites.tasks(settings.suite)
  device = opengl.choose(settings.renderer, settings.egl_device)
  variables = opengl.variables(settings.renderer, device) | {"LP_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
  made = functools.partial(Simulator, beginnings=beginnings) if make is None else make
  return Process(functools.partial(made, settings), variables, timeout)


class Simulator:
  """One LIBERO episode at a time, with the `Environment` protocol; `reset` takes an episode number.

  Number 50 i + t is the t-th first state of task i. The task's environment is made when its first episode begins and
  kept until another task's does. Cameras render only what is returned: they are closed inside robosuite's own
  observation step, so that an open one gives the same bytes as if all had been rendered.

  Args:
    settings: with `assets` resolved.
    beginnings: by episode number, instead of the benchmark's first states; such episodes alone exist then. With seeding
      by "episode" a known seed of numpy comes before that of the settings, and fixtures are placed as they were.

  Raises:
    RuntimeError: TensorFlow is in this process.
  """

  def __init__(self, settings: suites.Settings, beginnings: Mapping[int, suites.Beginning] | None = None):
    suites.check(settings)
    if "tensorflow" in sys.modules:
      raise RuntimeError("TensorFlow and the simulator crash in one process; put it into its own by `start`.")
    self.settings, self._beginnings = settings, beginnings
    self.max_steps = settings.max_steps or suites.max_steps(settings.suite)
    self._tasks = suites.tasks(settings.suite)
    self._task: int | None = None
    self._resets = 0  # of the current environment
    self._environment: Any = None
    self._geoms = np.zeros(0, bool)  # of the named objects, with `settings.objects`
    self._masks: dict[str, np.ndarray] = {}  # by camera
    self._samplers: list = []  # of drawers and knobs, that one reset leaves behind
    self._ahead: int | None = 0  # earlier resets less seed, of the last recorded reset that was found; None: none was
    self._make = _import(settings.assets)
    self._open = True
    self._steps, self._done = 0, False
    self._last: Mapping[str, np.ndarray] = {}

  @property
  def instruction(self) -> str:
    """What is asked in the current episode."""
    return self._tasks[self._current()].instruction

  @property
  def success(self) -> bool:
    """Whether the current state fulfils the task."""
    self._current()
    return self._done

  def reset(self, episode: int) -> dict:
    """Starts an episode by its number, which is not a random seed; the first observation is after `wait_steps`.

    Raises:
      ValueError: there is no such episode.
    """
    task, trial = divmod(episode, suites.EPISODES)
    state = self._first_state(episode, task, trial)
    self._open = False
    self._fresh(task, trial)
    self._last = self._environment.set_init_state(state)
    self._steps, self._done = 0, False
    self._wait()
    return self._observation()

  def step(self, action: np.ndarray, observe: bool = True) -> tuple[dict | None, bool]:
    """Acts once; returns (observation or None, done). Raises ValueError for an action that is not 7 finite numbers."""
    action = np.asarray(action, np.float64)
    if action.shape != (7,) or not np.isfinite(action).all():
      raise refuse(
        "Action",
        f"shape {action.shape} and values {action.tolist()}",
        "7 finite numbers: translation, axis-angle, gripper",
        "correct what the policy returns",
      )
    self._current()
    self._open = observe
    self._last, _, self._done, _ = self._environment.step(action.tolist())
    self._steps += 1
    return (self._observation() if observe else None), self._done or self._steps >= self.max_steps

  def observe(self) -> dict:
    """Renders the current state anew; robosuite's own frames are a few physics steps older."""
    self._current()
    self._open = True
    self._environment._update_observables(force=True)
    self._last = self._environment.env._get_observations()
    return self._observation()

  def facts(self, episode: int) -> dict[str, str]:
    """The renderer; makes the environment of an episode if there is none."""
    if self._task is None:
      self._create(episode // suites.EPISODES)
    from OpenGL import GL

    drawn = GL.glGetString(GL.GL_RENDERER)
    return {"renderer": f"{self.settings.renderer}: {'unknown' if drawn is None else drawn.decode()}"}

  def _wait(self) -> None:
    """Lets objects fall into place; only the last frame is rendered."""
    for i in range(self.settings.wait_steps):
      self._open = i == self.settings.wait_steps - 1
      self._last, _, self._done, _ = self._environment.step(list(suites.WAIT))

  def _first_state(self, episode: int, task: int, trial: int) -> np.ndarray:
    if self._beginnings is not None:
      if episode not in self._beginnings:
        raise refuse(
          "LIBERO",
          f"episode {episode}",
          f"one of the {len(self._beginnings)} given ones",
          "choose one of them",
        )
      return self._beginnings[episode].state
    if not 0 <= task < len(self._tasks):
      raise refuse(
        "LIBERO",
        f"episode {episode}",
        f"0 to {suites.EPISODES * len(self._tasks) - 1} in {self.settings.suite}",
        "choose one of them",
      )
    found = suites.first_states(self._tasks[task])
    if trial >= len(found):
      raise refuse("LIBERO", f"trial {trial} of task {task}", f"0 to {len(found) - 1}", "lower --trials")
    return found[trial]

  def _fresh(self, task: int, trial: int) -> None:
    """A reset environment of the task, seeded as the settings say."""
    if self.settings.seeding == "episode":
      if task != self._task:
        self._create(task)
      earlier = self._earlier(task, trial)
      self._seed(task, trial)
      return self._reset(earlier)
    if task != self._task or self._resets > trial:
      self._create(task)
      self._environment.seed(self.settings.seed)
    while self._resets <= trial:
      self._reset()

  def _earlier(self, task: int, trial: int) -> int:
    """How many resets of its environment a recorded one came after; 0 where that is unknown or makes no difference.

    It makes one where resets leave samplers behind (see `_reset`). The number is not recorded, but only the right one
    leads from the recorded seed to the recorded state, so they are tried, first the one that an environment with seeds
    counted up would have had.
    """
    recorded = self._recorded(task, trial)
    if recorded is None or recorded.seed is None or not self._samplers or self._ahead is None:
      return 0
    likely, possible = recorded.seed + self._ahead, range(1, _EARLIER)
    for earlier in dict.fromkeys([likely, *possible] if likely in possible else possible):
      self._seed(task, trial)
      self._reset(earlier)
      if self._settles_at(recorded.state):
        self._ahead = earlier - recorded.seed
        return earlier
    self._ahead = None
    LOGGER.warning(
      "Episode %d: its recorded seed %d leads to another first state than the recorded one, whichever of 1 to %d resets"
      " came before; drawers of this task are not where they were; replay with the versions of the recording.",
      task * suites.EPISODES + trial,
      recorded.seed,
      _EARLIER - 1,
    )
    return 0

  def _settles_at(self, state: np.ndarray) -> bool:
    """Whether waiting leads to that state of the simulator."""
    for _ in range(self.settings.wait_steps):
      self._environment.step(list(suites.WAIT))
    found = self._environment.get_sim_state()
    return found.shape == state.shape and bool(np.allclose(found, state, rtol=0, atol=1e-6))

  def _recorded(self, task: int, trial: int) -> suites.Beginning | None:
    """How a recorded episode began; None for one of the benchmark's own."""
    return None if self._beginnings is None else self._beginnings[task * suites.EPISODES + trial]

  def _seed(self, task: int, trial: int) -> None:
    recorded = self._recorded(task, trial)
    known = recorded is not None and recorded.seed is not None
    np.random.seed(recorded.seed if known else [self.settings.seed, task, trial])
    random.seed(self.settings.seed * 1_000_003 + task * suites.EPISODES + trial)

  def _create(self, task: int) -> None:
    if self._environment is not None:
      self._environment.close()
    size = self.settings.size
    self._environment = self._make(bddl_file_name=str(self._tasks[task].bddl), camera_heights=size, camera_widths=size)
    self._task, self._resets, self._ahead = task, 0, 0
    self._samplers = [*self._environment.env.object_property_initializers]

  def _reset(self, earlier: int = 0) -> None:
    """Resets; with seeding by "episode" as if `earlier` resets had come before.

    Each adds its drawers' and knobs' samplers to those of all before, and every one of them draws random numbers.
    """
    if self.settings.seeding == "episode":
      self._environment.env.object_property_initializers[:] = self._samplers * earlier
    self._environment.reset()
    self._resets += 1
    if self.settings.objects:
      self._geoms = objects.geoms(self._environment.env)
    for name in _CAMERAS.values():  # a hard reset makes new sensors
      camera = self._environment.env._observables[name]
      camera._sensor = self._gate(camera._sensor, name)

  def _gate(self, sensor: Callable, name: str) -> Callable:
    """A camera that draws only while `_open`: and at the moment when robosuite would."""
    size = self.settings.size
    dark = np.zeros((size, size, 3), np.uint8)

    def gated(cache: dict) -> np.ndarray:
      if self._open and self.settings.objects:
        self._masks[name] = objects.mask(self._environment.env, name.removesuffix("_image"), size, self._geoms)
      return sensor(cache) if self._open else dark

    gated.__modality__ = sensor.__modality__
    return gated

  def _observation(self) -> dict:
    last = self._last
    pictures = {name: self._turn(last[camera]) for name, camera in _CAMERAS.items()}
    rotation = suites.axis_angle(last["robot0_eef_quat"], self.settings.quaternion)
    state = np.concatenate([last["robot0_eef_pos"], rotation, last["robot0_gripper_qpos"]]).astype(np.float32)
    joints = np.asarray(last["robot0_joint_pos"], np.float32)
    found = {**pictures, "observation/state": state, "observation/joint_state": joints, "prompt": self.instruction}
    for name, camera in _CAMERAS.items() if self.settings.objects else ():
      found[name.replace("observation/", MASK)] = self._turn(self._masks[camera])
    return found

  def _turn(self, image: Shaped[np.ndarray, "h w *c"]) -> Shaped[np.ndarray, "h w *c"]:
    return np.ascontiguousarray(image[::-1, ::-1] if self.settings.rotation == 180 else image)

  def _current(self) -> int:
    if self._task is None:
      raise refuse("Environment", "no running episode", "a call of reset first", "call reset")
    return self._task


def _import(assets: str) -> Callable[..., Any]:
  """Imports the benchmark with a separate configuration, and points it at the assets."""
  root = suites.package()
  folder = tempfile.mkdtemp(prefix="libero_config_")
  paths = {
    "benchmark_root": root,
    "bddl_files": root / "bddl_files",
    "init_states": root / "init_files",
    "datasets": root / "datasets",
    "assets": assets,
  }
  lines = "".join(f"{key}: {path}\n" for key, path in paths.items())
  (pathlib.Path(folder) / "config.yaml").write_text(lines, encoding="utf-8")
  os.environ["LIBERO_CONFIG_PATH"] = folder
  import libero.libero as benchmark

  benchmark._assets_path_cache = assets
  from libero.libero.envs import OffScreenRenderEnv

  if "tensorflow" in sys.modules:
    raise RuntimeError("The benchmark imported TensorFlow, which crashes next to OpenGL; install what make sim does.")
  return OffScreenRenderEnv
