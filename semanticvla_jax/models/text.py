"""SigLIP's text tower as a token sequence (SemanticVLA Eq. 2: the l_j), with big_vision's parameter names."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.errors import refuse
from semanticvla_jax.models.vit import Transformer


class TextEncoder(nn.Module):
  """Bidirectional transformer over instruction tokens; returns the states after the final norm, not a pooled vector.

  The released code masks padding in the attention (plain SigLIP does not) and, because SigLIP's padding id is its
  end-of-sentence id, masks the end-of-sentence token with it.
  """

  vocab: int
  positions: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  gelu: str = "tanh"
  scan: bool = False
  dtype: Any = jnp.float32

  def setup(self):
    self.Embed_0 = nn.Embed(self.vocab, self.width, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype)
    self.pos_embedding = self.param("pos_embedding", nn.initializers.normal(0.01), (1, self.positions, self.width))
    self.Encoder_0 = Transformer(self.depth, self.num_heads, self.mlp_dim, self.gelu, scan=self.scan, dtype=self.dtype)
    self.head = nn.Dense(self.width, dtype=self.dtype)

  def __call__(self, ids: Int[Array, "b m"], mask: Bool[Array, "b m"] | None = None) -> Float[Array, "b m e"]:
    """Token ids (and which of them are words; None: all) → states."""
    _, m = ids.shape
    if m > self.positions:
      raise refuse(
        "text encoder",
        f"an instruction of {m} tokens",
        f"at most the tower's {self.positions} positions",
        "shorten the instruction (nothing is truncated silently)",
      )
    x = self.Embed_0(ids) + self.pos_embedding[:, :m].astype(self.dtype)
    keys = None if mask is None else mask[:, None, None, :]
    x, _ = self.Encoder_0(x, 0, self.depth, None, keys)
    return self.Encoder_0.norm(x)

  def pooled(self, states: Float[Array, "b m e"]) -> Float[Array, "b e"]:
    """SigLIP's own sentence embedding (last position, then `head`). SemanticVLA does not use it."""
    return self.head(states[:, -1])
