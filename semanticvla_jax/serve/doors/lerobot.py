"""LeRobot's asynchronous inference (gRPC, its RobotClient of 0.4.2 and later), on a separate port.

    → Ready      → SendPolicyInstructions: a pickle, which features the robot has
    → SendObservations: a pickle      → GetActions      ← a pickle, [TimedAction, …]

No pickle is executed, and neither torch nor lerobot is needed: see `safe_pickle`. Several robots may be connected. The
robot's numbers have no names in an answer: action i goes to its i-th motor. Its state is read in the order of its
features, its cameras by name where the policy's views have such names, otherwise in their order.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import numpy as np

from semanticvla_jax.serve import safe_pickle
from semanticvla_jax.serve.core import KINDS, Refused
from semanticvla_jax.serve.observations import assign_views
from semanticvla_jax.serve.site import Site

SERVICE = "transport.AsyncInference"
WAIT = 2.0  # seconds that GetActions waits for an observation before it answers that there is none
MOST_ROBOTS = 32
_STATE, _IMAGES, _BYTES = "observation.state", "observation.images.", 2  # wire type of length-delimited fields
_STATUS = {
  400: grpc.StatusCode.INVALID_ARGUMENT,
  401: grpc.StatusCode.UNAUTHENTICATED,
  413: grpc.StatusCode.RESOURCE_EXHAUSTED,
  503: grpc.StatusCode.UNAVAILABLE,
  504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class _Robot:
  """One client: its features and its latest observation."""

  def __init__(self) -> None:
    self.state: list[str] = []
    self.cameras: list[str] = []
    self.most = 10**6  # actions of an answer
    self.latest: dict[str, Any] | None = None
    self.arrived = threading.Condition()
    self.seen = time.monotonic()


class Door:
  """The gRPC server.

  Args:
    site: whose core answers, on the event loop `loop`.
    port: 0 lets the system choose.
    fps: of the robot, for the time stamps of the actions.
    key: see gate; clients send it as the metadata `authorization`. LeRobot's own client sends none.
  """

  def __init__(
    self,
    site: Site,
    loop: asyncio.AbstractEventLoop,
    host: str,
    port: int,
    *,
    fps: float = 30.0,
    key: str | None = None,
  ):
    self._site, self._loop, self._period = site, loop, 1.0 / fps
    self._key = None if key is None else f"Api-Key {key}".encode()
    self._robots: dict[str, _Robot] = {}
    self._lock = threading.Lock()
    options = [("grpc.max_receive_message_length", 4 << 20), ("grpc.so_reuseport", 0)]
    self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(2 * MOST_ROBOTS, "lerobot"), options=options)
    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_unary_rpc_method_handler
    methods = {
      "Ready": unary(self._guarded(self._ready)),
      "SendPolicyInstructions": unary(self._guarded(self._instructions)),
      "SendObservations": stream(self._guarded(self._observations)),
      "GetActions": unary(self._guarded(self._actions)),
    }
    self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, methods)])
    self.port = self._server.add_insecure_port(f"{host}:{port}")
    self._server.start()

  def close(self) -> None:
    """Ends the server, after what is under way."""
    self._server.stop(5.0).wait()

  def _guarded(self, method: Callable[[_Robot, Any], bytes]) -> Callable[[Any, grpc.ServicerContext], bytes]:
    def call(request: Any, context: grpc.ServicerContext) -> bytes:
      try:
        given = dict(context.invocation_metadata()).get("authorization", "")
        if self._key is not None and not hmac.compare_digest(given.encode(), self._key):
          raise Refused("unauthorized", "no key, or a wrong one; send the metadata authorization: Api-Key KEY")
        return method(self._robot(context.peer()), request)
      except Exception as error:  # of any kind: the client gets one line
        refused = self._site.refusal("lerobot", error)
      context.abort(_STATUS.get(KINDS[refused.kind], grpc.StatusCode.INTERNAL), str(refused))

    return call

  def _robot(self, peer: str) -> _Robot:
    """The robot of a connection; beyond MOST_ROBOTS the one that was silent for longest is forgotten."""
    with self._lock:
      robot = self._robots.setdefault(peer, _Robot())
      robot.seen = time.monotonic()
      if len(self._robots) > MOST_ROBOTS:
        del self._robots[min(self._robots, key=lambda one: self._robots[one].seen)]
    return robot

  def _ready(self, robot: _Robot, request: bytes) -> bytes:
    if not self._site.core.alive:
      raise Refused("draining", "the server is shutting down")
    robot.latest = None
    return b""

  def _instructions(self, robot: _Robot, request: bytes) -> bytes:
    setup = safe_pickle.load(_field(request, 1))
    features = setup.get("lerobot_features") if isinstance(setup, Mapping) else None
    if not isinstance(features, Mapping):
      raise Refused("bad_request", "the policy's setup has no lerobot_features")
    state = features.get(_STATE)
    names = state.get("names") if isinstance(state, Mapping) else None
    robot.state = [name for name in names or [] if isinstance(name, str)]
    robot.cameras = [name.removeprefix(_IMAGES) for name in features if name.startswith(_IMAGES)]
    most = setup.get("actions_per_chunk")
    robot.most = most if isinstance(most, int) and most > 0 else robot.most
    return b""

  def _observations(self, robot: _Robot, chunks: Iterator[bytes]) -> bytes:
    parts, size = [], 0
    for chunk in chunks:
      parts.append(_field(chunk, 2))
      size += len(parts[-1])
      if size > self._site.max_bytes:
        raise Refused("too_large", f"an observation of more than {self._site.max_bytes} bytes")
    timed = safe_pickle.load(b"".join(parts))
    wanted = {"timestamp": (int, float), "timestep": int, "observation": Mapping}
    if not isinstance(timed, Mapping) or not all(isinstance(timed.get(name), kind) for name, kind in wanted.items()):
      raise Refused("bad_request", "the pickle is not a TimedObservation")
    if not 0 <= timed["timestep"] < 2**30:
      raise Refused("bad_request", f"timestep {timed['timestep']!r:.40}; expected 0 to 2^30")
    if not abs(timed["timestamp"]) < 1e12:  # nor NaN
      raise Refused("bad_request", f"timestamp {timed['timestamp']!r:.40}; expected seconds")
    with robot.arrived:
      robot.latest = timed
      robot.arrived.notify_all()
    return b""

  def _actions(self, robot: _Robot, request: bytes) -> bytes:
    with robot.arrived:
      robot.arrived.wait_for(lambda: robot.latest is not None, WAIT)
      timed, robot.latest = robot.latest, None
    if timed is None:
      return b""
    observation = self._named(robot, timed["observation"])
    asked = self._site.ask("lerobot", observation, f"lerobot {id(robot)}")
    answer = asyncio.run_coroutine_threadsafe(asked, self._loop).result()
    actions = answer.actions[: robot.most]
    return _message(safe_pickle.dump_actions(actions, float(timed["timestamp"]), timed["timestep"], self._period))

  def _named(self, robot: _Robot, given: Mapping[str, Any]) -> dict[str, Any]:
    """LeRobot's observation, a number per motor and an image per camera, under the policy's names."""
    cameras = [name for name, value in given.items() if isinstance(value, np.ndarray) and value.ndim == 3]
    cameras = [name for name in robot.cameras if name in cameras] or cameras
    numbers = [name for name, value in given.items() if isinstance(value, int | float | np.number)]
    order = robot.state or numbers
    if missing := [name for name in order if name not in numbers]:
      raise Refused("bad_request", f"the observation lacks {', '.join(missing):.100}, of the robot's features")
    found = {view: given[camera] for view, camera in assign_views(self._site.own["views"], cameras).items()}
    return found | {"state": np.array([given[name] for name in order], np.float32), "prompt": given.get("task")}


def _field(message: bytes, number: int) -> bytes:
  """A field of bytes of a protobuf message; b"" if it has none. Other fields are skipped.

  Raises:
    Refused: it is not a protobuf message.
  """
  found, at = b"", 0
  try:
    while at < len(message):
      tag, at = _varint(message, at)
      if tag & 7 == 0:
        _, at = _varint(message, at)
      elif tag & 7 == _BYTES:
        length, at = _varint(message, at)
        if at + length > len(message):
          raise IndexError
        found = message[at : at + length] if tag >> 3 == number else found
        at += length
      else:
        raise IndexError
  except IndexError:
    raise Refused("bad_request", f"{len(message)} bytes that are not a message of {SERVICE}") from None
  return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 64, 7):
    byte = message[at]
    value, at = value | (byte & 127) << shift, at + 1
    if byte < 128:
      return value, at
  raise IndexError


def _message(data: bytes) -> bytes:
  """A protobuf message with field 1, bytes."""
  length, prefix = len(data), bytearray([1 << 3 | _BYTES])
  while length > 127:
    prefix.append(length & 127 | 128)
    length >>= 7
  return bytes([*prefix, length]) + data
