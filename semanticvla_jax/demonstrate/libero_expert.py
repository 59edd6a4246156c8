"""`demonstrate libero --expert`: the flags of LIBERO's scripted expert, and what is printed of its episodes.

With --replay=DIR nothing is recorded: a dataset's recorded actions are done again.
"""

from __future__ import annotations

import argparse
import sys
import time

from semanticvla_jax import cli
from semanticvla_jax.demonstrate import libero_flags
from semanticvla_jax.envs.subprocess_env import BrokenEnvironment
from semanticvla_jax.libero import demonstrator, expert_replays, suites
from semanticvla_jax.libero import expert_demonstrations as demonstrations


def _arguments(program: str, argv: list[str]) -> argparse.Namespace:
  settings = suites.Settings("libero_object")
  default, variety = demonstrations.Options(settings, ()), demonstrator.Variety()
  what = (
    "Writes demonstrations of LIBERO's scripted expert. --replay does those of a dataset again: see --replay --help."
  )
  parser = cli.ArgumentParser(f"{program} libero --expert", what)
  add = parser.add_argument
  add("--expert", action="store_true", required=True, help="the scripted expert, in place of recorded demonstrations")
  add("--suite", required=True, help=f"suite of LIBERO: one of {', '.join(suites.SUITES)}")
  add("--tasks", help="numbers of the tasks, separated by commas, e.g. 0,3 (default: all that the expert can do)")
  add("--episodes", type=int, default=default.episodes, help="successful episodes per task (default: 30)")
  add("--bar", type=float, default=default.bar, help="leave out tasks below this success rate (default: 0.8)")
  add("--start", type=float, default=variety.start, help="largest shift of the arm's start, meters (default: 0.05)")
  add(
    "--distractors",
    type=float,
    default=variety.distractors,
    help="largest shift of objects that the task does not name, meters (default: 0.03)",
  )
  add("--noise", type=float, default=variety.noise, help="noise on the expert's movements, 0 to 1 (default: 0.1)")
  add("--check", action="store_true", help="render and write nothing: only report each task's success rate")
  libero_flags.add_flags(add, settings, "layouts, starts, and noise")
  return parser.parse_args(argv)


def _replay_arguments(program: str, argv: list[str]) -> argparse.Namespace:
  what = "Does the recorded actions of an expert's dataset again, in their layouts, and reports how many succeed."
  parser = cli.ArgumentParser(f"{program} libero --expert", what)
  add = parser.add_argument
  add("--expert", action="store_true", required=True, help="the scripted expert's, in place of LIBERO's own")
  add("--replay", required=True, metavar="DIR", help="folder of the dataset, e.g. data/libero_object_no_noops")
  libero_flags.add_simulator_flags(add, suites.Settings("libero_object"))
  return parser.parse_args(argv)


def replay(program: str, argv: list[str]) -> None:
  """Replays a dataset of the expert's; problems end the program with their message."""
  args = _replay_arguments(program, argv)
  start = time.perf_counter()

  def progress(done: int, succeeded: int, wanted: int) -> None:
    print(f"{done}/{wanted} replays, {succeeded} succeeded, {time.perf_counter() - start:.0f} s", flush=True)

  try:
    dataset = expert_replays.read(args.replay)
    here = dict(assets=args.assets, renderer=args.renderer, egl_device=args.egl_device)
    settings = dataset.settings._replace(**here)
    suites.check(settings)
    now = suites.versions() | {"assets": suites.assets_hash(str(suites.find_assets(args.assets)))}
    counts = expert_replays.replay(dataset, settings, args.workers, progress)
  except (ValueError, BrokenEnvironment) as error:
    sys.exit(f"error: {error}")
  for name, (good, tried) in counts.items():
    print(f"  {name}: {good} of {tried} replays succeeded ({good / tried:.0%})")
  good, tried = map(sum, zip(*counts.values(), strict=True))
  print(f"{args.replay}: {good} of {tried} replays succeeded, {time.perf_counter() - start:.0f} s")
  for name, value in dataset.made_with.items():
    if now.get(name) != value:
      print(f"  recorded with {name} {value}; here {now.get(name)}")


def _options(args: argparse.Namespace) -> demonstrations.Options:
  """The flags as options. Raises ValueError for tasks or settings that do not exist."""
  settings = suites.Settings(
    args.suite, args.assets, size=args.size, seed=args.seed, renderer=args.renderer, egl_device=args.egl_device
  )
  suites.check(settings)
  tasks = demonstrations.able(args.suite) if args.tasks is None else suites.task_numbers(args.tasks, args.suite)
  variety = demonstrator.Variety(args.start, args.distractors, args.noise)
  return demonstrations.Options(settings, tuple(tasks), variety, args.episodes, args.bar, args.workers)


def write(program: str, argv: list[str]) -> None:
  """Writes a dataset of the expert's episodes, or replays one; problems end the program with their message."""
  if any(word.partition("=")[0] == "--replay" for word in cli.dashed(argv)):
    return replay(program, argv)
  args = _arguments(program, argv)
  start = time.perf_counter()

  def progress(done: int, succeeded: int, wanted: int) -> None:
    print(f"{done} attempts, {succeeded} of {wanted} episodes, {time.perf_counter() - start:.0f} s", flush=True)

  try:
    if args.check:
      summary = demonstrations.check(_options(args), progress)
    else:
      summary = demonstrations.write(_options(args), args.out, args.name or f"{args.suite}_no_noops", progress)
  except (ValueError, BrokenEnvironment) as error:
    sys.exit(f"error: {error}")
  for name, (good, tried) in summary.counts.items():
    note = f", left out: below {args.bar:.0%}" if name in summary.left_out else ""
    print(f"  {name}: {good} of {tried} attempts succeeded ({good / tried:.0%}){note}")
  what = "nothing written" if summary.folder is None else f"{summary.folder}: {summary.frames} frames"
  print(f"{what}, {time.perf_counter() - start:.0f} s")
