"""Demonstrations as an RLDS dataset: from the tabletop's expert, LIBERO's recorded ones, or a LeRobot dataset.

    python -m semanticvla_jax.demonstrate tabletop --suite=place --episodes=200 --out=data --name=tabletop_place

writes data/tabletop_place/1.0.0 with features.json, dataset_info.json, the shards (in the layout of
`libero_*_no_noops`), dataset_statistics.json and demonstrations.json. The same flags give the same bytes.
Look at it with `python -m semanticvla_jax.data preview --data-dir data --name tabletop_place`.

    python -m semanticvla_jax.demonstrate libero --from-hdf5=DIR --suite=libero_object --out=data

replays LIBERO's own demonstrations (HDF5) in the simulator by the release's rules and writes
data/libero_object_no_noops; the same command resumes after an interruption. With --check it only reports which
demonstrations succeed.

    python -m semanticvla_jax.demonstrate libero --expert --suite=libero_object --episodes=30 --out=data

lets a scripted expert do the tasks in the simulator, in random layouts, and writes data/libero_object_no_noops; it
needs no download and resumes after an interruption.

    python -m semanticvla_jax.demonstrate lerobot --from-lerobot=DIR --absolute=none --gripper=6:1:0 --out=data

writes a LeRobot dataset (v2.1 or v3.0) as data/<name>, with the DatasetSpec that reads it in data/<name>.py; the
same command resumes after an interruption. What the dataset does not say of its robot is asked for by flags.

Without a subcommand, --from-hdf5 and --expert mean `libero`, --from-lerobot means `lerobot`, and all other flags mean
`tabletop`.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time

from semanticvla_jax import cli
from semanticvla_jax.data import datasets, lerobot, lerobot_to_rlds
from semanticvla_jax.demonstrate import libero_expert, libero_flags
from semanticvla_jax.envs.subprocess_env import BrokenEnvironment
from semanticvla_jax.errors import refuse
from semanticvla_jax.libero import demonstrations as replays
from semanticvla_jax.libero import suites
from semanticvla_jax.tabletop import demonstrations, tasks

_PROGRAM = "python -m semanticvla_jax.demonstrate"
_COMMANDS = {
  "tabletop": "demonstrations of the tabletop's expert",
  "libero": "LIBERO's recorded demonstrations (HDF5), replayed in the simulator",
  "lerobot": "a LeRobot dataset, v2.1 or v3.0, with the spec that reads it",
}
_HORIZON = 1000  # the simulator's own: a demonstration is replayed to its end


def _arguments(argv: list[str]) -> argparse.Namespace:
  default = demonstrations.Options("place")
  parser = cli.ArgumentParser(f"{_PROGRAM} tabletop", "Writes demonstrations of the tabletop's scripted expert.")
  add = parser.add_argument
  add("--suite", required=True, help=f"suite of the tabletop: one of {', '.join(tasks.SUITES)}")
  add("--split", default=default.split, help=f"split of the layouts: {', '.join(tasks.SPLITS)} (default: train)")
  add("--episodes", type=int, default=default.episodes, help="number of successful episodes (default: 200)")
  add("--seed", type=int, default=default.seed, help="seed of the first episode (default: 0)")
  add("--size", type=int, default=default.size, help="width and height of both views in pixels (default: 64)")
  add("--noise", type=float, default=default.noise, help="noise on the expert's movements, 0 to 1 (default: 0.3)")
  add(
    "--perturbed",
    type=float,
    default=default.perturbed,
    help="fraction of episodes with a perturbed initial state (default: 0)",
  )
  labels = ", ".join(demonstrations.LABELS)
  add("--label", default=default.label, help=f"action to record: one of {labels} (default: {default.label})")
  add("--out", default="data", help="folder of datasets (default: data)")
  add("--name", help="name of the dataset (default: tabletop_<suite>)")
  return parser.parse_args(argv)


def _replay_arguments(argv: list[str]) -> argparse.Namespace:
  default = suites.Settings("libero_object")
  what = (
    "Replays LIBERO's recorded demonstrations and stores the frames. A scripted expert needs none: see --expert --help."
  )
  parser = cli.ArgumentParser(f"{_PROGRAM} libero", what)
  add = parser.add_argument
  add("--from-hdf5", required=True, metavar="DIR", help="folder of <task>_demo.hdf5 files, or its parent")
  add("--suite", required=True, help=f"suite of LIBERO: one of {', '.join(suites.SUITES)}")
  add("--tasks", help="numbers of the tasks, separated by commas, e.g. 0,3 (default: all)")
  add("--episodes", type=int, help="number of demonstrations per task (default: all)")
  add(
    "--check",
    action="store_true",
    help="render and write nothing, summary which replays succeed, in a quarter of the time",
  )
  libero_flags.add_flags(add, default, "the resets")
  return parser.parse_args(argv)


def _lerobot_arguments(argv: list[str]) -> argparse.Namespace:
  default = lerobot_to_rlds.Options((), None)
  parser = cli.ArgumentParser(f"{_PROGRAM} lerobot", "Writes a LeRobot dataset (v2.1 or v3.0) as RLDS, with its spec.")
  add = parser.add_argument
  add("--from-lerobot", required=True, metavar="DIR", help="folder of the dataset, with meta/info.json")
  add("--absolute", help="action dimensions that are targets, e.g. 0,1,2; all or none: the others are displacements")
  add("--gripper", metavar="DIM:OPEN:CLOSED", help="dimension and values of the gripper's command; none without")
  add("--action", default=default.action, help=f"feature of the actions (default: {default.action})")
  states = ",".join(default.states)
  add("--states", default=states, help=f"features of the proprioception, with commas (default: {states})")
  add("--views", default="", help="features of 1 to 4 cameras in the model's order, with commas (default: all)")
  add("--mode", default=default.mode, choices=("bounds_q99", "bounds"), help=f"normalization (default: {default.mode})")
  add("--chunk", type=int, default=default.chunk, help=f"actions predicted at a time (default: {default.chunk})")
  add("--out", default="data", help="folder of datasets (default: data)")
  add("--name", help="name of the dataset (default: the folder's)")
  return parser.parse_args(argv)


def _lerobot_options(args: argparse.Namespace) -> lerobot_to_rlds.Options:
  """The flags as options. Raises ValueError for what cannot be read, and for what must be said and is not."""
  data = lerobot.LeRobot(args.from_lerobot)
  width = data.vectors.get(args.action, 0)
  choose = lerobot_to_rlds.dimensions_of(data, args.action) if width else "name --action"
  targets = {"all": list(range(width)), "none": []}.get(args.absolute)
  if targets is None:
    words = (args.absolute or "").split(",")
    if not all(word.strip().isdecimal() for word in words):
      raise refuse("--absolute", args.absolute, "all, none, or dimensions such as 0,1,2", choose)
    targets = [int(word) for word in words]
  grip = None
  if args.gripper != "none":
    number = r"(-?\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(\d+):{number}:{number}", args.gripper or "")
    if match is None:
      raise refuse("--gripper", args.gripper, "none, or DIM:OPEN:CLOSED such as 6:1:0", choose)
    grip = datasets.Gripper(int(match[1]), float(match[2]), float(match[3]))
  states, views = (
    tuple(word.strip() for word in text.split(",") if word.strip()) for text in (args.states, args.views)
  )
  return lerobot_to_rlds.Options(tuple(targets), grip, args.action, states, views, args.mode, args.chunk)


def from_lerobot(argv: list[str]) -> None:
  """Writes a LeRobot dataset as RLDS; problems end the program with their message."""
  args = _lerobot_arguments(argv)
  start = time.perf_counter()

  def progress(done: int, total: int) -> None:
    print(f"{done}/{total} episodes, {time.perf_counter() - start:.0f} s", flush=True)

  name = args.name or re.sub(r"\W", "_", os.path.basename(os.path.abspath(args.from_lerobot)))
  try:
    summary = lerobot_to_rlds.convert(args.from_lerobot, args.out, name, _lerobot_options(args), progress)
  except ValueError as error:
    sys.exit(f"error: {error}")
  print(f"{summary.folder}: {summary.episodes} episodes, {summary.frames} frames; read by SPEC of {summary.spec}")


def replay(argv: list[str]) -> None:
  """Writes a dataset of LIBERO's recorded demonstrations; problems end the program with their message."""
  args = _replay_arguments(argv)
  start = time.perf_counter()

  def progress(done: int, kept: int, total: int) -> None:
    print(f"{done}/{total} replays, {kept} succeeded, {time.perf_counter() - start:.0f} s", flush=True)

  try:
    settings = suites.Settings(
      args.suite,
      args.assets,
      size=args.size,
      seed=args.seed,
      renderer=args.renderer,
      egl_device=args.egl_device,
      max_steps=_HORIZON,
    )
    suites.check(settings)
    tasks = tuple(suites.task_numbers(args.tasks, args.suite))
    options = replays.ReplayOptions(args.from_hdf5, args.suite, settings, tasks, args.episodes, args.workers)
    if args.check:
      summary = replays.check(options, progress)
    else:
      summary = replays.write(options, args.out, args.name or f"{args.suite}_no_noops", progress)
  except (ValueError, BrokenEnvironment) as error:
    sys.exit(f"error: {error}")
  print(
    f"{summary.folder or args.suite}: {summary.kept} of {summary.tried} replays succeeded, {summary.frames} frames, "
    f"{time.perf_counter() - start:.0f} s"
  )
  for task, names in summary.dropped.items():
    print(f"  dropped of {task}: {', '.join(names)}")


def expert(argv: list[str]) -> None:
  """Writes a dataset of the tabletop's expert; problems end the program with their message."""
  args = _arguments(argv)
  if args.suite in suites.SUITES:
    sys.exit(f"error: {_no_source(args.suite)}")
  name = args.name or f"tabletop_{args.suite}"
  options = demonstrations.Options(
    args.suite, args.split, args.episodes, args.seed, args.size, args.noise, args.label, args.perturbed
  )
  start = time.perf_counter()

  def progress(done: int) -> None:
    if done % 25 == 0 or done == options.episodes:
      print(f"{done}/{options.episodes} episodes, {time.perf_counter() - start:.0f} s", flush=True)

  try:
    summary = demonstrations.write(options, args.out, name, progress)
  except ValueError as error:
    sys.exit(f"error: {error}")
  size = sum(path.stat().st_size for path in summary.folder.iterdir()) / 1e6
  print(
    f"{summary.folder}: {summary.kept} episodes, {summary.frames} frames, {size:.1f} MB; {len(summary.dropped)} of "
    f"{summary.tried} tries failed and were dropped; {time.perf_counter() - start:.0f} s"
  )


def _no_source(suite: str) -> ValueError:
  return refuse(
    f"Demonstrations of {suite}",
    "neither --from-hdf5 nor --expert",
    "where they come from",
    "add --expert for the scripted expert, or --from-hdf5=DIR for LIBERO's recorded demonstrations",
  )


def main(argv: list[str]) -> None:
  """Writes one dataset; problems end the program with their message."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  name, rest = cli.subcommand(_PROGRAM, __doc__, _COMMANDS, argv)
  flags = {word.partition("=")[0] for word in cli.dashed(rest)}
  if name in ("", "libero") and "--expert" in flags:
    return libero_expert.write(_PROGRAM, rest)
  if name == "libero" and not flags & {"--from-hdf5", "--help", "-h"}:
    sys.exit(f"error: {_no_source('LIBERO')}")
  if name == "libero" or (not name and "--from-hdf5" in flags):
    return replay(rest)
  if name == "lerobot" or (not name and "--from-lerobot" in flags):
    return from_lerobot(rest)
  return expert(rest)


if __name__ == "__main__":
  cli.run(main)
