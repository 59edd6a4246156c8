"""What a policy looks at in one observation, under two instructions, as a scene of the report and as a picture file."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from semanticvla_jax import files
from semanticvla_jax.evaluate import report, visualize

_LABELS = ("its instruction", "another instruction")


def path(out: pathlib.Path, suite: str, moment: str) -> pathlib.Path:
  """The picture file of a moment, such as "first step", in a report's folder."""
  return out / f"{suite}_looks_{moment.replace(' ', '_')}.png"


def scene(
  name: str, views: Sequence[np.ndarray], prompts: Sequence[str], looks: Sequence[visualize.Look], target: pathlib.Path
) -> report.Scene:
  """A scene of the report; also writes it as a picture.

  Args:
    name: of the moment.
    views: u8[h w 3] each, what the cameras saw.
    prompts: the episode's instruction and another one.
    looks: of the policy under each of them.
    target: the picture file.
  """
  rows = [visualize.tiles(views, look) for look in looks]
  files.write(target, visualize.png(visualize.sheet([row for view in rows for row in view])))
  return report.Scene(name, [*zip(prompts, _LABELS, rows)], visualize.cue_tiles(views[0], looks[0]))
