"""The robot's side: answers, errors, time limits, reconnecting, one action at a time."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import serving
from serving import KEY, equal, observation

from semanticvla_jax.serve import client as robot_side
from semanticvla_jax.serve.client import Broker, Client, ServerGone, StaleAnswer
from semanticvla_jax.serve.core import Settings


@pytest.fixture
def url(served):
  return f"ws://127.0.0.1:{served[1]}"


@pytest.fixture
def client(url):
  with Client(url, patience=20.0) as found:
    yield found


def test_infer_metadata_and_errors(client, policy):
  assert client.metadata["chunk"] == 8 and client.metadata["continuous"] == [True] * 6 + [False]
  for seed in range(2):
    assert equal(client.infer(observation(seed))["actions"], policy.infer(observation(seed))["actions"])
  with pytest.raises(ValueError, match="lacks 'image'"):
    client.infer({"prompt": "pick up the red cube"})
  client.reset()
  assert "actions" in client.infer(observation()) and client.connects == 1


def test_http_addresses_and_the_key(policy):
  with serving.serving(policy, key=KEY) as (_, port):
    with Client(f"http://127.0.0.1:{port}", api_key=KEY) as one:
      assert "actions" in one.infer(observation())
    with Client(f"ws://127.0.0.1:{port}") as one, pytest.raises(ValueError, match="pass the server's key"):
      one.infer(observation())


def test_a_server_that_is_not_there_is_gone_after_the_patience():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
  begin = time.monotonic()
  with Client(f"ws://127.0.0.1:{port}", patience=0.5) as one, pytest.raises(ServerGone, match="no answer within 0.5 s"):
    one.infer(observation())
  assert 0.4 < time.monotonic() - begin < 20


def test_a_late_answer_is_stale_and_never_that_of_the_next_observation(policy):
  slow = serving.Slow(policy)
  with serving.serving(slow, Settings(max_batch=4)) as (_, port):
    with Client(f"ws://127.0.0.1:{port}", timeout=0.3, patience=0.2) as one:
      with pytest.raises(ServerGone):
        one.infer(observation(1))
      slow.release.set()
      one.patience, one.timeout = 20.0, 20.0
      assert equal(one.infer(observation(2))["actions"], policy.infer(observation(2))["actions"])
    with Client(f"ws://127.0.0.1:{port}", freshness=1e-6) as one, pytest.raises(StaleAnswer):
      one.infer(observation(1))


def test_an_overloaded_server_is_asked_again(policy):
  slow = serving.Slow(policy)
  with serving.serving(slow, Settings(max_batch=4, depth=1)) as (_, port):
    url = f"ws://127.0.0.1:{port}"
    with Client(url) as first, Client(url) as second:
      thread = threading.Thread(target=first.infer, args=[observation()])
      thread.start()
      while not slow.calls:
        time.sleep(0.01)
      threading.Timer(0.5, slow.release.set).start()
      assert "actions" in second.infer(observation())
      thread.join()


def test_one_action_at_a_time_open_loop(client, policy):
  broker = Broker(client, 3)
  first, second = (policy.infer(observation(seed))["actions"] for seed in (0, 1))
  taken = [broker.step(observation(0)) for _ in range(3)] + [broker.step(observation(1)) for _ in range(3)]
  assert equal(taken, [*first[:3], *second[:3]])
  with pytest.raises(ValueError, match="1 to 8, the chunk"):
    Broker(client, 9)


def test_the_robot_moves_while_the_next_chunk_is_computed(policy):
  slow = serving.Slow(policy)
  with serving.serving(slow, Settings(max_batch=4)) as (_, port):
    broker = Broker(Client(f"ws://127.0.0.1:{port}"), 2, asynchronous=True)
    assert broker.step(observation(0)) is None  # nothing to act on yet: hold
    slow.release.set()
    first = until_moving(broker, observation(0))
    slow.release.clear()
    moved = [first, *(broker.step(observation(1)) for _ in range(4))]
    assert equal(moved, policy.infer(observation(0))["actions"][:5])  # asked after two, went on meanwhile
    slow.release.set()
    while not broker._asked[1].done():
      time.sleep(0.01)
    assert equal(broker.step(observation(2)), policy.infer(observation(1))["actions"][3])  # three were executed since
    broker.reset()
    assert len(broker.chunks) == 0
    broker.close()


def until_moving(broker, seen):
  end = time.monotonic() + 30
  while (action := broker.step(seen)) is None:
    assert time.monotonic() < end
    time.sleep(0.01)
  return action


def test_dry_run_prints_every_layer(url, capsys):
  robot_side.main(["--url", url, "--dry-run", "--steps=3"])
  printed = capsys.readouterr().out
  for name in ("client", "queue", "prepare", "device"):
    assert f"\n{name}" in printed
  assert "p99" in printed and "0123456789abcdef" in printed
  with pytest.raises(ValueError, match="at least 1"):
    robot_side.main(["--url", url, "--dry-run", "--steps=0"])


SERVER = """
import sys; sys.path[:0] = ["tests", "tests/serve"]
import conftest, policies, serving
from semanticvla_jax.serve.server import Address, Server
policy = policies.policy(batch_sizes=(1,), metadata={"policy_hash": "h"})
with serving.serving(policy) as (site, port):
  Server(site, Address(port=int(sys.argv[1]))).run()
"""


@pytest.mark.processes
def test_kill_9_and_a_new_server(policy, caplog):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
  start = lambda: subprocess.Popen([sys.executable, "-c", SERVER, str(port)])  # noqa: E731
  server = start()
  try:
    with Client(f"ws://127.0.0.1:{port}", patience=120.0) as one:
      before = one.infer(observation())["actions"]
      server.send_signal(signal.SIGKILL)
      server.wait()
      broker = Broker(one, 8, asynchronous=True)
      assert broker.step(observation()) is None and not broker.chunks.executed  # holds
      server = start()
      until = time.monotonic() + 120
      while (action := broker.step(observation())) is None:
        assert time.monotonic() < until
        time.sleep(0.05)
      np.testing.assert_array_equal(action, before[0])
      assert "trying again" in caplog.text and one.connects == 2
      os.kill(server.pid, signal.SIGTERM)
      assert server.wait(60) == 0
      broker.close()
  finally:
    server.kill()
