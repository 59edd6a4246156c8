"""A training run and a policy folder that version 0.1.0 wrote in November 2026: what is on disk has to stay readable.

tests/train/earlier.tar.xz holds the run's dataset, its checkpoint of step 2, its policy of step 3, and what that
version computed from them: the loss of step 3, and the actions of the policy. Later formats get archives of their own:

    PYTHONPATH=.:tests python tests/earlier_training.py NEW.tar.xz
"""

import contextlib
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

ARCHIVE = Path(__file__).parent / "train" / "earlier.tar.xz"
NAME = "tabletop_test"
SAVED, STEPS = 2, 3
VARIANT = dict(  # smaller than `tiny`, with one encoder: a few tens of thousands of numbers
  image=16,
  patch=4,
  siglip=dict(width=8, depth=2, num_heads=1, mlp_dim=16),
  text=dict(vocab=512, positions=24, width=8, depth=1, num_heads=1, mlp_dim=16),
  llm=dict(vocab=512, width=16, depth=1, num_heads=1, mlp_dim=32),
)


def make_config(folder: Path, steps: int = STEPS) -> ConfigDict:
  """The config of the run; `folder` is that of the dataset."""
  from small_runs import CHANGES

  from configs import common

  config = common.get_config("tiny")
  with config.ignore_type():
    config.model.variant = ConfigDict(VARIANT)
  changes = {"model.encoders": ("siglip",), "model.film": (), "model.dense_fuser": None, "model.keep": 4}
  changes |= {"data.dir": str(folder), "data.cache_dir": "", "data.batch_size": 2, "train.steps": steps}
  config.update_from_flattened_dict(CHANGES | changes)
  return config


def observation() -> dict:
  """What the stored actions answer."""
  from policies import observation

  return observation(size=16)


def unpack(folder: Path) -> Path:
  """The archive's `data`, `run`, `policy` and `expected.json` in a folder; returns that."""
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(folder, filter="data")
  return folder


def pack(target: Path) -> None:
  """Writes an archive as ARCHIVE is, of today's code."""
  with tempfile.TemporaryDirectory() as folder, tarfile.open(target, "w:xz") as archive:
    with contextlib.chdir(folder):  # nothing in it is to name where it was made
      _write()
    for path in sorted(Path(folder).iterdir()):
      archive.add(path, path.name, filter=lambda member: member.replace(uid=0, gid=0, uname="", gname="", deep=False))


def _write() -> None:
  """Writes `data`, `run`, `policy` and `expected.json` here."""
  from semanticvla_jax import Policy
  from semanticvla_jax.train import __main__ as command

  _write_data(Path("data"))
  command.train(make_config(Path("data"), SAVED), Path("run"))
  policy = command.train(make_config(Path("data")), Path("run"))
  lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
  actions = Policy.load(policy).infer(observation())["actions"]
  expected = {"loss": {line["step"]: line["loss"] for line in lines}[STEPS], "actions": np.asarray(actions).tolist()}
  Path("expected.json").write_text(json.dumps(expected), encoding="utf-8")
  policy.rename("policy")
  for path in Path("run").iterdir():
    if path.name != "checkpoints":
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  shutil.rmtree(Path("run/checkpoints") / str(STEPS))
  for path in Path().rglob("commit_success.txt"):  # Orbax writes the absolute path of the folder into it
    path.write_text(path.read_text(encoding="utf-8").replace(f"{Path.cwd()}/", ""), encoding="utf-8")


def _write_data(folder: Path) -> None:
  """Two episodes of ten steps of noise at 16 pixels."""
  from semanticvla_jax.data import writer

  rng, t = np.random.default_rng(0), 10

  def episode(i: int):
    image = rng.integers(0, 256, (2, t, 16, 16, 3), np.uint8)
    action = rng.uniform(-1, 1, (t, 7)).astype(np.float32)
    action[:, 6] = np.where(np.arange(t) < 5, -1, 1)
    state = rng.uniform(-1, 1, (t, 8)).astype(np.float32)
    return writer.Episode(image[0], image[1], state, action, f"pick up the {('red', 'blue')[i]} cube")

  writer.write(folder, NAME, map(episode, range(2)))


if __name__ == "__main__":
  pack(Path(sys.argv[1]))
