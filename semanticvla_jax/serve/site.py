"""What all doors share: the core, the metadata, the limits, and how a request is read and counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from semanticvla_jax import cli
from semanticvla_jax.serve import contract, wire
from semanticvla_jax.serve.core import Answer, Core, Refused
from semanticvla_jax.serve.metrics import Metrics


class Site:
  """One server, as its doors see it.

  Args:
    core: of the policy.
    metrics: of the server.
    grippers: the convention by door, see `contract.grippers`.
    max_bytes: of a request's body or frame.
    body_timeout: seconds in which a body has to arrive.
    idle_timeout: seconds without a frame after which a websocket is closed; half-open sockets end so.

  Attributes:
    metadata: what is sent to clients. busy: requests that are being read, computed or answered.
  """

  def __init__(
    self,
    core: Core,
    metrics: Metrics,
    grippers: Mapping[str, str],
    *,
    max_bytes: int = 32 << 20,
    body_timeout: float = 30.0,
    idle_timeout: float = 1800.0,
  ):
    self.core, self.metrics, self.grippers = core, metrics, dict(grippers)
    self.max_bytes, self.body_timeout, self.idle_timeout = max_bytes, body_timeout, idle_timeout
    self.busy = 0
    self.own = core.policy.metadata
    settings = core.settings
    limits = {
      "max_batch": settings.max_batch,
      "deadline_ms": 1e3 * settings.deadline,
      "requests_under_way": settings.depth,
      "request_bytes": max_bytes,
      "idle_timeout_s": idle_timeout,
      "actions": core.limit.describe(),
    }
    self.metadata = contract.describe(core.policy, limits, self.grippers, contract.device(), [*core.units])

  async def ask(self, door: str, observation: Any, session: str, unnorm_key: Any = None) -> Answer:
    """An observation's actions, counted under a door's name.

    Raises:
      Refused: see `Core.infer`.
    """
    begin = time.monotonic()
    own = dict(session=session, gripper=self.grippers[door], unnorm_key=unnorm_key)
    answer = await self.core.infer(observation, **own)
    self.metrics.answered(door, answer, time.monotonic() - begin)
    return answer

  def refusal(self, door: str, error: Exception) -> Refused:
    """The error to answer with, counted: a Refused as it is, a ValueError as a bad request, anything else logged."""
    if not isinstance(error, Refused):
      if isinstance(error, ValueError):
        error = Refused("bad_request", str(error))
      else:
        logging.error("%s: %s", door, cli.first_line(error), exc_info=error)
        error = Refused("failed", "the server failed; its log says why")
    self.metrics.error(door, error.kind)
    return error

  @contextlib.contextmanager
  def working(self) -> Iterator[None]:
    """Counts a request until its answer is sent: a server that shuts down waits for it."""
    self.busy += 1
    try:
      yield
    finally:
      self.busy -= 1

  @contextlib.asynccontextmanager
  async def opened(self, door: str, websocket: WebSocket) -> AsyncIterator[None]:
    """Accepts a websocket and counts it while it is open; a client that leaves ends the block."""
    await websocket.accept()
    self.metrics.client(door, 1)
    try:
      with contextlib.suppress(WebSocketDisconnect):
        yield
    finally:
      self.metrics.client(door, -1)

  async def frames(self, websocket: WebSocket) -> AsyncIterator[bytes | str]:
    """A client's frames until it leaves, or sends none for `idle_timeout` seconds."""
    while True:
      try:
        message = await asyncio.wait_for(websocket.receive(), self.idle_timeout)
      except TimeoutError:
        await websocket.close(1001, "idle")
        return
      if message["type"] == "websocket.disconnect":
        return
      yield message["bytes"] if message.get("bytes") is not None else message["text"]

  async def body(self, request: Request) -> bytes:
    """A request's body.

    Raises:
      Refused: it is larger than `max_bytes`, or does not arrive in time, or the client left.
    """
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > self.max_bytes:
      raise Refused("too_large", f"a body of {declared:.20} bytes; at most {self.max_bytes} are read")
    try:
      async with asyncio.timeout(self.body_timeout):
        return await self._read(request)
    except TimeoutError:
      raise Refused("timeout", f"the body did not arrive within {self.body_timeout:g} s") from None
    except ClientDisconnect:
      raise Refused("timeout", "the client left") from None

  async def _read(self, request: Request) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
      size += len(chunk)
      if size > self.max_bytes:
        raise Refused("too_large", f"a body of more than {self.max_bytes} bytes, the most that are read")
      chunks.append(chunk)
    return b"".join(chunks)


def session(connection: HTTPConnection) -> str:
  """What distinguishes one connection from another."""
  return "?" if connection.client is None else f"{connection.client.host}:{connection.client.port}"


def json_error(refused: Refused) -> Response:
  """An HTTP answer with the error's status and one line."""
  headers = {} if refused.retry_after is None else {"Retry-After": str(max(1, round(refused.retry_after)))}
  body = wire.dump_json({"error": str(refused), "kind": refused.kind})
  return Response(body, refused.status, headers, "application/json")
