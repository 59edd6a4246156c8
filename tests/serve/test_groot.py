"""GR00T's protocol in both of its codecs: actions of the policy bit for bit, and nothing that holds an object."""

import io

import msgpack
import numpy as np
import pytest
import serving
from serving import equal, observation

from semanticvla_jax.data import statistics

zmq = pytest.importorskip("zmq", reason="pip install pyzmq: GR00T's door is an extra")

from semanticvla_jax.serve.doors import groot  # noqa: E402

NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


@pytest.fixture(scope="module")
def port(policy):
  with serving.serving(policy, doors=[lambda site, loop: groot.Door(site, loop, "127.0.0.1", 0)]) as (site, _):
    yield site.other_doors[0].port


class Robot:
  """A REQ socket and one of the codecs."""

  def __init__(self, port, encode=groot._msgpack_numpy):
    self._socket = zmq.Context.instance().socket(zmq.REQ)
    self._socket.setsockopt(zmq.RCVTIMEO, 60_000)
    self._socket.setsockopt(zmq.LINGER, 0)
    self._socket.connect(f"tcp://127.0.0.1:{port}")
    self._encode = encode

  def ask(self, value):
    self._socket.send(value if isinstance(value, bytes) else msgpack.packb(value, default=self._encode))
    reply = self._socket.recv()
    assert (b"\xc4\x02nd" if self._encode is groot._npy else b"as_npy") not in reply  # of the other generation
    return groot._Codec().unpack(reply)


def seen(seeds=(0,)):
  image, wrist, state, prompt = zip(*(observation(seed).values() for seed in seeds))
  state = np.stack(state)[:, None]
  video = {"agentview": np.stack(image)[:, None], "wrist": np.stack(wrist)[:, None]}
  return {
    "video": video,
    "state": {"arm": state[..., :6], "hand": state[..., 6:]},
    "language": {"task": [[x] for x in prompt]},
  }


def raw(policy, seeds):
  normalized = np.asarray(policy.device_step(policy.observe([observation(seed) for seed in seeds])))[: len(seeds)]
  return statistics.unnormalize(normalized, policy.stats.action, mode=policy.mode)


@pytest.mark.parametrize("encode", [groot._msgpack_numpy, groot._npy], ids=["N1.7", "N1.6"])
def test_actions_in_both_codecs(port, policy, encode):
  robot = Robot(port, encode)
  actions, info = robot.ask({"endpoint": "get_action", "data": {"observation": seen(), "options": None}})
  assert list(actions) == NAMES and info == {}
  assert equal(np.concatenate([actions[name] for name in NAMES], axis=2), raw(policy, [0]))
  assert robot.ask({"endpoint": "ping"})["status"] == "ok" and robot.ask({"endpoint": "reset", "data": {}}) == {}
  config = robot.ask({"endpoint": "get_modality_config"})
  assert config["action"] == {"delta_indices": [*range(8)], "modality_keys": NAMES}


def test_a_batch_and_several_moments(port, policy):
  given = seen((1, 2))
  given["video"] = {name: np.concatenate([np.zeros_like(x), x], axis=1) for name, x in given["video"].items()}
  actions, _ = Robot(port).ask({"endpoint": "get_action", "data": {"observation": given}})
  found = np.concatenate([actions[name] for name in NAMES], axis=2)
  np.testing.assert_allclose(found, raw(policy, [1, 2]), atol=1e-4)


def test_another_robots_groups_and_columns():
  robot = {"groups": {"arm": [0, 1, 2], "hand": [3]}, "proprio": ["observation/arm", "hand"]}
  own = {"action_dim": 4, "robot": robot}
  assert groot.groups(own) == robot["groups"] and groot.columns(own) == ["arm", "hand"]
  assert [*groot.groups({"action_dim": 2})["action"]] == [0, 1] and groot.columns({"robot": None}) == []
  parts = {"hand": np.full((1, 1, 1), 9.0), "leg": np.zeros((1, 1, 6)), "arm": np.arange(3.0)[None, None]}
  given = {"video": {"a": np.zeros((1, 1, 2, 2, 3))}, "state": parts, "language": {"task": [["go"]]}}
  read = lambda **changes: groot.observations(given | changes, ["a"], ["arm", "hand"])[0]["state"].tolist()  # noqa: E731
  assert read() == [0, 1, 2, 9] and read(state={"x": parts["hand"], "arm": parts["arm"]}) == [9, 0, 1, 2]


@pytest.mark.parametrize(
  ("request_", "what"),
  [
    (b"\xc1", "msgpack"),
    ([1], "expected a map"),
    ({"endpoint": "kill"}, "kill"),
    ({"endpoint": "get_action", "data": {"observation": {"video": {}}}}, "language"),
    ({"endpoint": "get_action", "data": {"observation": seen() | {"language": {"task": []}}}}, "1 to 64"),
    ({"endpoint": "get_action", "data": {"observation": seen() | {"video": {"a": np.zeros((1, 2))}}}}, "5 axes"),
    ({"endpoint": "get_action", "data": {"observation": seen() | {"state": {}}}}, "lacks 'state'"),
  ],
)
def test_errors_are_one_line_and_the_next_request_is_answered(port, request_, what):
  robot = Robot(port)
  found = robot.ask(request_)
  assert what in found["error"] and "\n" not in found["error"]
  assert isinstance(robot.ask({"data": {"observation": seen()}}), list)


def test_the_token_is_asked_for(policy):
  door = lambda site, loop: groot.Door(site, loop, "127.0.0.1", 0, key=serving.KEY)  # noqa: E731
  with serving.serving(policy, doors=[door]) as (site, _):
    robot = Robot(site.other_doors[0].port)
    assert "Unauthorized" in robot.ask({"endpoint": "ping"})["error"]
    assert robot.ask({"endpoint": "ping", "api_token": serving.KEY})["status"] == "ok"


class Trap:
  ran = False

  def __reduce__(self):
    return (setattr, (Trap, "ran", True))


def saved(array, **options):
  file = io.BytesIO()
  np.save(file, array, **options)
  return file.getvalue()


def test_files_of_numbers_are_read_and_others_refused():
  for array in (np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.uint8(3)):
    assert equal(groot.read_npy(saved(array)), array)
  long = saved(np.zeros(3, np.float32)).replace(b"(3,)", b"(9999999999,)"[:4])
  bad = [b"", b"no", None, saved(np.array([Trap()], object), allow_pickle=True), saved(np.array(["a"])), long]
  bad += [saved(np.zeros(3))[:-1], saved(np.zeros(3)) + b"x", saved(np.zeros(2, [("a", "f4")]))]
  for data in bad:
    with pytest.raises(ValueError, match="Array: got"):
      groot.read_npy(data)
  assert not Trap.ran
