"""The benchmark's rows and recipes are those of configs/, which it cannot import."""

import importlib

import pytest

from configs import baselines
from semanticvla_jax.benchmark import programs, rows
from semanticvla_jax.models.config import resolve
from semanticvla_jax.models.semanticvla import abstract_params, build, dummy_observation
from semanticvla_jax.train.partition import count

CONFIGS = {
  "openvla": "openvla:libero",
  "oft": "openvla_oft:libero",
  **{row: f"libero:{row}" for row in ("full", "lite", "r4", "r32")},
  **{row: f"ablations:{row}" for row in rows.ROWS if row.startswith("table")},
  **{row: f"baselines:{row}" for row in rows.ROWS if row in baselines.ROWS},
}
HOW = ("scan", "scan_encoders", "remat", "dtype")  # a program computes the same with other values


def config(row, size):
  module, mode = CONFIGS[row].split(":")
  return importlib.import_module(f"configs.{module}").get_config(f"{mode}@{size}")


@pytest.mark.parametrize("size", ["tiny", "7b"])
@pytest.mark.parametrize("row", rows.ROWS)
def test_rows_are_the_configs(row, size):
  ours, theirs = resolve(rows.model(row, size)), resolve(config(row, size).model.to_dict())
  assert {k: v for k, v in ours.items() if k not in HOW} == {k: v for k, v in theirs.items() if k not in HOW}


@pytest.mark.parametrize("row", ["full", "oft", "openvla", "slime", "cogvla"])
def test_recipes_train_the_parameters_that_the_configs_train(row):
  theirs = config(row, "7b")
  lora = theirs.lora
  assert rows.RECIPES[rows.ROWS[row].recipe] == (lora.rank, lora.alpha, lora.targets, theirs.trainable)


def test_the_optimizer_is_the_configs():
  theirs = config("full", "7b").optim.to_dict()
  assert rows.OPTIMIZER == {k: v for k, v in theirs.items() if k != "accumulate"}


def test_mid_has_a_quarter_of_a_billion_parameters_and_every_row_fits_it():
  sizes = {}
  for row in ("full", "oft", "r32"):
    model = build(rows.model(row, "mid"))
    sizes[row] = count(abstract_params(model, dummy_observation(model)))
  assert 230e6 < sizes["full"] < 270e6, sizes
  assert build(rows.model("full", "mid")).siglip.num_patches == 256


@pytest.mark.parametrize("arguments", [("nothing", "tiny"), ("full", "huge")])
def test_rows_and_sizes_that_do_not_exist_are_refused(arguments):
  with pytest.raises(ValueError, match=r"^--(row|size): got '\w+'; expected one of .*; choose one of them\.$"):
    rows.model(*arguments)


def test_random_parameters_are_a_function_of_the_seed_and_fit_the_model():
  model = build(rows.model("full", "tiny", "bfloat16"))
  shapes = abstract_params(model, dummy_observation(model))
  first, again, other = (programs.random_params(shapes, "bfloat16", seed) for seed in (0, 0, 1))
  leaf = first["coupler"]["trans"]["in"]["kernel"]
  assert leaf.dtype == "bfloat16" and leaf.shape == shapes["coupler"]["trans"]["in"]["kernel"].shape
  assert (leaf == again["coupler"]["trans"]["in"]["kernel"]).all()
  assert (leaf != other["coupler"]["trans"]["in"]["kernel"]).any()
