"""Small training runs for tests: a dataset, a config, the same as flags, and what a run left behind."""

import json
from pathlib import Path

import numpy as np

from configs import common
from semanticvla_jax.data import writer

NAME = "tabletop_test"
CHANGES = {
  "init_from": "random",  # nobody asks what these models have learned
  "lora.rank": 2,
  "lora.alpha": 4.0,
  "optim.lr": 1e-2,
  "optim.warmup_steps": 1,
  "optim.decay_steps": 10,
  "data.mixture": NAME,
  "data.batch_size": 8,
  "data.prompt_length": 32,
  "data.instruction_length": 24,
  "train.steps": 4,
  "train.save_every": 2,
  "train.keep_last": 3,
  "train.log_every": 1,
  "model.cues": 3,
  "mesh.split_above": 256,  # all parameters are small at this size: some are to be split
}


def write_data(folder: Path) -> Path:
  """Six episodes of 14 steps of noise at 32 pixels."""
  rng = np.random.default_rng(0)

  def episode(i):
    t = 14
    image = rng.integers(0, 256, (2, t, 32, 32, 3), np.uint8)
    action = rng.uniform(-1, 1, (t, 7)).astype(np.float32)
    action[:, 6] = np.where(np.arange(t) < 7, -1, 1)
    state = rng.uniform(-1, 1, (t, 8)).astype(np.float32)
    return writer.Episode(image[0], image[1], state, action, f"pick up the {('red', 'blue')[i % 2]} cube")

  writer.write(folder, NAME, (episode(i) for i in range(6)))
  return folder


def make_config(data, **train):
  """A tiny config over that dataset; `train` changes fields of config.train."""
  config = common.get_config("tiny")
  config.update_from_flattened_dict(CHANGES | {"data.dir": str(data)} | {f"train.{k}": v for k, v in train.items()})
  return config


def flags(data, workdir, **train) -> list[str]:
  """The same as arguments of `python -m semanticvla_jax.train`."""
  changes = CHANGES | {"data.dir": str(data)} | {f"train.{k}": v for k, v in train.items()}
  return [
    "--config=configs/libero.py:full@tiny",
    f"--workdir={workdir}",
    *(f"--config.{k}={v}" for k, v in changes.items()),
  ]


def losses_of(workdir) -> dict[int, float]:
  """Loss by step, as a run wrote it; {} before there is any."""
  path = Path(workdir) / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return {m["step"]: m["loss"] for m in map(json.loads, lines)}
