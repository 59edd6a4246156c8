"""Who may come in: an API key compared in constant time on every door, and no requests of web pages."""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket

from semanticvla_jax.errors import refuse
from semanticvla_jax.serve.core import KINDS

OPEN = ("/healthz", "/readyz", "/health")  # probes of orchestrators carry no key
_SCHEMES = ("api-key", "bearer")
_SHORTEST = 16  # characters of a key


def read_key(path: str | os.PathLike) -> str:
  """The key that a file holds, without white space around it.

  Raises:
    ValueError: it cannot be read, is not text, or the key is short enough to be guessed.
  """
  try:
    key = Path(path).read_text(encoding="utf-8").strip()
  except (OSError, UnicodeError) as error:
    got = f"a file that cannot be read ({error})"
    raise refuse(f"--api-key-file {path}", got, "a text file that holds the key", "check the path") from error
  if len(key) < _SHORTEST:
    got = f"a key of {len(key)} characters"
    raise refuse(f"--api-key-file {path}", got, f"at least {_SHORTEST}", "choose a longer one: openssl rand -hex 32")
  return key


class Gate:
  """ASGI middleware that answers 401 without the key and 403 to other web pages' requests, before a door sees them.

  A browser sends `Origin`; a page of another site could otherwise move a robot through a server on loopback.

  Args:
    app: behind it. key: None lets everyone in. errors: called with the kind of each refusal.
    clients: websockets that may be open at the same time.
  """

  def __init__(self, app: Any, key: str | None, errors: Callable[[str], None], clients: int):
    self._app, self._key, self._errors = app, None if key is None else key.encode(), errors
    self._clients, self._opened = clients, 0

  async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
    """See ASGI."""
    refused = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
    if refused is None:
      is_websocket = scope["type"] == "websocket"
      self._opened += is_websocket
      try:
        await self._app(scope, receive, send)
      finally:
        self._opened -= is_websocket
      return
    kind, message = refused
    self._errors(kind)
    response = JSONResponse({"error": message, "kind": kind}, KINDS[kind])
    if scope["type"] == "http":
      await response(scope, receive, send)
    else:
      await WebSocket(scope, receive, send).send_denial_response(response)

  def _refusal(self, scope: dict) -> tuple[str, str] | None:
    headers = Headers(scope=scope)
    if _of_another_page(headers):
      return "forbidden", "requests of web pages are not answered"
    if scope["type"] == "websocket" and self._opened >= self._clients:
      return "overloaded", f"{self._opened} clients are connected, the most there may be"
    if self._key is None or scope["path"] in OPEN:
      return None
    scheme, _, given = headers.get("authorization", "").partition(" ")
    given = given.strip() if scheme.lower() in _SCHEMES else headers.get("x-api-key", "")
    if hmac.compare_digest(given.encode(), self._key):
      return None
    return "unauthorized", "no key, or a wrong one; send the header Authorization: Api-Key KEY"


def _of_another_page(headers: Headers) -> bool:
  """Whether a browser sends this for a page that is not this server's own.

  A page's own name may point at this machine (DNS rebinding): its own are those of an address or of localhost.
  """
  if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
    return True
  origin = headers.get("origin")
  if origin is None:
    return False
  try:
    where = urlsplit(origin)
    is_address = where.hostname == "localhost" or bool(ipaddress.ip_address(where.hostname or ""))
  except ValueError:
    return True
  return not is_address or where.netloc != headers.get("host")
