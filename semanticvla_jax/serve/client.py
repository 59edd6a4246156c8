"""A robot's side of the server: one observation at a time, or asynchronously while the robot moves.

    client = Client("ws://127.0.0.1:8000")
    client.infer({"image": …, "wrist_image": …, "state": …, "prompt": "pick up …"})["actions"]     f32[k a]

    python -m semanticvla_jax.serve.client --url=ws://127.0.0.1:8000 --dry-run

Needs numpy, msgpack and websockets; no jax. A connection that breaks is opened again with growing pauses; an answer
that comes too late is never taken for that of a later observation.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from semanticvla_jax import cli
from semanticvla_jax.errors import refuse
from semanticvla_jax.serve import contract, wire
from semanticvla_jax.serve.chunks import Chunks

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between two tries to connect
_LATER = ("overloaded", "draining", "deadline")  # errors that another try may not meet
_REFUSED = (400, 401, 403, 404)  # statuses that another try will meet again


class ServerGone(ConnectionError):
  """No answer within the client's patience."""


class StaleAnswer(TimeoutError):
  """An answer to an observation that is older than the client's freshness limit; it is not to be acted on."""


class Client:
  """A connection to a server; opened at the first use, and again where it broke.

  Args:
    url: ws:// or wss:// address; http:// and https:// mean the same.
    api_key: of the server; None for none.
    timeout: seconds to wait for an answer before the connection is given up.
    patience: seconds to try again in all, before `ServerGone` is raised.
    freshness: seconds after which an answer is too old to act on, counted from the call of `infer`; None for no limit.
  """

  def __init__(
    self,
    url: str,
    *,
    api_key: str | None = None,
    timeout: float = 10.0,
    patience: float = 30.0,
    freshness: float | None = None,
  ):
    self.url = url.replace("http", "ws", 1) if url.startswith("http") else url
    self.timeout, self.patience, self.freshness = timeout, patience, freshness
    self._headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
    self._socket: ClientConnection | None = None
    self._stack = contextlib.ExitStack()  # closes it
    self._metadata: dict[str, Any] | None = None
    self.connects = 0  # how often a connection was opened

  def __enter__(self) -> Client:
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  @property
  def metadata(self) -> dict[str, Any]:
    """What the server says of its policy; see docs/serving.md."""
    if self._metadata is None:
      self._until(time.monotonic() + self.patience, self._connected)
    return self._metadata

  def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
    """One observation → {"actions": f32[k a], "policy_timing", "server_timing"}.

    Raises:
      ValueError: the server does not take the observation, the key, or serves another policy than before.
      StaleAnswer: the answer came later than `freshness`.
      ServerGone: no answer within `patience`.
    """
    begin, frame = time.monotonic(), wire.pack({**observation})
    reply = self._until(begin + self.patience, lambda: self._exchange(frame))
    age = time.monotonic() - begin
    if self.freshness is not None and age > self.freshness:
      raise StaleAnswer(f"the answer came after {1e3 * age:.0f} ms; expected at most {1e3 * self.freshness:.0f} ms")
    return reply

  def reset(self) -> None:
    """Begins an episode; the server keeps nothing of the one before."""

  def close(self) -> None:
    """Closes the connection; the next use opens it again."""
    self._socket = None
    with contextlib.suppress(WebSocketException, OSError):
      self._stack.close()

  def _until(self, end: float, work: Any) -> Any:
    """What `work` gives, tried again with growing pauses where the connection breaks or the server is overloaded."""
    pause = _FIRST_PAUSE
    while True:
      try:
        return work()
      except (OSError, WebSocketException, _TryLater) as error:
        if not isinstance(error, _TryLater):
          self.close()
        _raise_if_final(self.url, error)
        left = end - time.monotonic()
        if left <= 0:
          raise ServerGone(f"{self.url}: no answer within {self.patience:g} s ({cli.first_line(error)})") from error
        logging.warning("%s: %s; trying again", self.url, cli.first_line(error))
        time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
        pause = min(2 * pause, _LONGEST_PAUSE)

  def _connected(self) -> ClientConnection:
    if self._socket is None:
      options = dict(compression=None, max_size=None, open_timeout=self.timeout, close_timeout=1)
      self._socket = self._stack.enter_context(connect(self.url, additional_headers=self._headers, **options))
      found = wire.unpack(self._socket.recv(timeout=self.timeout))
      self.connects += 1
      if self._metadata is not None and found.get("policy_hash") != self._metadata.get("policy_hash"):
        got, expected = (one.get("policy_hash") for one in (found, self._metadata))
        raise refuse(self.url, f"policy {got}", f"{expected}, as before", "make a new Client for another policy")
      self._metadata = found
    return self._socket

  def _exchange(self, frame: bytes) -> dict[str, Any]:
    socket = self._connected()
    socket.send(frame)
    reply = socket.recv(timeout=self.timeout)
    if not isinstance(reply, str):
      return wire.unpack(reply)
    kind, _, message = reply.partition(": ")
    raise _TryLater(message) if kind in _LATER else ValueError(f"{self.url}: {reply}")


class _TryLater(Exception):
  """The server has too much to do, or shuts down."""


def _raise_if_final(url: str, error: Exception) -> None:
  """Raises ValueError where another try would meet the same answer."""
  status = getattr(getattr(error, "response", None), "status_code", None)
  if isinstance(error, InvalidURI) or (isinstance(error, InvalidHandshake) and status in _REFUSED):
    hint = "pass the server's key" if status == 401 else "check the address"
    raise refuse(url, cli.first_line(error), "a policy server", hint) from error


class Broker:
  """One action at a time for a robot's control loop, from the chunks of a server.

  Args:
    client: of the server.
    replan_steps: actions executed per query; None for the policy's own number.
    asynchronous: whether the policy is asked in the background while the robot executes the chunk it has. Without
      it the robot waits for each answer.
    align, blend: see `Chunks`; of asynchronous queries.
  """

  def __init__(
    self,
    client: Client,
    replan_steps: int | None = None,
    *,
    asynchronous: bool = False,
    align: bool = True,
    blend: int = 0,
  ):
    known = client.metadata
    steps = known["replay"] if replan_steps is None else replan_steps
    if not 1 <= steps <= known["chunk"]:
      raise refuse("Broker", f"replan_steps={steps}", f"1 to {known['chunk']}, the chunk", "choose another")
    discrete = [i for i, continuous in enumerate(known.get("continuous") or []) if not continuous]
    self.client, self.asynchronous = client, asynchronous
    self.chunks = Chunks(steps, align=align, blend=blend, discrete=discrete)
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "infer")
    self._asked: tuple[int, concurrent.futures.Future] | None = None

  def step(self, observation: Mapping[str, Any]) -> np.ndarray | None:
    """The action for now, f32[a]; None where there is none to act on: hold, and call again.

    Raises:
      ValueError: see `Client.infer`; without `asynchronous` also StaleAnswer and ServerGone.
    """
    if self.asynchronous:
      self._collect()
      if self.chunks.wants and self._asked is None:
        self._asked = (self.chunks.executed, self._pool.submit(self.client.infer, {**observation}))
    elif self.chunks.wants:
      self.chunks.add(self.client.infer(observation)["actions"], self.chunks.executed)
    return self.chunks.next()

  def reset(self) -> None:
    """Begins an episode: nothing of the old one is executed."""
    self.chunks.reset()
    self._asked = None  # an answer that is still to come is of the old episode
    self.client.reset()

  def close(self) -> None:
    """Ends the thread and the connection."""
    self._pool.shutdown()
    self.client.close()

  def _collect(self) -> None:
    """Takes an answer that has come; one that is stale, or did not come, is logged and asked for again."""
    if self._asked is None or not self._asked[1].done():
      return
    executed, future = self._asked
    self._asked = None
    try:
      self.chunks.add(future.result()["actions"], executed)
    except (StaleAnswer, ServerGone) as error:
      logging.warning("%s", error)


def dry_run(client: Client, steps: int) -> dict[str, np.ndarray]:
  """Milliseconds of `steps` queries with a dummy observation, by layer: client (all of it), queue, prepare, device."""
  seen = contract.example(client.metadata, client.metadata.get("state_range"))
  found: dict[str, list[float]] = {"client": [], "queue": [], "prepare": [], "device": []}
  for _ in range(steps):
    begin = time.perf_counter()
    timing = client.infer(seen)["policy_timing"]
    found["client"].append(1e3 * (time.perf_counter() - begin))
    for name, key in (("queue", "queue_ms"), ("prepare", "prepare_ms"), ("device", "infer_ms")):
      found[name].append(timing[key])
  return {name: np.array(values) for name, values in found.items()}


def main(argv: Sequence[str]) -> None:
  """Sends a dummy episode and prints where its time went."""
  parser = cli.ArgumentParser("python -m semanticvla_jax.serve.client", __doc__)
  parser.add_argument("--url", default="ws://127.0.0.1:8000", help="of the server (default: ws://127.0.0.1:8000)")
  parser.add_argument("--api-key-file", metavar="FILE", help="text file with the server's key (default: none)")
  parser.add_argument("--dry-run", action="store_true", required=True, help="send a dummy episode, print milliseconds")
  parser.add_argument("--steps", type=int, default=50, help="observations to send (default: 50)")
  args = parser.parse_args(argv)
  if args.steps < 1:
    raise refuse("--steps", args.steps, "at least 1", "raise it")
  key = None if args.api_key_file is None else Path(args.api_key_file).read_text(encoding="utf-8").strip()
  with Client(args.url, api_key=key, patience=5.0) as client:
    known = client.metadata
    print(f"policy {known.get('policy_hash')} of dataset {known.get('dataset')}, {known['server']}, {known['device']}")
    print(f"{known['chunk']} actions of {known['action_dim']}: {known['action_units']}")
    for name, ms in dry_run(client, args.steps).items():
      p50, p95, p99 = np.percentile(ms, (50, 95, 99))
      print(f"{name:8} p50 {p50:8.2f} ms   p95 {p95:8.2f} ms   p99 {p99:8.2f} ms")


if __name__ == "__main__":
  cli.run(main)
