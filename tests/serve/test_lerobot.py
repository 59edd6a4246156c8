"""LeRobot's asynchronous inference without lerobot, torch or an executed pickle."""

import dataclasses
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import grpc
import numpy as np
import pytest
import serving
from serving import equal, observation

from semanticvla_jax.data import statistics
from semanticvla_jax.serve import safe_pickle
from semanticvla_jax.serve.doors.lerobot import SERVICE, Door, _field, _message

JOINTS = [f"joint_{i}.pos" for i in range(8)]


@dataclasses.dataclass
class RemotePolicyConfig:
  policy_type: str
  pretrained_name_or_path: str
  lerobot_features: dict
  actions_per_chunk: int
  device: str = "cpu"
  rename_map: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class TimedData:
  timestamp: float
  timestep: int


@dataclasses.dataclass
class TimedObservation(TimedData):
  observation: dict
  must_go: bool = False


@dataclasses.dataclass
class TimedAction(TimedData):
  action: object


@pytest.fixture(autouse=True)
def lerobot(monkeypatch):
  """The names that LeRobot's pickles hold, importable as they are on a robot."""
  helpers, torch = types.ModuleType(safe_pickle.HELPERS), types.ModuleType("torch")
  for kind in (RemotePolicyConfig, TimedObservation, TimedAction):
    monkeypatch.setattr(kind, "__module__", safe_pickle.HELPERS)
    setattr(helpers, kind.__name__, kind)
  torch.tensor = lambda values: np.array(values, np.float32)
  for name, module in (
    ("lerobot", types.ModuleType("lerobot")),
    ("lerobot.async_inference", types.ModuleType("lerobot.async_inference")),
    (safe_pickle.HELPERS, helpers),
    ("torch", torch),
  ):
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def port(policy):
  with serving.serving(policy, doors=[lambda site, loop: Door(site, loop, "127.0.0.1", 0)]) as (site, _):
    yield site.other_doors[0].port


class Robot:
  """LeRobot's RobotClient, its four calls."""

  def __init__(self, port, key=None):
    self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
    self._metadata = None if key is None else [("authorization", f"Api-Key {key}")]

  def call(self, name, request=b""):
    method = self._channel.stream_unary if isinstance(request, list) else self._channel.unary_unary
    given = iter(request) if isinstance(request, list) else request
    return method(f"/{SERVICE}/{name}")(given, timeout=600, metadata=self._metadata)

  def begin(self, actions=100):
    self.call("Ready")
    names = {"dtype": "float32", "shape": (8,), "names": JOINTS}
    features = {"observation.state": names, "observation.images.front": {}, "observation.images.wrist": {}}
    self.call("SendPolicyInstructions", _message(pickle.dumps(RemotePolicyConfig("act", "x", features, actions))))

  def show(self, timed, size=3000):
    data = timed if isinstance(timed, bytes) else pickle.dumps(timed)
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    states = [1, *[2] * (len(parts) - 2), 3] if len(parts) > 1 else [3]
    chunks = [bytes([8, state, 18]) + _message(part)[1:] for state, part in zip(states, parts)]
    self.call("SendObservations", chunks)

  def actions(self):
    reply = self.call("GetActions")
    return pickle.loads(_field(reply, 1)) if reply else None


def timed(seed=0, step=7):
  image, wrist, state, prompt = observation(seed).values()
  joints = {name: float(value) for name, value in zip(JOINTS, state)}
  return TimedObservation(
    12.5, step, {**dict(reversed(joints.items())), "front": image, "wrist": wrist, "task": prompt}
  )


def test_actions_are_those_of_the_policy_bit_for_bit(port, policy):
  robot = Robot(port)
  robot.begin()
  for seed in range(2):
    robot.show(timed(seed, 7 + seed))
    found = robot.actions()
    normalized = np.asarray(policy.device_step(policy.observe([observation(seed)])))
    expected = statistics.unnormalize(normalized, policy.stats.action, mode=policy.mode)[0]
    assert equal([one.action for one in found], expected)
    assert [one.timestep for one in found] == [*range(7 + seed, 15 + seed)]
    assert found[0].timestamp == 12.5 and found[1].timestamp == pytest.approx(12.5 + 1 / 30)


@pytest.mark.lerobot
def test_lerobots_own_client(port, policy, tmp_path):
  image, wrist, state, _ = observation(6).values()
  np.savez(tmp_path / "seen.npz", front=image, wrist=wrist, state=state)
  root = Path(__file__).parents[2] / ".venv-lerobot"
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root / "client", Path(__file__).parent)))}
  arguments = f"127.0.0.1:{port}", str(tmp_path / "seen.npz"), str(tmp_path / "taken.npy")
  command = [root / "bin" / "python", "-c", f"import lerobot_robot as robot; robot.run(*{arguments})"]
  environment |= {"HF_LEROBOT_HOME": str(tmp_path)}
  subprocess.run(command, check=True, timeout=900, env=environment, cwd=tmp_path)  # where it writes its logs
  normalized = np.asarray(policy.device_step(policy.observe([observation(6)])))
  chunk = statistics.unnormalize(normalized, policy.stats.action, mode=policy.mode)[0]
  # Another chunk begins at the step of the action before it, which the client has done already.
  assert equal(np.load(tmp_path / "taken.npy"), np.concatenate([chunk, chunk[1:], chunk[1:6]]))


def test_two_robots_at_once_and_fewer_actions(port, policy):
  first, second = Robot(port), Robot(port)
  first.begin(3)
  second.begin()
  first.show(timed(1))
  second.show(timed(2))
  assert len(first.actions()) == 3 and len(second.actions()) == 8
  assert first.actions() is None  # no new observation


@pytest.mark.parametrize(
  "bad",
  [
    b"",
    b"\x80\x05.",
    pickle.dumps(timed())[:-40],
    pickle.dumps({"timestamp": 1.0}),
    pickle.dumps(TimedObservation(1.0, -1, {})),
    pickle.dumps(TimedObservation(1.0, 10**12, {})),
    pickle.dumps(TimedObservation(1.0, 10**400, {})),
    pickle.dumps(TimedObservation("now", 1, {})),
    pickle.dumps(TimedObservation(float("nan"), 1, {})),
    pickle.dumps(TimedObservation(10**400, 1, {})),
  ],
)
def test_what_is_no_observation_is_refused_and_the_next_is_answered(port, bad):
  robot = Robot(port)
  robot.begin()
  with pytest.raises(grpc.RpcError) as refused:
    robot.show(bad)
  assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "Traceback" not in refused.value.details()
  with pytest.raises(grpc.RpcError):
    robot.call("SendPolicyInstructions", b"\xff\xff")
  robot.show(timed())
  assert len(robot.actions()) == 8


def test_a_robot_without_the_joints_it_named(port):
  robot = Robot(port)
  robot.begin()
  given = timed()
  del given.observation[JOINTS[0]]
  robot.show(given)
  with pytest.raises(grpc.RpcError, match=r"lacks joint_0\.pos"):
    robot.actions()


def test_the_key_is_asked_for(policy):
  door = lambda site, loop: Door(site, loop, "127.0.0.1", 0, key=serving.KEY)  # noqa: E731
  with serving.serving(policy, doors=[door]) as (site, _):
    with pytest.raises(grpc.RpcError) as refused:
      Robot(site.other_doors[0].port).begin()
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    Robot(site.other_doors[0].port, serving.KEY).begin()


RAN = []


class Trap:
  def __init__(self, function, *args):
    self._call = (function, args)

  def __reduce__(self):
    return self._call


@pytest.mark.parametrize(
  "trap",
  [
    Trap(RAN.append, 1),
    Trap(eval, "RAN.append(1)"),
    Trap(exec, "import test_lerobot; test_lerobot.RAN.append(1)"),
    Trap(getattr, "", "join"),
    Trap(np.load, "/etc/passwd"),
    [1, {"a": Trap(RAN.append, 2)}],
    np.array([Trap(RAN.append, 3)], object),
    np.array(["text"]),
    types.SimpleNamespace(a=1),
    {1, 2},
  ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_would_run_code_does_not(trap, protocol):
  with pytest.raises(ValueError, match="Pickle: got"):
    safe_pickle.load(pickle.dumps(trap, protocol))
  assert RAN == []


def test_operations_that_allocate_or_multiply():
  huge = pickle.PROTO + b"\x05" + pickle.BYTEARRAY8 + (2**40).to_bytes(8, "little") + b"x" + pickle.STOP
  index = pickle.PROTO + b"\x04" + pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\xff" + b"\x80"
  laughs = value = []
  for _ in range(14):
    value = [value] * 10
  for bad in (huge, index, pickle.dumps(value), pickle.dumps(laughs) * 0):
    with pytest.raises(ValueError, match="Pickle: got"):
      safe_pickle.load(bad)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_and_arrays_are_read(protocol):
  value = {"a": [1, 2.5, "x", None, True, b"y"], "b": np.arange(6, dtype=np.uint8).reshape(2, 3), "c": np.float32(1.5)}
  value |= {"d": np.asfortranarray(np.ones((2, 3), np.float32)), "e": np.arange(3, dtype=">i4"), "f": np.zeros((0, 3))}
  found = safe_pickle.load(pickle.dumps(value, protocol))
  assert found["a"] == value["a"] and found["c"] == 1.5
  for name in "bdef":
    assert equal(found[name], value[name]) and found[name].shape == value[name].shape
  assert not callable(found["b"]) and isinstance(found["b"], np.ndarray)
