"""Where a gripper takes the moving part of a fixture: the handle of a drawer, the bar of a knob. Pure numpy.

Positions in meters with z up, angles in radians.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_HANDLE = 0.017  # depth of a handle, from a drawer's foremost point
_BAR = 0.02  # height of a knob's bar, from its highest point


class Part(NamedTuple):
  """The moving part of a fixture: points inside its collision shapes, and which way it moves from where it is closed.

  `axis` is a drawer's unit vector in the world, or what a knob turns about, by the right-hand rule.
  """

  points: Float[np.ndarray, "n 3"]
  axis: Float[np.ndarray, "3"]


def handle(drawer: Part) -> Float[np.ndarray, "3"]:
  """The middle of a drawer's handle, which is what stands out from its front."""
  along = drawer.points @ drawer.axis
  bar = drawer.points[along > along.max() - _HANDLE]
  return (bar.min(0) + bar.max(0)) / 2


def knob(part: Part) -> tuple[Float[np.ndarray, "3"], float]:
  """The middle of a knob's bar, 2 cm below its top, and the yaw in which two fingers close across it."""
  top = part.points[:, 2].max()
  bar = part.points[part.points[:, 2] > top - _BAR, :2]
  across = np.linalg.eigh(np.cov((bar - bar.mean(0)).T))[1][:, 0]  # of the least spread
  return np.array([*(bar.min(0) + bar.max(0)) / 2, top - _BAR]), float(np.arctan2(across[1], across[0]))
