"""vla-eval's messages: who speaks first, one action per observation, errors that leave the connection open."""

import io

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import equal, observation, serving
from websockets.sync.client import connect

from semanticvla_jax.serve import wire


class Benchmark:
  """vla-eval's client in a few lines."""

  def __init__(self, socket):
    self._socket, self._seq = socket, 0

  def send(self, kind, payload):
    self._seq += 1
    message = {"type": kind, "payload": payload, "seq": self._seq, "timestamp": 0.0}
    self._socket.send(wire.pack_str(message))

  def ask(self, kind, payload):
    self.send(kind, payload)
    reply = wire.unpack(self._socket.recv(timeout=600))
    assert reply["seq"] == self._seq or reply["type"] == "error"
    return reply


@pytest.fixture
def benchmark(served):
  with connect(f"ws://127.0.0.1:{served[1]}/vla-eval", compression=None, max_size=None) as socket:
    yield Benchmark(socket)


def png(image, form="PNG"):
  file = io.BytesIO()
  Image.fromarray(image).save(file, form)
  return {"__image__": True, "format": form.lower(), "data": file.getvalue(), "shape": list(image.shape)}


def seen(seed=0):
  image, wrist, state, prompt = observation(seed).values()
  return {"images": {"agentview": png(image), "wrist": png(wrist)}, "states": state, "task_description": prompt}


def test_the_client_speaks_first(benchmark):
  reply = benchmark.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1})
  assert reply["type"] == "hello" and reply["payload"]["protocol_version"] == 1
  assert reply["payload"]["observation_params"] == {"send_state": True, "send_wrist_image": True}


def test_each_observation_gets_the_next_action_of_the_chunk(benchmark, policy):
  benchmark.send("episode_start", {"task": {"name": "t"}})
  first, second = (policy.infer(observation(seed))["actions"] for seed in (0, 1))
  for i in range(8):
    action = benchmark.ask("observation", seen(0 if i == 0 else 9))["payload"]["actions"]
    assert equal(action, first[i]) and action.dtype == np.float32 and action.shape == (7,)
  assert equal(benchmark.ask("observation", seen(1))["payload"]["actions"], second[0])
  benchmark.send("episode_end", {"metrics": {"success": True}, "steps": 9, "elapsed_sec": 1.0})
  benchmark.send("episode_start", {"task": {"name": "t"}})
  assert equal(benchmark.ask("observation", seen(0))["payload"]["actions"], first[0])


def test_raw_arrays_are_read_too(benchmark, policy):
  image, wrist, state, prompt = observation(2).values()
  plain = {"images": {"agentview": image, "wrist": wrist}, "state": state, "task_description": prompt}
  assert equal(benchmark.ask("observation", plain)["payload"]["actions"], policy.infer(observation(2))["actions"][0])


@pytest.mark.parametrize(
  ("payload", "what"),
  [
    ({}, "lacks 'image'"),
    ({"images": {"agentview": {"__image__": True, "format": "png", "data": b"no", "shape": [1, 1, 3]}}}, "PNG"),
    ({"images": {"agentview": {"__image__": True, "format": "gif", "data": b"", "shape": [1, 1, 3]}}}, "gif"),
    ({"images": {"agentview": png(np.zeros((4, 4, 3), np.uint8)) | {"shape": [400, 4, 3]}}}, "shape"),
  ],
)
def test_an_error_leaves_the_connection_open(benchmark, payload, what):
  reply = benchmark.ask("observation", payload)
  assert reply["type"] == "error" and what in reply["payload"]["error"]
  assert benchmark.ask("observation", seen())["type"] == "action"


def test_a_small_file_of_many_pixels_is_not_decoded(benchmark):
  file = io.BytesIO()
  Image.new("1", (30000, 30000)).save(file, "PNG")
  bomb = {"__image__": True, "format": "png", "data": file.getvalue(), "shape": [30000, 30000, 3]}
  reply = benchmark.ask("observation", seen() | {"images": {"agentview": bomb}})
  assert reply["type"] == "error" and ("pixels" in reply["payload"]["error"] or "PNG" in reply["payload"]["error"])


def test_unknown_messages(benchmark):
  assert benchmark.ask("dance", {})["type"] == "error"
  assert benchmark.ask("observation", [1])["type"] == "error"


def test_health_and_config(policy):
  with serving(policy) as (site, port):
    get = lambda path: httpx.get(f"http://127.0.0.1:{port}{path}")  # noqa: E731
    assert get("/health").json() == get("/vla-eval/health").json() == {"status": "ok"}
    assert get("/vla-eval/config").json() == get("/config").json()
    assert get("/config?max_batch_size=2&max_wait_time=0.02").json() == {"max_batch_size": 2, "max_wait_time": 0.02}
    assert site.core.settings.max_batch == 2 and get("/config").json()["max_batch_size"] == 2
    for wrong in ("max_batch_size=5", "max_batch_size=0", "max_batch_size=x", "max_wait_time=nan"):
      assert get(f"/config?{wrong}").status_code == 400, wrong
