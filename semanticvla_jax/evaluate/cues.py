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

from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import results, tabletop_flags, visualize
from semanticvla_jax.evaluate.evaluation import check_minimum
from semanticvla_jax.evaluate.rollout import OnDevice
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import tasks

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


def frequent(words: Counter, count: int) -> str:
  """The most frequent words, with their share of all."""
  return ", ".join(f"{word} {n / words.total():.0%}" for word, n in words.most_common(count))


def words_text(words: Counter) -> str:
  """The share of cues that name something, and the most frequent words with theirs."""
  naming = sum(count for word, count in words.items() if NAMING.fullmatch(word))
  return f"{naming / words.total():.0%} of cues name a color, shape or container ({frequent(words, _WORDS)})"


def main(argv: Sequence[str]) -> None:
  """Prints the lines; problems end the program with their message."""
  parser = tabletop_flags.parser("cues", __doc__, "place", 128, "episodes per row, 0 for words alone")
  args = parser.parse_args(argv)
  try:
    check_minimum(args, {"episodes": 0})
    policy = Policy.load(args.policy, dataset=args.dataset, batch_sizes=())
    observations = tabletop_flags.first_observations(policy, args.suite, args.split, _LOOKS)
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
