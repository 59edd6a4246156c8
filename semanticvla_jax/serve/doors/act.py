"""`POST /act`: OpenVLA's, OpenVLA-OFT's and MolmoAct2's clients, JSON with json-numpy's arrays.

    OpenVLA     {image, instruction, unnorm_key?}                    → f32[a], the first action of the chunk
    OFT         {full_image, wrist images…, state, instruction}      → a list of f32[a]
    MolmoAct2   {cameras…, state, instruction, num_steps}            → {"actions": f32[n a], "dt_ms"}

`dt_ms` is the time between two actions, at which the client executes them: of the robot's description, or 0 where it
does not say, which leaves the rate to the client.
A body {"encoded": JSON text} gets JSON text in a JSON string. No Content-Type is asked for. An error has a status and a
body {"error", "kind"}. `GET /act` is 200 when the server is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from semanticvla_jax import observation_dict
from semanticvla_jax.serve import wire
from semanticvla_jax.serve.core import Refused
from semanticvla_jax.serve.doors import status
from semanticvla_jax.serve.site import Site, json_error


async def act(site: Site, request: Request) -> Response:
  """One observation."""
  if request.method == "GET":
    return await status.readyz(site, request)
  with site.working():
    try:
      body = await site.body(request)
      value, encoded = await site.core.in_pool(_decoded, body)
      observation, shape = _observation(value, site.own["views"])
      who = "?" if request.client is None else request.client.host  # most clients open a connection for each request
      answer = await site.ask("act", observation, who, value.get("unnorm_key"))
      period_ms = site.core.units_of(value.get("unnorm_key")).period_ms
      return Response(_encoded(shape(answer.actions, period_ms), encoded), media_type="application/json")
    except Exception as error:  # of any kind: the client gets one line
      return json_error(site.refusal("act", error))


def _decoded(body: bytes) -> tuple[Mapping, bool]:
  value, encoded = wire.load_json(body)
  if not isinstance(value, Mapping):
    raise Refused("bad_request", f"a body of {type(value).__name__}; expected a map, the observation")
  return value, encoded


def _encoded(value: Any, encoded: bool) -> str:
  text = wire.dump_json(value)
  return wire.dump_json(text) if encoded else text


def _observation(value: Mapping[str, Any], views: Sequence[str]) -> tuple[dict[str, Any], Callable]:
  """The observation without the other entries, and which of the functions below gives its client's answer."""
  seen = {key: one for key, one in value.items() if key not in ("unnorm_key", "num_steps")}
  if "num_steps" in value:
    return seen, _molmoact
  if "full_image" not in value:
    return seen, _openvla
  wrists = [view for view in views if "wrist" in view]
  sent = [key for key in seen if "wrist" in key]
  known = {alias for view in wrists for alias in observation_dict.ALIASES.get(view, (view,))}
  if len(sent) == len(wrists) and not known.issuperset(sent):  # OFT takes them in the order in which they were sent
    seen |= {view: seen.pop(key) for view, key in zip(wrists, sent)}
  return seen, _oft


def _openvla(actions: np.ndarray, period_ms: float) -> Any:
  return actions[0]


def _oft(actions: np.ndarray, period_ms: float) -> Any:
  return [*actions]


def _molmoact(actions: np.ndarray, period_ms: float) -> Any:
  return {"actions": actions, "dt_ms": period_ms}
