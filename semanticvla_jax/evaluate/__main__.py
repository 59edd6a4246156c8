"""Measures a policy in closed loop on the tabletop and writes a report.

    python -m semanticvla_jax.evaluate --policy=runs/place/policy --suite=place --split=heldout --episodes=100 \\
        --baseline=checkpoints/base --controls --out=runs/place/report

writes results.json after every row, then films, pictures and report.html (self-contained). Run again into the same
folder it goes on: what was measured alike is kept, more episodes, suites and controls are added, broken episodes
repeated. Episodes run wholly on the device; --host runs them through the interface that simulators have, one at a time.

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
import logging
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from semanticvla_jax import cli, files
from semanticvla_jax.evaluate import compare, controls, folder, libero, protocol, report, visualize
from semanticvla_jax.evaluate.rollout import Episodes, OnDevice, OnHost, check_robot
from semanticvla_jax.libero import doctor
from semanticvla_jax.libero import suites as envs_libero
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import physics, tasks

_COLOURS = re.compile(rf" ?\b({'|'.join((*tasks.COLOURS, 'white'))})\b")


def task(instruction: str) -> str:
  """What is asked, whatever the colours: "pick up the red cube" → "pick up the cube"."""
  return _COLOURS.sub("", instruction)


def instructions(suite: str, split: str, seeds: Sequence[int]) -> list[str]:
  """What episodes ask for, by their seeds, without running them."""
  found = jax.vmap(lambda seed: tasks.reset(tasks.seed_key(seed, split), suite, split).instruction)
  return [tasks.INSTRUCTIONS[i] for i in np.asarray(jax.jit(found)(np.array(seeds, np.int32)))]


class Evaluation:
  """One policy on one suite: its runner, and rows of the report.

  Args:
    args: of the command line.
    policy: to measure.
    suite: of the tabletop.
    name, kind: of its row.

  Raises:
    ValueError: the suite, the split or a seed does not exist, or the policy does not fit.
  """

  def __init__(self, args: argparse.Namespace, policy: Policy, suite: str, name: str, kind: str):
    self.args, self.policy, self.suite = args, policy, suite
    self.key, self.seeds = (suite, kind, name), range(args.seed, args.seed + args.episodes)
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
    check_robot(policy, policy.replay if args.replay is None else args.replay)
    environment = physics.TabletopEnvironment(self.suite, args.split, policy.image_size)
    ask = lambda seed: instructions(self.suite, args.split, [seed])[0]  # noqa: E731
    return OnHost(policy, environment, replay=args.replay, instruction=ask)

  def marks(self, names: Sequence[str]) -> dict[folder.Key, dict]:
    """The fingerprints of the policy's own row and of the controls that apply."""
    found = {self.key: self.fingerprint()}
    for name, changes in controls.of_policy(self.policy, names).items():
      told = {"told": "another episode's instruction"} if name == "shuffled" else {}
      found[self.control(name)] = self.fingerprint(model_changes=changes, **told)
    return found

  def control(self, name: str) -> folder.Key:
    """The row of a control."""
    return self.suite, "control", controls.NAMES[name]

  def measure(self, results: folder.Results) -> report.Row:
    """The policy itself."""
    runner, name = self._resumed(results, self.key, self.runner), self.key[2]
    show = _progress(name, self.args.episodes, self.runner)
    return self._row(results, self.key, self.fingerprint(), runner.run(self.seeds, progress=show))

  def controls(self, results: folder.Results, own: Episodes, names: Sequence[str]) -> None:
    """The policy with one thing taken away at a time, each a row as soon as it is measured."""
    marks, shuffled = self.marks(names), self.control("shuffled")
    make = lambda variant, name: self._resumed(results, self.control(name), self.make(variant))  # noqa: E731
    runner, before = self._resumed(results, shuffled, self.runner), results.before(shuffled)
    pairs = [] if before is None else zip(before.seeds.tolist(), before.told, before.error)
    said = {seed: told for seed, told, error in pairs if not error}
    for name, episodes, _ in controls.each(self.policy, runner, own, make, names, said=said):
      self._row(results, self.control(name), marks[self.control(name)], episodes)

  def _resumed(self, results: folder.Results, key: folder.Key, runner: OnDevice | OnHost) -> folder.Resumed:
    return folder.Resumed(runner, results.before(key), f"{key[0]}, {key[2]}")

  def _row(self, results: folder.Results, key: folder.Key, mark: dict, episodes: Episodes) -> report.Row:
    if key in results.found:
      mark = folder.gone_on(results.found[key].fingerprint, mark, results.out)
    return results.add(report.Row(key[2], key[1], key[0], protocol.summary(episodes, task), mark, episodes))


def with_states(evaluation: Evaluation, result: Episodes, count: int) -> Episodes:
  """The result, if its states are known; else those of its episodes that are shown, run again."""
  if result.states is not None:
    return result
  seeds = result.seeds[sorted(choose(result.success, count))]
  return evaluation.runner.run(seeds)


def films(result: Episodes, count: int, out: pathlib.Path, suite: str) -> list[report.Film]:
  """Films of the first episodes, half of them failures where there are as many; those before one that fails."""
  found = []
  folder.afterwards("films", lambda: [found.append(film) for film in _films(result, count, out, suite)], None)
  return found


def _films(result: Episodes, count: int, out: pathlib.Path, suite: str) -> Iterator[report.Film]:
  for i in choose(result.success, count):
    steps, success = int(result.steps[i]), bool(result.success[i])
    states = jax.tree.map(lambda x: x[: steps + 1, i], result.states)  # noqa: B023
    frames = visualize.film(visualize.pictures(states), result.told[i], success, result.instruction[i])
    path = out / f"{suite}_{result.seeds[i]}_{'done' if success else 'not_done'}.mp4"
    folder.write_film(path, frames)
    yield report.Film(path, result.told[i], success, steps, int(result.seeds[i]))


def choose(success: np.ndarray, count: int) -> list[int]:
  """The first episodes of either outcome, `count` in all, successes first; half failures if there are as many."""
  good, bad = np.flatnonzero(success).tolist(), np.flatnonzero(~success).tolist()
  failures = min(len(bad), max(count // 2, count - len(good)))
  return good[: count - failures] + bad[:failures]


def scenes(policy: Policy, result: Episodes, index: int, out: pathlib.Path, suite: str) -> list[report.Scene]:
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
    files.write(out / f"{suite}_looks_{moment.replace(' ', '_')}.png", visualize.png(sheet))
  return found


class Job(NamedTuple):
  """What is measured on one suite: the policy, and what it was fine-tuned from, if that is asked for."""

  own: Evaluation
  before: Evaluation | None


def jobs(args: argparse.Namespace, timed: Callable) -> list[Job]:
  """All that is measured, suite by suite, after everything that can be checked without an episode.

  Args:
    args: of the command line.
    timed: of `report.Stages`.

  Raises:
    ValueError: something does not exist, does not fit, or cannot be measured.
  """
  options = dict(dataset=args.dataset, dtype=args.dtype, batch_sizes=(1,) if args.host else ())
  policy = timed("load", lambda: Policy.load(args.policy, **options))
  before = timed("load", lambda: Policy.load(args.baseline, **options)) if args.baseline else None
  found = []
  for suite in folder.suites(args.suite, tasks.SUITES):
    own = Evaluation(args, policy, suite, "this policy", "policy")
    baseline = None if before is None else Evaluation(args, before, suite, "before", "baseline")
    if baseline is not None:
      _check_alike(own.fingerprint(), baseline.fingerprint())
    if "shuffled" in _controls(args):
      controls.shuffle(instructions(suite, args.split, own.seeds))
    found.append(Job(own, baseline))
  if left := [name for name in _controls(args) if name not in controls.of_policy(policy, _controls(args))]:
    logging.warning("Controls left out, for they change nothing in this policy: %s", ", ".join(left))
  return found


def _check_alike(own: dict, before: dict) -> None:
  """Raises ValueError where two policies would be measured differently; reports how the policies themselves differ."""
  protocol.require_alike(own, before, but=protocol.OWN)
  # Fine-tuning gives the statistics the name of its own data.
  if lines := protocol.unlike(own, before, (*protocol.COMPARED, *protocol.NOTED, "policy.dataset")):
    logging.warning("This policy and the baseline differ in what is their own: %s", "; ".join(lines))


def measure(args: argparse.Namespace, results: folder.Results) -> list[tuple[Job, Episodes]]:
  """Measures what an earlier run has not, each row on disk when it is there; the policy's own episodes by suite."""
  timed, names = results.seconds.timed, _controls(args)
  planned, found = jobs(args, timed), []
  marks = {key: mark for job in planned for key, mark in job.own.marks(names).items()}
  marks |= {job.before.key: job.before.fingerprint() for job in planned if job.before is not None}
  results.check(marks, planned[0].own.seeds)
  for own, before in planned:
    row = timed("evaluate", lambda: own.measure(results))  # noqa: B023
    found.append((Job(own, before), row.episodes))
    if before is not None:
      timed("baseline", lambda: before.measure(results))  # noqa: B023
    if names and row.episodes.valid:
      timed("controls", lambda: own.controls(results, row.episodes, names))  # noqa: B023
  results.write()  # with the seconds of the last stage
  return found


def show(args: argparse.Namespace, results: folder.Results, found: list[tuple[Job, Episodes]]) -> dict[str, list]:
  """Films and pictures, as many as can be made."""
  shown, looked, timed = [], [], results.seconds.timed
  for job, episodes in found if args.films and not args.host else ():
    again = lambda: with_states(job.own, episodes, args.films)  # noqa: B023, E731
    result = timed("films", lambda: folder.afterwards("films", again, None))  # noqa: B023
    if result is None:
      continue
    shown += timed("films", lambda: films(result, args.films, results.out, job.own.suite))  # noqa: B023
    index = choose(result.success, 1)[0]
    look = lambda: scenes(job.own.policy, result, index, results.out, job.own.suite)  # noqa: B023, E731
    looked += timed("pictures", lambda: folder.afterwards("pictures", look, []))  # noqa: B023
  return {"films": shown, "scenes": looked}


def _controls(args: argparse.Namespace) -> list[str]:
  return args.controls.split(",") if args.controls else []


def _progress(name: str, total: int, runner: OnDevice | OnHost) -> Callable[[int, int], None]:
  start = time.perf_counter()

  def show(done: int, successes: int) -> None:
    rate = done / (time.perf_counter() - start)
    if sys.stderr.isatty():
      end = "\n" if done == total else ""
      broke = f", {runner.broken} broke" if runner.broken else ""
      line = f"\r{name}: {done}/{total}, {successes} succeeded{broke}, {rate:.1f} episodes/s"
      print(line, end=end, file=sys.stderr, flush=True)

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
  parser.add_argument(
    "--out", help="folder for the report; one measured alike is gone on with (default: runs/<policy>_<suite>)"
  )
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


def _check_numbers(args: argparse.Namespace) -> None:
  """Raises ValueError for numbers that are out of range whatever the policy."""
  if args.episodes < 1 or args.batch < 1:
    raise ValueError(f"Evaluation: got episodes={args.episodes}, batch={args.batch}; expected at least 1 each.")
  if args.films < 0 or (args.replay is not None and args.replay < 1):
    raise ValueError(f"Evaluation: got films={args.films}, replay={args.replay}; expected at least 0 and 1.")


def _check_suites(names: Sequence[str]) -> None:
  """Raises ValueError for suites of both simulators at once, which have flags of their own, and others of LIBERO's."""
  ours, others = ([name for name in names if name.strip() in known] for known in (tasks.SUITES, envs_libero.SUITES))
  if ours and others:
    raise ValueError(
      f"Suites: got {ours} of the tabletop with {others} of LIBERO; expected one of the two; evaluate them in turn."
    )
  if any("libero" in name for name in names):
    folder.suites(",".join(names), envs_libero.SUITES)


def evaluate(args: argparse.Namespace, out: pathlib.Path, command: str) -> list[str]:
  """Measures, then shows; returns what to say of rows without a rate."""
  lines = folder.metrics(args.metrics)
  if args.films and not args.host:
    folder.warn_without_ffmpeg()
  results = folder.Results(out, command, "all is measured again")
  try:
    found = measure(args, results)
  except KeyboardInterrupt:
    print(f"Rows that were finished are in {out}; the same command goes on after them.", file=sys.stderr)
    raise
  shown = show(args, results, found)
  folder.write_page(out, results, title=args.title, metrics=lines, **shown)
  return results.no_rates()


def main(argv: list[str]) -> None:
  """Measures, writes results.json and report.html, and says where; problems end the program with their message."""
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  if argv[:1] == ["compare"]:
    return compare.main(argv[1:])
  if argv[:1] == ["doctor"]:
    return doctor.main(argv[1:])
  names = [name for words in _values(argv, "--suite")[-1:] for name in words.split(",")]
  try:
    _check_suites(names)
    if any("libero" in name for name in names):
      return libero.main(argv)
    args = _arguments(argv)
    _check_numbers(args)
    controls.check(_controls(args))
    for name in folder.suites(args.suite, [*tasks.SUITES, *names]):
      tasks.max_steps(name)  # names the nearest
    tasks.check_split(args.split)
    out = pathlib.Path(args.out)
    with folder.alone(out):
      missing = evaluate(args, out, "python -m semanticvla_jax.evaluate " + shlex.join(argv))
  except ValueError as error:
    sys.exit(str(error))
  if missing:
    sys.exit("\n".join(missing))


if __name__ == "__main__":
  cli.run(main)
