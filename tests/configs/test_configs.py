import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_observation, random_params

from configs import ablations, baselines, common
from semanticvla_jax.data import datasets, mixtures
from semanticvla_jax.models.lora import TARGETS, LoRA
from semanticvla_jax.models.semanticvla import DEFAULTS, VARIANTS, build

FILES = {
  "libero": ("full", "lite", "r4", "r32"),
  "aloha": ("full",),
  "bridge": ("full",),
  "openvla_oft": ("libero", "film", "aloha"),
  "openvla": ("libero",),
}
CASES = [f"{name}:{mode}" for name, modes in FILES.items() for mode in modes]
LIGHT = ("libero:full", "openvla_oft:aloha", "openvla:libero")  # one of each kind of head
SERVING = {"fused", "attention", "token_multiple"}  # fields that say how a loaded policy runs: models/serving.py
ROWS = [f"ablations:{row}" for row in ablations.ROWS if ablations.ROWS[row] != (8, {})]
ROWS += [f"baselines:{row}" for row in baselines.ROWS]


def load(case, variant):
  name, mode = case.split(":")
  return importlib.import_module(f"configs.{name}").get_config(f"{mode}@{variant}")


@pytest.mark.parametrize(
  "case", [case if case in LIGHT else pytest.param(case, marks=pytest.mark.slow) for case in CASES + ROWS]
)
def test_builds_and_runs_one_forward_and_one_gradient(case):
  check_gradient(load(case, "tiny"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["libero_scripted", "pretrain", "quickstart"])
def test_configs_of_one_size_run_one_forward_and_one_gradient(name):
  check_gradient(importlib.import_module(f"configs.{name}").get_config())


def check_gradient(config):
  """One forward pass and one gradient of its model, with adapters where the config has them."""
  bare = build(config.model)
  lora = config.lora
  model = bare if lora is None else LoRA(bare.clone(), 2, lora.alpha, TARGETS[lora.targets])
  params, observation = random_params(model), random_observation(bare, batch=1)

  def loss(params):
    if bare.coupler is None:
      logits, _ = model.apply({"params": params}, observation, call="logits")
      return jax.nn.log_softmax(logits).mean()
    out = model.apply({"params": params}, observation, train=True, rngs={"noise": jax.random.key(0)})
    assert out.actions.shape == (1, config.model.chunk, config.model.action_dim)
    return jnp.abs(out.actions).mean()

  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  norm = sum(float(np.square(g).sum()) for g in jax.tree.leaves(gradients))
  assert np.isfinite(value) and np.isfinite(norm) and norm > 0


@pytest.mark.parametrize("case", CASES + ROWS)
def test_builds_at_full_size(case):
  config = load(case, "7b")
  assert build(config.model).llm.width == 4096
  assert set(config.model) == set(DEFAULTS) - SERVING


def test_the_released_recipe_is_the_models_defaults():
  """Configs import nothing of the package and restate its defaults: all but sizes, and how they are computed."""
  own = {"scan_encoders", "remat", "dtype", *SERVING}
  config = common.get_config("7b").model
  assert {name: config[name] for name in DEFAULTS if name not in own} == {
    name: value for name, value in DEFAULTS.items() if name not in own
  }


def test_patches_agree_with_the_variants():
  assert common.PATCHES == {name: (v["image"] // v["patch"]) ** 2 for name, v in VARIANTS.items()}


@pytest.mark.parametrize("case", CASES)
def test_normalization_is_that_of_the_released_data(case):
  config = load(case, "tiny")
  for name, _ in mixtures.mixture(config.data.mixture):
    assert config.data.normalisation == datasets.spec(name).mode


def test_bad_arguments():
  with pytest.raises(ValueError, match=r"got 'fulll@7b'; expected MODE@VARIANT"):
    load("libero:fulll", "7b")
  with pytest.raises(ValueError, match="VARIANT one of"):
    load("libero:full", "13b")
  with pytest.raises(AttributeError, match='Did you mean "keep"'):
    load("libero:full", "7b").model.kepp = 3


@pytest.mark.parametrize("name", ["pretrain", "quickstart"])
def test_tabletop_configs_fit_the_embedded_tokenizers(name):
  from semanticvla_jax.data import text

  config = importlib.import_module(f"configs.{name}").get_config()
  model = build(config.model)
  tokenizers = text.load(prompt_length=config.data.prompt_length, instruction_length=config.data.instruction_length)
  assert model.text.positions == config.data.instruction_length
  assert tokenizers.pad_id < model.llm.vocab


def test_couplers_are_compared_on_equal_terms():
  from configs import coupling

  rows = {name: coupling.get_config(name) for name in coupling.ROWS}
  assert {name: build(config.model).coupler.tokens for name, config in rows.items()} == dict(grouped=3, single=7, one=1)
  heads = {name for config in rows.values() for name, _ in build(config.model).coupler.groups}
  assert not heads & {"trans", "rot", "grip"}, "a head that the base has would not be new"
  same = [config.to_dict() | {"model": None} for config in rows.values()]
  assert same[0] == same[1] == same[2] and same[0]["data"]["suites"] == (0, 0, 0, 0, 0, 1)
  with pytest.raises(ValueError, match="got 'both'; expected one of"):
    coupling.get_config("both")
