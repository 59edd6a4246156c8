"""Small policies with random parameters, for the tests of what runs a policy."""

import functools
from pathlib import Path

import numpy as np
from helpers import TINY, random_params, tiny

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics, text
from semanticvla_jax.models import lora
from semanticvla_jax.models.config import VARIANTS
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.policy import Policy

DATA = {"normalisation": "q99", "crop_area": None, "prompt_length": 40, "instruction_length": 32}
CONFIG = {"model": TINY, "lora": None, "data": DATA}
CROPPING = CONFIG | {"data": DATA | {"crop_area": 0.9}}
RANK, ALPHA = 4, 8.0
# OpenVLA-OFT with three layers of a decoder and VLA-Pruner's history: what it keeps is decided by earlier queries too.
_HISTORY = dict(block=1, keep=6, score="mean+action", history=dict(window=3, decay=0.8, block=1))
_OFT = dict(dino_pruner=None, siglip_pruner=None, dense_fuser=None, film=(), coupler="single", mask="full", scan=False)
REMEMBERING = CONFIG | {
  "model": _OFT
  | dict(vision_layer="second_to_last", decoder_pruner=_HISTORY)
  | dict(variant=VARIANTS["tiny"] | {"llm": VARIANTS["tiny"]["llm"] | {"depth": 3}})
}


@functools.cache
def stats(seed: int = 0) -> statistics.DatasetStatistics:
  """Statistics of made-up tabletop numbers: the last action is a gripper, 1 open and 0 closed."""
  rng = np.random.default_rng(seed)
  actions = rng.normal(0, 0.05, (400, 7)).astype(np.float32)
  actions[:, 6] = rng.integers(0, 2, 400)
  middle, spread = [0, 0, 0.15, 0, 0, 0, 0.03, -0.03], [0.1, 0.1, 0.05, 0.2, 0.2, 0.5, 0.01, 0.01]
  proprio = rng.normal(middle, spread, (400, 8)).astype(np.float32)
  mask = [True] * 6 + [False]
  return statistics.DatasetStatistics(statistics.compute(actions, mask), statistics.compute(proprio), 400, 20)


@functools.cache
def tokenizers() -> text.Tokenizers:
  return text.load(prompt_length=DATA["prompt_length"], instruction_length=DATA["instruction_length"])


def policy(seed: int = 0, config: dict | None = None, **options) -> Policy:
  """A tiny policy."""
  config = CONFIG if config is None else config
  model = tiny(**{name: value for name, value in config["model"].items() if name not in TINY})
  options = {"batch_sizes": ()} | options
  return Policy(model, random_params(model, seed), stats(), tokenizers(), config, **options)


def remembering(**options) -> Policy:
  """A tiny policy whose answers depend on earlier queries."""
  model = build(REMEMBERING["model"])
  return Policy(model, random_params(model, 1), stats(), tokenizers(), REMEMBERING, **({"batch_sizes": ()} | options))


def saved_for_libero(folder: Path) -> Path:
  """A tiny policy in a folder, whose statistics are named after `libero_object`."""
  policy_folder.save_policy(
    folder,
    random_params(tiny()),
    config=CROPPING | {"data": CROPPING["data"] | {"prompt_length": 64}},
    tokenizers=text.EMBEDDED,
    statistics={"libero_object_no_noops": statistics.to_openvla(stats())},
  )
  return folder


@functools.cache
def adapted(seed: int = 0) -> tuple[lora.LoRA, dict]:
  """A tiny model wrapped in LoRA, with adapters that change its output."""
  model = lora.LoRA(tiny(), RANK, ALPHA)
  return model, random_params(model, seed)


def observation(seed: int = 0, size: int = 32, prompt: str = "pick up the red cube") -> dict:
  """What the tabletop would show, random."""
  rng = np.random.default_rng(seed)
  return {
    "observation/image": rng.integers(0, 256, (size, size, 3)).astype(np.uint8),
    "observation/wrist_image": rng.integers(0, 256, (size, size, 3)).astype(np.uint8),
    "observation/state": rng.normal(0, 0.1, 8).astype(np.float32),
    "prompt": prompt,
  }
