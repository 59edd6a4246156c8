"""What happens along one episode: action chunks, the end of the episode, dropped no-ops. Pure numpy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

ENDS = ("cut", "pad")


def starts(length: int, chunk: int, trajectory_end: str = "cut") -> Int[np.ndarray, "n"]:
  """Lists the frames of an episode of `length` frames that may start a training example.

  "cut" keeps frames whose whole chunk lies inside the episode: the last `chunk` - 1 are never a start, and an episode
  shorter than the chunk has none. So does the release (`traj_transforms.py:27`). "pad" keeps every frame.

  Raises:
    ValueError: unknown `trajectory_end`, or a chunk below 1.
  """
  if trajectory_end not in ENDS:
    raise ValueError(f"Unknown trajectory end: got {trajectory_end!r}; expected one of {ENDS}; fix the config.")
  if chunk < 1:
    raise ValueError(f"Bad chunk length: got {chunk}; expected at least 1 action; fix the config.")
  return np.arange(max(length - chunk + 1, 0) if trajectory_end == "cut" else length)


def windows(
  actions: Float32[np.ndarray, "n a"],
  frames: Int[np.ndarray, "b"],
  ends: Int[np.ndarray, "b"],
  chunk: int,
  absolute: Bool[np.ndarray, "a"],
) -> tuple[Float32[np.ndarray, "b k a"], Bool[np.ndarray, "b k"]]:
  """Gathers the actions of `chunk` steps from each frame on, in raw units.

  Args:
    actions: the actions of all episodes, one after the other.
    frames: where each chunk starts.
    ends: one past the last frame of the episode of each.
    chunk: number of actions.
    absolute: dimensions that are targets (joint angles, a gripper) rather than displacements.

  Returns:
    The chunks, and True where the step lies inside the episode. Past its end, absolute dimensions repeat the last
    action and displacements are zero: the robot stays where it is.
  """
  index = frames[:, None] + np.arange(chunk)
  inside = index < ends[:, None]
  chunks = actions[np.minimum(index, ends[:, None] - 1)]
  return np.where(inside[:, :, None] | absolute, chunks, np.float32(0)), inside


def kept(actions: Float[np.ndarray, "t a"], threshold: float = 1e-4) -> Bool[np.ndarray, "t"]:
  """Marks the steps that are not no-ops, by the rule that made the `*_no_noops` data sets.

  A step is dropped if the norm of its first 6 dimensions is below `threshold` and its gripper command (the last
  dimension) equals that of the last *kept* step; while nothing has been kept yet, the norm alone decides.
  """
  still = np.linalg.norm(actions[:, :6], axis=1) < threshold
  keep = np.ones(len(actions), bool)
  gripper = None
  for t, command in enumerate(actions[:, -1]):
    keep[t] = not still[t] or (gripper is not None and command != gripper)
    if keep[t]:
      gripper = command
  return keep
