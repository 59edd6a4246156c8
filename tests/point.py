"""A small environment of its own, for the tests of what runs environments: a point that is to reach a goal."""

import os
import time
from pathlib import Path

import numpy as np

from semanticvla_jax.envs.subprocess_env import LOGGER

FOLDER = str(Path(__file__).parent)


class Point:
  """Episode `seed` asks for the goal of group seed // 10; the first action's sign decides whether it is reached.

  Args:
    log: a file that each reset adds its seed to, as a trace across processes.
    trouble: {seed: what goes wrong at its second action}: "raise", "die" (once: the file `log`.SEED remembers),
      "always die", "hang" (once), "nan" (a state that is not finite) or "tell" (a warning, and nothing else).
  """

  max_steps = 6

  def __init__(self, log: str, trouble: dict | None = None):
    self.log, self.trouble = Path(log), trouble or {}

  @property
  def instruction(self) -> str:
    return f"go to goal {self.seed // 10}"

  @property
  def success(self) -> bool:
    return self.place >= 1.0

  def reset(self, seed: int) -> dict:
    with self.log.open("a") as file:
      file.write(f"{seed}\n")
    self.seed, self.place, self.steps = seed, 0.0, 0
    return self.observe()

  def step(self, action, observe=True):
    self.place += float(action[0])
    self.steps += 1
    if self.steps == 2 and self.seed in self.trouble:
      self.go_wrong(self.trouble[self.seed])
    return (self.observe() if observe else None), self.success or self.steps >= self.max_steps

  def observe(self) -> dict:
    image = np.full((8, 8, 3), self.steps, np.uint8)
    place = np.nan if self.steps >= 2 and self.trouble.get(self.seed) == "nan" else self.place
    return {
      "observation/image": image,
      "observation/wrist_image": image,
      "prompt": self.instruction,
      "observation/state": np.array([self.seed, place, *[0] * 6], np.float32),
    }

  def facts(self, seed: int) -> dict[str, str]:
    return {"renderer": "a point"}

  def go_wrong(self, how: str) -> None:
    if how == "nan":
      return
    if how == "raise":
      raise ArithmeticError("the physics exploded")
    if how == "tell":
      return LOGGER.warning("a screw is loose in %d", self.seed)
    before = Path(f"{self.log}.{self.seed}")
    if how != "always die" and before.exists():
      return
    before.touch()
    if how == "hang":
      time.sleep(1000)
    os.kill(os.getpid(), 9)
