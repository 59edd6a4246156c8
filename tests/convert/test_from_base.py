"""What to-torch takes from --base, and the bases that it refuses."""

import checkpoints
import numpy as np
import pytest

from semanticvla_jax.convert import to_torch
from semanticvla_jax.convert.rules import engine

CHANGES = {
  "a tensor of another shape": (
    lambda t: t | {"projector.fc1.bias": np.zeros(3, np.float32)},
    r"0 \+, 0 -, 1 !.*\n! projector.fc1.bias: got shape \(3,\) in the base",
  ),
  "a tensor that the model knows nothing of": (
    lambda t: t | {"action_queries.weight": np.zeros(3, np.float32)},
    r"0 \+, 1 -, 0 !.*\n- action_queries.weight \(3,\)",
  ),
  "fewer layers": (
    lambda t: {k: x for k, x in t.items() if "language_model.model.layers.2." not in k},
    r"\+ language_model.model.layers.2.input_layernorm.weight",
  ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_base_of_another_model_is_refused(what, made, tmp_path):
  change, message = CHANGES[what]
  base = checkpoints.openvla(tmp_path / "base", change)
  with pytest.raises(engine.Mismatch, match=message):
    to_torch.to_torch(made("openvla")[1], tmp_path / "back", base=base)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_what_comes_from_the_base_has_a_reason(made, tmp_path):
  folder, policy = made("openvla")
  report = to_torch.to_torch(policy, tmp_path / "back", base=folder)
  assert len(report["from_base"]) == 30 and all(report["from_base"].values())
