"""A robot of LeRobot's that always sees the same and writes down its actions, driven by LeRobot's own RobotClient.

Runs in the environment of `make lerobot`: python -c 'import lerobot_robot as robot; robot.run(ADDRESS, SEEN, OUT)'
"""

import dataclasses
import pathlib
import sys
import threading

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "data" / "lerobot"))

import diffusers  # noqa: F401  looks for torchvision, and must not find what stands in for it
import numpy as np
import write

write.without_torchvision()

from lerobot.async_inference import configs, robot_client  # noqa: E402
from lerobot.robots import config, robot  # noqa: E402

ACTIONS = 20
TIME = 300.0  # seconds for them


@config.RobotConfig.register_subclass("recorder")
@dataclasses.dataclass(kw_only=True)
class RecorderConfig(config.RobotConfig):
  seen: str  # file of np.savez: images, and "state"


class Recorder(robot.Robot):
  """Two cameras and eight joints; seven motors."""

  config_class, name = RecorderConfig, "recorder"

  def __init__(self, config):
    super().__init__(config)
    with np.load(config.seen) as file:
      self._cameras = {name: file[name] for name in file.files if name != "state"}
      self._joints = {f"joint_{i}.pos": float(x) for i, x in enumerate(file["state"])}
    self.taken, self.done, self._connected = [], threading.Event(), False

  @property
  def observation_features(self):
    return dict.fromkeys(self._joints, float) | {name: image.shape for name, image in self._cameras.items()}

  @property
  def action_features(self):
    return {f"motor_{i}.pos": float for i in range(7)}

  @property
  def is_connected(self):
    return self._connected

  is_calibrated = True

  def connect(self, calibrate=True):
    self._connected = True

  def calibrate(self):
    pass

  def configure(self):
    pass

  def get_observation(self):
    return self._joints | self._cameras

  def send_action(self, action):
    self.taken.append([*action.values()])
    if len(self.taken) == ACTIONS:
      self.done.set()
    return action

  def disconnect(self):
    self._connected = False


def run(address, seen, out):
  """Performs ACTIONS actions of the server, a chunk after the other, and saves them, f32[n 7]."""
  setup = configs.RobotClientConfig(
    policy_type="act",
    pretrained_name_or_path="unused",
    robot=RecorderConfig(seen=seen),
    actions_per_chunk=8,
    task="pick up the red cube",
    server_address=address,
    chunk_size_threshold=0.0,
    aggregate_fn_name="latest_only",
  )
  client = robot_client.RobotClient(setup)
  assert client.start()
  for work in (client.receive_actions, lambda: client.control_loop("pick up the red cube")):
    threading.Thread(target=work, daemon=True).start()
  assert client.robot.done.wait(TIME)
  client.shutdown_event.set()
  np.save(out, np.array(client.robot.taken[:ACTIONS], np.float32))
