"""What makes fewer visual tokens of a view's projected patches, in front of the language model: SliME's two modules.

    resampler   learned queries look once at all tokens                    SliME, arXiv 2406.08487, `Resampler`
    router      the tokens nearest the prompt's words go on as they are    SliME, `TextGuidedSampler`

Both have to be trained. Of the paper's SliME row (Table 5) only a commented-out call is public; either fits it.
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
    (b, n, width), grid = tokens.shape, math.isqrt(tokens.shape[1])
    if grid * grid != n:
      raise refuse("compressor", f"{n} tokens a view", "a square grid of patches", "set both pruners to None")
    own = sincos_2d(self.side, width)
    square = rearrange(own, "1 (y x) d -> y x d", y=self.side)
    theirs = jax.image.resize(square, (grid, grid, width), "bicubic").reshape(1, n, width)
    learned = self.param("queries", nn.initializers.truncated_normal(0.02), (1, self.side**2, width))
    queries = layer_norm("query_norm", self.dtype)(learned) + own
    values = layer_norm("token_norm", self.dtype)(tokens)
    heads = max(width // _HEAD, 1)
    queries = jnp.broadcast_to(queries, (b, *queries.shape[1:])).astype(self.dtype)
    look = nn.MultiHeadDotProductAttention(heads, dtype=self.dtype, name="MultiHeadDotProductAttention_0")
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


KINDS = {"resampler": ("side", Resampler), "router": ("keep", Router)}  # and the number that each takes


def from_config(fields: Mapping[str, Any] | None, dtype: Any) -> nn.Module | None:
  """The module of `model.compressor`, dict(kind="resampler", side=6), say."""
  if fields is None:
    return None
  number, module = KINDS[fields["kind"]]
  return module(fields[number], **({"dtype": dtype} if module is Resampler else {}))
