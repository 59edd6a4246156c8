"""`POST /act`: the clients of OpenVLA, OpenVLA-OFT and MolmoAct2, and what is wrong with a body."""

import json
import socket

import httpx
import numpy as np
import pytest
import serving
from serving import equal, observation

from semanticvla_jax.data import statistics
from semanticvla_jax.serve import wire


@pytest.fixture
def url(served):
  return f"http://127.0.0.1:{served[1]}/act"


def post(url, value, **headers):
  content = value if isinstance(value, bytes | str) else wire.dump_json(value)
  return httpx.post(url, content=content, headers=headers, timeout=600)


def answered(response):
  assert response.status_code == 200, response.text
  return wire.load_json(response.text)[0]


@pytest.fixture(scope="module")
def raw(policy):
  """What OpenVLA's clients expect: the gripper as it was learned."""

  def actions(seen):
    normalized = np.asarray(policy.device_step(policy.observe([seen])))
    return statistics.unnormalize(normalized, policy.stats.action, mode=policy.mode)[0]

  return actions


def parts(seed=0):
  return observation(seed).values()


def test_oft_gets_a_list_and_wrist_images_count_in_the_order_they_were_sent(url, raw):
  image, wrist, state, prompt = parts(1)
  for name in ("wrist_image", "robot0_eye_in_hand_wrist"):
    body = {"full_image": image, name: wrist, "state": state, "instruction": prompt}
    reply = answered(post(url, body))
    assert isinstance(reply, list) and equal(reply, raw(observation(1))) and reply[0].dtype == np.float32


def test_openvla_gets_the_first_action(url, raw):
  image, wrist, state, prompt = parts(2)
  body = {"image": image, "wrist_image": wrist, "state": state, "instruction": prompt, "unnorm_key": "tabletop_place"}
  assert equal(answered(post(url, body)), raw(observation(2))[0])
  refused = post(url, body | {"unnorm_key": "bridge_orig"})
  assert refused.status_code == 400 and "unnorm_key" in refused.json()["error"]


def test_molmoact_gets_a_map_and_asks_whether_the_server_is_ready(url, raw):
  image, wrist, state, prompt = parts(3)
  assert httpx.get(url).status_code == 200
  body = {"top": image, "wrist": wrist, "state": state, "instruction": prompt, "num_steps": 10}
  reply = answered(post(url, body))
  assert equal(reply["actions"], raw(observation(3))) and reply["dt_ms"] == 0  # the rate is not known


def test_double_encoding_and_lists_without_json_numpy(url, raw):
  image, wrist, state, prompt = parts(4)
  body = {"full_image": image, "wrist_image": wrist, "state": state, "instruction": prompt}
  reply = answered(post(url, json.dumps({"encoded": wire.dump_json(body)})))
  assert isinstance(reply, str) and equal(wire.load_json(reply)[0], raw(observation(4)))
  lists = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in body.items()}
  assert equal(answered(post(url, lists)), raw(observation(4)))


def test_a_body_without_content_type_is_read(url, served, raw):
  image, wrist, state, prompt = parts(5)
  body = wire.dump_json({"full_image": image, "wrist_image": wrist, "state": state, "instruction": prompt}).encode()
  head = f"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
  with socket.create_connection(("127.0.0.1", served[1])) as one:
    one.sendall(head + body)
    reply = b"".join(iter(lambda: one.recv(65536), b""))
  assert reply.startswith(b"HTTP/1.1 200") and equal(
    wire.load_json(reply.partition(b"\r\n\r\n")[2])[0], raw(observation(5))
  )


@pytest.mark.parametrize(
  ("body", "what"),
  [
    (b"", "JSON"),
    (b"\xff\xfe", "JSON"),
    ("[1, 2]", "expected a map"),
    ('{"image": ' + "[" * 5000 + "]" * 5000 + "}", ""),
    ('{"image": {"__numpy__": "AAAA", "dtype": "O", "shape": [1]}}', "dtype"),
    ('{"image": {"__numpy__": "AAAA", "dtype": "|u1", "shape": [64, 64, 3]}}', "bytes"),
    ('{"image": {"__numpy__": "!", "dtype": "|u1", "shape": [1]}}', "data"),
    ('{"image": {"__numpy__": "AAAA", "dtype": [["a", "f4"]], "shape": [1]}}', "dtype"),
    ('{"image": [[1, 2], [3]]}', ""),
    ('{"instruction": "x"}', "lacks 'image'"),
    ('{"encoded": "{"}', "JSON"),
  ],
)
def test_a_wrong_body_is_a_400_of_one_line(url, body, what):
  response = post(url, body)
  found = response.json()
  assert response.status_code == 400 and found["kind"] == "bad_request" and what in found["error"]
  assert "\n" not in found["error"] and "Traceback" not in found["error"] and "/" not in found["error"].split("got")[0]


def test_a_body_over_the_limit_is_not_read(policy):
  with serving.serving(policy, max_bytes=1000, body_timeout=0.3) as (_, port):
    url = f"http://127.0.0.1:{port}/act"
    assert post(url, "x" * 2000).status_code == 413
    chunked = httpx.post(url, content=iter([b"x" * 600] * 3), timeout=600)
    assert chunked.status_code == 413
    with socket.create_connection(("127.0.0.1", port)) as slow:
      slow.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")
      assert b" 408 " in slow.recv(1000)


def test_a_lone_client_that_opens_a_connection_for_each_request_is_not_kept_waiting(policy):
  from semanticvla_jax.serve.core import Settings

  image, wrist, state, prompt = parts()
  body = {"full_image": image, "wrist_image": wrist, "state": state, "instruction": prompt}
  with serving.serving(policy, Settings(max_batch=4, max_wait=30.0)) as (site, port):
    for _ in range(3):
      answered(post(f"http://127.0.0.1:{port}/act", body))
    counted = site.metrics.text().decode()
  queued = next(line for line in counted.splitlines() if 'seconds_sum{door="act",layer="queue"}' in line)
  assert float(queued.split()[1]) < 30


def test_too_much_to_do_is_a_503_that_says_when_to_come_again(policy):
  from semanticvla_jax.serve.core import Settings

  with serving.serving(policy, Settings(max_batch=4, depth=0)) as (_, port):
    image, wrist, state, prompt = parts()
    body = {"full_image": image, "wrist_image": wrist, "state": state, "instruction": prompt}
    response = post(f"http://127.0.0.1:{port}/act", body)
  assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
  assert response.json()["kind"] == "overloaded"
