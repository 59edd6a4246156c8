"""The port: status pages, the key, web pages, limits, an orderly end."""

import socket
import threading
import time

import httpx
import pytest
import serving
from serving import KEY, observation, robot
from websockets.exceptions import ConnectionClosed, InvalidStatus

from semanticvla_jax.serve import gate, server
from semanticvla_jax.serve.core import Settings


def get(port, path, **options):
  return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=600, **options)


def test_status_pages(served):
  port = served[1]
  with robot(port) as one:
    one.ask(observation())
    one.ask(b"\xc1")
    counted = get(port, "/metrics").text
  assert get(port, "/healthz").text == "OK" and get(port, "/readyz").json() == {"status": "ok"}
  found = get(port, "/metadata").json()
  assert found["proprio_dim"] == 8 and found["limits"]["max_batch"] == 4 and found["state_range"]["q01"]
  assert 'semanticvla_seconds_count{door="openpi",layer="infer"}' in counted
  assert 'semanticvla_errors_total{door="openpi",kind="bad_request"}' in counted
  for name in ("queue_depth", "batch_size_bucket", "cached_sentences", "clients", "device_seconds_sum"):
    assert f"semanticvla_{name}" in counted, name
  assert get(port, "/nothing").status_code == 404


def test_a_key_is_asked_for_on_every_door(policy):
  with serving.serving(policy, key=KEY) as (_, port):
    for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": KEY}, {"X-API-Key": "é"}):
      for path in ("/", "/roboarena"):
        with pytest.raises(InvalidStatus, match="401"), robot(port, path, headers):
          pass
      assert get(port, "/metadata", headers=[(k, v.encode()) for k, v in headers.items()]).status_code == 401
    for headers in ({"Authorization": f"Api-Key {KEY}"}, {"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
      with robot(port, headers=headers) as one:
        assert "actions" in one.ask(observation())
      assert get(port, "/metrics", headers=headers).status_code == 200
    assert get(port, "/healthz").text == "OK" and get(port, "/readyz").status_code == 200


def test_web_pages_of_other_sites_are_not_answered(served):
  port = served[1]
  with pytest.raises(InvalidStatus, match="403"), robot(port, headers={"Origin": "https://example.com"}):
    pass
  rebound = {"Origin": f"http://example.com:{port}", "Host": f"example.com:{port}"}
  for headers in ({"Origin": "https://example.com"}, {"Origin": "null"}, rebound, {"Sec-Fetch-Site": "cross-site"}):
    assert get(port, "/metadata", headers=headers).status_code == 403
  assert get(port, "/metadata", headers={"Origin": f"http://127.0.0.1:{port}"}).status_code == 200


@pytest.mark.parametrize(("content", "what"), [("short", "at least 16"), (None, "cannot be read")])
def test_a_key_file_that_does_not_fit_is_refused(tmp_path, content, what):
  path = tmp_path / "key"
  if content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match=what):
    gate.read_key(path)
  path.write_text(f"\n{KEY}\n")
  assert gate.read_key(path) == KEY


def test_more_clients_than_the_limit_are_refused(policy):
  with serving.serving(policy, clients=2) as (_, port), robot(port), robot(port) as second:
    with pytest.raises(InvalidStatus, match="503"), robot(port):
      pass
    assert "actions" in second.ask(observation())


def test_a_silent_client_is_closed(policy):
  with serving.serving(policy, idle_timeout=0.3) as (_, port), robot(port) as one:
    assert "actions" in one.ask(observation())
    with pytest.raises(ConnectionClosed, match="idle"):
      one.socket.recv(timeout=30)


def test_a_half_open_socket_and_a_slow_header_disturb_nobody(served):
  port = served[1]
  half, slow = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
  half.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n")
  slow.sendall(b"P")
  with robot(port) as one:
    assert "actions" in one.ask(observation())
  half.close()
  slow.close()


def test_a_connection_without_a_request_is_closed(policy, monkeypatch):
  monkeypatch.setattr(server, "HEADER_TIMEOUT", 1.0)
  monkeypatch.setattr(server, "_TICKS", 1)
  with serving.serving(policy) as (_, port), robot(port) as one:
    with socket.create_connection(("127.0.0.1", port)) as silent:
      silent.sendall(b"P")
      silent.settimeout(60)
      assert silent.recv(10) == b""
    assert "actions" in one.ask(observation())  # a websocket has another time-out


def test_the_end_answers_what_is_under_way_and_refuses_the_rest(policy):
  slow, replies = serving.Slow(policy), []
  with serving.serving(slow, Settings(max_batch=4)) as (site, port), robot(port) as one, robot(port) as late:
    thread = threading.Thread(target=lambda: replies.append(one.ask(observation())))
    thread.start()
    while not slow.calls:
      time.sleep(0.01)
    site.terminate()
    assert "shutting down" in late.ask(observation())
    assert get(port, "/readyz").status_code == 503 and get(port, "/healthz").status_code == 200
    slow.release.set()
    thread.join(60)
  assert serving.equal(replies[0]["actions"], policy.infer(observation())["actions"])
