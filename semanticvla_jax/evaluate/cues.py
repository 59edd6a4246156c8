"""Which words become cues, and success, with the values of a model's config that choose cues; nothing is trained.

    python -m semanticvla_jax.evaluate cues --policy=checkpoints/tabletop_small --suite=place --episodes=128

prints a line for each row of ROWS: the share of cues that name a color, a shape or a container, over both views of the
first frames; the words chosen most; and the success rate of the same parameters.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from semanticvla_jax import cli
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import results, visualize
from semanticvla_jax.evaluate.evaluation import check_minimum
from semanticvla_jax.evaluate.rollout import OnDevice
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import physics, probes, tasks

NAMING = re.compile("|".join((*tasks.COLORS, *tasks.SHAPES, "bowl", "plate", "slot")))  # words that name something
_WORDS = 5  # that are listed
_LOOKS = 32  # first frames


def _stop(policy: Policy) -> dict[str, Any]:
  return {"cue_stop": policy.tokenizers.stop()}


# A policy → what changes in its model's config.
ROWS: dict[str, Callable[[Policy], Mapping[str, Any]]] = {
  "as trained": lambda policy: {},
  "stop words": _stop,
  "max over patches": lambda policy: {"cue_pool": "max"},
  "stop words, max": lambda policy: _stop(policy) | {"cue_pool": "max"},
  "cue temperature / 3": lambda policy: {"cue_temperature": policy.config["model"].get("temperature", 1.0) / 3},
  "cue temperature x 10": lambda policy: {"cue_temperature": policy.config["model"].get("temperature", 1.0) * 10},
}


def chosen(policy: Policy, observations: Sequence[dict]) -> Counter:
  """How often each word is a cue, over views and observations; empty without cues."""
  return Counter(word for look in visualize.looks(policy, observations) for view in look.words for word in view)


def words_text(words: Counter) -> str:
  """The share of cues that name something, and the most frequent words with theirs."""
  total = sum(words.values())
  naming = sum(count for word, count in words.items() if NAMING.fullmatch(word))
  listed = ", ".join(f"{word} {count / total:.0%}" for word, count in words.most_common(_WORDS))
  return f"{naming / total:.0%} of cues name a color, shape or container ({listed})"


def main(argv: Sequence[str]) -> None:
  """Prints the lines; problems end the program with their message."""
  parser = cli.ArgumentParser("python -m semanticvla_jax.evaluate cues", __doc__)
  parser.add_argument("--policy", required=True, help="policy folder")
  parser.add_argument("--suite", default="place", help=f"one of {', '.join(probes.SUITES)} (default: place)")
  parser.add_argument("--split", default="heldout", help=f"one of {', '.join(tasks.SPLITS)} (default: heldout)")
  parser.add_argument("--episodes", type=int, default=128, help="number of episodes per row (default: 128; 0: none)")
  parser.add_argument("--dataset", help="name of the statistics to use, if the policy has several")
  args = parser.parse_args(argv)
  try:
    check_minimum(args, {"episodes": 0})
    policy = Policy.load(args.policy, dataset=args.dataset, batch_sizes=())
    environment = physics.TabletopEnvironment(args.suite, args.split, policy.image_size)
    observations = [environment.reset(seed) for seed in range(_LOOKS)]
    if not chosen(policy, observations):
      raise refuse("--policy", f"{args.policy}, which has no cues", "one with an ID-Pruner and cues", "choose another")
    for name, changes in ROWS.items():
      print(f"{name}: {_line(policy.variant(**changes(policy)), observations, args)}", flush=True)
  except ValueError as error:
    sys.exit(f"error: {error}")


def _line(policy: Policy, observations: Sequence[dict], args: Any) -> str:
  said = words_text(chosen(policy, observations))
  if not args.episodes:
    return said
  found = OnDevice(policy, args.suite, args.split, batch=min(64, args.episodes)).run(range(args.episodes))
  return f"{said}; success {results.rate_text(results.summary(found))}"
