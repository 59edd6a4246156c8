"""Evaluates a policy in an environment of your own: `python examples/evaluate_my_environment.py`.

An environment is any class with `max_steps`, `instruction`, `success`, `reset(seed)`, `step(action, observe)` and
`observe()` (see semanticvla_jax/envs/environment.py). This one asks the gripper to reach a height.
"""

from pathlib import Path

import numpy as np

from semanticvla_jax import Policy
from semanticvla_jax.evaluate import protocol
from semanticvla_jax.evaluate.rollout import OnHost

BASE = Path(__file__).resolve().parents[1] / "checkpoints" / "tabletop_small"


class ReachHeight:
  """Success: the gripper is within 2 cm of a height that the seed decides. Frames are grey."""

  max_steps = 16

  def __init__(self, size: int):
    self._frame = np.full((size, size, 3), 128, np.uint8)

  @property
  def instruction(self) -> str:
    return "pick up the red cube"

  @property
  def success(self) -> bool:
    return abs(self._height - self._goal) < 0.02

  def reset(self, seed: int) -> dict:
    self._height, self._goal, self._steps = 0.2, 0.1 + 0.02 * (seed % 5), 0
    return self.observe()

  def step(self, action: np.ndarray, observe: bool = True) -> tuple[dict | None, bool]:
    self._height += 0.05 * float(np.clip(action[2], -1, 1))
    self._steps += 1
    return (self.observe() if observe else None), self.success or self._steps >= self.max_steps

  def observe(self) -> dict:
    state = np.array([0, 0, self._height, 0, 0, 0, 0.04, -0.04], np.float32)
    return {"observation/image": self._frame, "observation/wrist_image": self._frame, "observation/state": state,
            "prompt": self.instruction}


def main(episodes: int = 8) -> dict:
  """Runs the episodes and returns their summary: successes, rate, Wilson interval, what left the rate."""
  policy = Policy.load(BASE)
  result = OnHost(policy, ReachHeight(policy.image_size)).run(range(episodes))
  summary = protocol.summary(result)
  low, high = summary["interval"]
  print(f"{summary['successes']} of {summary['episodes']} episodes, 95 % interval {low:.2f} to {high:.2f}")
  return summary


if __name__ == "__main__":
  main()
