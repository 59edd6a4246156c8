"""starVLA's requests, in openpi's frames and at openpi's address.

→ {"examples": [{"image": [u8 h w 3, …], "lang", "state"?}, …], "unnorm_key"?}, or that as `payload` of
      {"type": "infer", "request_id", "payload"}
← {"status": "ok", "ok": true, "type": "inference_result", "request_id", "data": {"actions": f32[b k a]}}
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from semanticvla_jax import observation_dict
from semanticvla_jax.serve.core import Refused
from semanticvla_jax.serve.site import Site

MOST = 64  # examples of one request


def is_for(request: Mapping[str, Any]) -> bool:
  """Whether a frame is one of starVLA's."""
  return "examples" in request or ("type" in request and ("payload" in request or request["type"] == "ping"))


async def answer(site: Site, request: Mapping[str, Any], who: str) -> dict[str, Any]:
  """The reply to one request; errors are maps too."""
  known = {"request_id": request.get("request_id", "")}
  try:
    if request.get("type", "infer") == "ping":
      return {"status": "ok", "ok": True, "type": "pong", **known}
    payload = request.get("payload", request) if "type" in request else request
    if request.get("type", "infer") != "infer" or not isinstance(payload, Mapping):
      raise Refused("bad_request", f"type {request.get('type')!r:.40}; expected 'infer' with a payload, or 'ping'")
    examples = _examples(payload.get("examples"), site.own["views"])
    asked = [site.ask("starvla", one, f"{who}/{i}", payload.get("unnorm_key")) for i, one in enumerate(examples)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    if failed := [one for one in answers if isinstance(one, BaseException)]:
      raise failed[0]
    data = {"actions": np.stack([one.actions for one in answers])}
    return {"status": "ok", "ok": True, "type": "inference_result", **known, "data": data}
  except Exception as error:  # of any kind: the client gets one line
    refused = site.refusal("starvla", error)
    message = {"message": str(refused), "kind": refused.kind}
    return {"status": "error", "ok": False, "type": "error", **known, "error": message}


def _examples(examples: Any, views: Sequence[str]) -> list[dict[str, Any]]:
  """Each example as an observation dict: its images in the order of the policy's views."""
  if not isinstance(examples, list) or not 1 <= len(examples) <= MOST:
    got = f"{len(examples)} of them" if isinstance(examples, list) else type(examples).__name__
    raise Refused("bad_request", f"examples: got {got}; expected a list of 1 to {MOST} maps")
  return [_observation(one, views) for one in examples]


def _observation(example: Any, views: Sequence[str]) -> dict[str, Any]:
  images = example.get("image") if isinstance(example, Mapping) else None
  if not isinstance(images, list) or len(images) < len(views):
    raise Refused("bad_request", f"an example's image: expected a list of {len(views)} arrays, {', '.join(views)}")
  found = {observation_dict.ALIASES.get(view, (view,))[0]: image for view, image in zip(views, images)}
  state = example.get("state")
  if isinstance(state, np.ndarray) and state.ndim == 2 and len(state) == 1:
    state = state[0]
  return found | {"observation/state": state, "prompt": example.get("lang")}
