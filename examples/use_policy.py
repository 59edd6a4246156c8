"""Loads the shipped tabletop policy and lets it act for one episode: `python examples/use_policy.py`.

On a robot, replace the environment's observation by your own dict: uint8 RGB images [h w 3], the robot's state in the
units of the training data, and the instruction as `prompt`.
"""

from pathlib import Path

from semanticvla_jax import Policy
from semanticvla_jax.tabletop.physics import TabletopEnvironment

BASE = Path(__file__).resolve().parents[1] / "checkpoints" / "tabletop_small"


def main(seed: int = 3) -> bool:
  """Runs one episode; returns whether the instruction was fulfilled."""
  policy = Policy.load(BASE)
  environment = TabletopEnvironment("pick", "heldout", size=policy.image_size)
  observation, done, steps = environment.reset(seed), False, 0
  print(f"instruction: {observation['prompt']}")
  while not done:
    result = policy.infer(observation)
    print(f"step {steps:3}: {len(result['actions'])} actions in {result['policy_timing']['total_ms']:.0f} ms, "
          f"the first {result['actions'][0].round(2).tolist()}")
    for action in result["actions"]:  # the whole chunk, then look again
      observation, done = environment.step(action)
      steps += 1
      if done:
        break
  print(f"success: {environment.success} after {steps} steps")
  return environment.success


if __name__ == "__main__":
  main()
