"""The routes of the one port: every protocol and the status pages, behind the gate."""

from __future__ import annotations

import functools
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute

from semanticvla_jax.serve.doors import act, openpi, status, vla_eval
from semanticvla_jax.serve.gate import Gate
from semanticvla_jax.serve.site import Site

WEBSOCKETS = {
  "/": openpi.serve,
  "/v1/realtime/robot/openpi": openpi.serve,  # vllm-omni's address of the same protocol
  "/roboarena": openpi.serve_roboarena,
  "/vla-eval": vla_eval.serve,
}
PAGES = {
  "/healthz": status.healthz,
  "/readyz": status.readyz,
  "/metadata": status.metadata,
  "/metrics": status.metrics,
  "/health": vla_eval.health,
  "/config": vla_eval.config,
  # vla-eval's tools append these to the address of the websocket, whatever its path
  "/vla-eval/health": vla_eval.health,
  "/vla-eval/config": vla_eval.config,
}


def app(site: Site, key: str | None = None, clients: int = 256) -> Any:
  """The ASGI application of a site.

  Args:
    key: what every request but those of gate.OPEN has to carry; None for no key.
    clients: websockets that may be open at the same time.
  """
  routes: list[Any] = [WebSocketRoute(path, functools.partial(door, site)) for path, door in WEBSOCKETS.items()]
  routes += [Route(path, functools.partial(page, site), methods=["GET"]) for path, page in PAGES.items()]
  routes.append(Route("/act", functools.partial(act.act, site), methods=["GET", "POST"]))
  return Gate(Starlette(routes=routes), key, functools.partial(site.metrics.error, "gate"), clients)
