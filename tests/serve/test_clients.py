"""Clients as their projects publish them, unmodified, over loopback: actions equal `Policy.infer` bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import equal, observation

from semanticvla_jax.data import statistics

pytestmark = pytest.mark.clients


def test_openpi_client(served, policy):
  client = pytest.importorskip("openpi_client.websocket_client_policy", reason="make serve-test installs openpi-client")
  from openpi_client import action_chunk_broker

  remote = client.WebsocketClientPolicy("127.0.0.1", served[1])
  assert remote.get_server_metadata()["policy_hash"] == policy.metadata["policy_hash"]
  for seed in range(2):
    assert equal(remote.infer(observation(seed))["actions"], policy.infer(observation(seed))["actions"])
  with pytest.raises(RuntimeError, match="lacks 'image'"):
    remote.infer({"prompt": "pick up the red cube"})
  broker, chunk = action_chunk_broker.ActionChunkBroker(remote, 8), policy.infer(observation(5))["actions"]
  assert all(equal(broker.infer(observation(5))["actions"], chunk[i]) for i in range(8))


def test_vla_eval_connection(served, policy):
  connection = pytest.importorskip("vla_eval.connection", reason="make serve-test installs vla-eval")
  import anyio

  image, wrist, state, prompt = observation(1).values()
  seen = {"images": {"agentview": image, "wrist": wrist}, "states": state, "task_description": prompt}

  async def episode():
    async with connection.Connection(f"ws://127.0.0.1:{served[1]}/vla-eval") as one:
      assert one.server_info["observation_params"]["send_state"]
      await one.start_episode({"task": {"name": "t", "suite": "s"}})
      taken = [(await one.act(seen))["actions"] for _ in range(8)]
      with pytest.raises(RuntimeError, match="unnorm_key|lacks"):
        await one.act({"images": {}, "task_description": prompt})
      await one.end_episode({"metrics": {"success": True}, "steps": 8, "elapsed_sec": 1.0})
      return taken

  assert equal(anyio.run(episode), policy.infer(observation(1))["actions"])


def test_vla_eval_run(served, policy, tmp_path):
  pytest.importorskip("vla_eval.cli.main", reason="make serve-test installs vla-eval")
  config = {
    "server": {"url": f"ws://127.0.0.1:{served[1]}/vla-eval"},
    "output_dir": str(tmp_path / "out"),
    "benchmarks": [{"benchmark": "vla_eval_benchmark:Echo", "episodes_per_task": 1, "max_steps": 10}],
  }
  (tmp_path / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
  tests = Path(__file__).parents[1]
  paths = os.pathsep.join(map(str, (tests / "serve", tests, tests.parent)))
  command = [sys.executable, "-m", "vla_eval.cli.main", "run", "--no-docker", "--config", str(tmp_path / "run.yaml")]
  environment = os.environ | {"PYTHONPATH": paths, "ECHO": str(tmp_path / "taken.json")}
  run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
  assert run.returncode == 0, run.stdout + run.stderr
  taken = np.array(json.loads((tmp_path / "taken.json").read_text()), np.float32)
  expected = [*policy.infer(observation(0))["actions"], *policy.infer(observation(8))["actions"][:2]]
  assert equal(taken, np.stack(expected))


def test_requests_and_json_numpy(served, policy):
  """The two lines that OpenVLA-OFT's robot runs."""
  numpy_in_json = pytest.importorskip("json_numpy", reason="make serve-test installs json-numpy")
  image, wrist, state, prompt = observation(2).values()
  body = {"full_image": image, "wrist_image": wrist, "state": state, "instruction": prompt}
  response = httpx.post(f"http://127.0.0.1:{served[1]}/act", content=numpy_in_json.dumps(body), timeout=600)
  found = numpy_in_json.loads(response.text)
  normalized = np.asarray(policy.device_step(policy.observe([observation(2)])))
  assert equal(found, statistics.unnormalize(normalized, policy.stats.action, mode=policy.mode)[0])
