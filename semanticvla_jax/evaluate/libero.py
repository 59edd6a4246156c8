"""LIBERO's adapter: its suites and flags, its initial states by episode number, and its episodes in simulators.

Every finished episode is a line of a file, so an interrupted evaluation resumes at the next one, also with
more --trials, and repeats the broken ones. `libero_checks.py` finds wrong flags before a simulator starts.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from semanticvla_jax import files, policy_folder
from semanticvla_jax.data import text
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import (
  controls,
  folder,
  libero_checks,
  libero_grounding,
  perturbed,
  progress,
  report,
  rollout_pool,
  served,
)
from semanticvla_jax.evaluate.evaluation import Benchmark, Evaluation, Job, SuiteRun
from semanticvla_jax.evaluate.film_recorder import FilmRecorder
from semanticvla_jax.evaluate.libero_checks import seeds, settings
from semanticvla_jax.evaluate.results import Row
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.evaluate.rollout_pool import EpisodeLog, EpisodeResult, OnSimulators
from semanticvla_jax.evaluate.served import ServedPolicy
from semanticvla_jax.libero import simulator, suites
from semanticvla_jax.libero.protocols import PROTOCOLS
from semanticvla_jax.libero.replay_policy import ReplayPolicy
from semanticvla_jax.policy import Policy

_PRO = "libero_pro"  # selects the four perturbed variants of the suite that the policy was trained on


class LiberoRun(SuiteRun):
  """One policy on one suite of LIBERO, in simulators that stay until `close`.

  Args:
    args: of the command line.
    policy: of `load`.
    suite: of LIBERO.
    stored: of the report; its folder also holds the files of finished episodes.
  """

  def __init__(self, args: argparse.Namespace, policy: Any, suite: str, stored: folder.ResultsFile):
    name = "recorded actions" if isinstance(policy, ReplayPolicy) else "this policy"
    super().__init__(policy, suite, seeds(args, suite), stored, name, shard=args.shard)
    self._args, self._out, protocol = args, stored.out, PROTOCOLS[args.protocol]
    self.settings = settings(args, suite)
    own = policy.metadata.get("jpeg_quality")
    self.jpeg = None if own is not None else protocol.jpeg_quality
    self.replan_steps = args.replan_steps or min(protocol.replan_steps, policy.metadata["chunk"])
    self._begun = policy.beginnings if isinstance(policy, ReplayPolicy) else None
    self._recorder: FilmRecorder | None = None
    tasks = suites.tasks(suite)
    self._prepare = rollout_pool.stored_as_jpeg(self.jpeg, policy.metadata.get("dct", "accurate"))
    self.simulators = OnSimulators(
      policy,
      lambda: simulator.start(self.settings, self._begun, args.timeout),
      workers=args.workers,
      replan_steps=self.replan_steps,
      task=lambda seed: (seed // suites.EPISODES, tasks[seed // suites.EPISODES].instruction),
      prepare=self._prepare,
    )

  def runner(self, policy: Any) -> OnSimulators:
    """See `SuiteRun`: the same simulators for every policy."""
    self.simulators.policy = policy
    return self.simulators

  def run(self, policy: Any, row: str, told: Sequence[str] | None = None) -> Episodes:
    """See `SuiteRun`."""
    if row == "policy" and self._args.films:
      self._recorder = FilmRecorder(self._out, self.suite, self._args.films, self.replan_steps)
    runner, records = self.runner(policy), self._log(row)
    grounded = self._grounded(policy, row, records) if self._args.grounding else None
    runner.seen = _each_of(self._recorder if row == "policy" else None, grounded)
    show = progress.line_per_episode(f"{self.suite} {row}", len(self.seeds), lambda: runner.broken)
    found = runner.run(self.seeds, told, show, records)
    if grounded is None:
      return found
    return found._replace(grounding=[grounded.of(int(seed), said) for seed, said in zip(found.seeds, found.told)])

  def _grounded(self, policy: Policy, row: str, records: EpisodeLog) -> libero_grounding.Recorder:
    """What measures the grounding; episodes in `records` of which it is not known are taken out, to run again."""
    path, draw = self._out / f"{self.suite}_{row}_grounding.jsonl", None
    if row == "policy" and self._args.films and not folder.grounding_picture(self._out, self.suite).exists():
      draw = functools.partial(folder.write_grounding_picture, self._out, self.suite)
    found = libero_grounding.Recorder(policy, path, self._prepare, draw)
    for seed, one in [*records.found.items()]:
      if one.error is None and found.of(seed, one.told) is None:
        del records.found[seed]
    return found

  def _log(self, row: str) -> EpisodeLog:
    return EpisodeLog(self._out / f"{self.suite}_{row}.jsonl", repair=True)

  def facts(self) -> dict:
    """See `SuiteRun`; starts a simulator, which knows the renderer."""
    wanted = self.settings
    return {
      "environment": "libero",
      "suite": self.suite,
      "split": "the benchmark's first states" if self._begun is None else "where the demonstrations began",
      "max_steps": wanted.max_steps or suites.max_steps(self.suite),
      "replan_steps": self.replan_steps,
      "loop": "simulators",
      "protocol": self._args.protocol,
      "simulator": suites.versions(),
      "renderer": self.simulators.first().ask("facts", self.seeds[0])["renderer"],
      "assets": suites.assets_hash(str(suites.find_assets(wanted.assets))),
      "first_states": self._states_hash(),
      "image": {"pixels": wanted.size, "rotation": wanted.rotation, "jpeg_quality": self.jpeg},
      "quaternion": wanted.quaternion,
      "seeding": self._seeding(),
      "wait_steps": wanted.wait_steps,
      "prompt": text.prompt("{instruction}"),
      **self._perturbed(),
      **(self.policy.facts if isinstance(self.policy, ServedPolicy) else {}),
    }

  def asked(self) -> list[str]:
    """See `SuiteRun`."""
    found = suites.tasks(self.suite)
    return [found[seed // suites.EPISODES].instruction for seed in self.whole]

  def tasks(self) -> list[int]:
    """See `SuiteRun`."""
    return [seed // suites.EPISODES for seed in self.whole]

  def _perturbed(self) -> dict:
    changes = suites.perturbation(self.suite)
    return {} if changes is None else {"perturbed": {"suite": suites.parent(self.suite), "changes": changes}}

  def _seeding(self) -> dict:
    """How fixtures are placed; the sentences are those of results.json files of all versions."""
    if self.settings.seeding == "environment":
      return {"seed": self.settings.seed, "where": "once, when a task's environment has been made"}
    where = "numpy and random, with (seed, task, trial), before every reset, samplers of earlier ones emptied"
    if any(one.seed is not None for one in (self._begun or {}).values()):
      where = f"numpy with the recording's own seed, samplers as they were, where that is known, else {where}"
    return {"seed": self.settings.seed, "where": where}

  def _states_hash(self) -> str:
    """SHA-256 of the initial states of all episodes, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for task in sorted({seed // suites.EPISODES for seed in self.whole}):
      found = suites.first_states(suites.tasks(self.suite)[task]) if self._begun is None else None
      for seed in (seed for seed in self.whole if seed // suites.EPISODES == task):
        state = found[seed % suites.EPISODES] if self._begun is None else self._begun[seed].state
        digest.update(np.ascontiguousarray(state, np.float64).tobytes())
    return digest.hexdigest()[:16]

  def claim(self, row: str, mark: Mapping) -> dict:
    """See `SuiteRun`; the fingerprint of the policy's own row is kept in a file next to its episodes."""
    if row != "policy":
      return {**mark}
    path = self._out / f"{self.suite}_fingerprint.json"
    now = folder.merged(self._noted(path) or json.loads(json.dumps(mark)), mark, self._out)
    files.write_json(path, now)
    return now

  def _noted(self, path: pathlib.Path) -> dict | None:
    """The fingerprint of the episodes on disk; None if there is none, or they had to be renamed for the lack of it."""
    there, noted = path.exists(), folder.read_json(path, _fingerprint, None, "results.json may know it")
    found = [self._out / name for name in _episode_files(self.suite) if (self._out / name).exists()]
    if noted is not None or not found:
      return noted
    rows = folder.read_json(self._out / "results.json", lambda value: value["results"], [], "built again")
    marks = [row["fingerprint"] for row in rows if (row["suite"], row["kind"]) == (self.suite, "policy")]
    if marks:
      logging.warning("%s: taken from results.json", path)
      return marks[0]
    names = ", ".join(one.name for one in found)
    if not there:
      logging.warning("%s is missing: episodes in %s are assumed to be measured as now", path, names)
      return None
    moved = [folder.set_aside(one).name for one in (*found, *self._out.glob(f"{self.suite}_films.json"))]
    logging.warning(
      "%s: it is unknown how the episodes in %s were measured; they are kept as %s and measured again (if nothing has "
      "changed, rename them back and remove %s)",
      self._out,
      names,
      ", ".join(moved),
      path.name,
    )
    return None

  def told_before(self) -> dict[int, str]:
    """See `SuiteRun`."""
    return {seed: one.told for seed, one in self._log("shuffled").found.items() if one.error is None}

  def finished(self) -> Episodes | None:
    """See `SuiteRun`."""
    tried = self._log("policy").found
    some = [tried[seed] for seed in self.seeds if seed in tried]
    return rollout_pool.episodes(some) if some else None

  def films(self, episodes: Episodes, count: int) -> list[report.Film]:
    """See `SuiteRun`; films were made while the episodes ran."""
    return [] if self._recorder is None else self._recorder.shown()

  def scenes(self, episodes: Episodes, count: int) -> list[report.Scene]:
    """See `SuiteRun`."""
    if self._recorder is None or not isinstance(self.policy, Policy):
      return []
    return self._recorder.looked(self.policy, [task.instruction for task in suites.tasks(self.suite)])

  def close(self) -> None:
    """Ends the simulators."""
    self.simulators.close()


def _each_of(*takers: Callable[[EpisodeResult, list[dict]], None] | None) -> Callable:
  """Hands an episode that ended to each of those that are not None."""

  def take(result: EpisodeResult, seen: list[dict]) -> None:
    for one in takers:
      if one is not None:
        one(result, seen)

  return take


def _fingerprint(value: Mapping) -> dict:
  if not {"suite", "replay", "policy"} & value.keys():
    raise KeyError("suite")
  return {**value}


def _episode_files(suite: str) -> list[str]:
  """Names of all files of episodes that an evaluation of a suite may write."""
  return [f"{suite}_{row}.jsonl" for row in ("policy", *controls.NAMES)]


def broken(out: pathlib.Path) -> dict[str, dict[int, str]]:
  """The tracebacks of all episodes that broke every time, by file of episodes and number."""
  paths = sorted(out / name for suite in suites.EVERY for name in _episode_files(suite) if (out / name).exists())
  found = {path.stem: EpisodeLog(path, repair=True).found.values() for path in paths}
  errors = {name: {one.seed: one.error for one in log if one.error is not None} for name, log in found.items()}
  return {name: some for name, some in errors.items() if some}


def load(args: argparse.Namespace, suite: str) -> Any:
  """The policy, compiled for up to `workers` observations; or recorded actions.

  Raises:
    ValueError: the policy is for another robot, its statistics are of other suites, or a sentence is too long for it.
  """
  if args.recorded:
    replan_steps = args.replan_steps or PROTOCOLS[args.protocol].replan_steps
    return _recorded(args.recorded, suite, tuple(seeds(args, suite)), replan_steps)
  if served.is_url(args.policy):
    return ServedPolicy(args.policy, args.workers)
  sizes = sorted({args.workers, *(2**i for i in range(args.workers.bit_length()))})
  dataset = args.dataset or libero_checks.dataset_for([*policy_folder.read_policy_json(args.policy).statistics], suite)
  policy = Policy.load(args.policy, dataset=dataset, dtype=args.dtype, weights=args.weights, batch_sizes=sizes)
  for one in args.suite:  # those of later suites, too, before the first episode
    libero_checks.check_sentences(policy, one, libero_checks.asked(args, one))
  return policy


@functools.cache
def _recorded(demonstrations: str, suite: str, numbers: tuple[int, ...], replan_steps: int) -> ReplayPolicy:
  return ReplayPolicy(demonstrations, suite, numbers, replan_steps)


class Libero(Benchmark):
  """LIBERO, for the command."""

  title, suites, bare_controls = "LIBERO", (*suites.EVERY, _PRO), ("shuffled",)
  knows_objects = True
  damaged = "built again from the episodes"
  film_note = "a frame for each policy query, at about real speed"

  def add_flags(self, add: Callable[..., None]) -> None:
    """See `Benchmark`."""
    add(
      "--recorded",
      metavar="DIR",
      help="folder of LIBERO's HDF5 demonstrations, whose actions are sent instead of "
      "those of a policy (default: none)",
    )
    add("--tasks", help="numbers of the tasks, separated by commas, e.g. 0,3 (default: all)")
    add("--trials", type=int, default=50, help="number of episodes per task (default: 50, all of the benchmark)")
    add("--workers", type=int, default=2, help="number of simulators running at once, about 2 GB each (default: 2)")
    add(
      "--protocol",
      choices=(*PROTOCOLS,),
      default="openvla",
      help="published protocol: seed, actions per query, JPEG round trip (default: openvla)",
    )
    add(
      "--seeding",
      choices=suites.SEEDING,
      default="episode",
      help="when random numbers are seeded: before every reset, or once per environment (default: episode)",
    )
    add("--max-steps", type=int, help="maximum number of actions per episode (default: the suite's)")
    add("--assets", help=f"folder of assets (default: ${suites.ASSETS_VARIABLE}, site-packages, ~/.cache/libero)")
    add("--rotation", type=int, default=180, help="rotation of the frames in degrees: 0 or 180 (default: 180)")
    add(
      "--quaternion",
      choices=suites.QUATERNIONS,
      default="robosuite",
      help="convention of the gripper's orientation, the one of the training data (default: robosuite)",
    )
    add("--renderer", default="egl", help="OpenGL library: egl or osmesa (default: egl)")
    add("--egl-device", type=int, help="number of the EGL device that renders (default: the first that works)")
    add(
      "--timeout",
      type=float,
      default=900.0,
      help="seconds without an answer after which a simulator counts as crashed (default: 900)",
    )

  def expand(self, args: argparse.Namespace) -> list[str]:
    """See `Benchmark`: `libero_pro` selects the perturbed variants of the policy's training suite."""
    if _PRO not in args.suite:
      return args.suite
    if args.policy is None:
      raise refuse("--suite=libero_pro", "no --policy", "a policy, whose statistics say which suite", "name the suites")
    names = [args.dataset] if args.dataset else libero_checks.statistics_of(args.policy)
    instead = libero_checks.variants(libero_checks.trained_suite(names)).split(",")
    return [name for one in args.suite for name in (instead if one == _PRO else [one])]

  def check(self, args: argparse.Namespace) -> None:
    """See `Benchmark`."""
    libero_checks.check(args, load)

  def sections(self, rows: Sequence[Row]) -> list[str]:
    """See `Benchmark`: perturbed suites next to those that they perturb."""
    return perturbed.section(rows)

  def jobs(self, args: argparse.Namespace, stored: folder.ResultsFile) -> Iterator[Job]:
    """See `Benchmark`; a suite's policy is loaded when the suite before it has been measured."""
    libero_checks.check_found(args, stored.out)
    for suite in args.suite:
      policy = stored.seconds.timed("load", lambda: load(args, suite))  # noqa: B023
      yield Job(Evaluation(LiberoRun(args, policy, suite, stored), stored))

  def more(self, out: pathlib.Path) -> dict:
    """See `Benchmark`: the tracebacks of broken episodes."""
    return {"broken": broken(out)}

  def merge(self, shards: Sequence[pathlib.Path], out: pathlib.Path) -> None:
    """See `Benchmark`: the files of episodes, one after the other, their fingerprint, and the lists of films."""
    for suite in suites.EVERY:
      grounded = [name.replace(".jsonl", "_grounding.jsonl") for name in _episode_files(suite)]
      for name in (*_episode_files(suite), *grounded):
        found = [shard / name for shard in shards if (shard / name).exists()]
        if found:
          files.write(out / name, b"".join(path.read_bytes() for path in found))
      read = lambda name: [folder.read_json(shard / name, lambda one: one, None, "left out") for shard in shards]  # noqa: E731
      if marks := [mark for mark in read(f"{suite}_fingerprint.json") if mark is not None]:
        files.write_json(out / f"{suite}_fingerprint.json", marks[0] | {"sources": folder.all_sources(marks)})
      if films := [film for some in read(f"{suite}_films.json") for film in some or ()]:
        files.write_json(out / f"{suite}_films.json", films)
