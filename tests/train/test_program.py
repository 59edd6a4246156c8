"""Every config as shipped makes a training step, and the documented bases hold what it does not train."""

import importlib
from pathlib import Path

import jax
import pytest

from configs import common, libero, openvla
from semanticvla_jax.train import from_specs, init, program

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))
OWN = ("coupling", "libero_scripted", "pretrain", "quickstart")  # one size, no @variant
CASES = [(f, "") for f in OWN] + [("pretrain", "dense")] + [(f, "@tiny") for f in FILES if f not in OWN]
LARGER = [pytest.param(f, "@small", marks=pytest.mark.slow) for f in FILES if f not in OWN]


@pytest.mark.parametrize(("file", "argument"), CASES + LARGER)
def test_every_config_has_a_training_step(file, argument):
  config = importlib.import_module(f"configs.{file}").get_config(argument)
  if file == "robot":  # leaves its sizes to a spec
    config.data.specs = (f"{ROOT}/examples/finetune_on_my_robot.py:SPEC",)
    config = from_specs.resolve(config)
  p = program.from_config(program.changed(config, **{"data.batch_size": 2}))
  state, metrics = jax.eval_shape(p.step, p.state, p.frozen, p.batch)
  assert jax.tree.structure(state) == jax.tree.structure(p.state) and metrics["loss"].shape == ()


def test_instructions_are_as_long_as_the_text_towers_positions():
  from semanticvla_jax.models.semanticvla import VARIANTS

  assert common.WORDS == {name: sizes["text"]["positions"] for name, sizes in VARIANTS.items()}


def parameters(config):
  return init.shapes(*init.make_model(config), config.trainable, config.frozen_dtype)


def test_openvla_and_siglip_hold_all_that_semanticvla_keeps_frozen():
  """The two policies of launch/README.md."""
  config, base = libero.get_config("full@tiny"), openvla.get_config("libero@tiny")
  base.model.vision_layer, tower = "last", libero.get_config("full@tiny")
  for one in (base, tower):  # without adapters
    one.lora, one.trainable = None, ".*"
  wanted, whole = parameters(config), parameters(tower)
  siglip = {name: whole[name] for name in ("siglip", "text")}
  taken, new = init.assign_sources(wanted, {"base": parameters(base), "siglip": siglip}, config.trainable)
  assert {path.split("/")[0] for path in taken["siglip"]} == {"text"}
  assert {"coupler", "dense_fuser", "dino_sa_pruner", "siglip_id_pruner"} <= set(new) and "text" not in new
