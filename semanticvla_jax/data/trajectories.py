"""What happens along one episode: action chunks, the end of the episode, dropped no-ops. Pure numpy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from semanticvla_jax.errors import refuse

ENDS = ("cut", "pad")


def starts(length: int, chunk: int, trajectory_end: str = "cut") -> Int[np.ndarray, " n"]:
  """Lists the frames of an episode of `length` frames that may start a training example.

  "cut" keeps frames whose whole chunk is inside the episode: the last `chunk` - 1 are never a start, and an episode
  shorter than the chunk has none. So does the release (`traj_transforms.py:27`). "pad" keeps every frame.

  Raises:
    ValueError: unknown `trajectory_end`, or a chunk below 1.
  """
  if trajectory_end not in ENDS:
    raise refuse("Unknown trajectory end", f"{trajectory_end!r}", f"one of {ENDS}", "fix the config")
  if chunk < 1:
    raise refuse("Bad chunk length", f"{chunk}", "at least 1 action", "fix the config")
  return np.arange(max(length - chunk + 1, 0) if trajectory_end == "cut" else length)


def windows(
  actions: Float32[np.ndarray, "n a"],
  frames: Int[np.ndarray, " b"],
  ends: Int[np.ndarray, " b"],
  chunk: int,
  absolute: Bool[np.ndarray, " a"],
) -> tuple[Float32[np.ndarray, "b k a"], Bool[np.ndarray, "b k"]]:
  """Gathers the actions of `chunk` steps from each frame on, in raw units.

  Args:
    actions: the actions of all episodes, one after the other.
    frames: where each chunk starts.
    ends: one past the last frame of the episode of each.
    chunk: number of actions.
    absolute: dimensions that are targets (joint angles, a gripper) rather than displacements.

  Returns:
    The chunks, and True where the step is inside the episode. Past its end, absolute dimensions repeat the last
    action and displacements are zero: the robot stays where it is.
  """
  index = frames[:, None] + np.arange(chunk)
  inside = index < ends[:, None]
  chunks = actions[np.minimum(index, ends[:, None] - 1)]
  return np.where(inside[:, :, None] | absolute, chunks, np.float32(0)), inside


def stride(actions: Float[np.ndarray, "n a"], proprio: Float[np.ndarray, "n p"], ends: Int[np.ndarray, " n"]) -> float:
  """Meters that one unit of a translation command moves the arm in a step: least squares over all steps.

  Args:
    actions: whose first three dimensions are displacements. proprio: whose first three are the position.
    ends: one past the last frame of the episode of each.
  """
  inside = np.flatnonzero(np.arange(len(ends)) + 1 < ends)
  moved, command = proprio[inside + 1, :3] - proprio[inside, :3], actions[inside, :3]
  return float((moved * command).sum(dtype=np.float64) / max((command**2).sum(dtype=np.float64), 1e-12))


def displaced(
  proprio: Float32[np.ndarray, "b p"],
  actions: Float32[np.ndarray, "b k a"],
  shift: Float[np.ndarray, "b 6"],
  meters: float,
  inside: Bool[np.ndarray, "b k"],
) -> tuple[Float32[np.ndarray, "b p"], Float32[np.ndarray, "b k a"]]:
  """Examples as if the arm stood elsewhere, with actions that lead back to the demonstrated path.

  Demonstrations that begin in one pose and follow one path do not show the states next to it. The way back is that of
  a proportional controller that leaves 1 - 1 / k of the distance after each step; the attitude is not led back. Images
  stay as they are, so `shift` should be small.

  Args:
    proprio: position, attitude, …, in raw units. actions: translations first, in [-1, 1], which they keep to.
    shift: meters and radians that the arm is displaced by. meters: see `stride`.
    inside: steps within the episode; those past its end stay as they are.
  """
  k = actions.shape[1]
  moved, answer = proprio.copy(), actions.copy()
  moved[:, :6] += shift.astype(np.float32)
  back = shift[:, None, :3] / (k * meters) * (1 - 1 / k) ** np.arange(k)[:, None]
  answer[:, :, :3] = np.where(inside[:, :, None], np.clip(actions[:, :, :3] - back, -1, 1), actions[:, :, :3])
  return moved, answer


def kept(actions: Float[np.ndarray, "t a"], threshold: float = 1e-4) -> Bool[np.ndarray, " t"]:
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
