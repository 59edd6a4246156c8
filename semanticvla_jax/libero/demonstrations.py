"""LIBERO's recorded demonstrations, replayed in the simulator, as an RLDS dataset with images.

By the rules of the release's `regenerate_libero_dataset.py`: reset, the demonstration's first state, ten steps of
waiting (without them the controller starts from a stale goal), then its actions without no-ops; what is seen before
each action is recorded, and a demonstration whose last step does not fulfil the task is dropped and counted. Where a
file says what its reset was seeded with (LIBERO's own do not), fixtures are placed as they were.
"""

from __future__ import annotations

import collections
import logging
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from semanticvla_jax import files
from semanticvla_jax.data import writer
from semanticvla_jax.envs.subprocess_env import BrokenEnvironment, Process, StepResult
from semanticvla_jax.libero import episode_files, hdf5, simulator, suites

_TRIES = 3


class ReplayOptions(NamedTuple):
  """What is replayed, and how.

  Attributes:
    folder: of `<task>_demo.hdf5` files, or the one above it.
    suite: of LIBERO.
    settings: of the simulator.
    tasks: their numbers; None for all.
    episodes: demonstrations of each task, the first ones; None for all.
    workers: simulators at once.
  """

  folder: str
  suite: str
  settings: suites.Settings
  tasks: tuple[int, ...] | None = None
  episodes: int | None = None
  workers: int = 2


class ReplaySummary(NamedTuple):
  """What came of it: demonstrations tried, kept, names of those dropped by task, frames, the folder (None: none)."""

  tried: int
  kept: int
  dropped: dict[str, list[str]]
  frames: int
  folder: pathlib.Path | None


def write(
  options: ReplayOptions, out: str | pathlib.Path, name: str, progress: Callable[[int, int, int], None] | None = None
) -> ReplaySummary:
  """Writes `<out>/<name>/1.0.0`, its statistics and demonstrations.json; resumes where an earlier call was interrupted.

  Args:
    options: see there.
    out: folder of datasets; replays that are done wait in `<out>/.<name>.parts`.
    name: of the dataset; `libero_object_no_noops` is what configs expect.
    progress: called with (done, kept, of how many).

  Raises:
    ValueError: the dataset exists, or files, packages or assets are missing.
    BrokenEnvironment: the same replay broke every time.
  """
  folder, parts = episode_files.check_new(out, name), pathlib.Path(out) / f".{name}.parts"
  demonstrations = collect(options)
  facts = _facts(options, demonstrations)
  with files.alone(parts):
    episode_files.claim(parts, facts)
    _Replays(options, demonstrations, parts, progress).run()
    return _assemble(options, demonstrations, parts, folder, name, facts)


def check(options: ReplayOptions, progress: Callable[[int, int, int], None] | None = None) -> ReplaySummary:
  """Replays without drawing and writes nothing: which demonstrations would be kept, in a fraction of the time.

  Raises:
    ValueError, BrokenEnvironment: see `write`.
  """
  demonstrations = collect(options)
  replays = _Replays(options, demonstrations, None, progress)
  replays.run()
  dropped = collections.defaultdict(list)
  for seed in (seed for seed in demonstrations if not replays.ended[seed]):
    dropped[suites.tasks(options.suite)[seed // suites.EPISODES].name].append(demonstrations[seed].name)
  frames = sum(len(one.moving) for seed, one in demonstrations.items() if replays.ended[seed])
  return ReplaySummary(len(demonstrations), sum(replays.ended.values()), dict(dropped), frames, None)


def collect(options: ReplayOptions) -> dict[int, hdf5.Demonstration]:
  """The demonstrations by episode number: the i-th of task k is number 50 k + i, as first states are."""
  folder, every = hdf5.folder(options.folder, options.suite), suites.tasks(options.suite)
  chosen = range(len(every)) if options.tasks is None else options.tasks
  found = {}
  for task in chosen:
    rows = hdf5.read(folder / f"{every[task].name}_demo.hdf5")[: options.episodes]
    found |= {suites.EPISODES * task + i: row for i, row in enumerate(rows[: suites.EPISODES])}
  return found


def _facts(options: ReplayOptions, demonstrations: dict[int, hdf5.Demonstration]) -> dict:
  """What the frames depend on, as JSON values: the simulator, and a hash of each file of demonstrations."""
  assets = suites.assets_hash(str(suites.find_assets(options.settings.assets)))
  settings = options.settings._asdict() | {"assets": assets}
  settings.pop("egl_device")  # another of the same kind draws the same
  paths = sorted({one.path for one in demonstrations.values()})
  hashes = {path.name: hdf5.digest(path) for path in paths}
  seeds = "as recorded" if any(one.seed is not None for one in demonstrations.values()) else "settings"
  versions = suites.versions()
  return {"suite": options.suite, "simulator": settings, "resets": seeds, "versions": versions, "files": hashes}


class _Replays:
  """Simulators, a thread each, that take the next demonstration until none is left.

  With a folder `parts` each replay is stored there, those in it count as done, and every frame is drawn. `ended` says
  which succeeded.
  """

  def __init__(
    self, options: ReplayOptions, demonstrations: dict[int, hdf5.Demonstration], parts: pathlib.Path | None, progress
  ):
    self.options, self.demonstrations, self.parts, self.progress = options, demonstrations, parts, progress
    paths = {} if parts is None else {seed: episode_files.path(parts, seed) for seed in demonstrations}
    sound = {seed: path for seed, path in paths.items() if episode_files.is_sound(path)}
    self.ended = {seed: episode_files.read(path) is not None for seed, path in sound.items()}
    self.waiting = collections.deque(seed for seed in demonstrations if seed not in self.ended)
    self.lock, self.error = threading.Lock(), None

  def run(self) -> None:
    count = min(self.options.workers, len(self.waiting))
    threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    if self.error is not None:
      raise self.error

  def _work(self) -> None:
    process = None
    try:
      beginnings = {seed: suites.Beginning(one.first, one.seed) for seed, one in self.demonstrations.items()}
      process = simulator.start(self.options.settings, beginnings)
      task = None
      while (seed := self._next(task)) is not None and self.error is None:
        task = seed // suites.EPISODES
        seen, end = self._replay(process, seed)
        if self.parts is not None:
          _store(episode_files.path(self.parts, seed), self.demonstrations[seed], seen, end)
        self._tell(seed, end.success)
    except Exception as error:  # raised where the threads are joined
      self.error = self.error or error
    finally:
      if process is not None:
        process.close()

  def _next(self, task: int | None) -> int | None:
    """The next of the same task, else of the task with most to do, so that simulators rarely change tasks."""
    with self.lock:
      if not self.waiting:
        return None
      counts = collections.Counter(seed // suites.EPISODES for seed in self.waiting)
      task = task if counts[task] else counts.most_common(1)[0][0]
      seed = next(seed for seed in self.waiting if seed // suites.EPISODES == task)
      self.waiting.remove(seed)
      return seed

  def _replay(self, process: Process, seed: int) -> tuple[list[dict], StepResult]:
    """What was seen in one replay, everything if it is to be stored, and how it ended."""
    for left in reversed(range(_TRIES)):
      try:
        process.begin(seed)
        first = process.receive().observations
        process.act(self.demonstrations[seed].moving, every=self.parts is not None, on=True)
        moment = process.receive()
        return first + moment.observations, moment
      except BrokenEnvironment as error:
        logging.warning("Replay %d broke, %d tries left:\n%s", seed, left, error)
        if not left:
          raise
        process.restart()
    raise AssertionError("unreachable")

  def _tell(self, seed: int, success: bool) -> None:
    with self.lock:
      self.ended[seed] = success
      if self.progress is not None:
        self.progress(len(self.ended), sum(self.ended.values()), len(self.demonstrations))


def _store(path: pathlib.Path, demonstration: hdf5.Demonstration, seen: list[dict], end: StepResult) -> None:
  """One replay on disk; an empty one where it did not end in success."""
  episode_files.store(path, seen[: end.steps] if end.success else [], demonstration.moving)


def _assemble(
  options: ReplayOptions,
  demonstrations: dict[int, hdf5.Demonstration],
  parts: pathlib.Path,
  folder: pathlib.Path,
  name: str,
  facts: dict,
) -> ReplaySummary:
  """Writes the dataset from the finished replays, in the order of tasks and demonstrations, and removes them."""
  every = suites.tasks(options.suite)
  kept, dropped = [], collections.defaultdict(list)

  def episodes() -> Iterator[writer.Episode]:
    for seed, demonstration in demonstrations.items():
      task, part = every[seed // suites.EPISODES], episode_files.read(episode_files.path(parts, seed))
      if part is None:
        dropped[task.name].append(demonstration.name)
        continue
      kept.append((part["action"], part["state"]))
      source = f"{options.suite}/{demonstration.path.name}/{demonstration.name}"
      yield episode_files.episode(part, task.instruction, source)

  def summary() -> ReplaySummary:
    return ReplaySummary(len(demonstrations), len(kept), dict(dropped), sum(len(action) for action, _ in kept), folder)

  def finish(partial: pathlib.Path) -> None:
    writer.write_statistics(partial, name, kept)
    counts = {key: getattr(summary(), key) for key in ("tried", "kept", "dropped", "frames")}
    files.write_json(partial / "demonstrations.json", facts | counts)

  writer.write(folder.parent.parent, name, episodes(), finish=finish)
  shutil.rmtree(parts)
  return summary()
