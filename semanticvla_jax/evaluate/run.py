"""Measures a policy in closed loop on the suites of a benchmark, and writes a report.

    python -m semanticvla_jax.evaluate run --policy=runs/place/policy --suite=place --split=heldout --episodes=100 \\
        --baseline=checkpoints/base --controls --out=runs/place/report
    python -m semanticvla_jax.evaluate run --policy=DIR --suite=libero_object --workers=4 --out=runs/object

writes results.json after every row, then films, pictures and report.html (self-contained). The same command resumes
in the same folder: finished episodes are kept if they were measured in the same way, more episodes, suites and controls
are added, broken episodes are repeated.

The tabletop runs wholly on the device. LIBERO runs in its own simulators, as many as --workers;
with --recorded=DEMONSTRATIONS instead of --policy it replays recorded actions, to validate the simulator.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from semanticvla_jax import cli
from semanticvla_jax.envs.subprocess_env import BrokenEnvironment
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import controls, folder, shards
from semanticvla_jax.evaluate.benchmarks import BENCHMARKS, of_suites
from semanticvla_jax.evaluate.evaluation import Benchmark, Job, check_minimum
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.policy import WEIGHTS

_PROGRAM = "python -m semanticvla_jax.evaluate run"
_BARE = "the benchmark's"  # --controls without a value


def arguments(argv: Sequence[str]) -> tuple[Benchmark, argparse.Namespace]:
  """The benchmark of the suites, and the flags: those of all benchmarks and its own; `suite` and `controls` are lists.

  Raises:
    ValueError: a suite does not exist, or a flag belongs to another benchmark.
  """
  parser = cli.ArgumentParser(_PROGRAM, __doc__)
  _add_common_flags(parser.add_argument_group("flags of every benchmark").add_argument)
  known: dict[str, str] = {}
  owned = {name: _add_own_flags(parser, benchmark, known) for name, benchmark in BENCHMARKS.items()}
  given = vars(parser.parse_args(argv))
  name, given["suite"] = of_suites(given["suite"])
  benchmark, defaults = BENCHMARKS[name], owned[name]
  for other in BENCHMARKS.keys() - {name}:
    if foreign := [flag for flag in owned[other] if flag in given and flag not in defaults]:
      raise refuse(
        f"--{foreign[0].replace('_', '-')}",
        f"a flag of {BENCHMARKS[other].title} with suites of {benchmark.title} ({', '.join(given['suite'])})",
        f"flags of {benchmark.title}",
        "leave it out",
      )
  args = argparse.Namespace(**defaults | given)
  args.controls = [*benchmark.bare_controls] if args.controls == _BARE else _split(args.controls)
  args.shard = shards.parse(args.shard)
  part = "" if args.shard is None else f"/shard_{args.shard.index}_of_{args.shard.count}"
  args.out = args.out or folder.default(args.policy or "recorded", ",".join(args.suite)) + part
  args.suite = benchmark.expand(args)
  if len({*args.suite}) < len(args.suite):
    raise refuse("--suite", f"{', '.join(args.suite)}", "each suite once", "name none twice")
  return benchmark, args


def _split(words: str) -> list[str]:
  return words.split(",") if words else []


def _add_common_flags(add: Callable) -> None:
  listing = "; ".join(f"{benchmark.title}: {', '.join(benchmark.suites)}" for benchmark in BENCHMARKS.values())
  bare = ", ".join(f"{','.join(benchmark.bare_controls)} on {benchmark.title}" for benchmark in BENCHMARKS.values())
  add("--policy", help="policy folder to measure, or the address of a server: ws://HOST:PORT")
  add("--suite", required=True, help=f"one or more suites of one benchmark, separated by commas. {listing}")
  add(
    "--replan-steps",
    type=int,
    help="number of actions executed per policy query (default: the policy's whole chunk "
    "on the tabletop, the protocol's on LIBERO)",
  )
  add("--replay", dest="replan_steps", type=int, help=argparse.SUPPRESS)  # the name it had
  add("--out", help="folder for the report, resumed if it exists (default: runs/<policy>_<suite>)")
  add(
    "--controls",
    nargs="?",
    const=_BARE,
    default="",
    metavar="NAMES",
    help="controls to measure in addition, "
    f"some of {','.join(controls.NAMES)} (without a value: {bare}; default: none)",
  )
  add(
    "--shard",
    metavar="K/N",
    help="measure share K of N of the episodes, K from 0 to N-1, into a separate folder; the merge subcommand puts "
    "the N folders together (default: all episodes)",
  )
  add("--films", type=int, default=6, help="number of films per suite (default: 6; 0: no pictures either)")
  add(
    "--grounding",
    action="store_true",
    help="measure in addition how much of what the instruction-driven pruner keeps lies on the objects that the task "
    "names, against chance; success rates are the same (default: not measured)",
  )
  add("--metrics", help="metrics.jsonl file of the training, to plot its curves (default: no curves)")
  add("--dataset", help="name of the statistics to use, if the policy has several (default: the only or fitting one)")
  add("--dtype", help="dtype of parameters and computation, e.g. bfloat16 (default: as trained)")
  add("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="int8 or fp8 rounds the decoder's kernels (default: full)")
  add("--title", default="Closed-loop evaluation", help="title of the report (default: Closed-loop evaluation)")


def _add_own_flags(parser: argparse.ArgumentParser, benchmark: Benchmark, known: dict[str, str]) -> dict[str, Any]:
  """Adds a benchmark's own flags; returns {name: default}. A flag that is not given is not in the parsed namespace.

  Args:
    parser: of the command.
    benchmark: whose flags are added.
    known: {flag: name}, added to; benchmarks may share a flag.
  """
  group, defaults = parser.add_argument_group(f"flags of {benchmark.title}"), {}

  def add(flag: str, **options: Any) -> None:
    default = options.pop("default", False if options.get("action") == "store_true" else None)
    if flag not in known:
      known[flag] = group.add_argument(flag, default=argparse.SUPPRESS, **options).dest
    defaults[known[flag]] = default

  benchmark.add_flags(add)
  return defaults


def measure(job: Job, args: argparse.Namespace, stored: folder.ResultsFile) -> Episodes:
  """Measures what an earlier command has not, each row on disk as soon as it is measured; the policy's own episodes."""
  timed = stored.seconds.timed
  try:
    episodes = timed("evaluate", job.own.measure).episodes
    if job.baseline is not None:
      timed("baseline", job.baseline.measure)
    if args.controls and episodes.valid:
      timed("controls", lambda: job.own.measure_controls(episodes, args.controls))
  finally:
    job.own.run.close()
  stored.write()  # with the seconds of the last stage
  return episodes


def show(
  job: Job, episodes: Episodes, count: int, stored: folder.ResultsFile, grounding: bool = False
) -> tuple[list, list]:
  """Films and pictures of a suite, as many as can be made."""
  run, timed = job.own.run, stored.seconds.timed
  if grounding:
    draw = lambda: folder.write_grounding_picture(stored.out, run.suite, run.grounding_picture(episodes))  # noqa: E731
    timed("pictures", lambda: folder.afterwards("the picture of the grounding", draw, None))
  films = timed("films", lambda: folder.afterwards("films", lambda: run.films(episodes, count), []))
  return films, timed("pictures", lambda: folder.afterwards("pictures", lambda: run.scenes(episodes, count), []))


def evaluate(benchmark: Benchmark, args: argparse.Namespace, command: str, metrics: list[dict]) -> list[str]:
  """Measures, then shows, suite by suite; returns what to print of rows without a rate."""
  out, count = pathlib.Path(args.out), benchmark.films(args)
  if count:
    folder.warn_without_ffmpeg()
  stored = folder.ResultsFile(out, command, benchmark.damaged, lambda: benchmark.more(out))
  films, scenes, problems = [], [], []
  try:
    for job in benchmark.jobs(args, stored):
      if args.shard is not None:
        shards.note(out, args.shard, job.own.run.suite, job.own.run.whole, job.own.run.seeds)
      episodes = measure(job, args, stored)
      if count:
        shown = show(job, episodes, count, stored, args.grounding)
        films, scenes = films + shown[0], scenes + shown[1]
  except BrokenEnvironment as error:
    problems = [str(error)]
  except KeyboardInterrupt:
    print(f"What was measured is in {out}; the same command continues from there.", file=sys.stderr)
    raise
  if stored.all:
    folder.write_page(
      out,
      stored,
      finished=not problems,
      title=args.title,
      metrics=metrics,
      films=films,
      scenes=scenes,
      film_note=benchmark.film_note,
      sections=benchmark.sections(stored.all),
    )
  return stored.no_rates() + problems


def main(argv: Sequence[str]) -> None:
  """Measures, writes results.json and report.html, and prints where; problems end the program with their message."""
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  try:
    benchmark, args = arguments(argv)
    check_minimum(args, {"films": 0, "replan_steps": 1})
    controls.check(args.controls)
    if args.grounding and not benchmark.knows_objects:
      known = " or ".join(one.title for one in BENCHMARKS.values() if one.knows_objects)
      raise refuse("--grounding", f"{benchmark.title}, which knows no objects", f"suites of {known}", "leave it out")
    metrics = folder.metrics(args.metrics)
    benchmark.check(args)
    with folder.alone(pathlib.Path(args.out)):
      shards.claim(pathlib.Path(args.out), args.shard)
      missing = evaluate(benchmark, args, f"{_PROGRAM} {shlex.join(argv)}", metrics)
  except ValueError as error:
    sys.exit(f"error: {error}")
  if missing:
    sys.exit("\n".join(missing))
