"""Grounding of LIBERO's episodes, measured when each ends: which patches were kept, and where the objects were.

The simulator's segmentation gives the objects; `grounding` defines the figures. Those of an episode are a line of a
file, so that a resumed evaluation has them.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from semanticvla_jax.evaluate import grounding, visualize
from semanticvla_jax.evaluate.rollout_pool import EpisodeResult
from semanticvla_jax.libero.simulator import MASK
from semanticvla_jax.policy import Policy

_BATCH = 8  # queries looked at together


class Recorder:
  """Measures episodes that have ended, and keeps the figures in a file.

  Args:
    policy: with an ID-Pruner.
    path: of the file; lines that are there already are read, damaged ones skipped.
    prepare: applied to an observation before the policy gets it, as in the episode.
    draw: called with the tiles of a picture of the first episode; None for no picture.

  Attributes:
    found: {number: (instruction that the policy got, figures by view)}.
  """

  def __init__(
    self,
    policy: Policy,
    path: pathlib.Path,
    prepare: Callable[[dict], dict],
    draw: Callable[[list[visualize.Tile]], None] | None = None,
  ):
    self._policy, self._path, self._prepare, self._draw = policy, path, prepare, draw
    self.found: dict[int, tuple[str, dict]] = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
      try:
        one = json.loads(line)
        self.found[int(one["seed"])] = str(one["told"]), {**one["views"]}
      except (ValueError, KeyError, TypeError):  # cut off: the episode runs again
        continue

  def __call__(self, result: EpisodeResult, seen: list[dict]) -> None:
    """Takes an episode that ended, with the observations that the policy had, and the last one, which it had not."""
    asked = seen[:-1] or seen
    kept = self._kept(asked, result.told)
    views, area = self._policy.metadata["views"], self._policy.metadata["crop_area"]
    masks = np.stack([np.stack([one[f"{MASK}{name}"] for name in views]) for one in asked])
    figures = grounding.of_episode(kept, grounding.filling(masks, round(kept.shape[-1] ** 0.5), area), views)
    with self._path.open("a", encoding="utf-8") as file:
      file.write(
        "\n" * self._cut_off() + json.dumps({"seed": result.seed, "told": result.told, "views": figures}) + "\n"
      )
      file.flush()
      os.fsync(file.fileno())
    self.found[result.seed] = result.told, figures
    if self._draw is not None:
      frames = np.stack([asked[0][f"observation/{name}"] for name in views])
      self._draw(visualize.grounding_tiles(frames, kept[0], masks[0], area, views))
      self._draw = None

  def of(self, seed: int, told: str) -> dict | None:
    """The figures of an episode by view, if they were measured under that instruction."""
    said, figures = self.found.get(seed, (None, None))
    return figures if said == told else None

  def _cut_off(self) -> bool:
    """Whether the file ends within a line."""
    text = self._path.read_bytes() if self._path.exists() else b""
    return bool(text) and not text.endswith(b"\n")

  def _kept(self, asked: Sequence[Mapping], told: str) -> np.ndarray:
    """bool[t v n], the kept patches at each query."""
    found = []
    for first in range(0, len(asked), _BATCH):
      part = [self._prepare(dict(one)) | {"prompt": told} for one in asked[first : first + _BATCH]]
      whole = part + [part[0]] * (_BATCH - len(part))  # one compiled size; the rest is cut off
      kept = visualize.kept_of(self._policy.params, self._policy.observe(whole), model=self._policy.model)
      found.append(np.asarray(kept)[: len(part)])
    return np.concatenate(found)
