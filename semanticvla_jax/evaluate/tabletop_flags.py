"""What the commands that look at one policy on the tabletop share: their flags, and first observations."""

from __future__ import annotations

from collections.abc import Sequence

from semanticvla_jax import cli
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import physics, probes, tasks


def parser(
  command: str, doc: str | None, suite: str, episodes: int, what: str, suites: Sequence[str] = probes.SUITES
) -> cli.ArgumentParser:
  """A parser with --policy, --suite, --split, --episodes and --dataset.

  Args:
    command: behind `evaluate`. doc: of its module.
    suite, episodes: defaults. what: is counted by --episodes. suites: that may be named.
  """
  made = cli.ArgumentParser(f"python -m semanticvla_jax.evaluate {command}", doc)
  add = made.add_argument
  add("--policy", required=True, help="policy folder")
  add("--suite", default=suite, help=f"of the tabletop, among {', '.join(suites)} (default: {suite})")
  add("--split", default="heldout", help=f"one of {', '.join(tasks.SPLITS)} (default: heldout)")
  add("--episodes", type=int, default=episodes, help=f"number of {what} (default: {episodes})")
  add("--dataset", help="name of the statistics to use, if the policy has several")
  return made


def first_observations(policy: Policy, suite: str, split: str, count: int) -> list[dict]:
  """The first observation of each of the first episodes."""
  environment = physics.TabletopEnvironment(suite, split, policy.image_size)
  return [environment.reset(seed) for seed in range(count)]
