"""One thread owns the device; requests of all doors queue for it and are answered in batches.

    door → Core.infer ─ canonical names, preparation (worker pool) ─► queue ─ device thread: join, infer ─► actions

The event loop never waits for either. A request is refused at once where too many are under way, and later where it
waited in the queue longer than its deadline: actions for what a robot saw that long ago are of no use.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from semanticvla_jax import cli
from semanticvla_jax.errors import one_line, refuse
from semanticvla_jax.serve import units
from semanticvla_jax.serve.limits import ActionLimit
from semanticvla_jax.serve.units import Units

RECENT = 1.0  # seconds for which a client that sent a request is expected to send another
# What a request can be refused for, with the HTTP status of each.
KINDS = {
  "bad_request": 400,
  "unauthorized": 401,
  "forbidden": 403,
  "too_large": 413,
  "timeout": 408,
  "overloaded": 503,
  "draining": 503,
  "deadline": 504,
  "unsafe": 500,
  "failed": 500,
}


class Refused(Exception):
  """A request that gets an error for an answer.

  Args:
    kind: one of KINDS.
    message: one line; line breaks and control characters that a client sent are left out.
    retry_after: seconds after which it may be tried again; None where that would not help.
  """

  def __init__(self, kind: str, message: str, retry_after: float | None = None):
    super().__init__(one_line(message))
    self.kind, self.retry_after = kind, retry_after

  @property
  def status(self) -> int:
    """Of HTTP."""
    return KINDS[self.kind]


class Settings(NamedTuple):
  """How the core batches and refuses.

  Attributes:
    max_batch: observations of one call of the device, at most.
    max_wait: seconds to wait for other clients that were active a moment ago; a lone client is never waited for.
    deadline: seconds that a request may wait in the queue.
    depth: requests under way, at most; further ones are refused.
    workers: threads that prepare observations.
  """

  max_batch: int = 8
  max_wait: float = 0.005
  deadline: float = 10.0
  depth: int = 128
  workers: int = min(4, os.cpu_count() or 1)


class Answer(NamedTuple):
  """One chunk of actions.

  Attributes:
    actions: f32[k a], read-only, in the robot's units.
    batch: number of the device call, counted from 1; row: place in it.
    seconds: {"prepare", "queue", "infer"}.
  """

  actions: np.ndarray
  batch: int
  row: int
  seconds: dict[str, float]


class _Waiting(NamedTuple):
  """A prepared request in the queue."""

  observation: Any  # types.Observation of batch 1
  given: dict  # what it was made of, by canonical names
  units: Units
  gripper: str
  session: str
  future: asyncio.Future
  loop: asyncio.AbstractEventLoop
  prepared: float  # time.monotonic
  seconds: float  # of preparation


class Core:
  """A policy, its thread and its queue; `start` before use.

  Args:
    policy: observe, device_step, preparation.actions, metadata and datasets are used; compiled, and warm.
    settings: see Settings.
    limit: of outgoing actions, in the units of the dataset that the policy was loaded for.
    watch: called as `batch(size, seconds)` and `outside(count)`, see serve.metrics; or None.
    record: called after every device call as `add(number, rows)`, see serve.record; or None.

  Attributes:
    units: by dataset, see serve.units. under_way: requests accepted and not answered yet.
    draining: whether all further ones are refused.
  """

  def __init__(self, policy: Any, settings: Settings, limit: ActionLimit, watch: Any = None, record: Any = None):
    self.policy, self.settings, self.limit, self.watch, self.record = policy, settings, limit, watch, record
    self.under_way, self.draining = 0, False
    self._own = Units(policy, limit)
    self.units = units.of_datasets(self._own)
    self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
    self._recent: dict[str, float] = {}  # session: when it last asked; of the device thread alone
    self._batches, self._latest = 0, 0.05
    self._pool = concurrent.futures.ThreadPoolExecutor(settings.workers, "prepare")
    self._thread = threading.Thread(target=self._run, name="device", daemon=True)

  def start(self) -> None:
    """Starts the device thread."""
    self._thread.start()

  @property
  def alive(self) -> bool:
    """Whether requests are answered: the device thread runs, and the server does not shut down."""
    return self._thread.is_alive() and not self.draining

  @property
  def depth(self) -> int:
    """Requests that wait for the device."""
    return self._queue.qsize()

  def close(self) -> None:
    """Ends the threads, after what is queued has been answered."""
    self.draining = True
    self._queue.put(None)
    self._thread.join()
    self._pool.shutdown()

  def units_of(self, unnorm_key: Any) -> Units:
    """Those that a request asks for; see `units.choose`."""
    return units.choose(self.units, unnorm_key, self._own.dataset)

  async def infer(
    self, observation: Any, *, session: str, gripper: str | None = None, unnorm_key: Any = None
  ) -> Answer:
    """The policy's actions for one observation, in names and layout of any client that `observations` knows.

    Args:
      session: who asks; clients that were active a moment ago are waited for when a batch is collected.
      gripper: "command" or "raw"; None for the policy's own convention.
      unnorm_key: the dataset whose units state and actions are in; None for the one that the policy was loaded for.

    Raises:
      Refused: the observation is not one, the policy does not know the dataset, too many requests are under way, the
        server shuts down, it waited too long, or the policy failed.
    """
    if self.draining:
      raise Refused("draining", "the server is shutting down", retry_after=5.0)
    if self.under_way >= self.settings.depth:
      wait = self._latest * (1 + self.under_way / self.settings.max_batch)
      raise Refused("overloaded", f"{self.under_way} requests are under way, the most there may be", retry_after=wait)
    self.under_way += 1
    try:
      return await self._infer(observation, session, gripper, unnorm_key)
    finally:
      self.under_way -= 1

  async def in_pool(self, work: Any, *args: Any) -> Any:
    """Runs what takes milliseconds of a CPU outside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

  async def _infer(self, observation: Any, session: str, gripper: str | None, unnorm_key: Any) -> Answer:
    loop = asyncio.get_running_loop()
    try:
      chosen = self.units_of(unnorm_key)
      given, prepared, seconds = await self.in_pool(_timed, chosen.prepare, observation)
    except ValueError as error:
      raise Refused("bad_request", str(error)) from error
    gripper, future = gripper or chosen.own_gripper, loop.create_future()
    waiting = _Waiting(prepared, given, chosen, gripper, session, future, loop, time.monotonic(), seconds)
    self._queue.put(waiting)
    return await waiting.future

  def run_batch(self, observations: Sequence[Any]) -> np.ndarray:
    """Prepared observations of batch 1 → normalized actions f32[b k a]; of the device thread, or of a replay."""
    joined = observations[0]
    if len(observations) > 1:
      joined = jax.tree.map(lambda *rows: np.concatenate(rows), *observations)
    return np.asarray(self.policy.device_step(joined))[: len(observations)]

  def _run(self) -> None:
    while (batch := self._collect()) is not None:
      if batch:
        self._answer(batch)

  def _collect(self) -> list[_Waiting] | None:
    """The next batch: what is queued, and what clients that were active a moment ago send within `max_wait`."""
    first = self._queue.get()
    if first is None:
      return None
    batch, until = [first], time.monotonic() + self.settings.max_wait
    while len(batch) < self.settings.max_batch:
      left = until - time.monotonic() if len(batch) < self._expected(batch) else 0.0
      try:
        one = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
      except queue.Empty:
        break
      if one is None:
        self._queue.put(None)  # for the next turn
        break
      batch.append(one)
    return self._in_time(batch)

  def _expected(self, batch: Sequence[_Waiting]) -> int:
    """How many clients were active within RECENT seconds, those of the batch included."""
    now = time.monotonic()
    self._recent |= {one.session: now for one in batch}
    self._recent = {session: then for session, then in self._recent.items() if now - then < RECENT}
    return len(self._recent)

  def _in_time(self, batch: list[_Waiting]) -> list[_Waiting]:
    """Those whose client still waits and whose deadline has not passed; the others are answered with an error."""
    now, kept = time.monotonic(), []
    for one in batch:
      waited = now - one.prepared
      if waited > self.settings.deadline:
        _set(
          one, Refused("deadline", f"waited {1e3 * waited:.0f} ms, longer than {1e3 * self.settings.deadline:.0f} ms")
        )
      elif not one.future.cancelled():
        kept.append(one)
    return kept

  def _answer(self, batch: list[_Waiting]) -> None:
    begin = time.monotonic()
    self._batches += 1
    try:
      normalized = self.run_batch([one.observation for one in batch])
      results = [self.checked(normalized[i : i + 1], one.gripper, one.units) for i, one in enumerate(batch)]
    except Exception as error:  # of any kind: the next batch has its own fate
      logging.error("Batch %d failed: %s", self._batches, cli.first_line(error), exc_info=error)
      results = [Refused("failed", "the policy failed; the server's log says why")] * len(batch)
    seconds = self._latest = time.monotonic() - begin
    answers = []
    for i, (one, result) in enumerate(zip(batch, results)):
      times = {"prepare": one.seconds, "queue": begin - one.prepared, "infer": seconds}
      answers.append(result if isinstance(result, Refused) else Answer(result, self._batches, i, times))
      _set(one, answers[-1])
    if self.watch is not None:
      self.watch.batch(len(batch), seconds)
    if self.record is not None:
      rows = [(one.given, one.gripper, self._key(one.units), result) for one, result in zip(batch, answers)]
      self.record.add(self._batches, rows)

  def _key(self, chosen: Units) -> str | None:
    """A request's dataset, None for the policy's own."""
    return None if chosen is self._own else chosen.dataset

  def checked(self, normalized: np.ndarray, gripper: str, chosen: Units | None = None) -> np.ndarray | Refused:
    """One row of `run_batch`, [1 k a] → what may be sent, [k a]: limited, or refused; None: in the policy's units."""
    chosen = chosen or self._own
    actions, limit = chosen.actions(normalized, gripper)[0], chosen.limit
    if not np.isfinite(actions).all():
      return Refused("unsafe", "the policy gave an action that is not finite; it is not sent")
    outside = int(limit.outside(actions).sum())
    if outside and self.watch is not None:
      self.watch.outside(outside)
    if outside and limit.choice == "refuse":
      what = f"{outside} of {len(actions)} actions are outside the range of the training data; they are not sent"
      return Refused("unsafe", what)
    return limit.clip(actions) if limit.choice == "clip" else actions


def _timed(prepare: Any, observation: Any) -> tuple[dict, Any, float]:
  """What `Units.prepare` gives, and its seconds."""
  begin = time.monotonic()
  return *prepare(observation), time.monotonic() - begin


def _set(one: _Waiting, result: Answer | Refused) -> None:
  """Hands a result to the event loop that waits for it."""

  def deliver() -> None:
    if one.future.done():
      return
    if isinstance(result, Refused):
      one.future.set_exception(result)
    else:
      one.future.set_result(result)

  with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
    one.loop.call_soon_threadsafe(deliver)


def check(settings: Settings, sizes: Sequence[int]) -> None:
  """Raises ValueError unless a policy compiled for these batch sizes can serve with these settings."""
  if settings.max_batch < 1 or settings.max_batch > max(sizes):
    raise refuse("--max-batch", settings.max_batch, f"1 to {max(sizes)}, the largest compiled size", "change either")
