"""openpi's protocol: websocket and msgpack, the server speaks first; unmodified `openpi-client` works.

    ← metadata      → observation      ← {"actions": f32[k a], "policy_timing", "server_timing"}

An error is a text frame of one line, as openpi's client expects it; the connection stays open for the next request.
RoboArena's clients add `endpoint` to every observation and get the bare array; starVLA's send `examples`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.websockets import WebSocket

from semanticvla_jax.serve import wire
from semanticvla_jax.serve.core import Answer, Refused
from semanticvla_jax.serve.doors import starvla
from semanticvla_jax.serve.site import Site, session

RESET = "reset successful"  # what RoboArena's clients wait for


async def serve(site: Site, websocket: WebSocket) -> None:
  """One connection at `/`."""
  await _serve(site, websocket, site.metadata)


async def serve_roboarena(site: Site, websocket: WebSocket) -> None:
  """One connection at `/roboarena`, whose clients accept these six fields of metadata and no others."""
  size, views = site.own["image_size"], site.own["views"]
  record = {
    "image_resolution": [size, size],
    "needs_wrist_camera": any("wrist" in view for view in views),
    "n_external_cameras": sum("wrist" not in view for view in views),
    "needs_stereo_camera": False,
    "needs_session_id": False,
    "action_space": "joint_position" if site.metadata.get("absolute", [False])[0] else "cartesian_velocity",
  }
  await _serve(site, websocket, record)


async def _serve(site: Site, websocket: WebSocket, metadata: Mapping) -> None:
  who, previous = session(websocket), None
  async with site.opened("openpi", websocket):
    await websocket.send_bytes(wire.pack(metadata))
    async for frame in site.frames(websocket):
      begin = time.perf_counter()
      with site.working():
        reply = await _answer(site, frame, who, begin, previous)
        await (websocket.send_text if isinstance(reply, str) else websocket.send_bytes)(reply)
      previous = time.perf_counter() - begin


async def _answer(site: Site, frame: bytes | str, who: str, begin: float, previous: float | None) -> bytes | str:
  request: Any = None
  try:
    request = wire.unpack(frame)
    if not isinstance(request, Mapping):
      raise Refused("bad_request", f"a frame of {type(request).__name__}; expected a map, the observation")
    if starvla.is_for(request):
      return wire.pack(await starvla.answer(site, request, who))
    endpoint = request.get("endpoint")
    if endpoint == "reset":
      return RESET
    if endpoint not in (None, "infer"):
      raise Refused("bad_request", f"endpoint {endpoint!r:.40}; expected 'infer' or 'reset'")
    door = "openpi" if endpoint is None else "roboarena"
    answer = await site.ask(door, request, who, request.get("unnorm_key"))
    return wire.pack(answer.actions if endpoint else _reply(answer, begin, previous))
  except Exception as error:  # of any kind: the client gets one line
    return _error(site, error)


def _reply(answer: Answer, begin: float, previous: float | None) -> dict[str, Any]:
  policy = {f"{layer}_ms": 1e3 * seconds for layer, seconds in answer.seconds.items()}
  server = {"infer_ms": 1e3 * (time.perf_counter() - begin)}
  if previous is not None:
    server["prev_total_ms"] = 1e3 * previous
  return {"actions": np.asarray(answer.actions), "policy_timing": policy, "server_timing": server}


def _error(site: Site, error: Exception) -> str:
  refused = site.refusal("openpi", error)
  return f"{refused.kind}: {refused}"
