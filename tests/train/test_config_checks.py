"""Numbers that no run can be made from are refused by their field, before anything is read or compiled."""

import pytest

from configs import ablations, aloha, bridge, common, libero, openvla, openvla_oft, pretrain, quickstart
from semanticvla_jax.train import config_checks, explain, program


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("optim.lr", 0.0),
    ("optim.lr", -1.0),
    ("optim.lr", float("nan")),
    ("optim.decay_steps", 0),
    ("optim.warmup_steps", -1),
    ("optim.b2", 1.0),
    ("optim.eps", 0.0),
    ("optim.clip_norm", 0.0),
    ("optim.ema", 1.0),
    ("optim.accumulate", 0),
    ("data.batch_size", 0),
    ("data.prompt_length", -3),
    ("train.log_every", 0),
    ("train.save_every", -5),
    ("train.steps", -1),
    ("train.spike", 0.0),
    ("seed", -1),
    ("seed", 2**40),
    ("lora.rank", 0),
    ("lora.alpha", 0.0),
  ],
)
def test_a_number_that_no_run_can_have_is_refused_by_its_field(field, value):
  config = common.get_config("tiny")
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=rf"config.{field}: got .*; expected an? .*; set --config.{field}="):
    program.from_config(config)
  with pytest.raises(ValueError, match=f"config.{field}"):
    explain.explain(config, None)


def test_all_problems_are_told_at_once_and_a_drop_needs_both_of_its_numbers():
  config = common.get_config("tiny")
  config.update_from_flattened_dict({"optim.lr": 0.0, "train.log_every": 0, "optim.drop_at": 10})
  with pytest.raises(ValueError, match=r"optim.lr(.|\n)*train.log_every(.|\n)*got drop_at=10, drop_to=None"):
    config_checks.check(config)


@pytest.mark.parametrize(
  "config",
  [
    libero.get_config("lite@tiny"),
    aloha.get_config("@tiny"),
    bridge.get_config("@tiny"),
    openvla.get_config("@tiny"),
    openvla_oft.get_config("film@tiny"),
    pretrain.get_config("turn"),
    quickstart.get_config(),
    ablations.get_config("full@tiny"),
  ],
  ids=lambda config: config.data.mixture,
)
def test_every_recipe_passes(config):
  config_checks.check(config)
