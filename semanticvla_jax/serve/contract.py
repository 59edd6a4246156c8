"""What a client has to know before it acts, as JSON values: units, frames, gripper, views, shapes, limits.

A policy records its dataset, its widths and its gripper's convention; the units follow from the dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import semanticvla_jax
from semanticvla_jax.errors import refuse

GRIPPERS = {
  "command": "-1 opens, +1 closes (LIBERO's controller)",
  "raw": "1 open, 0 closed, as it was learned",
}
# The gripper's convention that the clients of a protocol expect.
OF_DOOR = {
  "openpi": "command",
  "roboarena": "command",
  "starvla": "raw",
  "act": "raw",
  "vla_eval": "command",
  "lerobot": "raw",
  "groot": "raw",
}
_CONTROLLER = "displacement of the end effector in the controller's units, base frame"
_LIBERO = {
  "actions": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"],
  "action_units": f"{_CONTROLLER}: 3 translations and 3 rotations (axis-angle), each -1..1; then the gripper",
  "state": ["x", "y", "z", "rx", "ry", "rz", "left_finger", "right_finger"],
  "state_units": "end effector in meters and axis-angle radians, base frame; two finger positions in meters; raw",
  "absolute": [False] * 6 + [True],
}
_BRIDGE = {
  "actions": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"],
  "action_units": "displacement of the end effector in meters and radians (Euler angles), base frame; then the gripper",
  "state": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"],
  "state_units": "end effector in meters and Euler radians, base frame; gripper; raw",
  "absolute": [False] * 6 + [True],
}
_ARMS = [f"{side}_{joint}" for side in ("left", "right") for joint in (*(f"joint_{i}" for i in range(6)), "gripper")]
_ALOHA = {
  "actions": _ARMS,
  "action_units": "absolute joint positions of two arms in radians, grippers as stored",
  "state": _ARMS,
  "state_units": "joint positions in radians, grippers as stored; raw",
  "absolute": [True] * 14,
}
UNITS = {"libero": _LIBERO, "tabletop": _LIBERO, "expert": _LIBERO, "bridge": _BRIDGE, "aloha": _ALOHA}
NOT_SENT = ("folder",)  # a path of the server's disk


def units(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Names, units and frames of a policy's numbers; of a dataset that is not in UNITS, only whose units they are."""
  dataset = str(metadata.get("dataset"))
  found = next((one for prefix, one in UNITS.items() if dataset.startswith(prefix)), None)
  if found is None or len(found["actions"]) != metadata["action_dim"]:
    return {"action_units": f"those of dataset {dataset}", "state_units": f"those of dataset {dataset}, raw"}
  return dict(found) if metadata["proprio_dim"] == len(found["state"]) else {**found, "state": None}


def state_range(policy: Any) -> dict[str, list[float]] | None:
  """The 1 % and 99 % quantiles of the state in the training data, raw; None for a policy that reads no state."""
  if policy.metadata["proprio_dim"] is None:
    return None
  stats = policy.stats.proprio
  return {"q01": [float(x) for x in stats.q01], "q99": [float(x) for x in stats.q99]}


def example(metadata: Mapping[str, Any], states: Mapping[str, Sequence[float]] | None) -> dict[str, Any]:
  """An observation as a policy reads it: grey images, a state in the middle of `state_range`, a short sentence."""
  size = metadata["image_size"]
  seen: dict[str, Any] = {view: np.full((size, size, 3), 128, np.uint8) for view in metadata["views"]}
  if states is not None:
    seen["state"] = np.mean([states["q01"], states["q99"]], axis=0).astype(np.float32)
  return seen | {"prompt": "pick up the red cube"}


def device() -> str:
  """The kind and number of jax's devices, of the server."""
  import jax

  first = jax.devices()[0]
  return f"{first.platform}: {first.device_kind} × {jax.device_count()}"


def describe(
  policy: Any, limits: Mapping[str, Any], grippers: Mapping[str, str], device: str, datasets: Sequence[str | None]
) -> dict[str, Any]:
  """The metadata of a server.

  Args:
    policy: its metadata and statistics are read.
    limits: of the server: sizes, deadlines, range of actions.
    grippers: the convention by door.
    device: what computes.
    datasets: whose units a request may ask for.
  """
  metadata = policy.metadata
  chunk, width = metadata["chunk"], metadata["action_dim"]
  answer = {"name": "actions", "dtype": "float32", "shape": [chunk, width]}
  size, views = metadata["image_size"], metadata["views"]
  image = "uint8 [h, w, 3], RGB 0..255, upright, any size"
  reads = {view: image for view in views} | {"instruction": "one sentence"}
  if metadata["proprio_dim"] is not None:
    reads["state"] = f"{metadata['proprio_dim']} finite numbers, raw"
  own = {name: value for name, value in metadata.items() if name not in NOT_SENT}
  return {
    **own,
    "server": f"semanticvla_jax {semanticvla_jax.__version__}",
    "observation": reads,
    "answer": answer,
    "device": device,
    "continuous": [bool(x) for x in policy.stats.action.mask],
    "state_range": state_range(policy),
    "normalization": "done by the server: raw states in, actions in the robot's units out",
    "grippers": {door: {"convention": name, "means": GRIPPERS[name]} for door, name in grippers.items()},
    **units(metadata),
    "limits": dict(limits),
    # what starVLA's clients read
    "action_chunk_size": chunk,
    "available_unnorm_keys": [*datasets],
    "default_unnorm_key": metadata.get("dataset"),
    "training_obs_image_size": [size, size],
    "action_keys": ["actions"],
    "state_keys": [] if metadata["proprio_dim"] is None else ["state"],
  }


def grippers(choices: Sequence[str]) -> dict[str, str]:
  """{"openpi": "command", …}: OF_DOOR with changes such as "openpi=raw".

  Raises:
    ValueError: no such door or convention.
  """
  found = dict(OF_DOOR)
  for word in choices:
    door, _, name = word.partition("=")
    if door not in found or name not in GRIPPERS:
      expected = f"DOOR=CONVENTION of {', '.join(found)} and {', '.join(GRIPPERS)}"
      raise refuse("--gripper", repr(word), expected, "choose one of them")
    found[door] = name
  return found
