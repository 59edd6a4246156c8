"""What makes fewer visual tokens of a view's projected patches, in front of the language model.

    resampler      learned queries look once at all tokens                    SliME, arXiv 2406.08487, `Resampler`
    router         the tokens nearest the prompt's words, unchanged           SliME, `TextGuidedSampler`
    task_spatial   queries that the instruction modulates look at all tokens,
                   and a query for each window at its own                     Compressor-VLA, arXiv 2511.18950

All have to be trained. Of the paper's SliME row (Table 5) only a commented-out call is public; either of the first two
fits it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from semanticvla_jax.errors import refuse
from semanticvla_jax.models.mlp import MLP
from semanticvla_jax.models.pruner import cosine_similarity, gather, top_indices
from semanticvla_jax.models.vit import layer_norm, sincos_2d

_HEAD = 128  # width of an attention head


class Resampler(nn.Module):
  """`side` × `side` learned queries look once at a view's tokens; nothing follows but a LayerNorm.

  Queries and keys have fixed positions, sines and cosines of the query's grid, resized to that of the tokens; values
  have none. As in SliME, but here at the language model's width.
  """

  side: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n D"], words: Array, mask: Array) -> Float[Array, "b m D"]:
    """A view's tokens in raster order → side² tokens; the words are not read."""
    (b, n, width), grid = tokens.shape, _grid(tokens.shape[1])
    own = sincos_2d(self.side, width)
    square = rearrange(own, "1 (y x) d -> y x d", y=self.side)
    theirs = jax.image.resize(square, (grid, grid, width), "bicubic").reshape(1, n, width)
    learned = self.param("queries", nn.initializers.truncated_normal(0.02), (1, self.side**2, width))
    queries = layer_norm("query_norm", self.dtype)(learned) + own
    values = layer_norm("token_norm", self.dtype)(tokens)
    queries = jnp.broadcast_to(queries, (b, *queries.shape[1:])).astype(self.dtype)
    look = _attention(width, self.dtype, "MultiHeadDotProductAttention_0")
    return layer_norm("out_norm", self.dtype)(look(queries, (values + theirs).astype(self.dtype), values))


class Router(nn.Module):
  """The `keep` tokens of a view with the largest sum of cosines to the prompt's words, in raster order.

  Without SliME's noise in training, and with a fixed number where SliME keeps a share of probability.
  """

  keep: int

  def __call__(
    self, tokens: Float[Array, "b n D"], words: Float[Array, "b t D"], mask: Bool[Array, "b t"]
  ) -> Float[Array, "b m D"]:
    """A view's tokens and the prompt's input embeddings → the kept tokens."""
    scores = (cosine_similarity(tokens, words) * mask[:, None]).sum(axis=-1)
    return gather(tokens, top_indices(scores, self.keep, "visual tokens of a view (compressor)"))


class TaskSpatial(nn.Module):
  """Compressor-VLA: queries of the task look at a whole view, one query for each window of the grid at that window.

      task      Q' = γ·Q + β, γ and β of the instruction for each query      Attention(Q', tokens, tokens)
      spatial   q = mean of the window's tokens + MLP(instruction)           Attention(q, window, window)

  Its code is not public. What its equations do not say is chosen here: heads of 128 channels; a window's mean as its
  downsampling; MLPs of two layers with an inner width of D/8; queries that start at N(0, 1), γ about one; the mean
  embedding of the whole prompt as the instruction. Where they have no norm, residual or position, there is none.

  Attributes:
    queries: of the task. window: side length of a window in patches, a divisor of the grid's.
  """

  queries: int
  window: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, tokens: Float[Array, "b n D"], words: Float[Array, "b t D"], mask: Bool[Array, "b t"]
  ) -> Float[Array, "b m D"]:
    """A view's tokens in raster order and the prompt's input embeddings → [task | windows in raster order]."""
    (b, _, width), (k, w), grid = tokens.shape, (self.queries, self.window), _grid(tokens.shape[1])
    if grid % w:
      raise refuse(
        "compressor", f"windows of {w} patches in a grid of {grid}", f"a divisor of {grid}", "set window to one"
      )
    real = mask[..., None].astype(jnp.float32)
    instruction = ((words.astype(jnp.float32) * real).sum(axis=1) / real.sum(axis=1)).astype(self.dtype)
    mlp = lambda name, out: MLP((max(width // 8, 1), out), dtype=self.dtype, name=name)  # noqa: E731

    learned = self.param("queries", nn.initializers.normal(1.0), (k, width)).astype(self.dtype)
    film = mlp("film", 2 * k * width)(mlp("task_instruction", max(width // 8, 1))(instruction))
    scale, shift = jnp.split(film.reshape(b, 2 * k, width), 2, axis=1)
    task = _attention(width, self.dtype, "task_attention")((1 + scale) * learned + shift, tokens, tokens)

    windows = rearrange(tokens, "b (y i x j) D -> b (y x) (i j) D", y=grid // w, i=w, x=grid // w, j=w)
    asking = windows.mean(axis=2, keepdims=True) + mlp("spatial_instruction", width)(instruction)[:, None, None]
    spatial = _attention(width, self.dtype, "spatial_attention")(asking, windows, windows)[:, :, 0]
    return jnp.concatenate([task, spatial], axis=1)


def _grid(n: int) -> int:
  """The side length of a square grid of n patches."""
  side = math.isqrt(n)
  if side * side != n:
    raise refuse("compressor", f"{n} tokens a view", "a square grid of patches", "set both pruners to None")
  return side


def _attention(width: int, dtype: Any, name: str) -> nn.MultiHeadDotProductAttention:
  return nn.MultiHeadDotProductAttention(max(width // _HEAD, 1), dtype=dtype, name=name)


# And the numbers that each takes.
KINDS = {
  "resampler": (("side",), Resampler),
  "router": (("keep",), Router),
  "task_spatial": (("queries", "window"), TaskSpatial),
}


def from_config(fields: Mapping[str, Any] | None, dtype: Any) -> nn.Module | None:
  """The module of `model.compressor`, dict(kind="resampler", side=6), say."""
  if fields is None:
    return None
  numbers, module = KINDS[fields["kind"]]
  own = {number: fields[number] for number in numbers}
  return module(**own, **({} if module is Router else {"dtype": dtype}))
