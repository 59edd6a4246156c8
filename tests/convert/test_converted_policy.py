"""A converted checkpoint loads as a policy and acts."""

import checkpoints
import numpy as np
import pytest

from semanticvla_jax.convert.to_orbax import Options, to_orbax
from semanticvla_jax.data import text
from semanticvla_jax.policy import Policy


@pytest.mark.parametrize("name", ["openvla", "oft"])
def test_a_converted_policy_acts(name, tmp_path):
  folder = checkpoints.openvla(tmp_path / "s") if name == "openvla" else checkpoints.oft(tmp_path / "s", name)
  config = checkpoints.config(name)
  to_orbax([folder], tmp_path / "policy", config, Options(tokenizers=text.EMBEDDED))
  policy = Policy.load(tmp_path / "policy")
  picture = np.zeros((64, 64, 3), np.uint8)
  state = {} if name == "openvla" else {"wrist_image": picture, "state": np.zeros(8, np.float32)}
  actions = policy.infer({"image": picture, "instruction": "pick up the cup"} | state)["actions"]
  assert actions.shape == (config["model"]["chunk"], 7) and np.isfinite(actions).all()
