"""Writes the small datasets next to this file with LeRobot's own code: `python write.py OUT`, in the environment of
`make lerobot`.

v3.0 by `lerobot-dataset` 0.4.4, v2.1 by `lerobot` 0.3.3. Both import torchvision for names that nothing here calls.
"""

import pathlib
import shutil
import sys
import types

import numpy as np

FPS, SIZE, LENGTHS = 10, (64, 96), (7, 5, 6)
TASKS = ("pick up the red cube", "öffne die Schublade", "pick up the red cube")
SETS = {  # name: version, cameras, whether they are videos
  "v30_video": ("v3.0", ("front", "side", "hand"), True),
  "v30_image": ("v3.0", ("front",), False),
  "v21_video": ("v2.1", ("front",), True),
  "v21_image": ("v2.1", ("front", "side", "hand"), False),
}


def picture(camera: int, episode: int, frame: int) -> np.ndarray:
  """A picture whose upper third says in eight blocks, black or white, which frame of which episode it is."""
  rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
  out = np.stack([rows * 2 + 40, columns + 60 + 30 * camera, np.full(SIZE, 90 + 20 * camera)], axis=-1)
  bits = (32 * episode + frame) >> np.arange(7, -1, -1) & 1
  out[: SIZE[0] // 3] = np.repeat(bits * 255, SIZE[1] // 8)[None, :, None]
  return out.astype(np.uint8)


def columns(episode: int) -> dict[str, np.ndarray]:
  """The numbers of an episode: commands of seven dimensions, the last a gripper's (1 open, 0 closed), and a state."""
  rng, length = np.random.default_rng(episode), LENGTHS[episode]
  action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
  action[:, 6] = np.arange(length) % 2
  return {"action": action, "observation.state": rng.normal(size=(length, 6)).astype(np.float32)}


def without_torchvision() -> None:
  """Stands in for torchvision: modules whose names are imported, and none called."""
  import datasets  # noqa: F401  looks for torchvision, and must not find this one

  def anything(name: str) -> type:
    if name.startswith("__"):
      raise AttributeError(name)
    return type(name, (), {})

  inner = ("transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional")
  for name in ("torchvision", *(f"torchvision.{one}" for one in inner)):
    module = types.ModuleType(name)
    module.__getattr__, module.__path__ = anything, []
    sys.modules[name] = module
    if "." in name:
      setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)


def write(root: pathlib.Path, version: str, cameras: tuple[str, ...], videos: bool) -> None:
  if version == "v3.0":
    from ledataset.datasets.lerobot_dataset import LeRobotDataset
  else:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

  joints = ["x", "y", "z", "roll", "pitch", "yaw"]
  features = {
    f"observation.images.{camera}": {
      "dtype": "video" if videos else "image",
      "shape": (*SIZE, 3),
      "names": ["height", "width", "channels"],
    }
    for camera in cameras
  }
  features["action"] = {"dtype": "float32", "shape": (7,), "names": [*joints, "gripper"]}
  features["observation.state"] = {"dtype": "float32", "shape": (6,), "names": joints}
  made = LeRobotDataset.create("a/b", fps=FPS, features=features, root=root, robot_type="arm", use_videos=videos)
  for episode, task in enumerate(TASKS):
    if version == "v3.0" and videos and episode == 2:  # two episodes in the first files, one in the second
      made.meta.info["data_files_size_in_mb"] = made.meta.info["video_files_size_in_mb"] = 1e-6
    numbers = columns(episode)
    for frame in range(LENGTHS[episode]):
      seen = {f"observation.images.{name}": picture(i, episode, frame) for i, name in enumerate(cameras)}
      seen |= {key: column[frame] for key, column in numbers.items()}
      if version == "v3.0":
        made.add_frame(seen | {"task": task})
      else:
        made.add_frame(seen, task)
    made.save_episode()
  if version == "v3.0":
    made.finalize()
  shutil.rmtree(root / "images", ignore_errors=True)  # PNGs from before they were put into the parquet files


if __name__ == "__main__":
  without_torchvision()
  for name, what in SETS.items():
    if not (pathlib.Path(sys.argv[1]) / name).exists():
      write(pathlib.Path(sys.argv[1]) / name, *what)
