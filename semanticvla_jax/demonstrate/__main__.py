"""Demonstrations as an RLDS dataset: of the tabletop's expert, or LIBERO's recorded ones with images.

    python -m semanticvla_jax.demonstrate --suite=place --episodes=200 --out=data --name=tabletop_place

writes data/tabletop_place/1.0.0 with features.json, dataset_info.json, the shards (in the layout of
`libero_*_no_noops`), dataset_statistics.json and demonstrations.json. The same flags give the same bytes.
Look at it with `python -m semanticvla_jax.data preview --data_dir data --name tabletop_place`.

    python -m semanticvla_jax.demonstrate --from-hdf5=DIR --suite=libero_object --out=data

replays LIBERO's own demonstrations (HDF5) in the simulator by the release's rules and writes
data/libero_object_no_noops; run again after an interruption it goes on. With --check it only says which succeed. --help
after --from-hdf5 lists its flags.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

from semanticvla_jax import cli
from semanticvla_jax.envs.subprocess_env import BrokenEnvironment
from semanticvla_jax.libero import demonstrations as replays
from semanticvla_jax.libero import suites
from semanticvla_jax.tabletop import demonstrations, tasks

_HORIZON = 1000  # the simulator's own: a demonstration is replayed to its end


def _arguments(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m semanticvla_jax.demonstrate", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  default = demonstrations.Recipe("place")
  parser.add_argument("--suite", required=True, help=f"one of {', '.join(tasks.SUITES)}")
  parser.add_argument("--split", default=default.split, help=f"layouts: {', '.join(tasks.SPLITS)} (default: train)")
  parser.add_argument("--episodes", type=int, default=default.episodes, help="successful ones (default: 200)")
  parser.add_argument("--seed", type=int, default=default.seed, help="of the first episode (default: 0)")
  parser.add_argument("--size", type=int, default=default.size, help="pixels of a side of both views (default: 64)")
  parser.add_argument("--noise", type=float, default=default.noise, help="of the expert's movements (default: 0.3)")
  parser.add_argument(
    "--perturbed", type=float, default=default.perturbed, help="share of episodes that begin anywhere (default: 0)"
  )
  labels = ", ".join(demonstrations.LABELS)
  parser.add_argument("--label", default=default.label, help=f"which action is recorded: {labels}")
  parser.add_argument("--out", default="data", help="folder of datasets (default: data)")
  parser.add_argument("--name", help="of the dataset (default: tabletop_<suite>)")
  return parser.parse_args(argv)


def _replay_arguments(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m semanticvla_jax.demonstrate", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  default = suites.Settings("libero_object")
  parser.add_argument(
    "--from-hdf5", "--from_hdf5", required=True, metavar="DIR", help="folder of <task>_demo.hdf5, or the one above"
  )
  parser.add_argument("--suite", required=True, help=f"one of {', '.join(suites.SUITES)}")
  parser.add_argument("--tasks", help="their numbers, e.g. 0,3 (default: all)")
  parser.add_argument("--episodes", type=int, help="demonstrations of each task (default: all)")
  parser.add_argument("--workers", type=int, default=2, help="simulators at once, about 2 GB each (default: 2)")
  parser.add_argument("--size", type=int, default=default.size, help="pixels of a side of both views (default: 256)")
  parser.add_argument("--seed", type=int, default=default.seed, help="of the resets (default: 0)")
  parser.add_argument("--assets", help=f"folder (default: ${suites.ASSETS_VARIABLE}, site-packages, ~/.cache/libero)")
  parser.add_argument("--renderer", default=default.renderer, help="egl or osmesa (default: egl)")
  parser.add_argument("--egl-device", "--egl_device", type=int, help="that draws (default: the first that works)")
  parser.add_argument(
    "--check", action="store_true", help="draw and write nothing: say which replays succeed, in a quarter of the time"
  )
  parser.add_argument("--out", default="data", help="folder of datasets (default: data)")
  parser.add_argument("--name", help="of the dataset (default: <suite>_no_noops)")
  return parser.parse_args(argv)


def replay(argv: list[str]) -> None:
  """Writes a dataset from recorded demonstrations; problems end the program with their message."""
  args = _replay_arguments(argv)
  start = time.perf_counter()

  def progress(done: int, kept: int, total: int) -> None:
    print(f"{done}/{total} replays, {kept} succeeded, {time.perf_counter() - start:.0f} s", flush=True)

  try:
    settings = suites.Settings(
      args.suite, args.assets, size=args.size, seed=args.seed, renderer=args.renderer, egl_device=args.egl_device,
      max_steps=_HORIZON,
    )  # fmt: skip
    suites.check(settings)
    tasks = tuple(suites.task_numbers(args.tasks, args.suite))
    recipe = replays.Recipe(args.from_hdf5, args.suite, settings, tasks, args.episodes, args.workers)
    if args.check:
      report = replays.check(recipe, progress)
    else:
      report = replays.write(recipe, args.out, args.name or f"{args.suite}_no_noops", progress)
  except (ValueError, BrokenEnvironment) as error:
    sys.exit(str(error))
  print(
    f"{report.folder or args.suite}: {report.kept} of {report.tried} replays succeeded, {report.frames} frames, "
    f"{time.perf_counter() - start:.0f} s"
  )
  for task, names in report.dropped.items():
    print(f"  dropped of {task}: {', '.join(names)}")


def main(argv: list[str]) -> None:
  """Writes one dataset; problems end the program with their message."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  if any(word.replace("_", "-").startswith("--from-hdf5") for word in argv):
    return replay(argv)
  args = _arguments(argv)
  if args.suite in suites.SUITES:
    sys.exit(
      f"Demonstrations: got --suite={args.suite} without --from-hdf5; expected a folder of LIBERO's recorded "
      f"demonstrations, for the expert knows only {', '.join(tasks.SUITES)}; add --from-hdf5=DIR."
    )
  name = args.name or f"tabletop_{args.suite}"
  recipe = demonstrations.Recipe(
    args.suite, args.split, args.episodes, args.seed, args.size, args.noise, args.label, args.perturbed
  )
  start = time.perf_counter()

  def progress(done: int) -> None:
    if done % 25 == 0 or done == recipe.episodes:
      print(f"{done}/{recipe.episodes} episodes, {time.perf_counter() - start:.0f} s", flush=True)

  try:
    report = demonstrations.write(recipe, args.out, name, progress)
  except ValueError as error:
    sys.exit(str(error))
  size = sum(path.stat().st_size for path in report.folder.iterdir()) / 1e6
  print(
    f"{report.folder}: {report.kept} episodes, {report.frames} frames, {size:.1f} MB; {len(report.dropped)} of "
    f"{report.tried} tries failed and were dropped; {time.perf_counter() - start:.0f} s"
  )


if __name__ == "__main__":
  cli.run(main)
