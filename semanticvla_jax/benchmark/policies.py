"""Policies to time: of a folder, or a row's with random weights made on the device in the type it runs in."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from semanticvla_jax.benchmark import programs, rows
from semanticvla_jax.data import statistics, text
from semanticvla_jax.models import serving
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.policy import Policy

SENTENCE = "put the red block on the blue square"  # 29 prompt tokens of the embedded tokenizer
_CAMERA = 256  # pixels of a side of LIBERO's images


def random_policy(
  row: str,
  size: str,
  dtype: str = "float32",
  *,
  prompt: int = 32,
  seed: int = 0,
  weights: str = "full",
  attention: str = "xla",
  **options: Any,
) -> Policy:
  """A row's policy with random weights, made on the device in `dtype`; layout, statistics, tokenizers as a real one's.

  Args:
    row, size: of rows.ROWS and rows.SIZES. prompt: padded length of the prompt, in tokens.
    weights, attention: of Policy.load.
    **options: of Policy (batch_sizes, …).

  Raises:
    ValueError: a row or size that does not exist, or a prompt too short for SENTENCE.
  """
  config = rows.model(row, size, dtype, **serving.layout(jax.default_backend(), attention))
  model = build(config)
  params = programs.random_params(programs.param_shapes(model), dtype, seed)
  if weights != "full":
    params = serving.quantize(params, weights)
  words = 64 if model.text is None else min(64, model.text.positions)
  data = dict(normalisation="q99", crop_area=0.9, prompt_length=prompt, instruction_length=words)
  stats = _statistics(config.get("action_dim", 7), model.proprio_dim)
  tokenizers = _tokenizers(prompt, words)
  model = model if weights == "full" else serving.Quantized(model, weights)
  return Policy(model, params, stats, tokenizers, {"model": config, "lora": None, "data": data}, **options)


def again(policy: Policy, **options: Any) -> tuple[Policy, float]:
  """The same policy compiled for other batch sizes, and the seconds this took: tracing, compilation, a first call."""
  begin = time.perf_counter()
  options = dict(replan_steps=policy.replan_steps, gripper=policy.gripper) | options
  parts = (policy.model, policy.params, policy.stats, policy.tokenizers, policy.config)
  return Policy(*parts, **options), time.perf_counter() - begin


def observation_dicts(policy: Policy, batch: int, seed: int = 0) -> list[dict]:
  """What a robot sends: random pictures in a camera's size, a plausible state, SENTENCE."""
  rng = np.random.default_rng(seed)
  side = max(policy.image_size, _CAMERA) if policy.image_size >= 128 else policy.image_size
  names = [f"observation/{name}" for name in policy.metadata["views"]]
  width = policy.bare.proprio_dim
  return [
    {name: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for name in names}
    | ({} if width is None else {"observation/state": _middle(policy, width)})
    | {"prompt": SENTENCE}
    for _ in range(batch)
  ]


def _middle(policy: Policy, width: int) -> np.ndarray:
  return np.broadcast_to(np.asarray(policy.stats.proprio.mean, np.float32), (width,))


def _statistics(actions: int, proprio: int | None) -> statistics.DatasetStatistics:
  """Of made-up numbers: small displacements, the last of each seven dimensions a gripper, 1 open and 0 closed."""
  rng = np.random.default_rng(0)
  gripper = np.arange(actions) % 7 == 6
  values = np.where(gripper, rng.integers(0, 2, (500, actions)), rng.normal(0, 0.05, (500, actions)))
  action = statistics.compute(values.astype(np.float32), ~gripper)
  if proprio is None:
    return statistics.DatasetStatistics(action, None, 500, 5)
  state = rng.normal(0, 0.2, (500, proprio)).astype(np.float32)
  return statistics.DatasetStatistics(action, statistics.compute(state), 500, 5)


def _tokenizers(prompt: int, words: int) -> text.Tokenizers:
  lengths: Mapping[str, int] = dict(prompt_length=prompt, instruction_length=words)
  try:
    return text.load(**lengths)
  except ModuleNotFoundError:  # no sentencepiece
    return text.Tokenizers(HashedWords(), HashedWords(), **lengths)


class HashedWords:
  """Ids of words by a checksum, in the interface of a SentencePieceProcessor.

  For timing on a machine without sentencepiece: random weights know no words. A few letters make a token, so that
  sentences are about as long as with the embedded tokenizer.
  """

  _SIZE, _FIRST, _LETTERS = 499, 3, 3

  def encode(self, sentence: str) -> list[int]:
    words = sentence.split()
    pieces = [word[i : i + self._LETTERS] for word in words for i in range(0, len(word), self._LETTERS)]
    return [self._FIRST + zlib.crc32(piece.encode()) % (self._SIZE - self._FIRST - 1) for piece in pieces]

  def vocab_size(self) -> int:
    return self._SIZE

  def piece_to_id(self, piece: str) -> int:
    return self._SIZE - 1

  def bos_id(self) -> int:
    return 2

  def eos_id(self) -> int:
    return 1
