"""LIBERO: five suites of tasks in the real simulator, with the interface of `envs.base.Environment`.

`Simulator` loads OpenGL, so it belongs in a process of its own (`start` puts it there) where nobody imports TensorFlow:
both in one process crash. All else here only reads files, and never imports the benchmark's own package, which asks
questions on the terminal when it is imported without a configuration.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import math
import os
import pathlib
import pickle
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from semanticvla_jax.envs.process import Process

# Actions of an episode, without the first wait (released evaluation code; SemanticVLA's has 320 for libero_goal).
MAX_STEPS = {
  "libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
}  # fmt: skip
SUITES = (*MAX_STEPS,)
EPISODES = 50  # first states of a task; episode t of task i is number 50 i + t
WAIT = (0.0,) * 6 + (-1.0,)  # nothing moves, the gripper stays open
SEEDING = ("episode", "environment")
QUATERNIONS = ("robosuite", "positive_w")
PACKAGES = ("hf-libero", "robosuite", "bddl", "mujoco")
ASSETS_VARIABLE = "LIBERO_ASSETS"
_PARTS = ("articulated_objects", "stable_scanned_objects", "turbosquid_objects", "stable_hope_objects", "scenes")
_LOOKS = (*_PARTS, "textures")  # and the .xml beside them: all that the simulator reads
_CAMERAS = {"observation/image": "agentview_image", "observation/wrist_image": "robot0_eye_in_hand_image"}


class Task(NamedTuple):
  """One task: its name, what is asked (wording of the file name, as in the training data), and its two files."""

  name: str
  instruction: str
  bddl: pathlib.Path
  states: pathlib.Path


class Beginning(NamedTuple):
  """How a recorded episode began.

  Attributes:
    state: f64[s], of the simulator: time, positions, velocities.
    seed: of numpy before its reset, which decides where fixtures stand; None where that is not known.
  """

  state: np.ndarray
  seed: int | None = None


class Settings(NamedTuple):
  """How the simulator is run; all of it is part of a result's fingerprint.

  Attributes:
    suite: one of SUITES.
    assets: the folder of meshes and textures; None looks for it, see `find_assets`.
    size: pixels of a side of both views.
    seeding: "episode" seeds numpy and random with (seed, task, trial) right before every reset, so that an episode is
      the same wherever and whenever it runs; "environment" is the community's way: once when a task's environment has
      been made, so that what an episode looks like (fixtures move by a centimetre) depends on those before it. Then
      earlier resets are repeated where they are missing.
    seed: see there; OpenVLA's evaluation takes 0, openpi's 7.
    wait_steps: actions WAIT after the reset, while objects fall into place.
    rotation: degrees by which the rendered rows, bottom first, are turned: 180 is what the `*_no_noops` sets and all
      policies trained on them have (upright, mirrored left to right); 0 is the raw HDF5 files' look.
    quaternion: "robosuite" turns orientations into axis-angle without an antipodal flip, so that angles reach 2π;
      "positive_w" flips first. The training data has the former; the latter cost 14 to 40 points elsewhere.
    max_steps: actions of an episode; None for the suite's own.
    renderer: "egl" or "osmesa"; same frames.
  """

  suite: str
  assets: str | None = None
  size: int = 256
  seeding: str = "episode"
  seed: int = 0
  wait_steps: int = 10
  rotation: int = 180
  quaternion: str = "robosuite"
  max_steps: int | None = None
  renderer: str = "egl"


def check(settings: Settings) -> None:
  """Raises ValueError unless every setting is one that exists."""
  choices = {"suite": SUITES, "seeding": SEEDING, "rotation": (0, 180), "quaternion": QUATERNIONS,
             "renderer": ("egl", "osmesa")}  # fmt: skip
  for name, allowed in choices.items():
    if getattr(settings, name) not in allowed:
      raise ValueError(
        f"LIBERO: got {name}={getattr(settings, name)!r}; expected one of {allowed}; choose one of them."
      )
  if settings.size < 8 or settings.wait_steps < 1 or (settings.max_steps is not None and settings.max_steps < 1):
    raise ValueError(
      f"LIBERO: got size={settings.size}, wait_steps={settings.wait_steps}, max_steps={settings.max_steps}; expected "
      "at least 8 pixels, 1 step to wait and 1 to act."
    )


def package() -> pathlib.Path:
  """The folder of the installed benchmark, found without importing it.

  Raises:
    ValueError: it is not installed.
  """
  spec = importlib.util.find_spec("libero")
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      "LIBERO is not installed: got no package 'libero'; expected hf-libero; run `make sim`, or "
      "pip install --no-deps -r requirements-libero.txt."
    )
  return pathlib.Path(next(iter(spec.submodule_search_locations))) / "libero"


@functools.cache
def tasks(suite: str) -> tuple[Task, ...]:
  """The tasks of a suite in the benchmark's order.

  Raises:
    ValueError: the suite does not exist, or the benchmark is not installed.
  """
  if suite not in SUITES:
    raise ValueError(f"LIBERO: got suite {suite!r}; expected one of {SUITES}; choose one of them.")
  root = package()
  path = root / "benchmark" / "libero_suite_task_map.py"  # the package round it imports torch
  spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
  table = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(table)
  return tuple(
    Task(name, _sentence(name), root / "bddl_files" / suite / f"{name}.bddl",
         root / "init_files" / suite / f"{name}.pruned_init")
    for name in table.libero_task_map[suite]
  )  # fmt: skip


def _sentence(name: str) -> str:
  """What a file name asks for: "KITCHEN_SCENE10_close_the_drawer" → "close the drawer"."""
  if name[0].isupper():
    name = name[name.find("SCENE") + (8 if "SCENE10" in name else 7) :]
  return " ".join(name.split("_"))


def task_numbers(words: str | None, suite: str) -> list[int]:
  """Tasks from "0,3", in that order; None means all of the suite.

  Raises:
    ValueError: they are no numbers, or there are no such tasks.
  """
  count = len(tasks(suite))
  if words is None:
    return [*range(count)]
  found = [int(word) if word.strip().isdecimal() else -1 for word in words.split(",")]
  if not all(0 <= task < count for task in found):
    raise ValueError(
      f"LIBERO: got tasks={words!r}; expected numbers from 0 to {count - 1} of {suite}, such as 0,3; change --tasks."
    )
  return [*dict.fromkeys(found)]


class _ArraysOnly(pickle.Unpickler):
  """Reads numpy arrays and refuses to run anything else."""

  def find_class(self, module: str, name: str) -> Any:
    known = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
      return np.empty(0).__reduce__()[0]
    if (module, name) not in known:
      raise pickle.UnpicklingError(f"{module}.{name}")
    return super().find_class(module, name)


def first_states(task: Task) -> Float[np.ndarray, "n s"]:
  """The benchmark's own first states of a task: time, positions, velocities of the simulator.

  Raises:
    ValueError: the file is missing or holds no such array.
  """
  try:
    with zipfile.ZipFile(task.states) as archive:
      name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
      found = np.asarray(_ArraysOnly(io.BytesIO(archive.read(name))).load())
  except (OSError, StopIteration, zipfile.BadZipFile, pickle.UnpicklingError) as error:
    raise ValueError(
      f"First states: got {task.states} ({error!r}); expected the benchmark's .pruned_init; install hf-libero again."
    ) from error
  if found.ndim != 2 or not np.isfinite(found).all():
    raise ValueError(f"First states: got {found.shape} in {task.states}; expected finite numbers [n s].")
  return found


def find_assets(given: str | os.PathLike | None = None) -> pathlib.Path:
  """The folder of meshes and textures: `given`, $LIBERO_ASSETS, beside the package, or ~/.cache/libero/assets.

  Raises:
    ValueError: it is in none of these; says how to get it.
  """
  places = [given] if given else [os.environ.get(ASSETS_VARIABLE), *_usual_places()]
  places = [pathlib.Path(place).expanduser() for place in places if place]
  for place in places:
    if all((place / part).is_dir() for part in _PARTS):
      return place.resolve()
  raise ValueError(
    f"LIBERO's assets are missing: got none in {[str(place) for place in places]}; expected a folder with "
    f"{', '.join(_PARTS)}; get it with `hf download lerobot/libero-assets --repo-type dataset --local-dir "
    f"~/.cache/libero/assets`, or set {ASSETS_VARIABLE} or --assets to where it is."
  )


def _usual_places() -> list[pathlib.Path]:
  cache = pathlib.Path("~/.cache/libero/assets")
  return [cache] if importlib.util.find_spec("libero") is None else [package() / "assets", cache]


@functools.cache
def assets_hash(folder: str) -> str:
  """SHA-256 of names and contents of what the simulator reads, 16 hexadecimal digits: other looks give another hash.

  What else lies in the folder (a download's cache, a licence) counts for nothing.
  """
  digest, root = hashlib.sha256(), pathlib.Path(folder)
  found = [*root.glob("*.xml"), *(path for part in _LOOKS for path in (root / part).rglob("*"))]
  for path in sorted(path for path in found if path.is_file()):
    digest.update(path.relative_to(root).as_posix().encode() + b"\0")
    with path.open("rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()[:16]


def axis_angle(quaternion: Float[np.ndarray, "4"], convention: str = "robosuite") -> Float[np.ndarray, "3"]:
  """A rotation as axis times angle (radians), from (x, y, z, w).

  "robosuite" is its `quat2axisangle`: no antipodal flip, so that w < 0 gives angles between π and 2π; "positive_w"
  negates the quaternion first where w < 0, so that angles end at π.
  """
  x, w = np.asarray(quaternion[:3], np.float64), float(quaternion[3])
  if convention == "positive_w" and w < 0:
    x, w = -x, -w
  w = max(-1.0, min(1.0, w))
  sine = math.sqrt(1 - w * w)
  if math.isclose(sine, 0.0):
    return np.zeros(3)
  return x * 2 * math.acos(w) / sine


def start(
  settings: Settings, beginnings: Mapping[int, Beginning] | None = None, timeout: float = 900.0
) -> Process:
  """A simulator in a process of its own.

  Args:
    settings: see there.
    beginnings: by episode number, instead of the benchmark's first states; see `Simulator`.
    timeout: seconds without an answer after which it counts as broken.

  Raises:
    ValueError: a setting is wrong, or benchmark or assets are missing.
  """
  check(settings)
  settings = settings._replace(assets=str(find_assets(settings.assets)))
  tasks(settings.suite)
  variables = {"MUJOCO_GL": settings.renderer, "PYOPENGL_PLATFORM": settings.renderer, "LP_NUM_THREADS": "1",
               "OMP_NUM_THREADS": "1"}  # fmt: skip
  return Process(functools.partial(Simulator, settings, beginnings), variables, timeout)


def versions() -> dict[str, str | None]:
  """Of the packages whose versions change what happens."""
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


class Simulator:
  """One LIBERO episode at a time, with the `Environment` protocol; `reset(seed)` takes episode numbers.

  Number 50 i + t is the t-th first state of task i. The task's environment is made when its first episode begins and
  kept until another task's does. Cameras render only what is returned: they are closed inside robosuite's own
  observation step, so that an open one gives the same bytes as if all had been rendered.

  Args:
    settings: with `assets` resolved.
    beginnings: by episode number, instead of the benchmark's first states; such episodes alone exist then. With seeding
      by "episode" a known seed of numpy comes before that of the settings.

  Raises:
    RuntimeError: TensorFlow is in this process.
  """

  def __init__(self, settings: Settings, beginnings: Mapping[int, Beginning] | None = None):
    check(settings)
    if "tensorflow" in sys.modules:
      raise RuntimeError("TensorFlow and the simulator crash in one process; put it into its own: libero.start.")
    self.settings, self._beginnings = settings, beginnings
    self.max_steps = settings.max_steps or MAX_STEPS[settings.suite]
    self._tasks = tasks(settings.suite)
    self._task: int | None = None
    self._resets = 0  # of the current environment
    self._environment: Any = None
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

  def reset(self, seed: int) -> dict:
    """Starts an episode by its number; the first observation is after `wait_steps`.

    Raises:
      ValueError: there is no such episode.
    """
    task, trial = divmod(seed, EPISODES)
    state = self._first_state(seed, task, trial)
    self._open = False
    self._fresh(task, trial)
    self._last = self._environment.set_init_state(state)
    self._steps, self._done = 0, False
    for i in range(self.settings.wait_steps):
      self._open = i == self.settings.wait_steps - 1
      self._last, _, self._done, _ = self._environment.step(list(WAIT))
    return self._observation()

  def step(self, action: np.ndarray, observe: bool = True) -> tuple[dict | None, bool]:
    """Acts once; returns (observation or None, done). Raises ValueError for an action that is not 7 finite numbers."""
    action = np.asarray(action, np.float64)
    if action.shape != (7,) or not np.isfinite(action).all():
      raise ValueError(f"Action has shape {action.shape} and values {action}; expected 7 finite numbers: translation, "
                       "axis-angle, gripper.")  # fmt: skip
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

  def facts(self, seed: int) -> dict[str, str]:
    """What draws the frames; makes the environment of episode `seed` if there is none."""
    if self._task is None:
      self._create(seed // EPISODES)
    from OpenGL import GL

    drawn = GL.glGetString(GL.GL_RENDERER)
    return {"renderer": f"{self.settings.renderer}: {'unknown' if drawn is None else drawn.decode()}"}

  def _first_state(self, seed: int, task: int, trial: int) -> np.ndarray:
    if self._beginnings is not None:
      if seed not in self._beginnings:
        raise ValueError(f"LIBERO: got episode {seed}; expected one of the {len(self._beginnings)} given ones.")
      return self._beginnings[seed].state
    if not 0 <= task < len(self._tasks):
      raise ValueError(
        f"LIBERO: got episode {seed}; expected 0 to {EPISODES * len(self._tasks) - 1} in {self.settings.suite}."
      )
    found = first_states(self._tasks[task])
    if trial >= len(found):
      raise ValueError(f"LIBERO: got trial {trial} of task {task}; expected 0 to {len(found) - 1}; lower --trials.")
    return found[trial]

  def _fresh(self, task: int, trial: int) -> None:
    """A reset environment of the task, seeded as the settings say."""
    if self.settings.seeding == "episode":
      if task != self._task:
        self._create(task)
      self._seed(task, trial)
      return self._reset()
    if task != self._task or self._resets > trial:
      self._create(task)
      self._environment.seed(self.settings.seed)
    while self._resets <= trial:
      self._reset()

  def _seed(self, task: int, trial: int) -> None:
    known = None if self._beginnings is None else self._beginnings[task * EPISODES + trial].seed
    np.random.seed([self.settings.seed, task, trial] if known is None else known)
    random.seed(self.settings.seed * 1_000_003 + task * EPISODES + trial)

  def _create(self, task: int) -> None:
    if self._environment is not None:
      self._environment.close()
    size = self.settings.size
    self._environment = self._make(bddl_file_name=str(self._tasks[task].bddl), camera_heights=size, camera_widths=size)
    self._task, self._resets = task, 0

  def _reset(self) -> None:
    if self.settings.seeding == "episode":
      # Every reset adds its drawers' and knobs' samplers to those of all before, and each draws random numbers.
      self._environment.env.object_property_initializers.clear()
    self._environment.reset()
    self._resets += 1
    for name in _CAMERAS.values():  # a hard reset makes new sensors
      camera = self._environment.env._observables[name]
      camera._sensor = self._gate(camera._sensor)

  def _gate(self, sensor: Callable) -> Callable:
    """A camera that draws only while `_open`: whatever reads it, at the moment at which robosuite would."""
    dark = np.zeros((self.settings.size, self.settings.size, 3), np.uint8)

    def gated(cache: dict) -> np.ndarray:
      return sensor(cache) if self._open else dark

    gated.__modality__ = sensor.__modality__
    return gated

  def _observation(self) -> dict:
    last = self._last
    pictures = {name: self._turn(last[camera]) for name, camera in _CAMERAS.items()}
    rotation = axis_angle(last["robot0_eef_quat"], self.settings.quaternion)
    state = np.concatenate([last["robot0_eef_pos"], rotation, last["robot0_gripper_qpos"]]).astype(np.float32)
    joints = np.asarray(last["robot0_joint_pos"], np.float32)
    return {**pictures, "observation/state": state, "observation/joint_state": joints, "prompt": self.instruction}

  def _turn(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.ascontiguousarray(image[::-1, ::-1] if self.settings.rotation == 180 else image)

  def _current(self) -> int:
    if self._task is None:
      raise ValueError("No episode is running; expected reset(seed) before anything else: call reset first.")
    return self._task


def _import(assets: str) -> Callable[..., Any]:
  """Imports the benchmark with a configuration of its own, and points it at the assets."""
  root = package()
  folder = tempfile.mkdtemp(prefix="libero_config_")
  paths = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files",
           "datasets": root / "datasets", "assets": assets}  # fmt: skip
  (pathlib.Path(folder) / "config.yaml").write_text("".join(f"{key}: {path}\n" for key, path in paths.items()))
  os.environ["LIBERO_CONFIG_PATH"] = folder
  import libero.libero

  libero.libero._assets_path_cache = assets
  from libero.libero.envs import OffScreenRenderEnv

  if "tensorflow" in sys.modules:
    raise RuntimeError("The benchmark imported TensorFlow, which crashes beside OpenGL; install what make sim does.")
  return OffScreenRenderEnv
