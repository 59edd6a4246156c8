"""Evaluates a policy in an environment of your own: `python examples/evaluate_my_environment.py`.

The environment is any class with the methods of `ReachHeight` (semanticvla_jax/envs/environment.py says what they
mean). `ReachRun` and `Reach` make a benchmark of it, with the flags, the controls, the fingerprint and the report that
the others have. A benchmark of this package is a folder with its environment, these two classes in evaluate/, and a
line in evaluate/benchmarks.py.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from semanticvla_jax import Policy
from semanticvla_jax.evaluate import run
from semanticvla_jax.evaluate.benchmarks import BENCHMARKS
from semanticvla_jax.evaluate.evaluation import Benchmark, Evaluation, Job, SuiteRun
from semanticvla_jax.evaluate.rollout import OnHost

BASE = Path(__file__).resolve().parents[1] / "checkpoints" / "tabletop_small"


class ReachHeight:
  """Success: the gripper is within 2 cm of a height that depends on the seed. Frames are gray."""

  max_steps, instruction = 16, "pick up the red cube"

  def __init__(self, size: int):
    self._frame = np.full((size, size, 3), 128, np.uint8)

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


class ReachRun(SuiteRun):
  def runner(self, policy):
    return OnHost(policy, ReachHeight(policy.image_size))

  def facts(self):  # what success depends on besides the policy: part of every result's fingerprint
    return {"environment": "reach", "suite": self.suite, "split": "all", "max_steps": ReachHeight.max_steps,
            "replan_steps": self.policy.replan_steps, "loop": "host"}


class Reach(Benchmark):
  title, suites = "reaching", ("height",)

  def add_flags(self, add):
    add("--episodes", type=int, default=8, help="number of episodes (default: 8)")

  def jobs(self, args, stored):
    policy = Policy.load(args.policy, dataset=args.dataset, dtype=args.dtype)
    yield Job(Evaluation(ReachRun(policy, "height", range(args.episodes), stored), stored))


def main() -> dict:
  """Runs the episodes as the command would, and returns the row of results.json."""
  BENCHMARKS["reach"] = Reach()
  with tempfile.TemporaryDirectory() as out:
    run.main([f"--policy={BASE}", "--suite=height", "--films=0", "--controls=blind", f"--out={out}"])
    return json.loads((Path(out) / "results.json").read_text())["results"][0]


if __name__ == "__main__":
  main()
