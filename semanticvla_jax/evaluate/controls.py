"""Controls: what is left of a success rate without the instruction, without sight, and without learned pruning.

A policy that does as well when told something else does not follow instructions; one that does as well blind runs a
trajectory by heart; one that does as well with random patches gets nothing from its pruner. All are the same parameters
on the same episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.policy import Policy

NAMES = {
  "shuffled": "told another episode's instruction",
  "blind": "sees grey frames",
  "random": "keeps random patches",
  "uniform": "keeps evenly spread patches",
  "centre": "keeps the central patches",
}


def shuffle(instructions: Sequence[str], seed: int = 0) -> list[str]:
  """The sentences in another order, such that no episode keeps its own; which sentences there are does not change.

  Raises:
    ValueError: one sentence is more than half of all, so that some episode would have to keep it.
  """
  names, counts = np.unique(instructions, return_counts=True)
  if counts.max() * 2 > len(instructions):
    raise ValueError(
      f"Shuffled instructions: got {str(names[counts.argmax()])!r} in {counts.max()} of {len(instructions)} episodes; "
      "expected at most half; run more episodes or a suite with more tasks."
    )
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(instructions))
  while stuck := [i for i, j in enumerate(order) if instructions[i] == instructions[j]]:
    i = stuck[0]
    free = [
      j for j in range(len(order))
      if instructions[order[j]] != instructions[i] and instructions[order[i]] != instructions[j]
    ]
    j = rng.choice(free)
    order[i], order[j] = order[j], order[i]
  return [instructions[j] for j in order]


def check(names: Sequence[str]) -> None:
  """Raises ValueError for a control that there is not, before anything is measured for it."""
  unknown = sorted(set(names) - set(NAMES))
  if unknown:
    raise ValueError(f"Controls: got {unknown}; expected some of {[*NAMES]}; choose among them.")


def run(
  policy: Policy,
  runner: Any,
  result: Episodes,
  make: Callable[[Policy, str], Any],
  names: Sequence[str] = tuple(NAMES),
  seed: int = 0,
) -> dict[str, tuple[Episodes, dict]]:
  """The controls that apply to this policy, on the episodes of `result`.

  Args:
    policy: the one evaluated.
    runner: the OnDevice or OnHost that gave `result`.
    result: of the evaluation itself.
    make: makes such a runner of another policy, for the control of that name.
    names: which of NAMES; those that change nothing in this policy are left out.
    seed: of the shuffle.

  Returns:
    {description: (episodes, what was changed in the model's config)}.
  """
  check(names)
  prunes = policy.bare.siglip_id_pruner is not None or policy.bare.dino_id_pruner is not None
  own = policy.config["model"].get("anchor_rule", "similarity")
  found = {}
  for name in names:
    if name == "shuffled":
      found[NAMES[name]] = (runner.run(result.seeds, shuffle(result.instruction, seed)), {})
    elif name == "blind":
      found[NAMES[name]] = (make(policy.blind(), name).run(result.seeds), {"images": "grey"})
    elif prunes and name != own:
      found[NAMES[name]] = (make(policy.variant(anchor_rule=name), name).run(result.seeds), {"anchor_rule": name})
  return found
