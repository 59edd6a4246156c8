"""From chunks of actions to one action at a time: when to ask again, which actions of a late chunk are still to come.

Index-exact alignment counts the actions that were really executed between an observation and its answer, and skips as
many of the answer's; a delay that was estimated from clocks would be off by one where the robot was late. Runs on the
robot: numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from semanticvla_jax.errors import refuse


class Chunks:
  """The actions still to be executed.

  Args:
    replan_steps: actions of a chunk to execute before the policy is asked again; None for the whole chunk.
    align: whether the first actions of a chunk, those for the moments between observation and answer, are skipped.
    blend: actions over which a new chunk takes over from the old one, linearly; 0 switches at once.
    discrete: dimensions that are not blended, such as a gripper's command.

  Attributes:
    executed: actions handed out so far.
  """

  def __init__(
    self, replan_steps: int | None = None, *, align: bool = True, blend: int = 0, discrete: Sequence[int] = ()
  ):
    if replan_steps is not None and replan_steps < 1:
      raise refuse("Chunks", f"replan_steps={replan_steps}", "at least 1", "raise it")
    self.replan_steps, self.align, self.blend, self.discrete = replan_steps, align, blend, [*discrete]
    self.executed = 0
    self.reset()

  def reset(self) -> None:
    """Begins an episode: what is left of the old one is not executed."""
    self._left: list[np.ndarray] = []
    self._since = 0  # actions executed of the latest chunk

  def __len__(self) -> int:
    return len(self._left)

  @property
  def wants(self) -> bool:
    """Whether the policy should be asked with the next observation."""
    return not self._left or (self.replan_steps is not None and self._since >= self.replan_steps)

  def add(self, actions: np.ndarray, asked: int) -> None:
    """Takes over a chunk.

    Args:
      actions: f32[k a] of the policy, or f32[k b a] of robots in lock step.
      asked: value of `executed` when its observation was made.
    """
    late = self.executed - asked if self.align else 0
    new, old = [*np.asarray(actions)[late:]], self._left
    over = min(self.blend, len(old), len(new))
    for i in range(over):
      weight = np.float32((i + 1) / (over + 1))
      mixed = (1 - weight) * old[i] + weight * new[i]
      mixed[..., self.discrete] = new[i][..., self.discrete]
      new[i] = mixed
    self._left, self._since = new, late

  def next(self) -> np.ndarray | None:
    """The next action, f32[a], which counts as executed; None where there is none left: hold."""
    if not self._left:
      return None
    self.executed, self._since = self.executed + 1, self._since + 1
    return self._left.pop(0)
