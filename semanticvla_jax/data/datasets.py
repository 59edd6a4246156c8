"""The datasets that this package knows, each as a `DatasetSpec`; how a dataset finds its spec.

Where columns do not suffice, one function takes them to actions and proprioception in one convention: 7-d actions are
displacements of the end effector and a gripper command with 1 open, 0 closed. Your own robot needs no line here:
docs/your_robot.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32

from semanticvla_jax.data import gripper
from semanticvla_jax.data.spec import Columns, DatasetSpec, Gripper, Trajectory
from semanticvla_jax.errors import refuse


def check_gripper(name: str, spec: DatasetSpec, action: Float[np.ndarray, "n a"]) -> None:
  """Refuses stored gripper commands of another convention, which standardizing would clip or invert unseen.

  Commands must stay in the range of the spec's (within a twentieth of it) and, of a binary gripper, lie on both sides
  of its middle unless they never change.

  Args:
    name: of the dataset.
    spec: how it is read.
    action: as stored, of all frames.

  Raises:
    ValueError: naming dataset, dimension, values and remedy.
  """
  for one in spec.grippers if len(action) else ():
    column = action[:, one.dimension]
    low, high = float(column.min()), float(column.max())
    ends = sorted((one.open, one.closed))
    slack, middle = 0.05 * (ends[1] - ends[0]), sum(ends) / 2
    outside = low < ends[0] - slack or high > ends[1] + slack
    still = one.kind == "continuous" or (low == high and low in ends)
    if outside or (not still and (low >= middle or high <= middle)):
      raise refuse(
        f"Dataset {name!r}, action dimension {one.dimension}",
        f"gripper commands in [{low:g}, {high:g}]",
        f"{one.open:g} open … {one.closed:g} closed",
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


def binary_gripper(command: Float[np.ndarray, " t"]) -> Float32[np.ndarray, " t"]:
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


_COMMAND, _OPENING = Gripper(6, -1.0, 1.0), Gripper(6, 1.0, 0.0, command=(-1.0, 1.0))
_ARM = {
  "normalized": (True,) * 6 + (False,),
  "absolute": (False,) * 6 + (True,),
  "groups": {"trans": (0, 1, 2), "rot": (3, 4, 5), "grip": (6,)},
  "units": {"trans": "m", "rot": "rad"},
}
_SEVEN = {"action": 7, "observation/state": 8}
_WRIST = {"left_wrist_image": ("left_wrist",), "right_wrist_image": ("right_wrist",)}

LIBERO = DatasetSpec(
  standardize=libero,
  columns=_SEVEN,
  views=("image", "wrist_image"),
  proprio_dim=8,
  gripper=_COMMAND,
  aliases={"image": ("full_image",)},
  **_ARM,
)
TABLETOP = LIBERO._replace(standardize=tabletop)
BRIDGE = DatasetSpec(
  standardize=bridge,
  columns={"action": 7, "observation/state": 7},
  views=("image_0",),
  proprio_dim=7,
  chunk=5,
  gripper=_OPENING,
  control_hz=5.0,
  aliases={"image_0": ("observation/image", "full_image", "image")},
  **_ARM,
)
# Absolute joint targets and joint positions of two arms, as stored (released code: `oxe/transforms.py:844`).
ALOHA = DatasetSpec(
  columns={"action": 14, "observation/state": 14},
  views=("image", "left_wrist_image", "right_wrist_image"),
  normalized=(True,) * 14,
  absolute=(True,) * 14,
  mode="bounds",
  chunk=25,
  units={"proprio": "rad"},
  aliases={"image": ("full_image",), **_WRIST},
)

SPECS = {"libero": LIBERO, "tabletop": TABLETOP, "aloha": ALOHA, "bridge": BRIDGE}


def spec(name: str, own: Sequence[DatasetSpec] = ()) -> DatasetSpec:
  """Finds the spec of a dataset: one of `own`, by its name or without one, else by the beginning of the dataset's name.

  Raises:
    ValueError: no such spec, or several.
  """
  named, nameless = ([one for one in own if one.name == key] for key in (name, None))
  if len(found := named or nameless) == 1:
    return found[0]
  if own:
    raise refuse(
      f"Spec of dataset {name!r}",
      f"specs named {[one.name for one in own]}",
      "one of that name, or one without a name",
      f"set name={name!r} in its DatasetSpec, or correct the dataset's name",
    )
  for prefix, shipped in SPECS.items():
    if name.startswith(prefix):
      return shipped
  raise refuse(
    "Dataset without a spec",
    f"{name!r}",
    f"a name starting with one of {sorted(SPECS)}",
    "write a DatasetSpec for it and pass it, as --spec=FILE.py:NAME or config.data.specs (docs/your_robot.md)",
  )
