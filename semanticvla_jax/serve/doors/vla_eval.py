"""vla-eval's protocol (0.8, version 1) at `/vla-eval`: the client speaks first, and gets one action per observation.

    → hello            ← hello, with what the benchmark should send and how the actions are meant
    → episode_start
    → observation      ← action, of the same seq
    → episode_end

The server owns the chunk: one buffer per connection, emptied when an episode starts; an empty one asks the policy.
`GET /health` and `GET /config?max_batch_size=8&max_wait_time=0.01` are what its tools ask for.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket

from semanticvla_jax.serve import wire
from semanticvla_jax.serve.core import Refused
from semanticvla_jax.serve.doors import status
from semanticvla_jax.serve.site import Site, json_error, session

VERSION, PROTOCOL = "0.8.0", 1
_SILENT = ("episode_start", "episode_end", "error")  # messages without an answer


class _Connection:
  """One benchmark: its buffer of actions."""

  def __init__(self, site: Site, who: str):
    self._site, self._who = site, who
    self._buffer: collections.deque[np.ndarray] = collections.deque()

  async def answer(self, frame: bytes | str) -> bytes | None:
    """The reply to a frame; None where the protocol has none."""
    message: Any = None
    try:
      message = wire.unpack(frame)
      kind, payload = _parts(message)
      if kind == "episode_start":
        self._buffer.clear()
      if kind in _SILENT:
        return None
      answer = hello(self._site) if kind == "hello" else {"actions": await self._action(payload)}
      return _message("hello" if kind == "hello" else "action", answer, message.get("seq"))
    except Exception as error:  # of any kind: the benchmark gets one line and isolates the episode
      refused = self._site.refusal("vla_eval", error)
      seq = message.get("seq") if isinstance(message, Mapping) else None
      return _message("error", {"error": f"observation_failed: {refused.kind}: {refused}"}, seq)

  async def _action(self, payload: Mapping) -> np.ndarray:
    if not self._buffer:
      answer = await self._site.ask("vla_eval", payload, self._who)
      self._buffer.extend(answer.actions[: self._site.own["replay"]])
    return self._buffer.popleft()


async def serve(site: Site, websocket: WebSocket) -> None:
  """One connection."""
  one = _Connection(site, session(websocket))
  async with site.opened("vla_eval", websocket):
    async for frame in site.frames(websocket):
      with site.working():
        if (reply := await one.answer(frame)) is not None:
          await websocket.send_bytes(reply)


def hello(site: Site) -> dict[str, Any]:
  """What the server says of itself: observation_params name what the benchmark should send."""
  views, dataset = site.own["views"], str(site.own.get("dataset"))
  wanted = {"send_state": site.own["proprio_dim"] is not None, "send_wrist_image": any("wrist" in x for x in views)}
  if dataset.startswith("libero"):
    wanted["quat_no_antipodal"] = True
  found = {
    "harness_version": VERSION,
    "protocol_version": PROTOCOL,
    "model_server": site.metadata["server"],
    "capabilities": {},
    "observation_params": wanted,
  }
  if site.metadata.get("actions", [])[3:] == ["roll", "pitch", "yaw", "gripper"] and dataset.startswith("libero"):
    found |= {"action_spec": _action_spec(site), "observation_spec": _observation_spec(site)}
  return found


def _action_spec(site: Site) -> dict[str, Any]:
  spec = {
    "position": {"name": "position", "dims": 3, "format": "delta_xyz"},
    "rotation": {"name": "rotation", "dims": 3, "format": "axis_angle"},
  }
  if site.grippers["vla_eval"] == "command":
    spec["gripper"] = {"name": "gripper", "dims": 1, "format": "binary_close_positive"}
  return spec


def _observation_spec(site: Site) -> dict[str, Any]:
  image = lambda name: {"name": name, "dims": 0, "format": "rgb_hwc_uint8"}  # noqa: E731
  names = ["agentview", "wrist"][: len(site.own["views"])]
  spec = {name: image(name) for name in names}
  if site.own["proprio_dim"] == 8:
    spec["state"] = {"name": "state", "dims": 8, "format": "eef_pos3_axisangle3_gripper2"}
  return spec | {"language": {"name": "language", "dims": 0, "format": "language"}}


async def config(site: Site, request: Request) -> Response:
  """Reads and sets how the core batches, within what is compiled: max_batch_size, and max_wait_time in seconds."""
  settings = site.core.settings
  try:
    given = request.query_params
    batch = int(given.get("max_batch_size", settings.max_batch))
    wait = float(given.get("max_wait_time", settings.max_wait))
    largest = max(site.own["batch_sizes"])
    if not 1 <= batch <= largest or not 0 <= wait <= 1:
      expected = f"max_batch_size of 1 to {largest}, max_wait_time of 0 to 1 s"
      raise Refused("bad_request", f"max_batch_size={batch}, max_wait_time={wait:g}; expected {expected}")
  except (ValueError, Refused) as error:
    return json_error(site.refusal("vla_eval", error))
  site.core.settings = settings._replace(max_batch=batch, max_wait=wait)
  return JSONResponse({"max_batch_size": batch, "max_wait_time": wait})


async def health(site: Site, request: Request) -> Response:
  """As `/readyz`."""
  return await status.readyz(site, request)


def _parts(message: Any) -> tuple[str, Mapping]:
  kinds = ("hello", "observation", *_SILENT)
  if not isinstance(message, Mapping) or message.get("type") not in kinds:
    got = message.get("type") if isinstance(message, Mapping) else type(message).__name__
    raise Refused("bad_request", f"a message {got!r:.40}; expected a map with a type of {', '.join(kinds)}")
  payload = message.get("payload", {})
  if not isinstance(payload, Mapping):
    raise Refused("bad_request", f"a payload of {type(payload).__name__}; expected a map")
  return message["type"], payload


def _message(kind: str, payload: Mapping, seq: Any) -> bytes:
  seq = seq if isinstance(seq, int) else 0
  return wire.pack_str({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})
