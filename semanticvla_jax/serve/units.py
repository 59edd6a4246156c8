"""A policy in the units of one dataset: how its requests are read, and what its answers mean and may be."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from semanticvla_jax.errors import refuse
from semanticvla_jax.serve import observations
from semanticvla_jax.serve.limits import ActionLimit


class Units:
  """What depends on the dataset whose statistics are used, and not on the model.

  Args:
    policy: in the units of that dataset; metadata, observe and preparation are used.
    limit: of its actions.

  Attributes:
    period_ms: milliseconds between two actions of the robot; 0 where its description does not say.
  """

  def __init__(self, policy: Any, limit: ActionLimit):
    self.policy, self.limit = policy, limit
    self.dataset = policy.metadata.get("dataset")
    self.own_gripper = policy.metadata["gripper"]
    hz = (policy.metadata.get("robot") or {}).get("control_hz")
    self.period_ms = 1e3 / hz if hz else 0.0
    self._keys = observations.keys_of(policy)
    self._preparations = {self.own_gripper: policy.preparation}

  def prepare(self, observation: Any) -> tuple[dict, Any]:
    """What a client sent → the same by canonical names, and what the model reads. Raises ValueError."""
    given = observations.canonical(observation, self._keys)
    return given, self.policy.observe([given])

  def actions(self, normalized: Float[np.ndarray, "b k a"], gripper: str) -> Float[np.ndarray, "b k a"]:
    """Normalized actions of the model → the robot's units, with the gripper by a convention."""
    if gripper not in self._preparations:
      other = copy.copy(self.policy.preparation)
      other.gripper = gripper
      self._preparations[gripper] = other
    return self._preparations[gripper].actions(normalized)


def of_datasets(own: Units) -> dict[str | None, Units]:
  """Those of every dataset that a policy knows the statistics of, by name; one that does not fit is left out, and said.

  Args:
    own: of the dataset that the policy was loaded for.
  """
  found = {own.dataset: own}
  for name in getattr(own.policy, "datasets", ()):
    if name in found:
      continue
    try:
      other = own.policy.of_dataset(name)
    except ValueError as error:
      logging.warning("Statistics of %s are not served: %s", name, error)
      continue
    found[name] = Units(other, ActionLimit(other.stats.action, own.limit.choice))
  return found


def choose(units: Mapping[str | None, Units], key: Any, own: str | None) -> Units:
  """Those that a request's `unnorm_key` names, also without "_no_noops" as clients of LIBERO do; the policy's own
  without one.

  Raises:
    ValueError: none of them has that name.
  """
  if key in (None, ""):
    return units[own]
  names = (key, f"{key}_no_noops") if isinstance(key, str) else ()
  found = next((units[name] for name in names if name in units), None)
  if found is None:
    raise refuse("unnorm_key", f"{key!r:.80}", f"one of {', '.join(map(repr, units))}, or none", "name one of them")
  return found
