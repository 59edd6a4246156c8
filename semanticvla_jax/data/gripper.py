"""The gripper's two conventions: a command (-1 opens, +1 closes) and an opening (1 open, 0 closed), numpy or jax.

Simulators and robots take commands; data and models have openings (the released LIBERO convention).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float


def to_opening(command: Float[Any, "*b"]) -> Float[Any, "*b"]:
  """Commands, -1 open, +1 closed → openings, 1 open, 0 closed; values outside [0, 1] are clipped first."""
  return 1 - command.__array_namespace__().clip(command, 0, 1)


def to_commands(actions: Float[Any, "*b a"], mask: Bool[Any, " a"]) -> Float[Any, "*b a"]:
  """Actions whose openings become commands: binary at 0.5, so that LIBERO and the tabletop act on them.

  Released code: `process_action`.

  Args:
    actions: in raw units.
    mask: of their statistics; the dimensions outside it are openings.
  """
  mask = mask.astype(np.float32)
  return actions * mask + (1 - mask) * (1 - 2 * (actions > 0.5))
