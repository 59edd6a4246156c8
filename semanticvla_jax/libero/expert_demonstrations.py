"""Demonstrations of LIBERO's scripted expert, as an RLDS dataset: random layouts, successes only, resumable.

Attempts of a task are numbered from 0; each is a layout, a start and a noise drawn from (seed, task, attempt), never
one of the benchmark's first states. A task gets attempts until enough of them succeeded, or until so many failed that
it is below the bar; such a task is named and left out.
"""

from __future__ import annotations

import collections
import functools
import logging
import math
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from semanticvla_jax import files
from semanticvla_jax.data import writer
from semanticvla_jax.envs.subprocess_env import BrokenEnvironment, Process
from semanticvla_jax.errors import refuse
from semanticvla_jax.libero import demonstrator, episode_files, expert, expert_extension, simulator, suites

_TRIES = 3  # of an attempt whose simulator breaks
_ATTEMPTS = 1000  # numbers of a task; attempt k of task i is part 1000 i + k


class Options(NamedTuple):
  """What is demonstrated, and how.

  Attributes:
    settings: of the simulator; `seed` is that of the layouts.
    tasks: their numbers.
    variety: what differs between episodes.
    episodes: successful ones of each task.
    bar: a task whose share of successful attempts is below it is left out.
    workers: simulators at once.
  """

  settings: suites.Settings
  tasks: tuple[int, ...]
  variety: demonstrator.Variety = demonstrator.Variety()
  episodes: int = 30
  bar: float = 0.8
  workers: int = 2


class Summary(NamedTuple):
  """What came of it: (successful, all) attempts by task name, the names left out, frames, the folder (None: none)."""

  counts: dict[str, tuple[int, int]]
  left_out: list[str]
  frames: int
  folder: pathlib.Path | None


def write(
  options: Options, out: str | pathlib.Path, name: str, progress: Callable[[int, int, int], None] | None = None
) -> Summary:
  """Writes `<out>/<name>/1.0.0`, its statistics and demonstrations.json; resumes where an earlier call was interrupted.

  A dataset that exists is replaced by one with more episodes or tasks, of which those that it has are a part. It stays
  as it is until all episodes of the new one are recorded, and also where one of its tasks falls below the bar.

  Args:
    options: see there.
    out: folder of datasets; episodes that are done wait in `<out>/.<name>.expert`.
    name: of the dataset; `libero_object_no_noops` is what configs expect.
    progress: called with (attempts done, successes, successes wanted).

  Raises:
    ValueError: an option is wrong, the dataset exists and has all that is asked for or was made differently, packages
      or assets are missing, the expert cannot do one of the tasks, or none of them reaches the bar.
    BrokenEnvironment: the same attempt broke every time.
  """
  folder, waiting = episode_files.version(out, name), pathlib.Path(out) / f".{name}.expert"
  _check(options)
  facts, every = _facts(options), suites.tasks(options.settings.suite)
  if folder.exists():
    expert_extension.check(folder, facts, {every[task].name for task in options.tasks}, options.episodes)
  with files.alone(waiting):
    episode_files.claim(waiting, facts)
    if folder.exists():
      numbers = {(every[task].name, k): _ATTEMPTS * task + k for task in options.tasks for k in range(_ATTEMPTS)}
      expert_extension.take_apart(folder, numbers, waiting)
    collection = _Collection(options, waiting, progress)
    collection.run()
    return _assemble(options, collection.outcomes, waiting, folder, name, facts)


def check(options: Options, progress: Callable[[int, int, int], None] | None = None) -> Summary:
  """Makes the same attempts without rendering and writes nothing: each task's success in a fraction of the time.

  Raises:
    ValueError, BrokenEnvironment: see `write`.
  """
  _check(options)
  collection = _Collection(options, None, progress)
  collection.run()
  counts, taken = _sums(options, collection.outcomes)
  names = [task.name for task in suites.tasks(options.settings.suite)]
  return Summary(counts, [names[task] for task in options.tasks if task not in taken], 0, None)


def able(suite: str) -> list[int]:
  """Numbers of the tasks whose goals the expert can pursue."""
  goals = [expert.goals(task.bddl.read_text(encoding="utf-8")) for task in suites.tasks(suite)]
  return [number for number, found in enumerate(goals) if found is not None]


def _check(options: Options) -> None:
  """Raises ValueError for options that nothing can come of."""
  suite, variety = options.settings.suite, options.variety
  most = math.floor(_ATTEMPTS * min(options.bar, 1))
  if not (0 < options.bar <= 1 and 1 <= options.episodes <= most and options.workers >= 1):
    raise refuse(
      "Expert",
      f"episodes={options.episodes}, bar={options.bar:g}, workers={options.workers}",
      f"a bar in (0, 1], 1 to {max(most, 1)} episodes, at least 1 worker",
      "correct what is outside",
    )
  limits = {"start": 0.1, "distractors": 0.2, "noise": 1.0}
  for field, most in limits.items():
    if not 0 <= getattr(variety, field) <= most:
      raise refuse("Expert", f"{field}={getattr(variety, field)}", f"0 to {most:g}", f"correct --{field}")
  unable = sorted({*options.tasks} - {*able(suite)})
  if unable:
    names = ", ".join(f"{number} ({suites.tasks(suite)[number].instruction})" for number in unable)
    raise refuse(
      "The expert cannot do some tasks",
      f"{names} of {suite}",
      "goals to put, open, turn on: a movable object in or on something, a drawer, a knob",
      f"choose among --tasks={','.join(map(str, able(suite)))}",
    )


def _facts(options: Options) -> dict:
  """What the recorded frames depend on, as JSON values."""
  settings = options.settings._asdict()
  settings["assets"] = suites.assets_hash(str(suites.find_assets(options.settings.assets)))
  settings.pop("egl_device")  # another of the same kind draws the same
  return {
    "suite": options.settings.suite,
    "source": "expert",
    "expert": expert.REVISION,
    "simulator": settings,
    "variety": options.variety._asdict(),
    "versions": suites.versions(),
  }


class _Collection:
  """Simulators, a thread each, that take the next attempt until each task has enough.

  With a `folder` each episode is stored there, those in it count as done, and every frame is rendered. `outcomes` says
  by task and attempt which succeeded, None while it runs. Attempts are given out in order and one more for each that
  failed, so that those of a finished task are the same however many simulators ran.
  """

  def __init__(self, options: Options, folder: pathlib.Path | None, progress: Callable[[int, int, int], None] | None):
    self.options, self.folder, self.progress = options, folder, progress
    self.outcomes: dict[int, dict[int, bool | None]] = {task: {} for task in options.tasks}
    self.running: collections.Counter[int] = collections.Counter()
    self.lock, self.error = threading.Lock(), None
    for path in [] if folder is None else sorted(folder.glob("*.npz")):
      task, attempt = divmod(int(path.stem), _ATTEMPTS)
      if task in self.outcomes and episode_files.is_sound(path):
        self.outcomes[task][attempt] = episode_files.read(path) is not None

  def run(self) -> None:
    threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.options.workers)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    if self.error is not None:
      raise self.error

  def _work(self) -> None:
    process, task = None, None
    try:
      while self.error is None and (job := self._next(task)) is not None:
        process = process or self._start()
        task, attempt = job
        recording = self._attempt(process, task, attempt)
        if self.folder is not None:
          rows = recording.observations if recording.success else []
          episode_files.store(episode_files.path(self.folder, _ATTEMPTS * task + attempt), rows, recording.actions)
        self._finish(task, attempt, recording.success)
    except Exception as error:  # raised where the threads are joined
      self.error = self.error or error
    finally:
      if process is not None:
        process.close()

  def _start(self) -> Process:
    make = functools.partial(demonstrator.Demonstrator, variety=self.options.variety)
    return simulator.start(self.options.settings, make=make)

  def _next(self, task: int | None) -> tuple[int, int] | None:
    """The next attempt: of the same task if it needs one, else of the one with the fewest; None if all have enough."""
    with self.lock:
      short = [number for number in self.outcomes if self._is_short(number)]
      if not short:
        return None
      if task not in short:
        task = min(short, key=lambda number: (self.running[number], len(self.outcomes[number])))
      outcomes = self.outcomes[task]
      attempt = next(k for k in range(_ATTEMPTS) if k not in outcomes)
      outcomes[attempt] = None
      self.running[task] += 1
      return task, attempt

  def _is_short(self, task: int) -> bool:
    """Whether a task needs another attempt: enough may not succeed, and it can still reach the bar."""
    outcomes = [*self.outcomes[task].values()]
    promising = len(outcomes) - outcomes.count(False)
    return promising < self.options.episodes and not _is_below(self.options, outcomes.count(False))

  def _attempt(self, process: Process, task: int, attempt: int) -> demonstrator.Recording:
    for left in reversed(range(_TRIES)):
      try:
        return process.ask("demonstrate", task, attempt, self.folder is not None)
      except BrokenEnvironment as error:
        logging.warning("Attempt %d of task %d broke, %d tries left:\n%s", attempt, task, left, error)
        if not left:
          raise
        process.restart()
    raise AssertionError("unreachable")

  def _finish(self, task: int, attempt: int, success: bool) -> None:
    with self.lock:
      self.outcomes[task][attempt] = success
      self.running[task] -= 1
      if self.progress is not None:
        ended = [[end for end in outcomes.values() if end is not None] for outcomes in self.outcomes.values()]
        wanted = self.options.episodes  # an earlier call may have made more
        succeeded = sum(min(sum(ends), wanted) for ends in ended)
        self.progress(sum(map(len, ended)), succeeded, wanted * len(ended))


def _is_below(options: Options, failures: int) -> bool:
  """Whether a task with so many failures ends below the bar even if all other attempts succeed."""
  return options.episodes / (options.episodes + failures) < options.bar


def _assemble(
  options: Options,
  outcomes: dict[int, dict[int, bool]],
  waiting: pathlib.Path,
  folder: pathlib.Path,
  name: str,
  facts: dict,
) -> Summary:
  """Writes the dataset from the stored episodes, in the order of tasks and attempts, and removes them."""
  suite, every = options.settings.suite, suites.tasks(options.settings.suite)
  counts, taken = _sums(options, outcomes)
  left_out = [every[task].name for task in options.tasks if task not in taken]
  if not taken:
    raise refuse(
      "No task reaches the bar",
      ", ".join(f"{name} {good} of {tried}" for name, (good, tried) in counts.items()),
      f"{options.bar:.0%} of attempts",
      "lower --bar, or choose other tasks",
    )
  kept = []

  def episodes() -> Iterator[writer.Episode]:
    for task, attempts in taken.items():
      for attempt in attempts:
        part = episode_files.read(episode_files.path(waiting, _ATTEMPTS * task + attempt))
        kept.append((part["action"], part["state"]))
        yield episode_files.episode(part, every[task].instruction, f"{suite}/{every[task].name}/attempt_{attempt}")

  def finish(partial: pathlib.Path) -> None:
    writer.write_statistics(partial, name, kept)
    seeds = {every[task].name: attempts for task, attempts in taken.items()}
    table = {
      name: {"success": good, "attempts": tried, "kept_attempts": seeds.get(name, [])}
      for name, (good, tried) in counts.items()
    }
    found = {"bar": options.bar, "left_out": left_out, "frames": sum(len(action) for action, _ in kept), "tasks": table}
    files.write_json(partial / "demonstrations.json", facts | found)

  if folder.exists():
    expert_extension.check_kept(folder, {every[task].name for task in taken})
    folder.rename(waiting / "before")  # all its episodes wait there, too
  writer.write(folder.parent.parent, name, episodes(), finish=finish)
  shutil.rmtree(waiting)
  return Summary(counts, left_out, sum(len(action) for action, _ in kept), folder)


def _sums(
  options: Options, outcomes: dict[int, dict[int, bool]]
) -> tuple[dict[str, tuple[int, int]], dict[int, list[int]]]:
  """(Successful, all) attempts by task name, and of each task that reaches the bar the successful attempts."""
  counts, taken = {}, {}
  for task in options.tasks:
    used = _used(outcomes[task], options.episodes)
    good = [attempt for attempt in used if outcomes[task][attempt]]
    counts[suites.tasks(options.settings.suite)[task].name] = (len(good), len(used))
    if len(good) == options.episodes:
      taken[task] = good
  return counts, taken


def _used(outcomes: dict[int, bool], episodes: int) -> list[int]:
  """The attempts of a task in order, up to the one with which it has enough; an earlier call may have made more."""
  used = []
  for attempt in sorted(outcomes):
    if sum(outcomes[one] for one in used) == episodes:
      break
    used.append(attempt)
  return used
