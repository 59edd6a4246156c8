"""Clients of a policy server in a separate process, without jax: how many milliseconds each request took.

python -m semanticvla_jax.benchmark.load '{"url": "ws://127.0.0.1:8000", "protocol": "openpi", "clients": 8, …}'
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.sync.client import connect

from semanticvla_jax.serve import contract, wire
from semanticvla_jax.serve.client import Client


def observation(metadata: dict[str, Any]) -> dict[str, Any]:
  """What a robot would send: images of noise of the policy's size, and the example's state and instruction."""
  pixels = metadata["image_size"]
  seen, rng = contract.example(metadata, metadata.get("state_range")), np.random.default_rng(0)
  return seen | {view: rng.integers(0, 256, (pixels, pixels, 3)).astype(np.uint8) for view in metadata["views"]}


def openpi(url: str, seen: dict[str, Any]) -> Callable[[], None]:
  """One client of openpi's protocol; each call is a request."""
  client = Client(url, timeout=120.0, patience=120.0)
  return lambda: client.infer(seen) and None


def act(url: str, seen: dict[str, Any]) -> Callable[[], None]:
  """One client of OpenVLA-OFT's `POST /act`, which keeps its connection."""
  where, own = urlsplit(url), dict(seen)
  own |= {"full_image": own.pop("image"), "instruction": own.pop("prompt")}
  connection = http.client.HTTPConnection(where.hostname, where.port, timeout=120)

  def ask() -> None:
    connection.request("POST", "/act", wire.dump_json(own))
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
      raise RuntimeError(f"{response.status}: {body[:200]!r}")
    wire.load_json(body)

  return ask


PROTOCOLS = {"openpi": openpi, "act": act}


@contextlib.contextmanager
def disturbance(url: str, seen: dict[str, Any]) -> Iterator[None]:
  """Clients that misbehave: a half-open socket, a header that never ends, some that die, one that never reads."""
  logging.getLogger("websockets").setLevel(logging.CRITICAL)  # a traceback for every client that dies
  where, frame, ended = urlsplit(url), wire.pack(seen), threading.Event()
  sockets = [socket.create_connection((where.hostname, where.port)) for _ in range(2)]
  sockets[0].sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
  sockets[1].sendall(b"P")

  def die() -> None:
    while not ended.wait(0.2):
      with connect(f"ws://{where.netloc}/", compression=None) as one:
        one.send(frame)
        one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.socket.close()  # with a reset, before the answer

  def never_read() -> None:
    with connect(f"ws://{where.netloc}/", compression=None, max_queue=1) as one:
      while not ended.wait(0.2):
        one.send(frame)

  threads = [threading.Thread(target=work, daemon=True) for work in (die, never_read)]
  for thread in threads:
    thread.start()
  try:
    yield
  finally:
    ended.set()
    for thread in threads:
      thread.join(10)
    for one in sockets:
      one.close()


def run(url: str, protocol: str, clients: int, seconds: float, disturbed: bool = False) -> dict[str, Any]:
  """Lets `clients` ask, each without a pause, for some seconds after a first answer.

  Args:
    disturbed: whether clients that misbehave are connected at the same time.

  Returns:
    {"ms": [of every request], "seconds", "errors": count, "error": the first one or None}.
  """
  with Client(url, patience=60.0) as one:
    seen = observation(one.metadata)
  asks = [PROTOCOLS[protocol](url, seen) for _ in range(clients)]
  for ask in asks:
    ask()
  with disturbance(url, seen) if disturbed else contextlib.nullcontext():
    return _timed(asks, seconds)


def _timed(asks: Sequence[Callable[[], None]], seconds: float) -> dict[str, Any]:
  """See `run`."""
  found: list[float] = []
  errors: list[str] = []
  begin = time.perf_counter()

  def work(ask: Callable[[], None]) -> None:
    while time.perf_counter() - begin < seconds:
      start = time.perf_counter()
      try:
        ask()
      except Exception as error:  # counted, whatever it is
        errors.append(repr(error))
      else:
        found.append(1e3 * (time.perf_counter() - start))

  threads = [threading.Thread(target=work, args=[ask]) for ask in asks]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  took = time.perf_counter() - begin
  return {"ms": found, "seconds": took, "errors": len(errors), "error": errors[0] if errors else None}


if __name__ == "__main__":
  print(json.dumps(run(**json.loads(sys.argv[1]))))
