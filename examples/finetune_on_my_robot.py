"""Fine-tunes the shipped base on the data of a robot of one's own: `python examples/finetune_on_my_robot.py`.

Episodes are written as RLDS, a spec says how their columns are read, a config says what to train, and the policy
that comes out is asked for a chunk of actions. The episodes here are random: put your recordings in their place, and
raise `steps`.
"""

import tempfile
from pathlib import Path

import numpy as np

from semanticvla_jax import Policy, cli
from semanticvla_jax.data import datasets, writer
from semanticvla_jax.train.__main__ import train

ROOT = Path(__file__).resolve().parents[1]
NAME = "my_robot"


def episodes(count: int, length: int = 24, size: int = 64):
  """What was recorded: frames before each action, the state then, and the action in the robot's own convention."""
  rng = np.random.default_rng(0)
  for _ in range(count):
    action = rng.uniform(-0.05, 0.05, (length, 7)).astype(np.float32)  # meters and radians a step
    action[:, 6] = np.arange(length) < length // 2  # this robot's gripper: 1 open, 0 closed
    state = np.concatenate([np.cumsum(action, axis=0), np.zeros((length, 1))], axis=1).astype(np.float32)
    image, wrist_image = rng.integers(0, 256, (2, length, size, size, 3), dtype=np.uint8)
    yield writer.Episode(image, wrist_image, state, action, "pick up the red cube")


def read(columns: datasets.Columns) -> datasets.Trajectory:
  """Stored columns to the model's convention: displacements and a gripper command with 1 open, 0 closed."""
  action = columns["action"]
  return datasets.Trajectory(action, columns["observation/state"], np.arange(len(action)))


def get_config(data_dir: Path, steps: int):
  """The quickstart's config on this data, with its own statistics."""
  cli.make_importable(str(ROOT / "configs" / "quickstart.py"))
  from configs import quickstart

  config = quickstart.get_config()
  config.init_from = str(ROOT / "checkpoints" / "tabletop_small")
  config.data.update(dir=str(data_dir), mixture=NAME, keep_statistics=False, batch_size=8)
  config.train.update(steps=steps, save_every=steps, log_every=1)
  return config


def main(steps: int = 2) -> dict:
  """Returns the answer of the fine-tuned policy to the first frame."""
  datasets.SPECS[NAME] = datasets.LIBERO._replace(
    standardize=read, gripper=datasets.Gripper(dimension=6, open=1.0, closed=0.0)
  )
  with tempfile.TemporaryDirectory() as folder:
    writer.write(Path(folder) / "data", NAME, episodes(4))
    workdir = Path(folder) / "run"
    workdir.mkdir()
    policy = Policy.load(train(get_config(Path(folder) / "data", steps), workdir), gripper="raw")  # 1 open, 0 closed
    first = next(episodes(1))
    observation = {"image": first.image[0], "wrist_image": first.wrist_image[0], "state": first.state[0]}
    result = policy.infer(observation | {"prompt": first.instruction})
  print(f"{len(result['actions'])} actions, the first {result['actions'][0].round(3).tolist()}")
  return result


if __name__ == "__main__":
  main()
