"""Looks for the traps that make LIBERO results irreproducible, in the installation and in a policy folder.

    python -m semanticvla_jax.evaluate doctor --policy=DIR [--suite=libero_object] [--data-dir=DIR]
    python -m semanticvla_jax.evaluate doctor --survey [--suite=libero_10] [--tasks=0,1]

prints a line for each: whether it applies, what was seen, what it is known to cost, and the remedy; ends with status 1
if one does. With --data-dir the simulator's first frame is compared with the training data's. --survey needs no policy:
the first state of every task is simulated, and tasks whose objects do not rest in it are named.
"""

from __future__ import annotations

import argparse
import functools
import glob
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from semanticvla_jax import cli, policy_folder
from semanticvla_jax.data import images, statistics
from semanticvla_jax.envs.subprocess_env import BrokenEnvironment
from semanticvla_jax.errors import refuse
from semanticvla_jax.libero import opengl, simulator, suites, survey
from semanticvla_jax.libero.protocols import PROTOCOLS, fitting
from semanticvla_jax.models import masks
from semanticvla_jax.types import Statistics

_MUJOCO = "make sim installs 3.3.2; a result made elsewhere keeps its version in its fingerprint"
_MARKS = {True: "APPLIES", False: "ok     ", None: "unknown"}


class Finding(NamedTuple):
  """One trap: whether it applies (None: unknown), what was seen, its known effect, what to do."""

  trap: str
  applies: bool | None
  seen: str
  effect: str
  remedy: str


def quaternion(proprio: Statistics | None, convention: str = "robosuite") -> Finding:
  """Whether the training data's axis-angle has another convention than the simulator's."""
  effect = "an antipodal flip cost 14 points on Goal (97.4 to 83.4) and 40 on Long (95.4 to 55.8)"
  remedy = "evaluate with --quaternion=robosuite or positive_w, whichever the data has"
  if proprio is None or len(proprio.min) != 8:
    return Finding("quaternion convention", None, "no 8-d proprioception in the statistics", effect, remedy)
  low, high = float(proprio.min[3]), float(proprio.max[3])
  seen = f"rotation about x from {low:.2f} to {high:.2f} rad in the data, {convention} in the simulator"
  made = "robosuite" if high > math.pi + 1e-3 else "positive_w" if low < -2 and high > 2 else None
  return Finding("quaternion convention", None if made is None else made != convention, seen, effect, remedy)


def crop(config: Mapping) -> Finding:
  """Whether a policy trained on random crops is shown whole images."""
  data = config.get("data") or {}
  augmented, area, trained = data.get("augment"), data.get("crop_area"), images.RELEASE.crop_area
  seen = f"augment={augmented}, crop_area={area}"
  applies = None if augmented is None else bool(augmented) != (area is not None) or (augmented and area != trained)
  if "diagonal_crop" in data:  # trained since training crops what the config says; before, it was the released area
    applies = bool(augmented) and area is None
  remedy = f"set data.crop_area of the policy's config.json to {trained} if it was trained on crops, else to null"
  return Finding("center crop", applies, seen, "a missing crop cost about 3 points", remedy)


def bounds(config: Mapping, action: Statistics) -> Finding:
  """Whether actions are un-normalized with extremes where quantiles were trained on."""
  mode = (config.get("data") or {}).get("normalisation", "q99")
  masked = np.asarray(action.mask, bool)
  copies = bool(np.all(action.q01[masked] == action.min[masked]) and np.all(action.q99[masked] == action.max[masked]))
  seen = f"normalisation={mode!r}" + (", q01 and q99 are the extremes in all dimensions" if copies else "")
  remedy = "use the statistics of the training run, with q01 and q99 (data.normalisation='bounds_q99')"
  return Finding("statistics", mode == "bounds" or copies, seen, "min/max instead of q01/q99: 0 % success", remedy)


def action_block(config: Mapping) -> Finding:
  """Whether the action placeholders see one another."""
  model = config["model"]
  kind, effect = model.get("mask", "block"), "causal placeholders: 98.1 to 60.2 points"
  if model.get("coupler", "grouped") is None:
    return Finding("mask of the action block", False, "actions are generated one by one", effect, "none is needed")
  valid, block = jnp.ones((1, 6), bool), jnp.arange(6) >= 2
  allowed = np.asarray(masks.attention_mask(valid, block, kind))[0]
  seen = f"model.mask={kind!r}: the first action {'sees' if allowed[2, 5] else 'does not see'} the last"
  return Finding("mask of the action block", not allowed[2, 5], seen, effect, "set model.mask to 'block', and retrain")


def gripper(action: Statistics) -> Finding:
  """Whether the gripper is normalized, or stored as -1 and 1 where 0 and 1 are expected."""
  low, high, masked = float(action.min[-1]), float(action.max[-1]), bool(action.mask[-1])
  seen = f"gripper from {low:g} to {high:g}, {'normalized' if masked else 'passed through'}"
  remedy = "read the data with its LIBERO recipe: 1 open, 0 closed, not normalized"
  return Finding("gripper", masked or low < -1e-6 or high > 1 + 1e-6, seen, "it closes where it is to open", remedy)


def image_path(config: Mapping, quality: int | None) -> Finding:
  """Whether frames skip the JPEG that stored training frames went through.

  Args:
    config: of the policy.
    quality: of the protocol's round trip, if the policy has none.
  """
  data = config.get("data") or {}
  own = data.get("jpeg_quality")
  quality = quality if own is None else own
  dct = data.get("dct", "accurate")
  stored = "no JPEG" if quality is None else f"JPEG of quality {quality} decoded by the {dct} DCT"
  effect = "JPEG, Lanczos, crop and seeds together: 71.0 to 76.2 points"
  remedy = "evaluate with --protocol=openvla, or set data.jpeg_quality=95 of the policy's config.json"
  return Finding("image path", quality is None, f"{stored}, then Lanczos-3 to the model's size", effect, remedy)


def pruner_text(config: Mapping) -> Finding:
  """Whether the ID-Pruner reads another text than in training, as the release's does."""
  data = config.get("data") or {}
  trained, now = data.get("pruner_text", "question"), data.get("pruner_text_eval")
  seen = f"{trained!r} in training, {now or trained!r} in evaluation"
  effect = "the words 'in' and 'out' become cues; what that costs is not on record"
  remedy = "set data.pruner_text_eval of the policy's config.json to null; keep it to repeat the release's numbers"
  return Finding("text of the ID-Pruner", now not in (None, trained), seen, effect, remedy)


def seeding(where: str) -> Finding:
  """Whether what an episode looks like depends on those that ran before it."""
  effect = "fixtures are a centimeter off; JPEG, Lanczos, crop and seeds together: 71.0 to 76.2 points"
  seen = {"episode": "before every reset, by (seed, task, trial)", "environment": "once, when an environment is made"}
  return Finding("seeding", where == "environment", seen[where], effect, "evaluate with --seeding=episode")


def accelerator(backend: str, devices: Sequence[str]) -> Finding:
  """Whether jax runs on the CPU of a machine that has something faster.

  Args:
    backend: of jax.
    devices: files of accelerators in /dev.
  """
  seen = f"jax runs on {backend}; {', '.join(devices) or 'no accelerator'} in /dev"
  effect = "a silent fallback: the policy answers, only slowly"
  remedy = "install requirements-cuda.txt or requirements-tpu.txt; unset JAX_PLATFORMS and CUDA_VISIBLE_DEVICES"
  return Finding("accelerator", backend == "cpu" and bool(devices), seen, effect, remedy)


def _accelerators() -> list[str]:
  return sorted(path for kind in ("nvidia[0-9]*", "accel*", "kfd") for path in glob.glob(f"/dev/{kind}"))


def key(names: Sequence[str], suite: str) -> Finding:
  """Whether the policy's statistics are of another suite."""
  fits = fitting(names, suite)
  remedy = "choose with --dataset, or evaluate the suite that it was trained on"
  return Finding("statistics key", not fits, f"{[*names]} for {suite}", "actions in another suite's units", remedy)


def simulator_versions(versions: Mapping[str, str | None]) -> list[Finding]:
  """Whether the installed versions change what the benchmark shows or does; measured, see docs/libero.md."""
  mujoco, robosuite = versions.get("mujoco"), versions.get("robosuite")
  other = None if robosuite is None else not robosuite.startswith("1.4.")
  return [
    Finding(
      "MuJoCo's light",
      _since(mujoco, (3, 3, 3)),
      f"mujoco {mujoco}; it changed in 3.3.3",
      "floors of libero_object are 36 gray levels darker; public reports: 88 to 69 % there",
      _MUJOCO,
    ),
    Finding(
      "MuJoCo's first states",
      _since(mujoco, (3, 4, 0)),
      f"mujoco {mujoco}; objects come to rest elsewhere since 3.4.0",
      "the bowl of libero_spatial task 5 is off its ramekin (public reports: 98 to 12 %); groceries are in mid-air in "
      "libero_10 tasks 0, 1 and 7",
      _MUJOCO,
    ),
    Finding(
      "robosuite's version",
      other,
      f"robosuite {robosuite}; the reference pins 1.4.1",
      "1.5 has other controllers",
      "make sim installs 1.4",
    ),
  ]


def _since(version: str | None, first: tuple[int, ...]) -> bool | None:
  """Whether a version is at least that one; None where it is missing or not a number."""
  found = re.match(r"\d+(\.\d+)*", version or "")
  return None if found is None else tuple(map(int, found[0].split("."))) >= first


def looks(digest: str) -> Finding:
  """Whether objects look different from the benchmark's: stand-ins for some of its assets.

  Args:
    digest: of the assets there are, see suites.assets_hash. One without a name is unknown: LIBERO's own assets without
      those of LIBERO-PRO, for example, have another.
  """
  name = suites.ASSETS.get(digest)
  applies = None if name is None else digest != suites.PUBLISHED_ASSETS
  seen = (
    f"hash {digest}, {name or f'without a name; the published assets of LIBERO-PRO have {suites.PUBLISHED_ASSETS}'}"
  )
  remedy = "make sim installs the published ones; unset LIBERO_ASSETS and leave --assets out"
  return Finding("stand-in assets", applies, seen, "the policy sees objects it never saw", remedy)


def libraries(assets: str | None, renderer: str = "egl", device: int | None = None) -> list[Finding]:
  """Whether the simulator can run at all, its assets and OpenGL, and whether the assets are stand-ins."""
  try:
    folder = str(suites.find_assets(assets))
    found = [Finding("assets", False, folder, "", ""), looks(suites.assets_hash(folder))]
  except ValueError as error:
    found = [Finding("assets", True, str(error), "nothing runs", "see there")]
  return [*found, drawing(renderer, device)]


def drawing(renderer: str, device: int | None = None) -> Finding:
  """Whether OpenGL draws nothing: a context is opened and drawn with, in a separate process."""
  effect = "nothing is drawn, every episode breaks"
  try:
    chosen = opengl.choose(renderer, device)
  except ValueError as error:
    if opengl.draw(renderer, device).missing:
      return Finding("OpenGL", None, f"{renderer}: the simulator is not installed", effect, "make sim")
    return Finding("OpenGL", True, str(error), effect, _other_way(renderer))
  drawn = opengl.draw(renderer, chosen)
  where = "" if chosen is None else f", EGL device {chosen} of {drawn.devices}"
  return Finding("OpenGL", False, f"{renderer}: drawn by {drawn.renderer}{where}", effect, "")


def _other_way(renderer: str) -> str:
  """What draws instead, as far as that can be found out here."""
  others = [name for name in opengl.RENDERERS if name != renderer and opengl.draw(name).renderer is not None]
  if others:
    return f"--renderer={others[0]} draws here"
  return f"apt-get install {opengl.PACKAGES[renderer]}, or choose with --egl-device and --renderer"


def rotation(stored: Sequence[UInt8[np.ndarray, "h w 3"]], rendered: UInt8[np.ndarray, "h w 3"]) -> Finding:
  """Whether the simulator's first frame is oriented differently from the data's.

  Args:
    stored: first frames of episodes, of the front camera.
    rendered: the simulator's.
  """
  mean = np.mean([images.resize(one, 64).astype(np.float32) for one in stored], axis=0)
  ways = {"as it is": (1, 1), "turned by 180°": (-1, -1), "upside down": (-1, 1), "mirrored": (1, -1)}
  small = images.resize(rendered, 64).astype(np.float32)
  apart = {name: float(np.abs(small[::y, ::x] - mean).mean()) for name, (y, x) in ways.items()}
  best = min(apart, key=apart.get)
  seen = "mean difference to the data " + ", ".join(f"{name} {value:.0f}" for name, value in apart.items())
  remedy = "evaluate with --rotation=0 (data from raw HDF5 images) or 180 (the *_no_noops sets)"
  return Finding("rotation", best != "as it is", seen, "the policy sees what it never saw: about 0 %", remedy)


def suites_of(names: Sequence[str]) -> list[str]:
  """The suites whose statistics a policy has.

  Raises:
    ValueError: it has none of LIBERO.
  """
  found = [suite for suite in suites.SUITES if fitting(names, suite)]
  if not found:
    raise refuse(
      "Doctor",
      f"statistics of {[*names]}, which name no suite",
      f"some of {[*suites.SUITES]}",
      "pass --suite",
    )
  return found


def policy(
  folder: str, suite: str, dataset: str | None = None, convention: str = "robosuite", protocol: str = "openvla"
) -> list[Finding]:
  """All that a policy folder tells.

  Raises:
    ValueError: it is not a policy folder.
  """
  config, entries, _ = policy_folder.read_policy_json(folder)
  names = [dataset] if dataset else [*entries]
  found = [key(names, suite), crop(config), action_block(config), pruner_text(config)]
  found.append(image_path(config, PROTOCOLS[protocol].jpeg_quality))
  for name in names:
    if name not in entries:
      raise refuse("Doctor", f"dataset={name!r}", f"one of {[*entries]}", "choose one of them")
    stats = statistics.from_openvla(entries[name], f"statistics.json: {name}")
    found += [quaternion(stats.proprio, convention), bounds(config, stats.action), gripper(stats.action)]
  return found


def first_frames(data_dir: str, name: str, count: int = 10) -> list[np.ndarray]:
  """First frames of the front camera, of episodes spread over a dataset."""
  from semanticvla_jax.data import rlds, tfrecord_index

  dataset = rlds.load(data_dir, name)
  reader = tfrecord_index.Reader(dataset.index)
  starts = np.flatnonzero(np.diff(dataset.episodes, prepend=-1))
  chosen = starts[np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)]
  return [images.decode(reader.image(int(dataset.frames[frame]), 0)) for frame in chosen]


def training_data(data_dir: str, name: str) -> tuple[Finding, list[UInt8[np.ndarray, "h w 3"]]]:
  """Whether a dataset cannot be read as it is meant, e.g. for its gripper commands; and its first frames."""
  effect = "actions are misread: a gripper opens where it is to close"
  try:
    frames = first_frames(data_dir, name)
  except ValueError as error:
    return Finding("training data", True, str(error), effect, "see there"), []
  return Finding("training data", False, f"{name} can be read, its gripper as it is meant", effect, ""), frames


def _data(args: argparse.Namespace) -> list[Finding]:
  """What the training data tells, and which way up its frames are."""
  if args.data_dir is None:
    return [Finding("rotation", None, "no data to compare with", "about 0 %", "pass --data-dir")]
  found, frames = training_data(args.data_dir, f"{suites.parent(args.suite)}_no_noops")
  if not frames:
    return [found]
  try:
    return [found, rotation(frames, _first_picture(args))]
  except (ValueError, BrokenEnvironment) as error:  # what else was found is worth the reading
    seen = f"no frame of the simulator to compare with: {str(error).strip().splitlines()[-1]}"
    return [found, Finding("rotation", None, seen, "about 0 %", "put the above right first")]


def _first_picture(args: argparse.Namespace) -> UInt8[np.ndarray, "h w 3"]:
  """Of the simulator's first episode."""
  process = simulator.start(_settings(args, args.suite))
  try:
    return process.reset(0)["observation/image"]
  finally:
    process.close()


def show(findings: Sequence[Finding]) -> str:
  """A line or three for each."""
  lines = []
  for one in findings:
    lines.append(f"{_MARKS[one.applies]}  {one.trap}: {one.seen}")
    if one.applies is not False:
      lines += [f"           known effect: {one.effect}", f"           remedy: {one.remedy}"]
  return "\n".join(lines)


def _parser() -> cli.ArgumentParser:
  parser = cli.ArgumentParser("python -m semanticvla_jax.evaluate doctor", __doc__)
  add = parser.add_argument
  add("--policy", help="policy folder to check; not needed with --survey")
  add(
    "--suite",
    help=f"suite to evaluate, one of {', '.join(suites.EVERY)} (default: the first one in the statistics; "
    f"with --survey: {', '.join(suites.SUITES)})",
  )
  add("--model", action="store_true", help="what the policy's parts do; flags: doctor --model --help")
  add("--survey", action="store_true", help="simulate the first state of every task: do objects rest, how bright is it")
  add("--tasks", help="with --survey: numbers of the tasks, separated by commas, e.g. 0,3 (default: all)")
  add("--dataset", help="name of the statistics to use (default: all that the policy has)")
  add("--data-dir", help="folder with <suite>_no_noops, whose frames are compared with the simulator's")
  add("--assets", help=f"folder of assets (default: ${suites.ASSETS_VARIABLE}, site-packages, ~/.cache/libero)")
  add(
    "--quaternion",
    choices=suites.QUATERNIONS,
    default="robosuite",
    help="convention of the simulator's orientation (default: robosuite)",
  )
  add("--rotation", type=int, default=180, help="rotation of the simulator's frames in degrees (default: 180)")
  add("--protocol", choices=(*PROTOCOLS,), default="openvla", help="protocol of the evaluation (default: openvla)")
  add("--seeding", choices=suites.SEEDING, default="episode", help="seeding of the evaluation (default: episode)")
  add("--renderer", default="egl", help="OpenGL library: egl or osmesa (default: egl)")
  add("--egl-device", type=int, help="number of the EGL device that renders (default: the first that works)")
  return parser


def _settings(args: argparse.Namespace, suite: str) -> suites.Settings:
  found = suites.Settings(
    suite, args.assets, rotation=args.rotation, renderer=args.renderer, egl_device=args.egl_device
  )
  suites.check(found)
  return found


def _survey(args: argparse.Namespace) -> None:
  """Prints what `survey` finds; ends with status 1 where objects do not rest."""
  names = args.suite.split(",") if args.suite else [*suites.SUITES]
  settings = [_settings(args, name) for name in names]
  versions = ", ".join(f"{name} {version}" for name, version in suites.versions().items() if version is not None)
  print(versions)
  restless = survey.run(settings[0], names, args.tasks, functools.partial(print, flush=True))
  print(
    f"{len(restless)} tasks whose objects do not rest"
    + "".join(f"\n  {one.suite} {one.task}: {', '.join(one.restless)}" for one in restless)
  )
  if restless:
    sys.exit(1)


def _diagnose(args: argparse.Namespace) -> list[Finding]:
  """All findings of a policy, the installation, and the data if there is some."""
  if args.suite is None:
    found = suites_of([args.dataset] if args.dataset else [*policy_folder.read_policy_json(args.policy).statistics])
    args.suite = found[0]
    print(f"suite: {args.suite}, of those that the policy has statistics of: {', '.join(found)}")
  _settings(args, args.suite)
  findings = policy(args.policy, args.suite, args.dataset, args.quaternion, args.protocol)
  findings += [seeding(args.seeding), accelerator(jax.default_backend(), _accelerators())]
  findings += simulator_versions(suites.versions()) + libraries(args.assets, args.renderer, args.egl_device)
  return findings + _data(args)


def main(argv: Sequence[str]) -> None:
  """Prints what was found; ends with status 1 where a trap applies."""
  args = _parser().parse_args(argv)
  try:
    if args.survey:
      return _survey(args)
    if args.tasks is not None:
      raise refuse("--tasks", f"{args.tasks} without --survey", "--survey, which simulates tasks", "leave it out")
    if args.policy is None:
      raise refuse("Doctor", "no --policy", "a policy folder, or --survey", "name one of them")
    findings = _diagnose(args)
  except (ValueError, BrokenEnvironment) as error:
    sys.exit(f"error: {error}")
  print(show(findings))
  if any(one.applies for one in findings):
    sys.exit(1)
