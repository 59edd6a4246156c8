"""Measures a policy on LIBERO, in its own simulator, and says how.

    python -m semanticvla_jax.evaluate --policy=DIR --suite=libero_object --out=runs/object --workers=2

Run again into the same folder it goes on: at the next episode after an interruption, with more --trials, suites or
controls, and with episodes that broke. Everything that changes a success rate is in the result's fingerprint; episodes
that were measured otherwise are not gone on with, and `evaluate compare` refuses such results.

    python -m semanticvla_jax.evaluate --recorded=DEMONSTRATIONS --suite=libero_object --out=runs/proof --trials=2

sends recorded actions through the same path, from the first states that they were recorded from.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import logging
import pathlib
import shlex
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from semanticvla_jax import checkpoint, files
from semanticvla_jax.data import images, statistics, text
from semanticvla_jax.envs import libero, libero_simulator
from semanticvla_jax.envs.process import BrokenEnvironment
from semanticvla_jax.evaluate import controls, protocol, report, simulators, visualize
from semanticvla_jax.evaluate import folder as places
from semanticvla_jax.evaluate.recorded import Recorded
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.evaluate.simulators import OnSimulators, Record, Records
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.policy import Policy

_VIEWS = ("observation/image", "observation/wrist_image")
_RATE = 20  # control steps a second


class Protocol(NamedTuple):
  """What a community's evaluation fixes besides the simulator.

  Attributes:
    seed: of the resets.
    replay: actions executed of a chunk.
    jpeg_quality: of the round trip that frames take, as stored training frames did; None for none.
  """

  seed: int
  replay: int
  jpeg_quality: int | None


PROTOCOLS = {"openvla": Protocol(0, 8, 95), "openpi": Protocol(7, 5, None)}


class Watch:
  """Keeps what a report shows: films of the first episodes of either outcome, and two moments of one of them.

  On disk at once, so that a resumed evaluation shows what came before, too. What cannot be written is missing in the
  report, which is said; what is damaged is made again.

  Args:
    folder: of the report. name: begins the names of its files.
    count: films, half of them failures where there are as many.
    replay: actions between two frames.
  """

  def __init__(self, folder: pathlib.Path, name: str, count: int, replay: int):
    self.folder, self.name, self.count, self.replay = folder, name, count, replay
    self._list, self._moments = folder / f"{name}_films.json", folder / f"{name}_moments.npz"
    self._works = True
    films = places.read_json(self._list, self._listed, None, "the films that are there are listed again")
    self.films = self._there() if films is None and any(folder.glob(f"{name}_*_*.mp4")) else films or []
    if self._moments.exists() and self._kept() is None:
      aside = places.set_aside(self._moments)
      logging.warning("%s is damaged: kept as %s; those of the next episode are taken", self._moments, aside.name)

  def __call__(self, record: Record, seen: list[dict]) -> None:
    """Takes an episode that ended."""
    if record.error is None and seen and self._works:
      self._works = places.afterwards("Films", lambda: self._take(record, seen), False)

  def _take(self, record: Record, seen: list[dict]) -> bool:
    """Makes a film of an episode that has a place among those shown; True."""
    if not self._moments.exists() or (record.success and not any(film["success"] for film in self.films)):
      self._keep_moments(record, [seen[0], seen[len(seen) // 2]])
    rest = self._room(record.success)
    if rest is None:
      return True
    frames = np.stack([np.stack([one[name] for name in _VIEWS]) for one in seen])
    steps = [min(i * self.replay, record.steps) for i in range(len(seen))]
    path = self.folder / f"{self.name}_{record.seed}_{'done' if record.success else 'not_done'}.mp4"
    pictures = visualize.film(frames, record.told, record.success, record.instruction, steps)
    places.write_film(path, pictures, fps=max(1, round(_RATE / self.replay)))
    dropped = [film["path"] for film in self.films if film not in rest]
    self.films = [film for film in rest if film["path"] != path.name] + [self._entry(path, record)]
    files.write_json(self._list, self.films)
    for name in dropped:
      (self.folder / name).unlink(missing_ok=True)
    return True

  def _room(self, success: bool) -> list[dict] | None:
    """The films that are kept with one more of this outcome; None where there is no room for it."""
    if len(self.films) < self.count:
      return self.films
    alike = [film for film in self.films if film["success"] == success]
    share = self.count - self.count // 2 if success else self.count // 2
    if len(alike) >= share:
      return None
    last = [film for film in self.films if film["success"] != success][-1]
    return [film for film in self.films if film is not last]

  def shown(self) -> list[report.Film]:
    """The films, successes first."""
    found = [report.Film(**film | {"path": self.folder / film["path"]}) for film in self.films]
    return sorted(found, key=lambda film: (not film.success, film.seed))[: self.count]

  @staticmethod
  def _entry(path: pathlib.Path, record: Record) -> dict:
    return {
      "path": path.name, "told": record.told, "success": record.success, "steps": record.steps, "seed": record.seed
    }

  def _listed(self, value: list[dict]) -> list[dict]:
    """Films of the list that are on disk; missing ones are reported."""
    found = [{key: one[key] for key in ("path", "told", "success", "steps", "seed")} for one in value]
    there = [one for one in found if _whole(self.folder / one["path"])]
    if gone := [one["path"] for one in found if one not in there]:
      logging.warning("%s: films are missing or damaged, and left out: %s", self._list, ", ".join(gone))
    return there

  def _there(self) -> list[dict]:
    """The films on disk whose episodes are recorded."""
    records = Records(self.folder / f"{self.name}_policy.jsonl", repair=True).found.values()
    paths = [self.folder / f"{self.name}_{one.seed}_{'done' if one.success else 'not_done'}.mp4" for one in records]
    return [self._entry(path, one) for path, one in zip(paths, records) if _whole(path)][: self.count]

  def _kept(self) -> dict[str, np.ndarray] | None:
    """The moments; None where the file is damaged."""
    try:
      with np.load(self._moments) as file:
        kept = {key: file[key] for key in file.files}
      return kept if {"told", "seed", *(key.replace("/", "|") for key in _VIEWS)} <= kept.keys() else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
      return None

  def looked(self, policy: Policy, sentences: Sequence[str]) -> list[report.Scene]:
    """What the policy looked at in the moments kept, as told and told another of `sentences`."""
    kept = self._kept() if self._moments.exists() else None
    if kept is None:
      return []
    told, seed = str(kept.pop("told")), int(kept.pop("seed"))
    other = next((sentence for sentence in sentences if sentence != told), told)
    scenes = []
    for i, moment in enumerate(("first frame", "half way")):
      one = {key.replace("|", "/"): value[i] for key, value in kept.items()}
      pair = [{**one, "prompt": sentence} for sentence in (told, other)]
      views = [_large(view) for view in policy.observe(pair[:1]).images[0]]
      looks = visualize.looks(policy, pair)
      labels = ("told", "if it were told instead")
      shown = [(said["prompt"], label, visualize.tiles(views, look)) for said, label, look in zip(pair, labels, looks)]
      scenes.append(report.Scene(f"episode {seed}, {moment}", shown, visualize.cue_tiles(views[0], looks[0])))
      sheet = visualize.sheet([row for _, _, rows in shown for row in rows])
      files.write(self.folder / f"{self.name}_looks_{moment.replace(' ', '_')}.png", visualize.png(sheet))
    return scenes

  def _keep_moments(self, record: Record, moments: list[dict]) -> None:
    arrays = {key.replace("/", "|"): np.stack([one[key] for one in moments]) for key in (*_VIEWS, "observation/state")}
    buffer = io.BytesIO()
    np.savez(buffer, told=record.told, seed=record.seed, **arrays)
    files.write(self._moments, buffer.getvalue())


def _whole(path: pathlib.Path) -> bool:
  """Whether a film is there, to its end."""
  return path.is_file() and b"moov" in path.read_bytes()


def _large(view: np.ndarray) -> np.ndarray:
  """A view of the model's size, larger for the eye."""
  return images.resize(view, max(256, view.shape[0]))


class Evaluation:
  """One policy on one suite: simulators, files of finished episodes, rows of the report.

  Args:
    args: of the command line.
    policy: of `load`.
    suite: of LIBERO.
    results: of the report.
  """

  def __init__(self, args: argparse.Namespace, policy: Any, suite: str, results: places.Results):
    self.args, self.policy, self.suite, self.results, self.out = args, policy, suite, results, results.out
    chosen, self.seeds = PROTOCOLS[args.protocol], seeds(args, suite)
    self.settings = settings(args, suite)
    own = policy.metadata.get("jpeg_quality")
    self.jpeg = None if own is not None else chosen.jpeg_quality
    replay = min(chosen.replay, policy.metadata["chunk"]) if args.replay is None else args.replay
    tasks = libero.tasks(suite)
    begun = policy.beginnings if isinstance(policy, Recorded) else None
    self.watch: Watch | None = None
    self.simulators = OnSimulators(
      policy, lambda: libero_simulator.start(self.settings, begun, args.timeout), workers=args.workers, replay=replay,
      group=lambda seed: seed // libero.EPISODES, instruction=lambda seed: tasks[seed // libero.EPISODES].instruction,
      jpeg_quality=self.jpeg, dct=policy.metadata.get("dct", "accurate"),
    )  # fmt: skip
    self.replay = replay

  def fingerprint(self, **changes: Any) -> dict:
    """Of this evaluation, or of a control in it; starts a simulator, to hear what draws."""
    args, settings = self.args, self.settings
    drawn = self.simulators.first().ask("facts", self.seeds[0])
    recorded = isinstance(self.policy, Recorded)
    return protocol.fingerprint(
      self.policy, environment="libero", suite=self.suite,
      split="where the demonstrations began" if recorded else "the benchmark's first states", seeds=self.seeds,
      max_steps=settings.max_steps or libero.MAX_STEPS[self.suite], replay=self.replay, loop="simulators",
      protocol=args.protocol, simulator=libero.versions(), renderer=drawn["renderer"],
      assets=libero.assets_hash(str(libero.find_assets(settings.assets))), first_states=self._states_hash(),
      image={"pixels": settings.size, "rotation": settings.rotation, "jpeg_quality": self.jpeg},
      quaternion=settings.quaternion, seeding=self._seeding(),
      wait_steps=settings.wait_steps, prompt=text.prompt("{instruction}"), **changes,
    )  # fmt: skip

  def _seeding(self) -> dict:
    """What numbers fixtures are placed by."""
    if self.settings.seeding == "environment":
      return {"seed": self.settings.seed, "where": "once, when a task's environment has been made"}
    begun = self.policy.beginnings.values() if isinstance(self.policy, Recorded) else ()
    where = "numpy and random, with (seed, task, trial), before every reset, samplers of earlier ones emptied"
    if any(one.seed is not None for one in begun):
      where = f"numpy with the recording's own seed, samplers as they were, where that is known, else {where}"
    return {"seed": self.settings.seed, "where": where}

  def _states_hash(self) -> str:
    """Of the first states of all episodes."""
    digest = hashlib.sha256()
    for task in sorted({seed // libero.EPISODES for seed in self.seeds}):
      trials = [seed for seed in self.seeds if seed // libero.EPISODES == task]
      own = self.policy.beginnings if isinstance(self.policy, Recorded) else None
      found = libero.first_states(libero.tasks(self.suite)[task]) if own is None else None
      for seed in trials:
        state = found[seed % libero.EPISODES] if own is None else own[seed].state
        digest.update(np.ascontiguousarray(state, np.float64).tobytes())
    return digest.hexdigest()[:16]

  def measure(self) -> report.Row:
    """The policy itself.

    Raises:
      BrokenEnvironment: all of the first episodes broke; they are a row of the results all the same.
    """
    mark = self._claim(self.fingerprint())
    self.watch = Watch(self.out, self.suite, self.args.films, self.replay) if self.args.films else None
    self.simulators.seen, runner = self.watch, self.runner(self.policy, "policy")
    name = "recorded actions" if isinstance(self.policy, Recorded) else "this policy"
    try:
      episodes = runner.run(self.seeds)
    except BrokenEnvironment:
      tried = Records(self.out / f"{self.suite}_policy.jsonl", repair=True).found
      if some := [tried[seed] for seed in self.seeds if seed in tried]:
        self.row(name, "policy", simulators.episodes(some), mark)
      raise
    finally:
      self.simulators.seen = None
    return self.row(name, "policy", episodes, mark)

  def controls(self, result: Episodes, names: Sequence[str]) -> None:
    """The policy with one thing taken away at a time, each a row as soon as it is measured."""
    main = self.runner(self.policy, "policy")
    before = Records(self.out / f"{self.suite}_shuffled.jsonl", repair=True).found
    said = {seed: record.told for seed, record in before.items() if record.error is None}
    for name, episodes, changes in controls.each(self.policy, main, result, self.runner, names, said=said):
      told = {"told": controls.NAMES[name]} if name == "shuffled" else {}
      self.row(controls.NAMES[name], "control", episodes, self.fingerprint(model_changes=changes, **told))

  def runner(self, policy: Any, label: str) -> _Runner:
    """Runs a policy in the simulators there are, its finished episodes in files of their own."""
    return _Runner(self, policy, label)

  def row(self, name: str, kind: str, episodes: Episodes, mark: Mapping) -> report.Row:
    """A result with its summary, recorded."""
    return self.results.add(report.Row(name, kind, self.suite, protocol.summary(episodes, str), dict(mark), episodes))

  def _claim(self, mark: Mapping) -> dict:
    """Notes the fingerprint, or checks that episodes found here were measured with the same; returns that of all."""
    path = self.out / f"{self.suite}_fingerprint.json"
    now = places.gone_on(self._noted(path) or json.loads(json.dumps(mark)), mark, self.out)
    files.write_json(path, now)
    return now

  def _noted(self, path: pathlib.Path) -> dict | None:
    """The fingerprint of the episodes found here; None where there is none, or they had to be set aside without."""
    there, noted = path.exists(), places.read_json(path, _fingerprint, None, "results.json may know it")
    found = [self.out / name for name in _episode_files(self.suite) if (self.out / name).exists()]
    if noted is not None or not found:
      return noted
    rows = places.read_json(self.out / "results.json", lambda value: value["results"], [], "built anew")
    marks = [row["fingerprint"] for row in rows if (row["suite"], row["kind"]) == (self.suite, "policy")]
    if marks:
      logging.warning("%s: taken from results.json", path)
      return marks[0]
    names = ", ".join(one.name for one in found)
    if not there:
      logging.warning("%s is missing: episodes in %s are taken for such as are measured now", path, names)
      return None
    moved = [places.set_aside(one).name for one in (*found, *self.out.glob(f"{self.suite}_films.json"))]
    logging.warning(
      "%s: how the episodes in %s were measured is not known; they are kept as %s and measured again (rename them back "
      "and remove %s where you know that nothing changed)", self.out, names, ", ".join(moved), path.name,
    )  # fmt: skip
    return None


def _fingerprint(value: Mapping) -> dict:
  if not {"suite", "replay", "policy"} & value.keys():
    raise KeyError("suite")
  return {**value}


def _episode_files(suite: str) -> list[str]:
  """Names of all files of episodes that an evaluation of a suite may write."""
  return [f"{suite}_{label}.jsonl" for label in ("policy", *controls.NAMES)]


class _Runner:
  """The simulators with one policy, as `controls.each` wants it."""

  def __init__(self, owner: Evaluation, policy: Any, label: str):
    self.owner, self.policy, self.label = owner, policy, label

  def run(self, seeds: Sequence[int] | np.ndarray, told: Sequence[str] | None = None) -> Episodes:
    owner, label = self.owner, self.label if told is None else "shuffled"
    records, running = Records(owner.out / f"{owner.suite}_{label}.jsonl", repair=True), owner.simulators
    running.policy = self.policy
    show = progress(f"{owner.suite} {label}", len(seeds), lambda: running.broken)
    return running.run(seeds, told, show, records)


def broken(out: pathlib.Path) -> dict[str, dict[int, str]]:
  """The tracebacks of all episodes that broke each time, by file of episodes and number."""
  paths = sorted(out / name for suite in libero.SUITES for name in _episode_files(suite) if (out / name).exists())
  found = {path.stem: Records(path, repair=True).found.values() for path in paths}
  errors = {name: {one.seed: one.error for one in records if one.error is not None} for name, records in found.items()}
  return {name: some for name, some in errors.items() if some}


def progress(name: str, total: int, broken: Callable[[], int] = lambda: 0) -> Callable[[int, int], None]:
  """Prints, after each episode, how many are done, succeeded and broke, and how long the rest will take.

  Args:
    name: of what is measured. total: its episodes.
    broken: how many broke so far, which are in no rate.
  """
  start, first = time.perf_counter(), []

  def show(done: int, successes: int) -> None:
    first.append(done - 1)  # those found are not counted in the rate
    rate = (done - first[0]) / (time.perf_counter() - start)
    left, broke = (total - done) / rate / 60, broken()
    share = protocol.percent(successes, done - broke, 0) + (f" of {done - broke}, {broke} broke" if broke else "")
    times = f"{60 * rate:.1f} episodes/min, {left:.0f} min left"
    print(f"{name}: {done}/{total}, {successes} succeeded ({share}), {times}", flush=True)

  return show


def seeds(args: argparse.Namespace, suite: str) -> list[int]:
  """The numbers of the episodes asked for: trials 0, 1, … of each task.

  Raises:
    ValueError: there is no such task or trial.
  """
  tasks = libero.task_numbers(args.tasks, suite)
  if not 1 <= args.trials <= libero.EPISODES:
    raise ValueError(
      f"LIBERO: got trials={args.trials}; expected 1 to {libero.EPISODES}, the first states of a task; change --trials."
    )
  return [libero.EPISODES * task + trial for task in tasks for trial in range(args.trials)]


def settings(args: argparse.Namespace, suite: str) -> libero.Settings:
  """The simulator's, from the flags."""
  found = libero.Settings(
    suite, args.assets, seeding=args.seeding, seed=PROTOCOLS[args.protocol].seed, max_steps=args.max_steps,
    rotation=args.rotation, quaternion=args.quaternion, renderer=args.renderer, egl_device=args.egl_device,
  )  # fmt: skip
  libero.check(found)
  return found


def load(args: argparse.Namespace, suite: str) -> Any:
  """The policy, compiled for up to `workers` observations; or recorded actions.

  Raises:
    ValueError: the policy is of another robot, or its statistics are of other suites.
  """
  if args.recorded:
    return _recorded(args.recorded, suite, tuple(seeds(args, suite)), args.replay or PROTOCOLS[args.protocol].replay)
  sizes = sorted({args.workers, *(2**i for i in range(args.workers.bit_length()))})
  dataset = args.dataset or _dataset([*checkpoint.read_policy_json(args.policy)[1]], suite)
  return Policy.load(args.policy, dataset=dataset, dtype=args.dtype, batch_sizes=sizes)


@functools.cache
def _recorded(folder: str, suite: str, seeds: tuple[int, ...], replay: int) -> Recorded:
  return Recorded(folder, suite, seeds, replay)


def check(args: argparse.Namespace) -> None:
  """Finds out what can be known before an episode, of all suites.

  Raises:
    ValueError: something does not exist, does not fit, or cannot be measured.
  """
  names = args.controls.split(",") if args.controls else []
  controls.check(names)
  if names and args.recorded:
    raise ValueError(f"Controls: got {names} with --recorded; expected a policy, for they change it; leave them out.")
  suites = places.suites(args.suite, libero.SUITES)
  _check_numbers(args)
  for suite in suites:  # what needs no simulator
    settings(args, suite)
    if args.policy:
      _check_policy(args, suite)
  for suite in suites:
    tasks, numbers = libero.tasks(suite), seeds(args, suite)
    if args.recorded:
      load(args, suite)
      continue
    if "shuffled" in names:
      controls.shuffle([tasks[seed // libero.EPISODES].instruction for seed in numbers])
    _check_states(suite, numbers)
  libero.find_assets(args.assets)
  if args.policy:
    _tell_left_out(args.policy, names)


def _check_numbers(args: argparse.Namespace) -> None:
  if args.workers < 1 or args.films < 0 or args.timeout <= 0 or (args.replay is not None and args.replay < 1):
    raise ValueError(
      f"Evaluation: got workers={args.workers}, films={args.films}, timeout={args.timeout:g}, replay={args.replay}; "
      "expected at least 1, at least 0, more than 0, at least 1; change what is less."
    )


def _check_policy(args: argparse.Namespace, suite: str) -> None:
  """Raises ValueError unless a policy has statistics of a suite and is of LIBERO's robot; reads no parameters."""
  config, entries, _ = checkpoint.read_policy_json(args.policy)
  dataset = args.dataset or _dataset([*entries], suite)
  stats = statistics.select({name: statistics.from_openvla(one, name) for name, one in entries.items()}, dataset)
  model = build(config["model"])
  views, width, actions = model.num_views, model.proprio_dim, len(stats.action.mask)
  if views > 2 or width not in (None, 8) or actions != 7:
    raise ValueError(
      f"Policy is of another robot: got {views} views, proprioception of width {width}, {actions} action dimensions; "
      "expected 1 or 2, 8, 7; evaluate a policy trained on LIBERO."
    )
  chunk = model.chunk if model.coupler is not None else 1
  if args.replay is not None and args.replay > chunk:
    raise ValueError(f"Evaluation: got replay={args.replay}; expected 1 to {chunk}, the policy's chunk; lower it.")


def _check_states(suite: str, numbers: Sequence[int]) -> None:
  """Raises ValueError unless the benchmark's first states of all episodes are there."""
  for task in sorted({seed // libero.EPISODES for seed in numbers}):
    found, last = libero.first_states(libero.tasks(suite)[task]), max(
      seed % libero.EPISODES for seed in numbers if seed // libero.EPISODES == task
    )  # fmt: skip
    if last >= len(found):
      raise ValueError(
        f"LIBERO: got trial {last} of task {task} of {suite}; expected 0 to {len(found) - 1}, its first states; lower "
        "--trials."
      )


def check_found(args: argparse.Namespace, out: pathlib.Path) -> None:
  """Raises ValueError where episodes of one of the suites were measured otherwise, as far as flags and files tell.

  The whole fingerprint, with what draws, is compared when a suite's simulator is there.
  """
  for suite in places.suites(args.suite, libero.SUITES):
    try:
      before = json.loads((out / f"{suite}_fingerprint.json").read_text(encoding="utf-8"))
      hashed = before["policy"]["policy_hash"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that is reported when it is needed
      continue
    simulator = settings(args, suite)
    now = {
      "max_steps": simulator.max_steps or libero.MAX_STEPS[suite], "protocol": args.protocol,
      "quaternion": simulator.quaternion, "wait_steps": simulator.wait_steps,
      "policy_hash": checkpoint.policy_hash(args.policy) if args.policy else hashed,
    }  # fmt: skip
    noted = {name: before.get(name) for name in now} | {"policy_hash": hashed}
    places.gone_on(noted, now, out / f"{suite}_fingerprint.json")


def _tell_left_out(folder: str, names: Sequence[str]) -> None:
  model = build(config := checkpoint.read_policy_json(folder)[0]["model"])
  applying = controls.applying(config, model.prunes_by_instruction, names)
  if left := [name for name in names if name not in applying]:
    logging.warning("Controls left out, for they change nothing in this policy: %s", ", ".join(left))


def _dataset(names: Sequence[str], suite: str) -> str:
  """Whose statistics, of those that a policy has. Raises ValueError where none is in the suite's units."""
  fits = protocol.fitting(names, suite)
  if not fits:
    raise ValueError(
      f"Policy has no statistics of {suite}: got those of {[*names]}; expected {suite!r} or '{suite}_no_noops', for "
      "actions of another suite are in other units; evaluate the suite that it was trained on, or choose with "
      "--dataset."
    )
  return fits[0]


def run(args: argparse.Namespace, results: places.Results) -> dict[str, list]:
  """Measures, each row on disk when it is there; films and pictures, as many as could be made.

  Raises:
    BrokenEnvironment: the simulator does not work.
  """
  films, scenes, timed = [], [], results.seconds.timed
  for suite in places.suites(args.suite, libero.SUITES):
    policy = timed("load", lambda: load(args, suite))  # noqa: B023
    evaluation = Evaluation(args, policy, suite, results)
    try:
      main = timed("evaluate", evaluation.measure)
      if args.controls and main.episodes.valid:
        timed("controls", lambda: evaluation.controls(main.episodes, args.controls.split(",")))  # noqa: B023
    finally:
      evaluation.simulators.close()
    results.write()  # with the seconds of the last stage
    if evaluation.watch is not None:
      films += evaluation.watch.shown()
      if isinstance(policy, Policy):
        sentences = [task.instruction for task in libero.tasks(suite)]
        look = lambda: evaluation.watch.looked(policy, sentences)  # noqa: B023, E731
        scenes += timed("pictures", lambda: places.afterwards("pictures", look, []))  # noqa: B023
  return {"films": films, "scenes": scenes}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
  """The flags, read and checked for what does not need the benchmark."""
  parser = argparse.ArgumentParser(
    prog="python -m semanticvla_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--policy", help="policy folder")
  parser.add_argument("--recorded", metavar="DIR", help="instead: LIBERO's HDF5 demonstrations, whose actions are sent")
  parser.add_argument("--suite", required=True, help=f"one or more of {','.join(libero.SUITES)}")
  parser.add_argument("--tasks", help="their numbers, e.g. 0,3 (default: all)")
  parser.add_argument("--trials", type=int, default=50, help="episodes of each task (default: 50, the benchmark's)")
  parser.add_argument("--workers", type=int, default=2, help="simulators at once, about 2 GB each (default: 2)")
  parser.add_argument("--protocol", choices=(*PROTOCOLS,), default="openvla", help="seed, replay, JPEG round trip")
  parser.add_argument("--seeding", choices=libero.SEEDING, default="episode", help="before every reset, or as usual")
  parser.add_argument("--replay", type=int, help="actions executed before asking again (default: the protocol's)")
  parser.add_argument("--max_steps", "--max-steps", type=int, help="of an episode (default: the suite's)")
  parser.add_argument("--assets", help=f"folder (default: ${libero.ASSETS_VARIABLE}, site-packages, ~/.cache/libero)")
  parser.add_argument("--rotation", type=int, default=180, help="of frames, as in the training data (default: 180)")
  parser.add_argument("--quaternion", choices=libero.QUATERNIONS, default="robosuite", help="as in the training data")
  parser.add_argument("--renderer", default="egl", help="egl or osmesa (default: egl)")
  parser.add_argument("--egl-device", "--egl_device", type=int, help="that draws (default: the first that works)")
  parser.add_argument("--timeout", type=float, default=900.0, help="seconds without an answer that count as a crash")
  parser.add_argument(
    "--out", help="folder for the report; one measured alike is gone on with (default: runs/<policy>_<suite>)"
  )
  parser.add_argument(
    "--controls", nargs="?", const="shuffled", default="",
    help=f"measure controls too: the shuffled instruction, or some of {','.join(controls.NAMES)}",
  )
  parser.add_argument("--films", type=int, default=6, help="films of each suite (default: 6; 0: no pictures either)")
  parser.add_argument("--metrics", help="metrics.jsonl of the training, for its curves")
  parser.add_argument("--dataset", help="whose statistics to use, where the policy knows several")
  parser.add_argument("--dtype", help="of parameters and computation, e.g. bfloat16 (default: as trained)")
  parser.add_argument("--title", default="What the robot was told, and what it did", help="of the report")
  args = parser.parse_args(argv)
  if (args.policy is None) == (args.recorded is None):
    parser.error("one of --policy and --recorded is needed")
  args.out = args.out or report.folder(args.policy or "recorded", args.suite)
  return args


def evaluate(args: argparse.Namespace, out: pathlib.Path, command: str) -> list[str]:
  """Measures, then shows; returns what to say of rows without a rate."""
  lines = places.metrics(args.metrics)
  if args.films:
    places.warn_without_ffmpeg()
  results = places.Results(out, command, "built anew from the episodes", lambda: {"broken": broken(out)})
  check_found(args, out)
  shown, problem = {}, []
  try:
    shown = run(args, results)
  except BrokenEnvironment as error:
    problem = [str(error)]
  page = dict(title=args.title, metrics=lines, film_note="a frame for each time the policy looked, at about real speed")
  if results.all:
    places.write_page(out, results, finished=not problem, **page, **shown)
  return results.no_rates() + problem


def main(argv: Sequence[str]) -> None:
  """Measures, writes results.json and report.html, and says where; problems end the program with their message."""
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  args = arguments(argv)
  out = pathlib.Path(args.out)
  try:
    check(args)
    with places.alone(out):
      missing = evaluate(args, out, "python -m semanticvla_jax.evaluate " + shlex.join(argv))
  except ValueError as error:
    sys.exit(str(error))
  except KeyboardInterrupt:
    sys.exit(f"Interrupted; the same command goes on at the next episode. Finished ones are in {out}.")
  if missing:
    sys.exit("\n".join(missing))
