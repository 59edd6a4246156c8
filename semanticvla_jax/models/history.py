"""What a decoder pruner remembers between queries: where the actions looked (VLA-Pruner, arXiv 2511.16449).

A memory is a dict of arrays with the batch in front, every row an episode; one of zeros is empty:

    attention   f32[b w n], of the last w queries, newest first: mean attention of the action placeholders to each
                visual token; 0 at those that the decoder did without
    queries     i32[b], how many of the w are there
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Memory = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class History:
  """The estimate of this query's action attention from that of the last ones.

  Attributes:
    window: queries that are remembered. Until all of them are there, there is no estimate.
    decay: weight of a query relative to the next newer one: the newest counts 1, then decay, decay², …, divided by
      their sum. (VLA-Pruner's code for OpenVLA has the order reversed, that for OpenVLA-OFT has it so.)
    block: the layer whose attention is remembered, counted from 0.
  """

  window: int = 3
  decay: float = 0.8
  block: int = 15

  def empty(self, batch: int, tokens: int) -> Memory:
    """The memory of episodes that begin, of so many visual tokens over all views."""
    attention = jnp.zeros((batch, self.window, tokens), jnp.float32)
    return {"attention": attention, "queries": jnp.zeros(batch, jnp.int32)}

  def estimate(self, memory: Memory) -> tuple[Float[Array, "b n"], Bool[Array, " b"]]:
    """The attention to expect, and of which rows it is known."""
    weights = self.decay ** jnp.arange(self.window, dtype=jnp.float32)
    expected = jnp.einsum("bwn,w->bn", memory["attention"], weights / weights.sum())
    return expected, memory["queries"] >= self.window

  def add(self, memory: Memory, attention: Float[Array, "b n"]) -> Memory:
    """The memory with a further query; the oldest is forgotten."""
    attention = jnp.concatenate([attention[:, None], memory["attention"][:, :-1]], axis=1)
    return {"attention": attention, "queries": jnp.minimum(memory["queries"] + 1, self.window)}
