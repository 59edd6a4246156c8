"""GR00T's protocol (ZMQ, msgpack) on a separate port; an answer is in the codec of its request.

    → {"endpoint": "get_action", "data": {"observation": {"video": {name: u8[b t h w 3]}, "state": {name: f32[b t d]},
       "language": {name: [[text]]}}}, "api_token"?}
    ← [{name: f32[b k n] for every group of the action}, {}]

A known robot's groups are its single dimensions (x, y, …), another's those of its description. Of every array the last
moment is read. The state goes by the columns of the robot's description if the client sends these; otherwise its parts
follow each other in the order in which they were sent.
N1.6's arrays are files of np.save, N1.7's those of msgpack-numpy; neither may hold objects. `kill` is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import math
import threading
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
import zmq

from semanticvla_jax.errors import refuse
from semanticvla_jax.serve import wire
from semanticvla_jax.serve.core import Refused
from semanticvla_jax.serve.observations import assign_views
from semanticvla_jax.serve.site import Site

MOST_BATCH = 64
_POLL = 200  # milliseconds between two looks at whether to end


class Door:
  """The ZMQ server: one request at a time, as the protocol has it.

  Args:
    site: whose core answers, on the event loop `loop`.
    port: 0 lets the system choose.
    key: which requests carry as `api_token`.
  """

  def __init__(self, site: Site, loop: asyncio.AbstractEventLoop, host: str, port: int, *, key: str | None = None):
    self._site, self._loop, self._key = site, loop, None if key is None else key.encode()
    self._context = zmq.Context()
    self._socket = self._context.socket(zmq.REP)
    self._socket.setsockopt(zmq.MAXMSGSIZE, site.max_bytes)
    self._socket.setsockopt(zmq.LINGER, 1000)
    self._socket.bind(f"tcp://{host}:{port or '*'}")
    self.port = int(self._socket.getsockopt(zmq.LAST_ENDPOINT).rpartition(b":")[2])
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, name="groot", daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Ends the server, after the request under way."""
    self._ended.set()
    self._thread.join()
    self._socket.close()
    self._context.term()

  def _run(self) -> None:
    while not self._ended.is_set():
      if self._socket.poll(_POLL):
        frame = self._socket.recv()
        with contextlib.suppress(zmq.ZMQError):  # the client left
          self._socket.send(self._answer(frame))

  def _answer(self, frame: bytes) -> bytes:
    codec = _Codec()
    try:
      request = codec.unpack(frame)
      if not isinstance(request, Mapping):
        raise Refused("bad_request", f"a frame of {type(request).__name__}; expected a map with an endpoint")
      token = str(request.get("api_token") or "")
      if self._key is not None and not hmac.compare_digest(token.encode(), self._key):
        raise Refused("unauthorized", "Unauthorized: no api_token, or a wrong one")
      return codec.pack(self._endpoint(request.get("endpoint", "get_action"), request.get("data") or {}))
    except Exception as error:  # of any kind: the client gets one line
      return codec.pack({"error": str(self._site.refusal("groot", error))})

  def _endpoint(self, name: Any, data: Any) -> Any:
    if name == "ping":
      return {"status": "ok", "message": "Server is running"}
    if name == "reset":
      return {}
    if name == "get_modality_config":
      return self._modalities()
    if name != "get_action" or not isinstance(data, Mapping):
      raise Refused(
        "bad_request", f"endpoint {name!r:.40}; expected get_action with data, ping, reset or get_modality_config"
      )
    rows = observations(data.get("observation", data), self._site.own["views"], columns(self._site.own))
    actions = asyncio.run_coroutine_threadsafe(self._ask(rows), self._loop).result()
    return [{name: np.ascontiguousarray(actions[..., own]) for name, own in groups(self._site.metadata).items()}, {}]

  async def _ask(self, rows: list[dict[str, Any]]) -> np.ndarray:
    """f32[b k a]."""
    asked = [self._site.ask("groot", row, f"groot {i}") for i, row in enumerate(rows)]
    return np.stack([one.actions for one in await asyncio.gather(*asked)])

  def _modalities(self) -> dict[str, Any]:
    own, metadata = self._site.own, self._site.metadata
    keys = {"video": own["views"], "language": ["task"], "action": groups(metadata)}
    keys |= {} if own["proprio_dim"] is None else {"state": metadata.get("state") or columns(own) or ["state"]}
    moments = {"action": [*range(own["chunk"])]}
    return {name: {"delta_indices": moments.get(name, [0]), "modality_keys": [*found]} for name, found in keys.items()}


def groups(metadata: Mapping[str, Any]) -> dict[str, Sequence[int]]:
  """{name: dimensions of the action}: single ones where they have names, else the robot's groups, else all of them."""
  if names := metadata.get("actions"):
    return {name: [i] for i, name in enumerate(names)}
  described = (metadata.get("robot") or {}).get("groups")
  return described or {"action": range(metadata["action_dim"])}


def columns(metadata: Mapping[str, Any]) -> list[str]:
  """Names of the columns whose values make the state; [] where the policy's robot has no description."""
  return [key.removeprefix("observation/") for key in (metadata.get("robot") or {}).get("proprio", ())]


def observations(given: Any, views: Sequence[str], columns: Sequence[str] = ()) -> list[dict[str, Any]]:
  """One observation dict for each of the batch.

  Args:
    given: what a client sent. views: of the policy.
    columns: of its state. A client that names all of them may send them in any order, and others, which are not read.

  Raises:
    Refused: groups are missing, or of different batches.
  """
  groups = [given.get(name) if isinstance(given, Mapping) else None for name in ("video", "state", "language")]
  video, state, language = groups
  if not isinstance(video, Mapping) or not isinstance(language, Mapping) or not isinstance(state or {}, Mapping):
    raise Refused("bad_request", "the observation needs maps video and language, and state where the policy reads one")
  pictures = {view: _last(video[name], 5) for view, name in assign_views(views, [*video]).items()}
  states = {name: _last(value, 3) for name, value in (state or {}).items()}
  texts = next(iter(language.values()), None)
  size = len(texts) if isinstance(texts, list) else 0
  if not 1 <= size <= MOST_BATCH or any(len(one) != size for one in (*pictures.values(), *states.values())):
    raise Refused(
      "bad_request", f"a language of {size}; expected 1 to {MOST_BATCH} texts, and as many images and states"
    )
  parts = [states[name] for name in (columns if columns and {*columns} <= {*states} else states)]
  joined = np.concatenate(parts, axis=1) if parts else None
  rows = []
  for i, text in enumerate(texts):
    text = text[-1] if isinstance(text, list) and text else text
    row = {view: one[i] for view, one in pictures.items()} | {"prompt": text}
    rows.append(row if joined is None else row | {"state": joined[i]})
  return rows


def _last(value: Any, axes: int) -> np.ndarray:
  """[b t …] → [b …]: the last moment."""
  if not isinstance(value, np.ndarray) or value.ndim != axes or not value.shape[1]:
    got = f"{value.dtype}{[*value.shape]}" if isinstance(value, np.ndarray) else type(value).__name__
    raise Refused("bad_request", f"a group of {got}; expected an array of {axes} axes, batch and time in front")
  return value[:, -1]


class _Codec:
  """Reads both generations' arrays, and writes those of the generation that was read."""

  def __init__(self) -> None:
    self._npy = False

  def unpack(self, frame: bytes) -> Any:
    """See `wire.unpack`."""
    return wire.unpack(frame, self._array)

  def pack(self, value: Any) -> bytes:
    """A frame."""
    return msgpack.packb(value, default=_npy if self._npy else _msgpack_numpy)

  def _array(self, found: dict) -> Any:
    if "__ndarray_class__" in found:
      self._npy = True
      return read_npy(found.get("as_npy"))
    if b"nd" in found:
      shape = found.get(b"shape") if found[b"nd"] else ()
      return wire.array(found.get(b"data"), found.get(b"type"), shape)
    return found


def _msgpack_numpy(array: np.ndarray) -> dict:
  return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}


def _npy(array: np.ndarray) -> dict:
  file = io.BytesIO()
  np.save(file, array, allow_pickle=False)
  return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def read_npy(data: Any) -> np.ndarray:
  """The array of a file of np.save; its length is compared with its shape before anything is allocated.

  Raises:
    ValueError: it is not one, or holds other elements than numbers.
  """
  try:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file, max_header_size=1000)
    rest = data[file.tell() :]
    if dtype.hasobject or len(rest) != math.prod(shape) * dtype.itemsize:
      raise ValueError
    array = wire.array(rest, dtype.str, shape[::-1] if fortran else shape)
  except (ValueError, TypeError, EOFError, SyntaxError, tokenize.TokenError) as error:
    raise refuse("Array", "bytes that are not a file of np.save with numbers", "one", "send np.save's bytes") from error
  return array.T if fortran else array
