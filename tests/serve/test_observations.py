"""What clients send, under the names that a policy reads: its own robot's, or openpi's and OpenVLA-OFT's."""

import types

import numpy as np

from semanticvla_jax import observation_dict
from semanticvla_jax.data import robot
from semanticvla_jax.data.spec import DatasetSpec
from semanticvla_jax.serve import observations

PICTURE = np.zeros((4, 6, 3), np.uint8)


def policy(own=None, views=("image", "wrist_image")):
  """What `keys_of` asks of a policy."""
  kept = types.SimpleNamespace(robot=own)
  return types.SimpleNamespace(preparation=kept, metadata={"views": list(views if own is None else own.views)})


def test_known_robots_are_read_under_everybodys_names():
  keys = observations.keys_of(policy())
  sent = {"observation": {"images": {"agentview": PICTURE}, "wrist": PICTURE, "states": np.zeros(8)}, "lang": "lift it"}
  found = observations.canonical(sent | {"robot_id": 7}, keys)
  assert found.keys() == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}


def test_an_own_robot_is_read_under_its_own_names():
  """Cameras, their further names, and a state in columns, as `Policy.infer` takes them."""
  spec = DatasetSpec(
    columns={"action": 6, "observation/joints": 6, "observation/torque": 2},
    views=("front", "overhead"),
    absolute=(True,) * 6,
    groups={"arm": range(6)},
    proprio=("observation/joints", "observation/torque"),
    aliases={"overhead": ("cam_1",)},
  )
  own = robot.of(spec)
  sent = {"observation/front": PICTURE, "cam_1": PICTURE, "joints": np.zeros(6), "torque": np.ones(2), "prompt": "go"}
  found = observations.canonical(sent | {"image": PICTURE}, observations.keys_of(policy(own)))
  assert found.keys() == sent.keys()
  read = observation_dict.read(found, own.views, 8, own.optional, own.proprio)
  assert len(read["views"]) == 2 and read["state"].tolist() == [0.0] * 6 + [1.0] * 2
