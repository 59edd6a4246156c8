"""The arrays that cross folder borders, each with shape, dtype, unit and range.

Letters, everywhere in this package: `b` batch, `v` views, `h w` image height and width, `n` visual tokens of a view,
`m` instruction tokens, `t` prompt tokens, `l` sequence of the language model, `s` keys, `d` width, `k` chunk length,
`a` action dimensions, `p` proprioception dimensions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

# Leaves are jax or numpy arrays; as pytrees of shardings, shapes or None these classes hold other things too.
Array = Any


def _pytree(cls: type) -> type:
  """A frozen dataclass whose fields are a pytree's children; `replace` as flax's dataclasses have it.

  Not flax's own, so that an exported policy runs without Flax.
  """
  cls = dataclasses.dataclass(frozen=True)(cls)
  cls.replace = dataclasses.replace
  return jax.tree_util.register_dataclass(cls)


@_pytree
class Observation:
  """What a policy sees at one moment, ready for the model.

  Attributes:
    images: u8[b v h w 3], RGB 0..255, upright, views in the order of the config (primary first, then wrists). The
      model normalizes them on the device, once per encoder.
    proprio: f32[b p] in [-1, 1] (normalized with the dataset's statistics), or None for a model without proprioception.
    prompt: i32[b t], ids of the language model's tokenizer: `<s>`, the prompt, the empty token 29871; right-padded.
    prompt_mask: bool[b t], True at real tokens.
    instruction: i32[b m], ids of the SigLIP tokenizer, right-padded; None for a model without an ID-Pruner.
    instruction_mask: bool[b m], True at real tokens, False at padding *and* at the end-of-sentence token.
  """

  images: Array
  proprio: Array | None
  prompt: Array
  prompt_mask: Array
  instruction: Array | None = None
  instruction_mask: Array | None = None


@_pytree
class Sentence:
  """What the instruction alone decides in the model: a policy computes it once per sentence (`SemanticVLA.sentence`).

  Attributes:
    prompt: f[b t D], the prompt's embeddings; prompt_mask: bool[b t], True at real tokens.
    condition: of each encoder with FiLM: f[b e], the pooled instruction, or f[b depth 2 d], every block's γ and β.
    words: f[b m e], the text tower's states; None without one. words_mask: bool[b m].
    projected: of each pruner that projects words: f[b m d].
    stop: bool[b m], which words cannot be cues; None where every word may be one.
  """

  prompt: Array
  prompt_mask: Array
  condition: dict[str, Array]
  words: Array | None = None
  words_mask: Array | None = None
  projected: dict[str, Array] = dataclasses.field(default_factory=dict)
  stop: Array | None = None


@_pytree
class Batch:
  """One training batch.

  Attributes:
    observation: see Observation.
    actions: f32[b k a] normalized to [-1, 1]; dimensions outside the statistics' mask (a gripper) pass unchanged.
    action_mask: bool[b k], False where the chunk runs past the end of its episode (such steps carry no loss).
    aux: targets of an auxiliary loss, a pytree of arrays [b …] that only that loss reads (train.step.AuxLoss); None
      without one.
    labels: i32[b n+1], of a model that speaks FAST's tokens: ids, </s>, and -1 behind it; None for other models.
  """

  observation: Observation
  actions: Array
  action_mask: Array
  aux: Any = None
  labels: Array | None = None


@_pytree
class Statistics:
  """Per-dimension statistics of one array of a dataset (actions or proprioception), in raw units.

  Attributes:
    mean, std, min, max, q01, q99: f32[d]; q01 and q99 are the 1 % and 99 % quantiles.
    mask: bool[d], True where the dimension is normalized; False passes it through (a gripper command).
  """

  mean: Array
  std: Array
  min: Array
  max: Array
  q01: Array
  q99: Array
  mask: Array
