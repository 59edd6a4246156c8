"""What a server was asked and what it answered, on disk; and the same requests again, compared bit for bit.

A recording is a folder with a pair of files for each start of a server:

    <time>.json       the policy's hash, batch sizes, prompt lengths, limit, device, versions
    <time>.msgpack    a frame per call of the device: its number, and for every row observation, gripper and answer,
                      and the dataset whose units they are in, where that is not the policy's

Rows stay together as they were batched, since the last bits of an action depend on the size of its batch.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semanticvla_jax import files
from semanticvla_jax.errors import refuse
from semanticvla_jax.serve import wire
from semanticvla_jax.serve.core import Core, Refused, Settings
from semanticvla_jax.serve.limits import ActionLimit

MOST_BYTES = 20 << 30  # of one recording; the server then continues without recording
_WAITING = 64  # device calls that wait for the disk, at most; further ones are left out, which is counted
_PACKAGES = ("semanticvla_jax", "jax", "jaxlib", "numpy")
COMPILED = ("batch_sizes", "prompt_lengths")


class Recorder:
  """Writes device calls in a separate thread; a slow or full disk costs recordings, not answers.

  Args:
    folder: of the recording, made if it is missing.
    facts: JSON values that a replay needs: see `facts`.
    most_bytes: at which it stops.

  Attributes:
    left_out: device calls that are not in the recording.
  """

  def __init__(self, folder: str | os.PathLike, facts: Mapping[str, Any], most_bytes: int = MOST_BYTES):
    name = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    files.write_json(path / f"{name}.json", {**facts})
    self._file = (path / f"{name}.msgpack").open("ab")
    self._most, self.left_out = most_bytes, 0
    self._queue: queue.Queue[tuple[int, Sequence] | None] = queue.Queue(_WAITING)
    self._thread = threading.Thread(target=self._run, name="record", daemon=True)
    self._thread.start()

  def add(self, number: int, rows: Sequence[tuple[dict, str, str | None, Any]]) -> None:
    """One device call: of each row observation, gripper's convention, dataset (None: the policy's) and answer."""
    try:
      self._queue.put_nowait((number, rows))
    except queue.Full:
      self.left_out += 1

  def close(self) -> None:
    """Writes what waits, and says what is missing."""
    self._queue.put(None)
    self._thread.join()
    self._file.close()
    if self.left_out:
      logging.warning("%d calls of the device are not in the recording %s", self.left_out, self._file.name)

  def _run(self) -> None:
    while (call := self._queue.get()) is not None:
      try:
        frame = wire.pack({"batch": call[0], "rows": [_row(*row) for row in call[1]]})
        if self._file.tell() + len(frame) > self._most:
          raise OSError(f"more than {self._most:,} bytes")
        self._file.write(frame)
        self._file.flush()
      except (OSError, TypeError, ValueError, OverflowError) as error:
        if not self.left_out:
          logging.warning("Recording %s: %s; calls are left out", self._file.name, error)
        self.left_out += 1


def _row(observation: dict, gripper: str, dataset: str | None, result: Any) -> dict[str, Any]:
  answer = {"error": result.kind} if isinstance(result, Refused) else {"actions": result.actions}
  return {"observation": observation, "gripper": gripper, **({"dataset": dataset} if dataset else {}), **answer}


def facts(policy: Any, limit: str, device: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """What the answers depend on, besides the requests; `options` are those with which `server.load` read the policy."""
  known = policy.metadata
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  own = {name: known.get(name) for name in ("policy_hash", "dataset", "dtype", "weights", *COMPILED)}
  return {**own, "limit": limit, "device": device, "versions": versions, "options": {**(options or {})}}


class Replayed(NamedTuple):
  """What a replay found.

  Attributes:
    calls, observations: how many there were.
    different: lines that say which answers are others now, the first ones.
    unequal: how many are.
    largest: difference of an action, in the robot's units.
  """

  calls: int
  observations: int
  unequal: int
  largest: float
  different: list[str]


def recordings(folder: str | os.PathLike) -> list[tuple[Path, dict[str, Any]]]:
  """The recordings in a folder, each with its facts.

  Raises:
    ValueError: there are none, or one's facts cannot be read.
  """
  found = []
  for path in sorted(Path(folder).glob("*.msgpack")):
    try:
      known = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
      found.append((path, {**known}))
    except (OSError, ValueError, TypeError) as error:
      raise refuse(
        f"{path.with_suffix('.json')}", f"{error}", "the facts of a recording", "remove both files"
      ) from error
  if not found:
    raise refuse(f"{folder}", "no *.msgpack in it", "a recording of --record", "check the path")
  return found


def calls(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
  """The device calls of a recording; a last one that was cut off is left out with a warning."""
  with path.open("rb") as file:
    for value in wire.unpack_stream(file, lambda: logging.warning("%s: its last call was cut off", path)):
      yield value["batch"], value["rows"]


def check_alike(known: Mapping[str, Any], policy: Any, path: Path) -> None:
  """Raises ValueError unless a policy is the recorded one, compiled for the same sizes; other versions are logged."""
  now = facts(policy, known["limit"], known["device"])
  for name in ("policy_hash", "dataset", "dtype", "weights", *COMPILED):
    if now[name] != known.get(name):
      raise refuse(
        f"{path.name}: {name}", f"{now[name]}", f"{known.get(name)}, as recorded", "replay what was recorded"
      )
  if now["versions"] != known.get("versions"):
    logging.warning("%s was recorded with other versions: %s", path.name, known.get("versions"))


def replay(
  policy: Any, found: Sequence[tuple[Path, dict]], progress: Callable[[int], None] = lambda count: None
) -> Replayed:
  """Runs recorded device calls again, each batched as it was.

  Args:
    policy: the recorded one.
    found: of `recordings`.
    progress: called with the number of calls done.
  """
  done, seen, unequal, largest, lines = 0, 0, 0, 0.0, []
  for path, known in found:
    check_alike(known, policy, path)
    core = Core(policy, Settings(), ActionLimit(policy.stats.action, known["limit"]))
    for number, rows in calls(path):
      units = [core.units[row.get("dataset", known.get("dataset"))] for row in rows]
      normalized = core.run_batch([one.policy.observe([row["observation"]]) for one, row in zip(units, rows)])
      for i, (one, row) in enumerate(zip(units, rows)):
        now = core.checked(normalized[i : i + 1], row["gripper"], one)
        if (line := _compared(row, now)) is not None:
          unequal, largest = unequal + 1, max(largest, line[1])
          lines += [f"{path.name}, call {number}, row {i}: {line[0]}"] if len(lines) < 10 else []
      done, seen = done + 1, seen + len(rows)
      progress(done)
  return Replayed(done, seen, unequal, largest, lines)


def _compared(row: Mapping[str, Any], now: np.ndarray | Refused) -> tuple[str, float] | None:
  """How an answer differs from the recorded one: in words, and by how much; None where it does not."""
  before = row.get("actions")
  if isinstance(now, Refused) or before is None:
    had, have = (row.get("error") or "actions"), (now.kind if isinstance(now, Refused) else "actions")
    return None if had == have else (f"{have} instead of {had}", 0.0)
  if before.shape == now.shape and before.tobytes() == now.tobytes():
    return None
  if before.shape != now.shape:
    return f"shape {now.shape} instead of {before.shape}", float("inf")
  off = float(np.abs(before - now).max())
  return f"actions differ by up to {off:.3g}", off
