"""Fine-tunes the shipped base for a robot of your own: `python examples/finetune_on_my_robot.py`.

SPEC describes the data. Episodes are written as RLDS by it, a config names it, and the policy that comes out reads
observations by its camera names. The episodes here are random: put your recordings in their place, and raise `steps`.
"""

import tempfile
from pathlib import Path

import numpy as np

from semanticvla_jax import Policy, cli
from semanticvla_jax.data import __main__ as data
from semanticvla_jax.data import writer
from semanticvla_jax.data.spec import DatasetSpec, Gripper

ROOT = Path(__file__).resolve().parents[1]
SPEC = DatasetSpec(  # an arm of six joints with a gripper that opens up to 8 cm
  name="my_arm",
  columns={"action": 7, "observation/joints": 6, "observation/opening": 1},
  proprio=("observation/joints", "observation/opening"),
  views=("front", "side", "hand"),
  absolute=(False,) * 6 + (True,),  # displacements of the joints, a target of the gripper
  groups={"shoulder": (0, 1, 2), "wrist": (3, 4, 5), "gripper": (6,)},
  gripper=Gripper(6, open=0.08, closed=0.0, kind="continuous"),
  units={"shoulder": "rad", "wrist": "rad", "gripper": "m"},
  control_hz=10.0,
)


def recordings(count: int, length: int = 24):
  """Raw arrays: frames before each action, what the robot measured then, and the action."""
  rng = np.random.default_rng(0)
  for _ in range(count):
    action = rng.uniform(-0.05, 0.05, (length, 7)).astype(np.float32)
    action[:, 6] = rng.uniform(0, 0.08, length)
    joints = np.cumsum(action[:, :6], axis=0)
    sizes = {"front": (96, 128), "side": (96, 128), "hand": (64, 64)}
    images = {view: rng.integers(0, 256, (length, *size, 3), dtype=np.uint8) for view, size in sizes.items()}
    columns = {"action": action, "observation/joints": joints, "observation/opening": action[:, 6:]}
    yield writer.Recording(images, columns, "pick up the red cube")


def get_config(data_dir: Path, steps: int):
  """The quickstart's config; the numbers that SPEC decides are left to it."""
  cli.make_importable(str(ROOT / "configs" / "quickstart.py"))
  from configs import quickstart

  config = quickstart.get_config()
  config.init_from = str(ROOT / "checkpoints" / "tabletop_small")
  config.model.update(num_views=-1, proprio_dim=-1, action_dim=-1, chunk=-1)
  config.data.update(specs=(f"{__file__}:SPEC",), dir=str(data_dir), mixture=SPEC.name, keep_statistics=False)
  config.data.update(batch_size=8)
  config.train.update(steps=steps, save_every=steps, log_every=1)
  return config


def main(steps: int = 2) -> dict:
  """Returns the answer of the fine-tuned policy to the first frame."""
  with tempfile.TemporaryDirectory() as folder:
    writer.write_recordings(Path(folder) / "data", SPEC.name, SPEC, recordings(4))
    data.main(["inspect", f"--data-dir={folder}/data", f"--spec={__file__}:SPEC"])
    (Path(folder) / "run").mkdir()
    from semanticvla_jax.train.__main__ import train  # here, so that commands can read SPEC from this file

    policy = Policy.load(train(get_config(Path(folder) / "data", steps), Path(folder) / "run"))
  first = next(recordings(1))
  observation = {view: images[0] for view, images in first.images.items()} | {"prompt": first.instruction}
  result = policy.infer(observation | {key: first.columns[key][0] for key in SPEC.proprio})
  print(f"{len(result['actions'])} actions in {SPEC.units}, the first {result['actions'][0].round(3).tolist()}")
  return result


if __name__ == "__main__":
  main()
