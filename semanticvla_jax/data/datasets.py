"""One function per dataset: from the columns stored on disk to actions and proprioception in one convention.

The convention: 7-d actions are displacements of the end effector and a gripper command with 1 open, 0 closed. A
`DatasetSpec` says the rest: which images, which dimensions are normalized, how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from semanticvla_jax.data import gripper
from semanticvla_jax.errors import refuse

Columns = Mapping[str, np.ndarray]


class Trajectory(NamedTuple):
  """One episode in raw units.

  Attributes:
    actions: f32[t a].
    proprio: f32[t p].
    frames: which frames of the stored episode these are, ascending.
  """

  actions: Float32[np.ndarray, "t a"]
  proprio: Float32[np.ndarray, "t p"]
  frames: Int[np.ndarray, "t"]


class Gripper(NamedTuple):
  """The gripper command as stored: its dimension of the action, and the values that open and close."""

  dimension: int
  open: float
  closed: float


class DatasetSpec(NamedTuple):
  """How the columns of one kind of dataset are read.

  Attributes:
    standardize: columns of an episode to a Trajectory.
    columns: the step features it reads, with their widths.
    views: image features below `observation/`, primary camera first, then wrists.
    normalized: per action dimension, False passes it through (a gripper command).
    absolute: per action dimension, True for a target, False for a displacement (decides what padding repeats).
    proprio_dim: width of the proprioception.
    mode: "bounds_q99" or "bounds", see statistics.normalize.
    chunk: actions predicted at a time in the release.
    gripper: how the gripper command is stored; None where there is none (absolute joints).
  """

  standardize: Callable[[Columns], Trajectory]
  columns: Mapping[str, int]
  views: tuple[str, ...]
  normalized: tuple[bool, ...]
  absolute: tuple[bool, ...]
  proprio_dim: int
  mode: str
  chunk: int
  gripper: Gripper | None = None


def check_gripper(name: str, spec: DatasetSpec, action: Float[np.ndarray, "n a"]) -> None:
  """Refuses stored gripper commands of another convention, which standardizing would clip or invert unseen.

  Commands must stay in the range of the spec's (within a twentieth of it) and, unless they never change, lie on both
  sides of its middle.

  Args:
    name: of the dataset.
    spec: how it is read.
    action: as stored, of all frames.

  Raises:
    ValueError: naming dataset, dimension, values and remedy.
  """
  if spec.gripper is None or not len(action):
    return
  column = action[:, spec.gripper.dimension]
  low, high = float(column.min()), float(column.max())
  ends = sorted((spec.gripper.open, spec.gripper.closed))
  slack, middle = 0.05 * (ends[1] - ends[0]), sum(ends) / 2
  outside = low < ends[0] - slack or high > ends[1] + slack
  still = low == high and low in ends
  if outside or (not still and (low >= middle or high <= middle)):
    raise refuse(
      f"Dataset {name!r}, action dimension {spec.gripper.dimension}",
      f"gripper commands in [{low:g}, {high:g}]",
      f"{spec.gripper.open:g} open … {spec.gripper.closed:g} closed",
      "write the dataset with that convention, or read it with a DatasetSpec whose `gripper` and `standardize` are "
      "its own",
    )


def libero(columns: Columns) -> Trajectory:
  """LIBERO: the gripper command -1 open, +1 closed becomes 1 open, 0 closed; proprioception is 8-d.

  state [t 8] is end effector position (3, meters), axis-angle (3, radians), two finger positions (2, meters), and is
  kept as state[:6] + state[-2:]. Released code: `oxe/transforms.py:827-841`.
  """
  action, state = columns["action"], columns["observation/state"]
  opening = gripper.to_opening(action[:, 6:7])
  proprio = np.concatenate([state[:, :6], state[:, -2:]], axis=1)
  return Trajectory(np.concatenate([action[:, :6], opening], axis=1), proprio, np.arange(len(action)))


def tabletop(columns: Columns) -> Trajectory:
  """The tabletop environment of this package, which writes LIBERO's layout and conventions."""
  return libero(columns)


def aloha(columns: Columns) -> Trajectory:
  """ALOHA: absolute joint targets and joint positions of two arms, 14-d each, as stored (`oxe/transforms.py:844`)."""
  action, state = columns["action"], columns["observation/state"]
  return Trajectory(action, state, np.arange(len(action)))


def bridge(columns: Columns) -> Trajectory:
  """Bridge V2 (project website version), 5 Hz, as OpenVLA reads it.

  The first frame goes (its action is all zero) and so does the last (no action follows): the 6 movement dimensions
  are replaced by the displacement the arm really made, state[i+1] - state[i] (meters, radians of Euler angles, not
  wrapped); the gripper is made binary, 1 open. Proprioception is 7-d: pose (6) and gripper (1).
  Released code: `oxe/transforms.py`, bridge_orig_dataset_transform; state keys of `oxe/configs.py`.
  """
  action, state = columns["action"][1:], columns["observation/state"][1:]
  movement = np.diff(state[:, :6], axis=0)
  opening = binary_gripper(action[:, -1])[:-1, None]
  proprio = np.concatenate([state[:-1, :6], state[:-1, -1:]], axis=1)
  return Trajectory(np.concatenate([movement, opening], axis=1), proprio, 1 + np.arange(len(movement)))


def binary_gripper(command: Float[np.ndarray, "t"]) -> Float32[np.ndarray, "t"]:
  """Rounds a gripper command: above 0.95 open (1), below 0.05 closed (0), between: the state reached afterwards.

  Commands that end an episode in between keep the value of the last one.
  """
  out = np.empty(len(command), np.float32)
  carry = command[-1] if len(command) else 0.0
  for t in reversed(range(len(command))):
    if not 0.05 <= command[t] <= 0.95:
      carry = float(command[t] > 0.95)
    out[t] = carry
  return out


_COMMAND, _OPENING = Gripper(6, -1.0, 1.0), Gripper(6, 1.0, 0.0)
_ARM = {"normalized": (True,) * 6 + (False,), "absolute": (False,) * 6 + (True,), "mode": "bounds_q99"}
_SEVEN = {"action": 7, "observation/state": 8}

LIBERO = DatasetSpec(libero, _SEVEN, ("image", "wrist_image"), proprio_dim=8, chunk=8, gripper=_COMMAND, **_ARM)
TABLETOP = LIBERO._replace(standardize=tabletop)
BRIDGE = DatasetSpec(
  bridge, {"action": 7, "observation/state": 7}, ("image_0",), proprio_dim=7, chunk=5, gripper=_OPENING, **_ARM
)
ALOHA = DatasetSpec(
  aloha,
  {"action": 14, "observation/state": 14},
  ("image", "left_wrist_image", "right_wrist_image"),
  normalized=(True,) * 14,
  absolute=(True,) * 14,
  proprio_dim=14,
  mode="bounds",
  chunk=25,
)

SPECS = {"libero": LIBERO, "tabletop": TABLETOP, "aloha": ALOHA, "bridge": BRIDGE}


def spec(name: str) -> DatasetSpec:
  """Finds the spec of a dataset whose name starts with one of SPECS.

  Raises:
    ValueError: no such spec.
  """
  for prefix, found in SPECS.items():
    if name.startswith(prefix):
      return found
  raise refuse(
    "Dataset without a spec",
    f"{name!r}",
    f"a name starting with one of {sorted(SPECS)}",
    "pass a DatasetSpec for it",
  )
