"""Measures a policy in closed loop on the tabletop and writes a report.

    python -m semanticvla_jax.evaluate --policy=runs/place/policy --suite=place --split=heldout --episodes=100 \\
        --baseline=checkpoints/base --controls --out=runs/place/report

writes report.html (self-contained), results.json, the films and the pictures in it. Episodes run wholly on the device;
--host runs them through the interface that simulators have, one at a time.

    python -m semanticvla_jax.evaluate compare runs/a/report runs/b/report

puts two such results side by side, if they may be compared.

    python -m semanticvla_jax.evaluate --policy=DIR --suite=libero_object

runs the LIBERO simulator (see --suite=libero_object --help); and

    python -m semanticvla_jax.evaluate doctor --policy=DIR

looks for the known traps of that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from semanticvla_jax import cli
from semanticvla_jax.envs import tabletop, tasks
from semanticvla_jax.evaluate import compare, controls, doctor, libero, protocol, report, visualize
from semanticvla_jax.evaluate.rollout import Episodes, OnDevice, OnHost
from semanticvla_jax.policy import Policy

_COLOURS = re.compile(rf" ?\b({'|'.join((*tasks.COLOURS, 'white'))})\b")


def task(instruction: str) -> str:
  """What is asked, whatever the colours: "pick up the red cube" → "pick up the cube"."""
  return _COLOURS.sub("", instruction)


class Evaluation:
  """One policy on one suite: its runner, and rows of the report.

  Args:
    args: of the command line.
    policy: to measure.
    suite: of the tabletop.
  """

  def __init__(self, args: argparse.Namespace, policy: Policy, suite: str):
    self.args, self.policy, self.suite = args, policy, suite
    self.seeds = range(args.seed, args.seed + args.episodes)
    tasks.check_seeds(self.seeds, args.split)
    self.runner = self.make(policy)

  def fingerprint(self, **changes: Any) -> dict:
    """Of this evaluation, or of a control in it."""
    return protocol.fingerprint(
      self.policy, environment="tabletop", suite=self.suite, split=self.args.split, seeds=self.seeds,
      max_steps=self.runner.max_steps, replay=self.runner.replay, loop="host" if self.args.host else "device",
      **changes,
    )

  def make(self, policy: Policy) -> OnDevice | OnHost:
    """A runner of the kind asked for."""
    args = self.args
    if not args.host:
      batch = -(-args.episodes // -(-args.episodes // args.batch))  # equal batches
      return OnDevice(policy, self.suite, args.split, replay=args.replay, batch=batch, keep_states=True)
    environment = tabletop.TabletopEnvironment(self.suite, args.split, policy.image_size)
    return OnHost(policy, environment, replay=args.replay)

  def row(self, name: str, kind: str, episodes: Episodes, **changes: Any) -> report.Row:
    """A result with its summary and fingerprint."""
    mark = self.fingerprint(**changes)
    row = report.Row(name, kind, self.suite, protocol.summary(episodes, task), mark, episodes)
    low, high = (100 * x for x in row.summary["interval"])
    print(f"{self.suite:8} {name:42} {episodes.successes}/{episodes.valid}  ({low:.0f}–{high:.0f} %)", flush=True)
    return row

  def measure(self, name: str, kind: str) -> report.Row:
    """The policy itself."""
    return self.row(name, kind, self.runner.run(self.seeds, progress=_progress(name, self.args.episodes)))

  def controls(self, result: Episodes, names: Sequence[str]) -> list[report.Row]:
    """The policy with one thing taken away at a time."""
    rows = []
    make = lambda variant, name: self.make(variant)  # noqa: E731
    for name, (episodes, changes) in controls.run(self.policy, self.runner, result, make, names).items():
      told = {"told": "another episode's instruction"} if name == controls.NAMES["shuffled"] else {}
      rows.append(self.row(name, "control", episodes, model_changes=changes, **told))
    return rows


def films(result: Episodes, count: int, folder: pathlib.Path, suite: str) -> list[report.Film]:
  """Films of the first episodes, half of them failures where there are as many."""
  chosen = choose(result.success, count)
  found = []
  for i in chosen:
    steps, success = int(result.steps[i]), bool(result.success[i])
    states = jax.tree.map(lambda x: x[: steps + 1, i], result.states)  # noqa: B023
    frames = visualize.film(visualize.pictures(states), result.told[i], success, result.instruction[i])
    path = folder / f"{suite}_{result.seeds[i]}_{'done' if success else 'not_done'}.mp4"
    visualize.write_mp4(path, frames)
    found.append(report.Film(path, result.told[i], success, steps, int(result.seeds[i])))
  return found


def choose(success: np.ndarray, count: int) -> list[int]:
  """The first episodes of either outcome, `count` in all, successes first; half failures if there are as many."""
  good, bad = np.flatnonzero(success).tolist(), np.flatnonzero(~success).tolist()
  failures = min(len(bad), max(count // 2, count - len(good)))
  return good[: count - failures] + bad[:failures]


def scenes(policy: Policy, result: Episodes, index: int, folder: pathlib.Path, suite: str) -> list[report.Scene]:
  """What the policy looks at in one episode, at its first and a middle step, as told and told something else."""
  told = result.told[index]
  other = next((sentence for sentence in result.instruction if sentence != told), told)
  steps = [0, int(result.steps[index]) // 2]
  states = jax.tree.map(lambda x: x[steps, index], result.states)
  views = visualize.pictures(states)[:, : policy.bare.num_views]
  seen = [visualize.observation(jax.tree.map(lambda x: x[i], states), policy.image_size) for i in (0, 1)]  # noqa: B023
  looks = visualize.looks(policy, [{**one, "prompt": sentence} for one in seen for sentence in (told, other)])
  found = []
  for i, moment in enumerate(("first step", "half way")):
    pair = zip((told, other), ("told", "if it were told instead"), looks[2 * i : 2 * i + 2])
    shown = [(sentence, label, visualize.tiles(views[i], look)) for sentence, label, look in pair]
    name = f"episode {result.seeds[index]} of {suite}, {moment}"
    found.append(report.Scene(name, shown, visualize.cue_tiles(views[i][0], looks[2 * i])))
    sheet = visualize.sheet([row for _, _, rows in shown for row in rows])
    Image.fromarray(sheet).save(folder / f"{suite}_looks_{moment.replace(' ', '_')}.png")
  return found


def run(args: argparse.Namespace, out: pathlib.Path) -> tuple[list[report.Row], list, list, dict[str, float]]:
  """All measurements: rows, films, scenes, and seconds by stage."""
  rows, shown, looked, seconds = [], [], [], report.Stages()
  timed = seconds.timed
  options = dict(dataset=args.dataset, dtype=args.dtype, batch_sizes=(1,) if args.host else ())
  policy = timed("load", lambda: Policy.load(args.policy, **options))
  before = timed("load", lambda: Policy.load(args.baseline, **options)) if args.baseline else None
  for suite in args.suite.split(","):
    evaluation = Evaluation(args, policy, suite)
    baseline = None if before is None else Evaluation(args, before, suite)
    if baseline is not None:
      # Fine-tuning gives the statistics the name of its own data.
      protocol.require_alike(evaluation.fingerprint(), baseline.fingerprint(), but=("policy.dataset",))
    main = timed("evaluate", lambda: evaluation.measure("this policy", "policy"))  # noqa: B023
    rows.append(main)
    if baseline is not None:
      rows.append(timed("baseline", lambda: baseline.measure("before", "baseline")))  # noqa: B023
    if args.controls:
      names = args.controls.split(",")
      rows += timed("controls", lambda: evaluation.controls(main.episodes, names))  # noqa: B023
    if main.episodes.states is not None and args.films:
      shown += timed("films", lambda: films(main.episodes, args.films, out, suite))  # noqa: B023
      index = choose(main.episodes.success, 1)[0]
      looked += timed("pictures", lambda: scenes(policy, main.episodes, index, out, suite))  # noqa: B023
  return rows, shown, looked, seconds


def _progress(name: str, total: int) -> Callable[[int, int], None]:
  start = time.perf_counter()

  def show(done: int, successes: int) -> None:
    rate = done / (time.perf_counter() - start)
    if sys.stderr.isatty():
      end = "\n" if done == total else ""
      print(f"\r{name}: {done}/{total}, {successes} done, {rate:.1f} episodes/s", end=end, file=sys.stderr, flush=True)

  return show


def _values(argv: Sequence[str], flag: str) -> list[str]:
  """What stands behind a flag, in either spelling."""
  pairs = itertools.pairwise(argv)
  return [b for a, b in pairs if a == flag] + [word.split("=", 1)[1] for word in argv if word.startswith(f"{flag}=")]


def _arguments(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m semanticvla_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--policy", required=True, help="policy folder")
  parser.add_argument("--suite", required=True, help=f"one or more of {','.join(tasks.SUITES)}")
  parser.add_argument("--split", default="heldout", help=f"layouts: {', '.join(tasks.SPLITS)} (default: heldout)")
  parser.add_argument("--episodes", type=int, default=100, help="of each suite (default: 100)")
  parser.add_argument("--seed", type=int, default=0, help="of the first episode (default: 0)")
  parser.add_argument("--replay", type=int, help="actions executed before asking again (default: the whole chunk)")
  parser.add_argument("--batch", type=int, default=64, help="episodes run together on the device (default: 64)")
  parser.add_argument("--out", help="folder for the report; must not hold one (default: runs/<policy>_<suite>)")
  parser.add_argument("--baseline", help="policy folder of before the fine-tuning, measured alike")
  parser.add_argument(
    "--controls", nargs="?", const=",".join(controls.NAMES), default="",
    help=f"measure controls too: all, or some of {','.join(controls.NAMES)}",
  )
  parser.add_argument("--host", action="store_true", help="run through the simulators' interface; no films")
  parser.add_argument("--films", type=int, default=6, help="films of each suite (default: 6; 0: no pictures either)")
  parser.add_argument("--metrics", help="metrics.jsonl of the training, for its curves")
  parser.add_argument("--dataset", help="whose statistics to use, where the policy knows several")
  parser.add_argument("--dtype", help="of parameters and computation, e.g. bfloat16 (default: as trained)")
  parser.add_argument("--title", default="What the robot was told, and what it did", help="of the report")
  args = parser.parse_args(argv)
  args.out = args.out or report.folder(args.policy, args.suite)
  return args


def main(argv: list[str]) -> None:
  """Measures, writes results.json and report.html, and says where; problems end the program with their message."""
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  if argv[:1] == ["compare"]:
    return compare.main(argv[1:])
  if argv[:1] == ["doctor"]:
    return doctor.main(argv[1:])
  if any("libero" in word for word in _values(argv, "--suite")):
    return libero.main(argv)
  args = _arguments(argv)
  out = pathlib.Path(args.out)
  command = "python -m semanticvla_jax.evaluate " + shlex.join(argv)
  try:
    if args.episodes < 1 or args.batch < 1:
      raise ValueError(f"Evaluation: got episodes={args.episodes}, batch={args.batch}; expected at least 1 each.")
    controls.check(args.controls.split(",") if args.controls else ())
    if (out / "results.json").exists():
      raise ValueError(f"Report exists: got {out}; expected a folder without results.json; choose another.")
    metrics = report.read_metrics(args.metrics) if args.metrics else []
    out.mkdir(parents=True, exist_ok=True)
    rows, shown, looked, seconds = run(args, out)
  except ValueError as error:
    sys.exit(str(error))
  (out / "results.json").write_text(json.dumps(report.results(rows, command, seconds), indent=2) + "\n")
  page = report.write(
    out / "report.html", title=args.title, rows=rows, films=shown, scenes=looked, metrics=metrics, command=command,
    seconds=seconds,
  )
  print(f"report: {page.resolve()}")


if __name__ == "__main__":
  cli.run(main)
