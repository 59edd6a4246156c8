"""What may leave the server: finite actions, and by choice only such as the training data holds."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

CHOICES = ("off", "clip", "refuse")


class ActionLimit:
  """The range of the training data's actions, in raw units.

  Args:
    stats: of the actions (types.Statistics); None for a policy without any, which is not limited. Dimensions outside
      their mask (a gripper) are not limited either.
    choice: "off" counts actions outside, "clip" moves them to the nearest bound, "refuse" answers with an error.
  """

  def __init__(self, stats: Any, choice: str):
    self.choice = choice
    self.low = self.high = None
    if stats is not None:
      low, high = (np.where(np.isnan(a), b, a) for a, b in ((stats.min, stats.q01), (stats.max, stats.q99)))
      self.low = np.where(stats.mask, low, -np.inf).astype(np.float32)
      self.high = np.where(stats.mask, high, np.inf).astype(np.float32)

  def outside(self, actions: Float[np.ndarray, "*b a"]) -> Bool[np.ndarray, "*b"]:
    """Which actions have a dimension outside the range."""
    if self.low is None:
      return np.zeros(actions.shape[:-1], bool)
    return ((actions < self.low) | (actions > self.high)).any(axis=-1)

  def clip(self, actions: Float[np.ndarray, "*b a"]) -> Float[np.ndarray, "*b a"]:
    """The actions, each dimension inside the range."""
    return actions if self.low is None else np.clip(actions, self.low, self.high)

  def describe(self) -> dict:
    """JSON values: the choice and the bounds (None where a dimension has none)."""
    bounds = {}
    if self.low is not None:
      bounds = {
        k: [float(x) if np.isfinite(x) else None for x in v] for k, v in (("low", self.low), ("high", self.high))
      }
    return {"limit": self.choice, **bounds}
