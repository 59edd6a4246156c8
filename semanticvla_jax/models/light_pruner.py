"""LightVLA (arXiv 2509.12594): every patch chooses one patch, and those that nobody chooses are left out.

    queries   Q = rms(softmax(P T' / √D) T), one for each patch; P: patches, T: all other tokens behind <s>, both rms'd
    scores    Q P' / √D;   patch i chooses argmax_j of row i

No parameters. It acts on the decoder's input, where words, proprioception and placeholders (zeros, which count) are T.

    training    all slots stay: slot i holds its choice, and takes its position. Gradients are those of the softmax
                (straight through); uniform noise on the scores, whose amplitude falls from 1 to 0
    "mask"      what nobody chose is hidden
    "drop"      what was chosen is gathered, in raster order and with its positions, into a fixed number of places, of
                which empty ones are hidden. Where more was chosen, the most frequent choices stay
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.models import masks
from semanticvla_jax.models.llama import take
from semanticvla_jax.models.pruner import top_indices

if TYPE_CHECKING:
  from semanticvla_jax.models.decoder_pruner import DecoderPruner, Spans
  from semanticvla_jax.models.semanticvla import SemanticVLA

_EPS = 1e-6  # of the norms


def scores(
  patches: Float[Array, "b n D"], others: Float[Array, "b t D"], seen: Bool[Array, "b n"], real: Bool[Array, "b t"]
) -> Float[Array, "b n n"]:
  """How much patch i wants patch j, f32; -inf where j is not `seen`. `real`: which of the others are not padding."""
  patches, others = _rms(patches), _rms(others)
  scale = patches.shape[-1] ** -0.5
  logits = jnp.einsum("bnd,btd->bnt", patches, others) * scale
  share = jax.nn.softmax(jnp.where(real[:, None], logits, -jnp.inf), axis=-1)
  queries = _rms(jnp.einsum("bnt,btd->bnd", share, others))
  return jnp.where(seen[:, None], jnp.einsum("bid,bjd->bij", queries, patches) * scale, -jnp.inf)


def light_states(
  model: SemanticVLA,
  pruner: DecoderPruner,
  seen: dict,
  block: Bool[Array, " l"],
  read: Int[Array, "b w"],
  spans: Spans,
  training: tuple[Int[Array, ""] | int, tuple | None] | None,
) -> tuple[Float[Array, "b m D"], Float[Array, "b w D"]]:
  """As `decoder_pruner.pruned_states`. What it notes in `seen`: "visual_picks" i32[b n], the choice of each patch,
  "visual_kept" i32[b], how many different ones, and with `form="drop"` "visual_overflow" i32[b], how many had no place.

  Args:
    training: (updates made, part of the batch), see SemanticVLA.__call__; None outside of training.
  """
  x, valid, positions = seen["sequence"], seen["valid"], seen["positions"]
  own, behind = slice(1, 1 + spans.views * spans.visual), slice(1 + spans.views * spans.visual, None)
  wanted = scores(x[:, own], x[:, behind], valid[:, own], valid[:, behind])
  if training is not None:
    wanted += _noise(model, pruner, wanted.shape, *training)
  picks = jnp.argmax(wanted, axis=-1).astype(jnp.int32)
  votes = (jax.nn.one_hot(picks, wanted.shape[-1]) * valid[:, own, None]).sum(axis=1)
  seen |= {"visual_picks": picks, "visual_kept": (votes > 0).sum(axis=-1)}
  if training is not None:
    x = x.at[:, own].set(straight_through(wanted, picks, x[:, own]))
    positions = positions.at[:, own].set(take(positions[:, own], picks))
  elif pruner.form == "mask":
    valid = valid.at[:, own].set(votes > 0)
  else:
    kept = top_indices(votes, pruner.keep * spans.views, "visual tokens (decoder_pruner)")
    seen["visual_overflow"] = jnp.maximum(seen["visual_kept"] - kept.shape[1], 0)
    on = pruner.positions(kept, spans)
    valid = valid.at[:, own].set(votes > 0)
    x, positions, valid = (take(array, on) for array in (x, positions, valid))
    dropped = spans.length - on.shape[1]
    block, read = block[dropped:], read - dropped
  return model.llm.states_at(x, positions, masks.attention_mask(valid, block, model.mask), read)


def _rms(x: Float[Array, "b n D"]) -> Float[Array, "b n D"]:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt((x**2).mean(axis=-1, keepdims=True) + _EPS)


def straight_through(
  wanted: Float[Array, "b n n"], picks: Int[Array, "b n"], patches: Float[Array, "b n D"]
) -> Float[Array, "b n D"]:
  """The chosen patches, with the gradient that their softmax-weighted sums would give the scores."""
  share = jax.nn.softmax(wanted, axis=-1)
  weights = jax.nn.one_hot(picks, wanted.shape[-1]) + share - jax.lax.stop_gradient(share)
  return jnp.einsum("bij,bjd->bid", weights, patches.astype(jnp.float32)).astype(patches.dtype)


def _noise(
  model: SemanticVLA,
  pruner: DecoderPruner,
  shape: tuple[int, ...],
  updates: Int[Array, ""] | int,
  part: tuple[Int[Array, ""], int] | None,
) -> Float[Array, "b n n"] | float:
  """Uniform noise; of a part of a batch, what its examples have in the whole of it."""
  if pruner.noise_steps is None:
    return 0.0
  amplitude = jnp.clip(1 - jnp.asarray(updates, jnp.float32) / pruner.noise_steps, 0, 1)
  (b, *rest), (i, parts) = shape, (0, 1) if part is None else part
  noise = jax.random.uniform(model.make_rng("noise"), (b, parts, *rest))
  return amplitude * jax.lax.dynamic_index_in_dim(noise, i, axis=1, keepdims=False)
