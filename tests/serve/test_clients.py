"""Clients as their projects publish them, unmodified, over loopback: actions equal `Policy.infer` bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import policies
import pytest
import serving
from helpers import random_params
from serving import equal

from semanticvla_jax.data import datasets, robot, statistics
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.policy import Policy
from semanticvla_jax.serve.doors import groot

observation = policies.observation

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


def one_view(dataset, **model):
  """A tiny policy of one camera."""
  config = policies.CONFIG | {"model": policies.TINY | {"num_views": 1} | model}
  return policies.policy(config=config, batch_sizes=(1,), metadata={"dataset": dataset})


def raw(policy, seen):
  """Actions with the gripper as it was learned: 1 open, 0 closed."""
  normalized = np.asarray(policy.device_step(policy.observe([seen])))
  return statistics.unnormalize(normalized, policy.stats.action, mode=policy.mode)[0]


def taken(chunk):
  """The actions of one of inspect-robots' chunks, as they were sent: f32[k a]."""
  return np.stack([action.data for action in chunk.actions]).astype(np.float32)


def test_inspect_robots_widowx():
  """Its policies of OpenVLA's and openpi's servers: one camera, no state."""
  widowx = pytest.importorskip("inspect_robots_widowx.policy", reason="make serve-test installs inspect-robots-widowx")
  from inspect_robots.scene import Scene
  from inspect_robots.types import Observation

  policy = one_view("bridge_orig", proprio_dim=None)
  image = observation(3, size=224)["observation/image"]
  seen = {"observation/image": image, "prompt": "lift the pot"}
  with serving.serving(policy) as (_, port):
    openvla = widowx.OpenVLAPolicy(server_url=f"http://127.0.0.1:{port}", resize_px=224, jpeg_roundtrip=False)
    openpi = widowx.OpenpiPolicy(port=port)
    for client in (openvla, openpi):
      client.reset(Scene("0", "lift the pot"))
    shown = Observation(images={"external_cam": image})
    assert equal(taken(openvla.act(shown)), raw(policy, seen)[:1])
    assert equal(taken(openpi.act(shown)), policy.infer(seen)["actions"])


def test_inspect_robots_yam():
  """MolmoAct2's protocol: two arms, three cameras; the robot's rate comes with the actions."""
  yam = pytest.importorskip("inspect_robots_yam.policy", reason="make serve-test installs inspect-robots-yam")
  from inspect_robots.scene import Scene
  from inspect_robots.types import Observation

  spec = datasets.ALOHA._replace(name="yam", control_hz=20.0)
  model = policies.TINY | dict(num_views=3, proprio_dim=14, action_dim=14, coupler="single")
  config = policies.CONFIG | {"model": model, robot.KEY: {"yam": robot.of(spec).to_json()}}
  numbers = np.random.default_rng(0).normal(size=(400, 14)).astype(np.float32)
  stats = statistics.DatasetStatistics(
    statistics.compute(numbers, spec.normalized), statistics.compute(numbers), 400, 9
  )
  built = build(model)
  policy = Policy(
    built, random_params(built), stats, policies.tokenizers(), config, batch_sizes=(1,), metadata={"dataset": "yam"}
  )
  images = np.random.default_rng(1).integers(0, 256, (3, 224, 224, 3), np.uint8)
  with serving.serving(policy) as (_, port):
    client = yam.ActServerPolicy(server_url=f"http://127.0.0.1:{port}")
    client.reset(Scene("0", "fold the cloth"))
    shown = Observation(
      images=dict(zip(("top_cam", "left_cam", "right_cam"), images)), state={"joint_pos": numbers[0].astype(np.float64)}
    )
    chunk = client.act(shown)
  seen = dict(zip(policy.metadata["views"], images)) | {"state": numbers[0], "prompt": "fold the cloth"}
  assert equal(taken(chunk), raw(policy, seen)) and chunk.control_hz == 20.0


def test_inspect_robots_unitree_g1():
  """GR00T's protocol, N1.7's codec, over ZMQ."""
  unitree = pytest.importorskip("inspect_robots_unitree_g1.policy", reason="make serve-test installs it")
  from inspect_robots.scene import Scene
  from inspect_robots.types import Observation

  policy = one_view("tabletop_place")
  image, state = (observation(4)[f"observation/{name}"] for name in ("image", "state"))
  joints = np.concatenate([state, np.zeros(8, np.float32)])
  with serving.serving(policy, doors=[lambda site, loop: groot.Door(site, loop, "127.0.0.1", 0)]) as (site, _):
    client = unitree.Gr00tPolicy(
      port=site.other_doors[0].port,
      state_keys={"state.arm": ("packed", 0, 8)},
      action_keys={f"action.{name}": ("packed", i, i + 1) for i, name in enumerate(site.metadata["actions"])},
    )
    client.reset(Scene("0", "pick up the red cube"))
    chunk = client.act(Observation(images={"head_cam": image}, state={"joint_pos": joints.astype(np.float64)}))
  seen = {"observation/image": image, "observation/state": state, "prompt": "pick up the red cube"}
  assert equal(taken(chunk)[:, :7], raw(policy, seen)) and not taken(chunk)[:, 7:].any()
