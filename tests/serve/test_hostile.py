"""Generated and mutated frames at every door: an answer or an error of one line, never a crash, a path or a traceback.

HOSTILE=10000 frames a door in `make hostile`; fewer here.
"""

import json
import os
import pickle
import random
import re
import tempfile
from pathlib import Path

import grpc
import httpx
import msgpack
import numpy as np
import psutil
import pytest
import test_lerobot as test_lerobot_door
from serving import Robot, equal, observation, serving
from test_lerobot import lerobot  # noqa: F401  a fixture that every test here then has
from test_vla_eval import seen as vla_eval_seen
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from semanticvla_jax.serve import wire
from semanticvla_jax.serve.doors import lerobot as lerobot_door

COUNT = int(os.environ.get("HOSTILE", "60"))
FOLDERS = (tempfile.gettempdir(), Path.home(), Path("/home"), Path(__file__).parents[2])  # of this machine
LEAKS = re.compile("|".join([r'Traceback|File "|\.py\b|site-packages', *(re.escape(f"{path}/") for path in FOLDERS)]))
WORDS = [
  None,
  True,
  -1,
  2**63,
  float("nan"),
  float("inf"),
  "",
  "\x00",
  "x" * 3000,
  b"",
  b"\xff" * 10,
  [],
  {},
  [[]],
  {"a": {"b": {"c": {"d": {"e": 1}}}}},
  [[1, 2], [3]],
]
ARRAYS = [
  np.zeros((0, 0, 3), np.uint8),
  np.zeros((1, 1, 3), np.uint8),
  np.zeros((2, 3000, 3), np.uint8),
  np.zeros((32, 32, 4), np.uint8),
  np.zeros((), np.float32),
  np.full(8, np.nan, np.float32),
  np.full(8, 1e38, np.float64),
  np.zeros((1,) * 8, np.int64),
]
LIES = [
  {b"__ndarray__": True, b"data": b"abcd", b"dtype": "|O", b"shape": [1]},
  {b"__ndarray__": True, b"data": b"abcd", b"dtype": "|u1", b"shape": [2**31 - 1, 2**31 - 1, 3]},
  {b"__npgeneric__": True, b"data": b"", b"dtype": "<f8"},
  {"__ndarray__": True},
  {"__image__": True, "format": "png", "data": b"\x89PNG\r\n\x1a\n" + b"\x00" * 50},
  {"__image__": True, "format": "jpeg", "data": b"\xff\xd8\xff\xe0" + b"\x00" * 50, "shape": [1, 1, 3]},
  {"__numpy__": "AAAA", "dtype": "<f4", "shape": [1]},
]


def mutated(value, rng):
  """A map with one of its entries, at any depth, exchanged, dropped, renamed or added to."""
  value, keys = dict(value), [*value]
  key = rng.choice(keys) if keys else "x"
  inner = value.get(key)
  if isinstance(inner, dict) and inner and rng.random() < 0.6:
    return value | {key: mutated(inner, rng)}
  kind = rng.randrange(4)
  if kind == 0:
    value.pop(key, None)
  elif kind == 1:
    value[key] = rng.choice([*WORDS, *ARRAYS, *LIES])
  elif kind == 2:
    value["".join(rng.choices("abc/_é", k=rng.randrange(6)))] = value.pop(key, 1)
  else:
    value |= {f"more{i}": rng.choice(WORDS) for i in range(rng.choice([1, 100]))}
  return value


def scrambled(frame, rng):
  """Bytes cut off, exchanged, doubled, or all random."""
  kind, frame = rng.randrange(5), bytearray(frame)
  if kind == 0:
    return bytes(frame[: rng.randrange(len(frame))])
  if kind == 1:
    for _ in range(rng.randrange(1, 20)):
      frame[rng.randrange(len(frame))] = rng.randrange(256)
    return bytes(frame)
  if kind == 2:
    return bytes(frame) * 2
  if kind == 3:
    start = rng.randrange(min(60, len(frame)))  # where names and lengths are
    frame[start : start + 4] = rng.randbytes(4)
    return bytes(frame)
  return rng.randbytes(rng.randrange(300))


def frames(good, rng, pack, count=COUNT):
  """Hostile frames made of a good message."""
  for _ in range(count):
    bad = good
    for _ in range(rng.randrange(1, 4)):
      bad = mutated(bad, rng)
    try:
      frame = pack(bad)
    except (TypeError, ValueError, OverflowError):
      frame = pack(good)
    yield scrambled(frame, rng) if rng.random() < 0.5 else frame


def check_text(text):
  assert not LEAKS.search(text) and text.isprintable(), text


@pytest.fixture
def memory():
  """Fails a test that leaves the process much larger."""
  before = psutil.Process().memory_info().rss
  yield
  assert psutil.Process().memory_info().rss - before < 300e6


def small(seed=0):
  return observation(seed)


@pytest.mark.parametrize("path", ["/", "/roboarena"])
def test_openpi(served, policy, memory, path):
  rng, one = random.Random(path), Robot(served[1], path)
  pack = lambda value: msgpack.packb(value, default=wire._openpi)  # noqa: E731
  example = {"image": [*small().values()][:2], "state": small()["observation/state"], "lang": "pick up"}
  goods = [small(), small() | {"endpoint": "infer"}, {"examples": [example]}]
  goods += [{"type": "infer", "request_id": "1", "payload": {"examples": [example]}}]
  for good in goods:
    for frame in frames(good, rng, pack, COUNT // len(goods)):
      try:
        reply = one.ask(frame)
      except ConnectionClosed:
        one = Robot(served[1], path)
        continue
      if isinstance(reply, str):
        check_text(reply)
      elif isinstance(reply, dict) and reply.get("status") == "error":
        check_text(reply["error"]["message"])
  with_next = Robot(served[1])
  assert equal(with_next.ask(small())["actions"], policy.infer(small())["actions"])


def test_vla_eval(served, memory):
  rng = random.Random(1)
  message = {"type": "observation", "payload": vla_eval_seen(), "seq": 1, "timestamp": 0.0}
  pack = lambda value: msgpack.packb(value, default=wire._vla_eval)  # noqa: E731
  url = f"ws://127.0.0.1:{served[1]}/vla-eval"
  with connect(url, compression=None, max_size=None) as socket:
    for frame in frames(message, rng, pack):
      socket.send(frame)
      socket.send(pack({"type": "hello", "payload": {}, "seq": 77}))  # some frames have no answer, this one does
      while (reply := wire.unpack(socket.recv(timeout=600)))["type"] != "hello" or reply["seq"] != 77:
        if reply["type"] == "error":
          check_text(reply["payload"]["error"])
    socket.send(pack(message))
    assert wire.unpack(socket.recv(timeout=600))["type"] == "action"


def test_act(served, memory):
  rng = random.Random(2)
  image, wrist, state, prompt = small().values()
  good = {"full_image": image, "wrist_image": wrist, "state": state, "instruction": prompt, "unnorm_key": None}
  pack = lambda value: json.dumps(value, default=plain_json).encode()  # noqa: E731
  with httpx.Client(base_url=f"http://127.0.0.1:{served[1]}", timeout=600) as client:
    for body in frames(good, rng, pack):
      body = json.dumps({"encoded": body.decode("utf-8", "replace")}).encode() if rng.random() < 0.3 else body
      response = client.post(
        "/act", content=body, headers={"Content-Type": rng.choice(["", "text/x", "application/json"])}
      )
      assert response.status_code in (200, 400)
      if response.status_code == 400:
        check_text(response.json()["error"])
    assert client.post("/act", content=pack(good)).status_code == 200


def plain_json(value):
  if isinstance(value, bytes):
    return value.decode("latin-1")
  return wire._json_numpy(value)


def test_groot(policy, memory):
  test_groot = pytest.importorskip("test_groot", reason="pip install pyzmq: GR00T's door is an extra")
  groot, rng = test_groot.groot, random.Random(3)
  good = {"endpoint": "get_action", "data": {"observation": test_groot.seen(), "options": None}, "api_token": "x"}
  with serving(policy, doors=[lambda site, loop: groot.Door(site, loop, "127.0.0.1", 0)]) as (site, _):
    one = test_groot.Robot(site.other_doors[0].port)
    for frame in frames(good, rng, lambda value: msgpack.packb(value, default=groot._msgpack_numpy)):
      reply = one.ask(frame)
      if isinstance(reply, dict) and "error" in reply:
        check_text(reply["error"])
    assert equal(one.ask(good)[0]["x"][0, :, 0], test_groot.raw(policy, [0])[0, :, 0])


def test_lerobot(policy, memory):
  rng, good = random.Random(4), vars(test_lerobot_door.timed())
  with serving(policy, doors=[lambda site, loop: lerobot_door.Door(site, loop, "127.0.0.1", 0)]) as (site, _):
    one = test_lerobot_door.Robot(site.other_doors[0].port)
    one.begin()
    for frame in frames(good, rng, pickled):
      try:
        one.show(frame)
        one.actions()
      except grpc.RpcError as error:
        check_text(error.details())
    one.show(test_lerobot_door.timed())
    assert len(one.actions()) == 8


def pickled(fields):
  """A pickle of LeRobot's class with these attributes."""
  timed = test_lerobot_door.timed()
  vars(timed).clear()
  vars(timed).update(fields)
  return pickle.dumps(timed)
