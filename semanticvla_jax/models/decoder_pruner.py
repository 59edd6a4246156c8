"""Visual tokens that the decoder's later layers do without: FastV (arXiv 2403.06764), others like it, and controls.

    layers 0 … block-1 ─ all tokens ─► a score for each visual token ─► the `keep` best of each view ─► layers block …

Nothing is trained. What is kept stays unchanged, with its rotary position: positions are not renumbered. LightVLA,
which acts on the decoder's input and is trained, is light_pruner.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.models import masks
from semanticvla_jax.models.history import History, Memory
from semanticvla_jax.models.light_pruner import light_states
from semanticvla_jax.models.llama import take
from semanticvla_jax.models.pruner import ANCHOR_RULES, cosine_similarity, top_indices

if TYPE_CHECKING:
  from semanticvla_jax.models.semanticvla import SemanticVLA

# Whose attention makes the score; the controls ignore it and show what an attention score is worth.
ATTENTION = ("last", "stop", "mean", "text", "raters", "action", "mean+action")
CONTROLS = ("random", "uniform", "centre")
LIGHT = "light"
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
  last: Int[Array, " b"]


@dataclasses.dataclass(frozen=True)
class DecoderPruner:
  """Which visual tokens the decoder keeps.

  Attributes:
    block: layers that see all tokens; the score is of the last of them. FastV has 2 or 3.
    keep: visual tokens of each view that the other layers see.
    score: mean attention, over heads, of these positions to a visual token: "last", the prompt's last token (FastV's
      code, whose models speak behind it); "stop", </s>, the last one of a sequence here; "mean", everything before the
      action block (FastV's paper); "text", the prompt; "raters", its words whose embeddings look like the image
      (SparseVLM, arXiv 2410.04417); "action", the action placeholders. "mean+action": the best of either, of these
      the most different (VLA-Pruner, arXiv 2511.16449, by one layer's attention alone). Or a control. Or "light",
      LightVLA's with block 0, where `keep` is the mean of the views: as many places as that times the views.
    form: "drop" shortens the sequence; "mask" hides what is not kept from all other positions, which gives the same at
      the kept ones and saves nothing.
    history: with "mean+action" alone: the action's part is then expected from earlier queries instead of read off this
      one (a model that speaks does not know its actions yet). Until there are enough, the other part decides alone.
    noise_steps: "light" alone: updates over which the noise of its training falls to 0; None for no noise.
  """

  block: int
  keep: int
  score: str = "last"
  form: str = "drop"
  history: History | None = None
  noise_steps: int | None = None

  @property
  def parts(self) -> tuple[str, ...]:
    """The scores that this one is made of; () for a control."""
    return () if self.score in CONTROLS else tuple(self.score.split("+"))

  @property
  def looked_at(self) -> tuple[str, ...]:
    """The parts whose attention behind the first `block` layers is needed."""
    return self.parts if self.history is None or self.history.block < self.block else self.parts[:1]

  def choose(
    self,
    weights: Sequence[Float[Array, "b _ l"]],
    real: Sequence[Bool[Array, "b _"]],
    patches: Array,
    spans: Spans,
    expected: tuple[Float[Array, "b n"], Bool[Array, " b"]] | None = None,
  ) -> Int[Array, "b k"]:
    """The visual tokens to keep, counted over all views, ascending.

    Args:
      weights: of each part, the attention of its rows. real: which of these count. patches: f[b n D], embeddings of the
        visual tokens. expected: of History, one more score and the rows that have it.
    """
    (b, n), what = (spans.last.shape[0], spans.visual), "visual tokens of a view (decoder_pruner)"
    each = [_scores(*pair, spans) for pair in zip(weights, real, strict=True)]
    if not each:
      control = ANCHOR_RULES[self.score](jnp.zeros((1, n, 1)), None, None, None)
      each = [jnp.broadcast_to(control, (b * spans.views, n))]
    if expected is not None:
      scores, known = expected
      each.append(jnp.where(jnp.repeat(known, spans.views)[:, None], scores.reshape(-1, n), each[0]))
    kept = top_indices(each[0], self.keep, what)
    if len(each) > 1:
      best = [_members(top_indices(scores, self.keep, what), n) for scores in each]
      candidates = functools.reduce(jnp.logical_or, best)
      kept = most_different(patches.reshape(b * spans.views, n, -1), candidates, self.keep)
    return (kept.reshape(b, spans.views, -1) + n * jnp.arange(spans.views)[:, None]).reshape(b, -1)

  def positions(self, kept: Int[Array, "b k"], spans: Spans) -> Int[Array, "b m"]:
    """The positions of a sequence that go on, ascending."""
    behind = jnp.arange(1 + spans.views * spans.visual, spans.length)
    parts = (
      jnp.zeros((kept.shape[0], 1), kept.dtype),
      1 + kept,
      jnp.broadcast_to(behind, (kept.shape[0], len(behind))),
    )
    return jnp.concatenate(parts, axis=1)


def from_config(fields: Mapping[str, Any] | None) -> DecoderPruner | None:
  """The decoder pruner of a model config's `decoder_pruner`, or None."""
  if fields is None:
    return None
  history = fields.get("history")
  return DecoderPruner(**{**fields, "history": None if history is None else History(**history)})


def rows(part: str, spans: Spans) -> Int[Array, "b r"]:
  """The positions whose attention makes a score."""
  if part == "last":
    return spans.last[:, None]
  start, stop = {
    "mean": (0, spans.block),
    "text": (spans.prompt, spans.block),
    "raters": (spans.prompt, spans.block),
    "action": (spans.block, spans.length - 1),
    "stop": (spans.length - 1, spans.length),
  }[part]
  return jnp.broadcast_to(jnp.arange(start, stop), (spans.last.shape[0], stop - start))


def raters(
  patches: Float[Array, "b n D"], words: Float[Array, "b t D"], real: Bool[Array, "b t"]
) -> Bool[Array, "b t"]:
  """The words that patches look like more than like the average word, by a softmax over words of inner products."""
  logits = jnp.einsum("bnd,btd->bnt", patches.astype(jnp.float32), words.astype(jnp.float32))
  share = jax.nn.softmax(jnp.where(real[:, None], logits, -jnp.inf), axis=-1).mean(axis=1)
  return real & (share >= 1 / real.sum(axis=-1, keepdims=True))


def most_different(tokens: Float[Array, "b n D"], candidates: Bool[Array, "b n"], keep: int) -> Int[Array, "b k"]:
  """`keep` of at least as many candidates, ascending: one after the other the farthest from those chosen, by cosine.

  The first is the candidate whose nearest other one is farthest.
  """
  far = 1 - cosine_similarity(tokens, tokens)
  apart = jnp.where(candidates[:, None] & ~jnp.eye(tokens.shape[1], dtype=bool), far, jnp.inf).min(axis=-1)

  def choose(_, carry):
    nearest, chosen = carry
    new = jnp.argmax(jnp.where(candidates & ~chosen, nearest, -jnp.inf), axis=-1)
    to_new = jnp.take_along_axis(far, new[:, None, None], axis=1)[:, 0]
    first = ~chosen.any(axis=-1, keepdims=True)
    return jnp.where(first, to_new, jnp.minimum(nearest, to_new)), chosen | _members(new[:, None], far.shape[1])

  _, chosen = jax.lax.fori_loop(0, keep, choose, (apart, jnp.zeros(candidates.shape, bool)))
  return jnp.sort(jax.lax.top_k(chosen, keep)[1], axis=-1)


def _members(indices: Int[Array, "b k"], n: int) -> Bool[Array, "b n"]:
  return (indices[..., None] == jnp.arange(n)).any(axis=1)


def _scores(weights: Float[Array, "b r l"], real: Bool[Array, "b r"], spans: Spans) -> Float[Array, "bv n"]:
  """Mean attention of the rows that count to each visual token, a view a row."""
  own = real[..., None].astype(jnp.float32)
  mean = (weights * own).sum(axis=1) / own.sum(axis=1)
  return mean[:, 1 : 1 + spans.views * spans.visual].reshape(-1, spans.visual)


def pruned_states(
  model: SemanticVLA,
  pruner: DecoderPruner,
  seen: dict,
  block: Bool[Array, " l"],
  read: Int[Array, "b w"],
  last: Int[Array, " b"],
  memory: Memory | None = None,
  training: tuple | None = None,
) -> tuple[Array, Array, Memory | None]:
  """As `Llama.states_at`, with fewer visual tokens from some layer on; notes which ("kept_visual") in `seen`.

  Args:
    model: bound to its parameters. seen: its intermediates so far. block: which positions are the action block.
    read: the positions whose states are wanted. last: each prompt's last real token.
    memory: of a pruner with a history, what the query before gave; None for the first.
    training: (updates made, part of the batch) for what has another form then; None outside of training.

  Returns:
    hidden f[b l D], states f[b w D], and the memory for the next query; None without a history.
  """
  x, valid, positions, history = seen["sequence"], seen["valid"], seen["positions"], pruner.history
  views, prompt, length = seen["views"].shape[1], seen["context"].shape[1], len(block)
  spans = Spans(model.num_views, views, prompt, length - read.shape[1] - 1, length, last)
  if pruner.score == LIGHT:
    return *light_states(model, pruner, seen, block, read, spans, training), None
  patches, asked = x[:, 1 : 1 + spans.views * views], [rows(part, spans) for part in pruner.looked_at]
  real = [take(valid, at) for at in asked]
  if pruner.score == "raters":
    real = [raters(patches, take(x, asked[0]), real[0])]
  x, weights = model.llm.begin(
    x, positions, seen["allowed"], pruner.block, jnp.concatenate(asked, axis=1) if asked else None
  )
  ends = np.cumsum([at.shape[1] for at in asked])[:-1]
  each = jnp.split(weights, ends, axis=1) if asked else []
  expected, actions = None, None
  if history is not None:
    memory = history.empty(x.shape[0], patches.shape[1]) if memory is None else memory
    expected, actions = history.estimate(memory), each[1] if len(each) > 1 else None
    each, real = each[:1], real[:1]
  seen["kept_visual"] = pruner.choose(each, real, patches, spans, expected)
  on, dropped, start = pruner.positions(seen["kept_visual"], spans), 0, pruner.block
  if pruner.form == "mask":
    valid &= _members(on, length)
  else:
    x, positions, valid = (take(array, on) for array in (x, positions, valid))
    dropped = length - on.shape[1]
    block, read = block[dropped:], read - dropped
  allowed = masks.attention_mask(valid, block, model.mask)
  if history is not None:
    if actions is None:
      start = history.block + 1
      x, actions = model.llm.begin(x, positions, allowed, start, rows("action", spans) - dropped, pruner.block)
    memory = history.add(memory, _looked(actions, seen["kept_visual"], spans))
  return *model.llm.states_at(x, positions, allowed, read, start), memory


def _looked(weights: Float[Array, "b r l"], kept: Int[Array, "b k"], spans: Spans) -> Float[Array, "b n"]:
  """Mean attention of these rows to each visual token of all views; 0 to those that are not in the sequence."""
  n, mean = spans.views * spans.visual, weights.mean(axis=1)
  if weights.shape[-1] == spans.length:
    return mean[:, 1 : 1 + n]
  there = lambda at, found: jnp.zeros(n, jnp.float32).at[at].set(found)  # noqa: E731
  return jax.vmap(there)(kept, mean[:, 1 : 1 + kept.shape[1]])
