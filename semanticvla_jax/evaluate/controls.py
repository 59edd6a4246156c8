"""Controls: the success rate that remains without the instruction, without images, and without learned pruning.

A policy that does as well under another instruction does not follow instructions; one that does as well without images
has memorized a trajectory; one that does as well with random patches does not use its pruner. All controls run the same
parameters on the same episodes.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.policy import Policy

# Names of the rows in results.json files of all versions.
NAMES = {
  "shuffled": "told another episode's instruction",
  "blind": "sees grey frames",
  "random": "keeps random patches",
  "uniform": "keeps evenly spread patches",
  "centre": "keeps the central patches",
}


def shuffle(instructions: Sequence[str], seed: int = 0, before: Mapping[int, str] | None = None) -> list[str]:
  """The sentences in another order, such that no episode keeps its own; which sentences there are does not change.

  Args:
    instructions: each episode's own.
    seed: of the order.
    before: {index: sentence} of episodes that were given one earlier; they keep it if the rest can be arranged
      around it.

  Raises:
    ValueError: one sentence is more than half of all, so that some episode would have to keep it.
  """
  names, counts = np.unique(instructions, return_counts=True)
  if counts.max() * 2 > len(instructions):
    raise refuse(
      "Shuffled instructions",
      f"{str(names[counts.argmax()])!r} in {counts.max()} of {len(instructions)} episodes",
      "at most half",
      "run more episodes or a suite with more tasks",
    )
  whole = _arrange(instructions, instructions, seed)
  if before is None or all(whole[i] == sentence for i, sentence in before.items()):
    return whole
  rest = [i for i in range(len(instructions)) if i not in before]
  pool = collections.Counter(instructions)
  pool.subtract(before.values())
  own = [instructions[i] for i in rest]
  kept = all(sentence != instructions[i] for i, sentence in before.items()) and min(pool.values()) >= 0
  if not kept or any(pool[name] + own.count(name) > len(rest) for name in pool):
    return whole
  told = _arrange(own, sorted(pool.elements()), seed)
  return [before[i] if i in before else told[rest.index(i)] for i in range(len(instructions))]


def _arrange(own: Sequence[str], pool: Sequence[str], seed: int) -> list[str]:
  """The sentences of `pool` in an order in which none is an episode's own; such an order has to exist."""
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(own))
  while stuck := [i for i, j in enumerate(order) if own[i] == pool[j]]:
    i = stuck[0]
    free = [j for j in range(len(order)) if pool[order[j]] != own[i] and pool[order[i]] != own[j]]
    j = rng.choice(free)
    order[i], order[j] = order[j], order[i]
  return [pool[j] for j in order]


def check(names: Sequence[str]) -> None:
  """Raises ValueError for a control that does not exist, or is named twice."""
  unknown = sorted(set(names) - set(NAMES))
  if unknown:
    raise refuse("Controls", f"{unknown}", f"some of {[*NAMES]}", "choose among them")
  if len(set(names)) < len(names):
    raise refuse("Controls", f"{[*names]}", "each once", "name none twice")


def applying(config: Mapping, prunes: bool, names: Sequence[str]) -> dict[str, dict]:
  """Those controls that change something in a policy: {name: what they change in its model's config}.

  Args:
    config: of the model.
    prunes: whether the model prunes by the instruction.
    names: which of NAMES.
  """
  check(names)
  own, found = config.get("anchor_rule", "similarity"), {}
  for name in names:
    if name == "shuffled":
      found[name] = {}
    elif name == "blind":
      found[name] = {"images": "grey"}
    elif prunes and name != own:
      found[name] = {"anchor_rule": name}
  return found


def of_policy(policy: Any, names: Sequence[str]) -> dict[str, dict]:
  """As `applying`, for a policy; of one behind a server only the instruction can be changed."""
  if not isinstance(policy, Policy):
    return {name: {} for name in names if name == "shuffled"}
  return applying(policy.config["model"], policy.bare.prunes_by_instruction, names)


def each(
  policy: Any,
  run: Callable[[Any, str, Sequence[str] | None], Episodes],
  result: Episodes,
  names: Sequence[str] = tuple(NAMES),
  *,
  seed: int = 0,
  before: Mapping[int, str] | None = None,
  told: Mapping[int, str] | None = None,
) -> Iterator[tuple[str, Episodes, dict]]:
  """Yields the controls that apply to this policy one by one, on the episodes of `result`.

  Args:
    policy: the one that is evaluated.
    run: runs those episodes with a policy, for the control of a name, with an instruction for each (None: its own).
    result: of the evaluation itself.
    names: which of NAMES; those that change nothing in this policy are skipped.
    seed: of the shuffle.
    before: {seed: instruction} of the episodes that an earlier run of the shuffled control measured.
    told: {seed: instruction} of the shuffled control, where `result` is a share of the episodes that are shuffled.

  Yields:
    (name, episodes, what was changed in the model's config).
  """
  for name, changes in of_policy(policy, names).items():
    if name == "shuffled" and told is not None:
      yield name, run(policy, name, [told[int(one)] for one in result.seeds]), changes
    elif name == "shuffled":
      kept = {i: before[int(one)] for i, one in enumerate(result.seeds) if int(one) in (before or {})}
      yield name, run(policy, name, shuffle(result.instruction, seed, kept)), changes
    else:
      yield name, run(policy.blind() if name == "blind" else policy.variant(**changes), name, None), changes
