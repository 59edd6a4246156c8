"""The protocol that every environment offers to the evaluation loop, simulator or pure JAX alike."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Environment(Protocol):
  """One episode at a time, on the host, with the interface of LIBERO.

  An observation is a dict with openpi's keys: `observation/image` and `observation/wrist_image` u8[h w 3] (RGB,
  upright), `observation/state` f32[8] (gripper position xyz in meters, axis-angle in radians, the two finger positions
  in meters) and `prompt` (the instruction, str).

  An action is f32[7] in [-1, 1]: translation (x 0.05 m), rotation as axis-angle in the world frame (x 0.5 rad), gripper
  (-1 opens, +1 closes); one action a control step of 20 Hz.
  """

  max_steps: int

  @property
  def instruction(self) -> str:
    """What is asked in the current episode."""

  @property
  def success(self) -> bool:
    """Whether the current state fulfils the instruction."""

  def reset(self, seed: int) -> dict:
    """Starts episode `seed` (the same number always gives the same episode) and returns its first observation."""

  def step(self, action: np.ndarray, observe: bool = True) -> tuple[dict | None, bool]:
    """Acts once and returns (observation, done); done means success or `max_steps` reached.

    With `observe=False` nothing is rendered and the observation is None: a policy that executes chunks sees only the
    frames it asks for.
    """

  def observe(self) -> dict:
    """The current observation, rendered now."""
