"""From a robot's observation to a model's arrays, and from its actions to the robot's units. Knows no model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from semanticvla_jax import observation_dict
from semanticvla_jax.data import gripper as grippers
from semanticvla_jax.data import images, statistics, text
from semanticvla_jax.data.robot import Robot
from semanticvla_jax.types import Observation

SENTENCES = 1024  # whose tokens are remembered; instructions may be free text, and a policy may serve for weeks


class Preparation:
  """Statistics, tokenizers and image settings of a policy.

  Args:
    stats: of the dataset whose units the robot's numbers are in; `name` is that dataset's.
    mode: which bounds normalize, of statistics.MODES.
    tokenizers: their lengths are those of the arrays. reads_words: whether the model reads SigLIP's tokens too.
    picture: of images.prepare: size, crop_area, jpeg_quality, dct.
    views: names of the model's images, in its order. proprio_dim: None for a model without proprioception.
    gripper: "command" (the robot's values; -1 open, +1 closed where `robot` is None) or "raw" (as it was learned).
    robot: of the dataset; None takes observation_dict.ALIASES for the names of views, and every action dimension
      outside the statistics' mask for a binary gripper.
  """

  def __init__(
    self,
    stats: statistics.DatasetStatistics,
    tokenizers: text.Tokenizers,
    picture: Mapping[str, Any],
    *,
    name: str,
    mode: str,
    views: Sequence[str],
    proprio_dim: int | None,
    reads_words: bool,
    gripper: str,
    robot: Robot | None = None,
  ):
    self.stats, self.tokenizers, self.picture, self.name, self.mode = stats, tokenizers, {**picture}, name, mode
    self.views, self.proprio_dim, self.reads_words, self.gripper = tuple(views), proprio_dim, reads_words, gripper
    self.robot = robot
    self._warned: set[int] = set()
    self._encode = functools.lru_cache(maxsize=SENTENCES)(self._encode)

  def observe(self, observations: Sequence[Any]) -> Observation:
    """Observation dicts → what the model reads, numpy arrays of batch len(observations)."""
    found = [self._read(observation) for observation in observations]
    blank = np.zeros((self.picture["size"],) * 2 + (3,), np.uint8)  # what training has for an image that is missing
    prepare = lambda image: blank if image is None else images.prepare(image, **self.picture)  # noqa: E731
    views = [[prepare(image) for image in one["views"]] for one in found]
    proprio = None
    if self.proprio_dim is not None:
      state = np.stack([one["state"] for one in found])
      self._warn_of_other_units(state)
      proprio = statistics.normalize(state, self.stats.proprio, mode=self.mode)
    words = self.words([one["instruction"] for one in found])
    return Observation(np.stack([np.stack(one) for one in views]), proprio, *words)

  def words(self, instructions: Sequence[str]) -> tuple[np.ndarray | None, ...]:
    """Instructions → (prompt, prompt_mask, instruction, instruction_mask), the last two None without an ID-Pruner."""
    rows = zip(*(self._encode(sentence) for sentence in instructions))
    return tuple(None if column[0] is None else np.concatenate(column) for column in rows)

  def actions(self, normalized: Float[np.ndarray, "b k a"]) -> Float[np.ndarray, "b k a"]:
    """A model's actions → f32 in the robot's units, the gripper by its convention."""
    actions = statistics.unnormalize(normalized.astype(np.float32), self.stats.action, mode=self.mode)
    if self.gripper == "command" and self.robot is not None:
      return self.robot.commands(actions)
    if self.gripper == "command":
      actions = grippers.to_commands(actions, self.stats.action.mask).astype(np.float32)
    return actions

  @property
  def cached(self) -> int:
    """How many sentences' tokens are remembered now."""
    return self._encode.cache_info().currsize

  def _read(self, observation: Any) -> dict:
    if self.robot is None:
      return observation_dict.read(observation, self.views, self.proprio_dim)
    own = self.robot
    return observation_dict.read(observation, own.views, self.proprio_dim, own.optional, own.proprio)

  def _encode(self, sentence: str) -> tuple[np.ndarray | None, ...]:
    """One row of `words`; the constructor puts a bounded memory before it."""
    pruner = self.tokenizers.instruction([sentence]) if self.reads_words else (None, None)
    return (*self.tokenizers.prompt([sentence]), *pruner)

  def _warn_of_other_units(self, state: Float[np.ndarray, "b p"]) -> None:
    """Says once of each dimension that it lies further outside the data's range than that is wide: other units?"""
    stats = self.stats.proprio
    low, high = np.where(np.isnan(stats.min), stats.q01, stats.min), np.where(np.isnan(stats.max), stats.q99, stats.max)
    margin = np.maximum(high - low, 1e-3)
    outside = (state < low - margin) | (state > high + margin)
    for i in sorted({*np.flatnonzero(outside.any(axis=0)).tolist()} - self._warned):
      self._warned.add(i)
      value = state[outside[:, i], i][0]
      logging.warning(
        "Observation, state: got %g in dimension %d; expected about %g to %g, as in the data of %s; it is clipped to "
        "that range: check its unit and order. (Said once for each dimension.)",
        value,
        i,
        low[i],
        high[i],
        self.name,
      )
