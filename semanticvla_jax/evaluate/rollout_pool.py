"""Runs a policy in several simulators at once, each in a separate process; one policy answers all in batches.

A simulator executes a chunk while the policy answers another simulator, and renders only what the policy will see. If a
simulator breaks, its episode is repeated; an episode that breaks every time is an error with a traceback and not
counted. An action that is not finite is a failure of the policy and counted. Every episode is saved when it ends, so an
interrupted evaluation resumes at the next one.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np

from semanticvla_jax import files
from semanticvla_jax.data import images
from semanticvla_jax.envs.subprocess_env import BrokenEnvironment, Process, StepResult
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate.rollout import Episodes, check_state

_PICTURES = ("observation/image", "observation/wrist_image")


def stored_as_jpeg(quality: int | None, dct: str = "accurate") -> Callable[[dict], dict]:
  """A function that passes the frames of an observation through a JPEG, as stored training frames did.

  Args:
    quality: of the JPEG; None leaves frames as they were rendered.
    dct: how it is decoded, see `images.decode`.
  """

  def prepare(observation: dict) -> dict:
    if quality is None:
      return observation
    return observation | {name: images.jpeg_round_trip(observation[name], quality, dct) for name in _PICTURES}

  return prepare


class EpisodeResult(NamedTuple):
  """One finished episode.

  Attributes:
    seed: its number.
    success: whether the task was done at any step.
    steps: actions taken.
    error: the traceback of an episode that broke each time it was tried; None for all others.
    instruction, told: what success refers to, and the instruction that the policy got.
    retries: how often it broke and was started again.
    seconds: from its (last) beginning to its end.
    nonfinite: whether it failed by an action that is not finite.
  """

  seed: int
  success: bool
  steps: int
  error: str | None
  instruction: str
  told: str
  retries: int
  seconds: float
  nonfinite: bool = False


class EpisodeLog:
  """Finished episodes as lines of JSON, each on disk before the next starts.

  Args:
    path: of the file; its folder exists. Lines that are there already are read, the last of each episode counts; a
      last one that was cut off is dropped with a warning, and its episode run again.
    repair: damaged lines are moved into `<name>.damaged`, which is logged, and their episodes run again.

  Raises:
    ValueError: another line than the last is damaged, without `repair`.
  """

  def __init__(self, path: str | os.PathLike, repair: bool = False):
    self.path, self.found = pathlib.Path(path), {}
    *lines, last = (self.path.read_bytes() if self.path.exists() else b"").split(b"\n")
    good, bad = [], []
    for line in lines:
      try:
        result = self._read(line)
      except ValueError:
        if not repair:
          raise
        bad.append(line)
      else:
        good.append(line)
        self.found[result.seed] = result
    if bad or last:
      self._put_right(good, bad, last)

  def add(self, result: EpisodeResult) -> None:
    """Appends one episode."""
    with self.path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(result._asdict()) + "\n")
      file.flush()
      os.fsync(file.fileno())
    self.found[result.seed] = result

  def _put_right(self, good: Sequence[bytes], bad: Sequence[bytes], last: bytes) -> None:
    """Keeps the good lines in the file, moves the damaged ones out of it, and logs that."""
    if bad:
      aside = self.path.with_name(f"{self.path.name}.damaged")
      before = aside.read_bytes() if aside.exists() else b""
      files.write(aside, before + b"".join(line + b"\n" for line in bad))
      logging.warning(
        "%s: %d damaged lines, the first %r, are now in %s; their episodes run again",
        self.path,
        len(bad),
        bad[0][:80].decode(errors="replace"),
        aside.name,
      )
    if last:
      logging.warning("%s: its last line was cut off; that episode runs again", self.path)
    files.write(self.path, b"".join(line + b"\n" for line in good))

  def _read(self, line: bytes) -> EpisodeResult:
    try:
      result = EpisodeResult(**json.loads(line))
      numbers = [int(value) for value in (result.seed, result.steps, result.retries)]
      if [result.seed, result.steps, result.retries] != numbers or not isinstance(result.success, bool):
        raise TypeError
      if not (isinstance(result.instruction, str) and isinstance(result.told, str)) or float(result.seconds) < 0:
        raise TypeError
    except (ValueError, TypeError) as error:
      raise refuse(
        f"{self.path}",
        f"the line {line[:80].decode(errors='replace')!r}",
        "an episode",
        "remove the line, and it is run again",
      ) from error
    return result


class _Running:
  """One simulator and the episode it is in; idle while `seed` is None."""

  def __init__(self, process: Process):
    self.process = process
    self.group: Any = None
    self.idle()

  def idle(self) -> None:
    self.seed: int | None = None
    self.moment: StepResult | None = None
    self.seen: list[dict] = []
    self.spoilt = False  # whether what follows the actions sent is not finite

  def begin(self, seed: int, group: Any) -> None:
    self.seed, self.group, self.moment, self.seen = seed, group, None, []
    self.began = self.heard = time.monotonic()
    self.process.begin(seed)


class OnSimulators:
  """Episodes in several simulators at once.

  Args:
    policy: anything with infer_batch and replan_steps. An observation also holds "episode", its number, and "step". One
      that `remembers` earlier queries (see BasePolicy) does so by episode.
      Fewer actions than `replan_steps` are executed as they are; none at all ends the episode.
    make: starts one simulator, which knows `max_steps` itself.
    workers: how many of them. They start at the first `run` and stay until `close`.
    replan_steps: actions executed per policy query; None for the policy's own.
    task: (group, instruction) of an episode number. A simulator stays in a group while it can, because changing it
      takes time; the instruction is recorded for an episode that broke before it was known.
    prepare: applied to every observation before the policy gets it, e.g. `stored_as_jpeg`.
    retries: how often an episode that breaks is started again.

  Attributes:
    seen: called when an episode that did not break has ended and was recorded, with its result and the observations
      that the policy had, and the last one; None for nothing.
    broken: number of episodes with an error, of those that the latest `run` has finished.
  """

  def __init__(
    self,
    policy: Any,
    make: Callable[[], Process],
    *,
    workers: int = 1,
    replan_steps: int | None = None,
    task: Callable[[int], tuple[Any, str]] = lambda seed: (0, ""),
    prepare: Callable[[dict], dict] = dict,
    retries: int = 2,
  ):
    if workers < 1 or retries < 0:
      raise refuse("Simulators", f"workers={workers}, retries={retries}", "at least 1 and 0", "change them")
    self.policy, self.workers, self.retries = policy, workers, retries
    self.seen: Callable[[EpisodeResult, list[dict]], None] | None = None
    self.replan_steps, self.broken = policy.replan_steps if replan_steps is None else replan_steps, 0
    if self.replan_steps < 1:
      raise refuse("Simulators", f"replan_steps={self.replan_steps}", "at least 1 action", "raise it")
    self._make, self._task, self._prepare = make, task, prepare
    self._pool: list[_Running] = []

  def first(self) -> Process:
    """One of the simulators, started if it has to be."""
    self._start(1)
    return self._pool[0].process

  def close(self) -> None:
    """Ends all simulators."""
    for running in self._pool:
      running.process.close()
    self._pool = []

  def run(
    self,
    seeds: Sequence[int] | np.ndarray,
    told: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    records: EpisodeLog | None = None,
  ) -> Episodes:
    """Runs the episodes that `records` does not hold yet, or as broken, and returns all in the order of `seeds`.

    Args:
      seeds: episode numbers.
      told: a sentence for each, instead of its own instruction.
      progress: called after each episode with (done, successes), those found in `records` included.
      records: finished episodes, read before and added to.

    Raises:
      BrokenEnvironment: the first episodes broke, every one of them.
    """
    seeds = [int(seed) for seed in seeds]
    found = {} if records is None else records.found
    self._told = {} if told is None else dict(zip(seeds, told))
    done = {seed: found[seed] for seed in seeds if seed in found and self._is_this(found[seed])}
    self._waiting = [seed for seed in seeds if seed not in done]
    self._tries: dict[int, int] = {}
    self.broken = 0
    if self._waiting:
      self._start(min(self.workers, len(self._waiting)))
      for result, seen in self._episodes():
        done[result.seed] = result
        self.broken += result.error is not None
        if records is not None:
          records.add(result)
        if self.seen is not None and result.error is None:
          self.seen(result, seen)
        self._give_up_if_all_broke(done)
        if progress is not None:
          progress(len(done), sum(one.success for one in done.values()))
      if self._remembers:
        self.policy.reset()
    return episodes([done[seed] for seed in seeds])

  @property
  def _remembers(self) -> bool:
    return getattr(self.policy, "remembers", False)

  def _is_this(self, result: EpisodeResult) -> bool:
    """Whether a finished episode did not break and had the instruction that it would have now."""
    return result.error is None and self._told.get(result.seed, result.told) == result.told

  def _start(self, count: int) -> None:
    while len(self._pool) < count:
      self._pool.append(_Running(self._make()))

  def _episodes(self):
    """Yields a result, and what was observed, whenever an episode ends."""
    try:
      while self._waiting or any(one.seed is not None for one in self._pool):
        for one in self._pool:
          if one.seed is None and self._waiting:
            seed = self._next(one)
            if self._remembers:
              self.policy.reset([seed])
            one.begin(seed, self._task(seed)[0])
        ended = [result for one in self._arrived() if (result := self._hear(one)) is not None]
        ended += self._ask([one for one in self._pool if one.moment is not None])
        yield from ended
    except BaseException:  # an interruption leaves no simulator in the middle of an episode
      self.close()
      raise

  def _next(self, one: _Running) -> int:
    """The next episode for a simulator: of its own group, else of a group without a simulator, else any."""
    taken = {other.group for other in self._pool if other is not one and other.seed is not None}
    own = [i for i, seed in enumerate(self._waiting) if self._task(seed)[0] == one.group]
    free = [i for i, seed in enumerate(self._waiting) if self._task(seed)[0] not in taken]
    return self._waiting.pop((own or free or [0])[0])

  def _arrived(self) -> list[_Running]:
    """The simulators that answered; waits for one, and takes those that took too long along."""
    busy = {one.process.connection: one for one in self._pool if one.seed is not None}
    now = time.monotonic()
    left = min(one.heard + one.process.timeout - now for one in busy.values())
    ready = [busy[each] for each in connection.wait([*busy], max(0.0, left))]
    now = time.monotonic()
    late = [one for one in busy.values() if one not in ready and now > one.heard + one.process.timeout]
    for one in ready:
      one.heard = now
    return ready + late

  def _hear(self, one: _Running) -> tuple[EpisodeResult, list[dict]] | None:
    """Takes a simulator's answer; returns a record and what was observed if the episode is over."""
    try:
      if time.monotonic() > one.heard + one.process.timeout:
        raise BrokenEnvironment(f"No answer from the environment within {one.process.timeout:g} s.")
      moment = one.process.receive()
      check_state(moment.observations[-1])
    except (BrokenEnvironment, ArithmeticError) as error:
      return self._broke(one, str(error))
    one.moment = moment
    one.seen += moment.observations
    if one.spoilt and not moment.done:
      return self._end(one, nonfinite=True)
    return self._end(one) if moment.done else None

  def _ask(self, asking: list[_Running]) -> list[tuple[EpisodeResult, list[dict]]]:
    """Asks the policy for all simulators that wait for actions, and sends them on; returns what ended thereby."""
    if not asking:
      return []
    episodes = {"episodes": [one.seed for one in asking]} if self._remembers else {}
    results = self.policy.infer_batch([self._observation(one) for one in asking], **episodes)
    ended = []
    for one, result in zip(asking, results):
      actions = np.asarray(result["actions"])[: self.replan_steps]
      finite = np.isfinite(actions).all(axis=(*range(1, actions.ndim),))
      good = len(actions) if finite.all() else int(finite.argmin())
      if good < len(actions):
        steps = one.moment.steps + good
        logging.warning("Episode %d: the policy gave %s after %d steps.", one.seed, actions[good], steps)
      if not good:
        ended.append(self._end(one, nonfinite=good < len(actions)))
      else:
        one.moment, one.heard, one.spoilt = None, time.monotonic(), good < len(actions)
        one.process.act(actions[:good])
    return ended

  def _observation(self, one: _Running) -> dict:
    observation = self._prepare(one.moment.observations[-1])
    sentence = self._told.get(one.seed, one.moment.instruction)
    return observation | {"prompt": sentence, "episode": one.seed, "step": one.moment.steps}

  def _end(self, one: _Running, nonfinite: bool = False) -> tuple[EpisodeResult, list[dict]]:
    moment, told, seen = one.moment, self._told.get(one.seed, one.moment.instruction), one.seen
    seconds = round(time.monotonic() - one.began, 3)
    result = EpisodeResult(
      one.seed,
      moment.success and not nonfinite,
      moment.steps,
      None,
      moment.instruction,
      told,
      self._tries.get(one.seed, 0),
      seconds,
      nonfinite,
    )
    one.idle()
    return result, seen

  def _broke(self, one: _Running, error: str) -> tuple[EpisodeResult, list[dict]] | None:
    """Starts the simulator again; the episode waits for another try, unless it had enough of them."""
    seed, tries = one.seed, self._tries.get(one.seed, 0)
    logging.warning("Episode %d broke (try %d of %d):\n%s", seed, tries + 1, self.retries + 1, error)
    seconds = round(time.monotonic() - one.began, 3)
    one.process.restart()
    one.idle()
    if tries < self.retries:
      self._tries[seed] = tries + 1
      self._waiting.insert(0, seed)
      return None
    sentence = self._task(seed)[1]
    return EpisodeResult(seed, False, 0, error, sentence, self._told.get(seed, sentence), tries, seconds), []

  def _give_up_if_all_broke(self, done: Mapping[int, EpisodeResult]) -> None:
    errors = [result.error for result in done.values() if result.error is not None]
    if len(errors) == len(done) and len(errors) > self.workers:
      raise BrokenEnvironment(f"All of the first {len(errors)} episodes broke. The last one:\n{errors[-1]}")


def episodes(records: Sequence[EpisodeResult]) -> Episodes:
  """Finished episodes as arrays, in their order."""
  columns = list(zip(*records)) or [()] * len(EpisodeResult._fields)
  seed, success, steps, error, instruction, told, retries, seconds, nonfinite = columns
  broken = np.array([one is not None for one in error], bool)
  return Episodes(
    np.array(seed, np.int64),
    np.array(success, bool),
    np.array(steps, np.int32),
    broken,
    [*instruction],
    [*told],
    retries=np.array(retries, np.int64),
    seconds=np.array(seconds, np.float64),
    nonfinite=np.array(nonfinite, bool),
  )
