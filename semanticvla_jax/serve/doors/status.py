"""How the server is: alive, ready, what it serves, what it counted."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from semanticvla_jax.serve.site import Site


async def healthz(site: Site, request: Request) -> Response:
  """Alive: 200 `OK` while the process answers (openpi's clients wait for this address)."""
  return PlainTextResponse("OK")


async def readyz(site: Site, request: Request) -> Response:
  """Ready: 200 while requests are answered without compiling; 503 while the server shuts down."""
  if site.core.alive:
    return JSONResponse({"status": "ok"})
  return JSONResponse({"status": "draining"}, 503, {"Retry-After": "5"})


async def metadata(site: Site, request: Request) -> Response:
  """What a client has to know before it acts: see `contract.describe`."""
  return JSONResponse(site.metadata)


async def metrics(site: Site, request: Request) -> Response:
  """Prometheus' text format."""
  return Response(site.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
