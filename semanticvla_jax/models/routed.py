"""CogVLA's routed decoder layers (arXiv 2508.21046): a layer runs for some of the visual tokens, the others pass by.

    share of layer l of L = max(cos(π l / (L - 1)) / 2 + 1/2, least); layers of a share of at most `most` are routed

A router weighs every token; the visual tokens with the largest weights and all other tokens go through the layer. Those
left out are there again for the next layer (mixture of depths). The layer itself is llama.RoutedBlock.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from semanticvla_jax.models.mlp import MLP


class Routing(NamedTuple):
  """`least` share of the visual tokens that a layer sees, and the largest share, `most`, of a routed layer."""

  least: float
  most: float

  def shares(self, depth: int) -> list[float | None]:
    """Of each layer; None for one that is not routed."""
    each = [max(math.cos(math.pi * i / max(depth - 1, 1)) / 2 + 0.5, self.least) for i in range(depth)]
    return [share if share <= self.most else None for share in each]


class Router(nn.Module):
  """The weight of each token: softmax(Linear(h))_1, where h of visual tokens is modulated by the mean of the words'."""

  @nn.compact
  def __call__(self, h: Float[Array, "b l D"], visual: int, words: Bool[Array, "b l"]) -> Float[Array, "b l"]:
    """Normed states, how many of them behind <s> are visual, and which are proprioception or prompt → float32."""
    width, real = h.shape[-1], words[..., None].astype(jnp.float32)
    mean = ((h.astype(jnp.float32) * real).sum(axis=1, keepdims=True) / real.sum(axis=1, keepdims=True)).astype(h.dtype)
    scale, shift = (MLP((width // 2, width), dtype=h.dtype, name=name)(mean) for name in ("scale", "shift"))
    own = slice(1, 1 + visual)
    h = h.at[:, own].set(h[:, own] * (1 + scale) + shift)
    return jax.nn.softmax(nn.Dense(2, name="weights")(h.astype(jnp.float32)), axis=-1)[..., 1]
