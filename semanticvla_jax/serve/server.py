"""The process around the application: loading and warming a policy, the port, an orderly end."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

from semanticvla_jax import exported
from semanticvla_jax.errors import refuse
from semanticvla_jax.policy import Policy
from semanticvla_jax.serve import app, contract
from semanticvla_jax.serve.site import Site

HEADER_TIMEOUT = 60.0  # seconds in which a connection has to send its next request
_TICKS = 50  # of a tenth of a second, between two looks at connections without a request


class Address(NamedTuple):
  """Where and how the server listens.

  Attributes:
    host, port: 0 lets the system choose the port. key: of every request; None for no key.
    certificate, certificate_key: files of TLS; None for plain HTTP.
    clients: websockets that may be open at the same time.
    grace: seconds that requests under way may take after a SIGTERM.
  """

  host: str = "127.0.0.1"
  port: int = 8000
  key: str | None = None
  certificate: str | None = None
  certificate_key: str | None = None
  clients: int = 256
  grace: float = 30.0


class Server(uvicorn.Server):
  """uvicorn's server, which answers what is under way before it ends and closes connections that send nothing.

  Args:
    site: what is served. address: where.
    doors: of other ports: each is called with the event loop when the server starts, and gives what has to be closed.
  """

  def __init__(self, site: Site, address: Address, doors: Sequence[Callable[[asyncio.AbstractEventLoop], Any]] = ()):
    self._site, self._grace, self._until = site, address.grace, 0.0
    self._doors, self.opened = doors, []
    self._since: dict[Any, tuple[Any, float]] = {}  # connection: (its latest request, when it was seen idle)
    config = uvicorn.Config(
      app.app(site, address.key, address.clients),
      address.host,
      address.port,
      http="h11",
      ws="websockets-sansio",
      ws_max_size=site.max_bytes,
      ws_per_message_deflate=False,  # images do not shrink, and it would cost milliseconds
      ws_ping_interval=None,  # clients that compute between two requests do not answer pings
      limit_concurrency=4 * address.clients,
      timeout_keep_alive=int(HEADER_TIMEOUT),
      timeout_graceful_shutdown=5,
      ssl_certfile=address.certificate,
      ssl_keyfile=address.certificate_key,
      lifespan="off",
      access_log=False,
      proxy_headers=False,  # a client could otherwise give itself another address
      server_header=False,
      log_level="warning",
    )
    super().__init__(config)

  @property
  def port(self) -> int:
    """The port that it listens on; known once `started`."""
    return self.servers[0].sockets[0].getsockname()[1]

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """Opens the other doors first: when the port listens, all do."""
    self.opened = [door(asyncio.get_running_loop()) for door in self._doors]
    await super().startup(sockets)

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    """Closes the other doors, too."""
    for door in self.opened:
      await asyncio.to_thread(door.close)
    await super().shutdown(sockets)

  def handle_exit(self, sig: int, frame: Any) -> None:
    """SIGTERM and ^C: new requests are refused, those under way answered; the second signal ends at once."""
    if self._site.core.draining:
      self.should_exit = self.force_exit = True
    self._site.core.draining, self._until = True, time.monotonic() + self._grace

  async def on_tick(self, counter: int) -> bool:
    """Ten times a second: whether to end."""
    if counter % _TICKS == 0:
      self._close_silent()
    busy = self._site.busy or self._site.core.under_way
    if self._site.core.draining and (not busy or time.monotonic() > self._until):
      self.should_exit = True
    return await super().on_tick(counter)

  def _close_silent(self) -> None:
    """Closes connections that have had HEADER_TIMEOUT seconds for their next request."""
    now, before = time.monotonic(), self._since
    self._since = {}
    for connection in list(self.server_state.connections):
      cycle = getattr(connection, "cycle", self)  # a websocket has none, and its own time-out
      if cycle is self or (cycle is not None and not cycle.response_complete):
        continue
      known = before.get(connection, (cycle, now))
      self._since[connection] = known if known[0] is cycle else (cycle, now)
      if now - self._since[connection][1] > HEADER_TIMEOUT:
        connection.transport.abort()


class Background:
  """A server in a separate thread, for tests and measurements: `with Background(site) as port:`."""

  def __init__(self, site: Site, address: Address | None = None, doors: Sequence[Callable] = ()):
    self.server = Server(site, Address(port=0) if address is None else address, doors)
    self._thread = threading.Thread(target=self.server.run, name="server", daemon=True)

  def __enter__(self) -> int:
    self._thread.start()
    while not self.server.started:
      if not self._thread.is_alive():
        raise RuntimeError("the server did not start")
      time.sleep(0.01)
    return self.server.port

  def __exit__(self, *error: Any) -> None:
    self.server.handle_exit(0, None)
    self._thread.join()


def bind(host: str, port: int) -> socket.socket:
  """A socket that holds the port and does not listen yet, so that a port in use is found before a policy is loaded.

  Raises:
    ValueError: the port is taken, or the address is not one of this machine.
  """
  found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
  found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    found.bind((host, port))
  except (OSError, OverflowError) as error:
    found.close()
    raise refuse(f"{host}:{port}", str(error), "a free port of this machine", "choose --host and --port") from error
  return found


def check(address: Address) -> None:
  """Raises ValueError where the files of TLS cannot be read."""
  if address.certificate is None:
    return
  try:
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(address.certificate, address.certificate_key)
  except OSError as error:  # ssl's errors are some, too
    got = f"{address.certificate} and {address.certificate_key}: {error}"
    raise refuse("--tls-cert, --tls-key", got, "a certificate and its key, as PEM", "check the files") from error


def load(
  policy: str | os.PathLike,
  *,
  sizes: Sequence[int],
  prompt_lengths: Sequence[int] = (),
  dataset: str | None = None,
  dtype: str | None = None,
  weights: str = "full",
  attention: str = "xla",
) -> Any:
  """A policy folder, or a file of `Policy.export`, compiled for these batch sizes and prompt lengths, each run once.

  Raises:
    ValueError: it cannot be read, or remembers earlier queries, or an option does not apply to it.
  """
  if not Path(policy).is_file():
    own = dict(dataset=dataset, dtype=dtype, weights=weights, attention=attention, prompt_lengths=tuple(prompt_lengths))
    return _without_memory(Policy.load(policy, batch_sizes=tuple(sizes), **own))
  if (dataset, dtype, weights, attention, tuple(prompt_lengths)) != (None, None, "full", "xla", ()):
    got = "--dataset, --dtype, --weights, --attention or --prompt-lengths with an exported policy"
    raise refuse("--policy", got, "a policy folder", "leave them out; the file has its own")
  return _without_memory(exported.ExportedPolicy.load(policy, batch_sizes=tuple(sizes)))


def _without_memory(policy: Any) -> Any:
  """The policy. Raises ValueError if it remembers earlier queries: most clients never say when an episode begins."""
  if policy.remembers:
    raise refuse(
      "--policy",
      "one that remembers earlier queries of an episode (model.decoder_pruner has a history)",
      "one without, because openpi's and OpenVLA's clients do not say when an episode begins",
      "evaluate its folder, or save it without history",
    )
  return policy


def latency(policy: Any, calls: int = 5) -> float:
  """Median milliseconds of `Policy.infer`; warms what compiling does not, such as the image filters."""
  seen = contract.example(policy.metadata, contract.state_range(policy))
  return statistics.median(policy.infer(seen)["policy_timing"]["total_ms"] for _ in range(calls + 1))
