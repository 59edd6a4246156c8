"""Clients of a policy server in a process of their own, without jax: how many milliseconds each request took.

python -m semanticvla_jax.benchmark.load '{"url": "ws://127.0.0.1:8000", "protocol": "openpi", "clients": 8, …}'
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np

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


def run(url: str, protocol: str, clients: int, seconds: float) -> dict[str, Any]:
  """Lets `clients` ask, each without a pause, for some seconds after a first answer.

  Returns:
    {"ms": [of every request], "seconds", "errors": count, "error": the first one or None}.
  """
  with Client(url, patience=60.0) as one:
    seen = observation(one.metadata)
  asks = [PROTOCOLS[protocol](url, seen) for _ in range(clients)]
  for ask in asks:
    ask()
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
