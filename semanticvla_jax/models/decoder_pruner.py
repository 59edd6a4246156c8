"""Visual tokens that the decoder's later layers do without: FastV (Chen et al. 2024, arXiv 2403.06764) and controls.

    layers 0 … block-1 ─ all tokens ─► a score for each visual token ─► the `keep` best of each view ─► layers block …

Nothing is trained. What is kept goes on as it is, with its rotary position: positions are not renumbered.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.models import masks
from semanticvla_jax.models.llama import take
from semanticvla_jax.models.pruner import ANCHOR_RULES, top_indices

if TYPE_CHECKING:
  from semanticvla_jax.models.semanticvla import SemanticVLA

# Whose attention makes the score; the others ignore it and tell what an attention score is worth.
ATTENTION = ("last", "stop", "mean", "text", "action")
CONTROLS = ("random", "uniform", "centre")
FORMS = ("drop", "mask")


class Spans(NamedTuple):
  """Where things are in [ <s> | visual | proprio | prompt | action placeholders | </s> ].

  Attributes:
    views: of images. visual: tokens of one. prompt: the prompt's first position behind <s>. block: the action block's.
    length: of the sequence. last: i32[b], each prompt's last real token.
  """

  views: int
  visual: int
  prompt: int
  block: int
  length: int
  last: Int[Array, "b"]


@dataclasses.dataclass(frozen=True)
class DecoderPruner:
  """Which visual tokens the decoder keeps.

  Attributes:
    block: layers that see all tokens; the score is of the last of them. FastV has 2 or 3.
    keep: visual tokens of each view that the other layers see.
    score: mean attention, over heads, of these positions to a visual token: "last", the prompt's last token (FastV's
      code, whose models speak behind it); "stop", </s>, the last one of a sequence here; "mean", everything before the
      action block (FastV's paper); "text", the prompt; "action", the action placeholders. Or a control.
    form: "drop" shortens the sequence; "mask" hides what is not kept from all other positions, which gives the same at
      the kept ones and saves nothing.
  """

  block: int
  keep: int
  score: str = "last"
  form: str = "drop"

  def rows(self, spans: Spans) -> Int[Array, "b r"] | None:
    """The positions whose attention is the score; None for a control."""
    if self.score == "last":
      return spans.last[:, None]
    ranges = {
      "mean": (0, spans.block),
      "text": (spans.prompt, spans.block),
      "action": (spans.block, spans.length - 1),
      "stop": (spans.length - 1, spans.length),
    }
    if self.score not in ranges:
      return None
    rows = jnp.arange(*ranges[self.score])
    return jnp.broadcast_to(rows, (len(spans.last), len(rows)))

  def choose(
    self, weights: Float[Array, "b r l"] | None, real: Bool[Array, "b r"] | None, spans: Spans
  ) -> Int[Array, "b k"]:
    """The visual tokens to keep, counted over all views, ascending.

    Args:
      weights: attention of the positions `rows`; None for a control. real: which of these are not padding.
    """
    b, n = len(spans.last), spans.visual
    if weights is None:
      scores = jnp.broadcast_to(ANCHOR_RULES[self.score](jnp.zeros((1, n, 1)), None, None, None), (b, spans.views, n))
    else:
      own = real[..., None].astype(jnp.float32)
      mean = (weights * own).sum(axis=1) / own.sum(axis=1)
      scores = mean[:, 1 : 1 + spans.views * n].reshape(b, spans.views, n)
    kept = top_indices(scores.reshape(b * spans.views, n), self.keep, "visual tokens of a view (decoder_pruner)")
    return (kept.reshape(b, spans.views, -1) + n * jnp.arange(spans.views)[:, None]).reshape(b, -1)

  def positions(self, kept: Int[Array, "b k"], spans: Spans) -> Int[Array, "b m"]:
    """The positions of a sequence that go on, ascending."""
    behind = jnp.arange(1 + spans.views * spans.visual, spans.length)
    parts = (jnp.zeros((len(kept), 1), kept.dtype), 1 + kept, jnp.broadcast_to(behind, (len(kept), len(behind))))
    return jnp.concatenate(parts, axis=1)


def pruned_states(
  model: SemanticVLA, pruner: DecoderPruner, seen: dict, block: Bool[Array, "l"], read: Array, last: Int[Array, "b"]
) -> tuple[Array, Array]:
  """As `Llama.states_at`, with fewer visual tokens from some layer on; notes which ("kept_visual") in `seen`.

  Args:
    model: bound to its parameters. seen: its intermediates so far. block: which positions are the action block.
    read: i32[b w], the positions whose states are wanted. last: each prompt's last real token.
  """
  x, valid, positions = seen["sequence"], seen["valid"], seen["positions"]
  views, prompt, length = seen["views"].shape[1], seen["context"].shape[1], len(block)
  spans = Spans(model.num_views, views, prompt, length - read.shape[1] - 1, length, last)
  rows = pruner.rows(spans)
  x, weights = model.llm.begin(x, positions, seen["allowed"], pruner.block, rows)
  seen["kept_visual"] = pruner.choose(weights, None if rows is None else take(valid, rows), spans)
  on = pruner.positions(seen["kept_visual"], spans)
  if pruner.form == "mask":
    valid &= jnp.zeros(valid.shape, bool).at[jnp.arange(len(valid))[:, None], on].set(True)
  else:
    x, positions, valid = (take(array, on) for array in (x, positions, valid))
    dropped = length - on.shape[1]
    block, read = block[dropped:], read - dropped
  return model.llm.states_at(x, positions, masks.attention_mask(valid, block, model.mask), read, pruner.block)
