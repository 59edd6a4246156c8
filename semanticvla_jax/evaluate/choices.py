"""What a policy does where several objects fit the words: which it takes, and how often it moves nothing.

    python -m semanticvla_jax.evaluate choices --policy=checkpoints/tabletop_small --episodes=256

measures the tabletop's suites place_twins, place_shape and place_color (tabletop/probes.py), in which success counts
with any object that fits. It prints, with 95 % Wilson intervals, the success rate; which object was grasped first (the
fitting one that lay nearest to the gripper at the start, a fitting one further away, another object, or none); and the
share of episodes in which no object moved by more than 1 cm.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import results, tabletop_flags
from semanticvla_jax.evaluate.evaluation import check_minimum
from semanticvla_jax.evaluate.rollout import Episodes, OnDevice
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import probes, tasks

MOVED = 0.01  # meters from its first place, that count as moved
CHOICES = ("nearest", "further", "another", "none")


def chosen(episodes: Episodes) -> Int[np.ndarray, " n"]:
  """The choice of each episode, an index into CHOICES: what was grasped first.

  Args:
    episodes: with the states of an ambiguous suite.
  """
  states, found = episodes.states, []
  for i, steps in enumerate(episodes.steps):
    held = np.asarray(states.held)[: steps + 1, i]
    fitting, center = np.asarray(states.fitting)[0, i], np.asarray(states.center)[0, i]
    distance = np.linalg.norm(center[:, :2] - np.asarray(states.position)[0, i, :2], axis=-1)
    nearest = int(np.argmin(np.where(fitting, distance, np.inf)))
    first = next((int(index) for index in held if index >= 0), None)
    found.append(3 if first is None else 0 if first == nearest else 1 if fitting[first] else 2)
  return np.array(found)


def moved(episodes: Episodes) -> Bool[np.ndarray, " n"]:
  """Whether any object was ever more than MOVED from its first place, in each episode."""
  center = np.asarray(episodes.states.center)  # [t + 1, n, objects, 3]; an episode that ended stays as it is
  return (np.linalg.norm(center - center[:1], axis=-1) > MOVED).any(axis=(0, 2))


def lines(suite: str, episodes: Episodes) -> Iterator[str]:
  """What came of a suite, as lines."""
  n, choice = len(episodes.seeds), chosen(episodes)
  yield f"{suite}: success {_share(episodes.successes, n)}"
  for index, name in enumerate(CHOICES):
    of = choice == index
    what = "no object grasped" if name == "none" else f"first grasped: {_NAMES[name]}"
    yield f"  {what} {_share(int(of.sum()), n)}, of these successes {int(episodes.success[of].sum())}"
  yield f"  no object moved by more than 1 cm {_share(int((~moved(episodes)).sum()), n)}"


_NAMES = {
  "nearest": "the fitting object nearest to the gripper",
  "further": "a fitting object further away",
  "another": "an object that does not fit",
}


def _share(count: int, of: int) -> str:
  return f"{count} of {of}, {results.percent(count, of)} ({results.interval_text(results.wilson(count, of))})"


def main(argv: Sequence[str]) -> None:
  """Prints the lines; problems end the program with their message."""
  known = ",".join(probes.AMBIGUOUS)
  parser = tabletop_flags.parser("choices", __doc__, known, 256, "episodes per suite", [*probes.AMBIGUOUS])
  parser.add_argument("--seed", type=int, default=0, help="seed of the first episode (default: 0)")
  parser.add_argument("--batch", type=int, default=64, help="number of episodes that run together (default: 64)")
  args = parser.parse_args(argv)
  try:
    suites = args.suite.split(",")
    if unknown := [suite for suite in suites if suite not in probes.AMBIGUOUS]:
      raise refuse("--suite", f"{unknown[0]!r}", f"some of {known}", "choose among them")
    check_minimum(args, {"episodes": 1, "batch": 1})
    tasks.check_seeds([args.seed, args.seed + args.episodes - 1], args.split)
    policy = Policy.load(args.policy, dataset=args.dataset, batch_sizes=())
    for suite in suites:
      runner = OnDevice(policy, suite, args.split, batch=min(args.batch, args.episodes), keep_states=True)
      print("\n".join(lines(suite, runner.run(range(args.seed, args.seed + args.episodes)))), flush=True)
  except ValueError as error:
    sys.exit(f"error: {error}")
