"""SD-Pruner: which visual tokens reach the language model (SemanticVLA §"Semantic-driven Hierarchical …", Eq. 2-7).

IDPruner   instruction-driven:     patches + words ─► cues (k words looking at the image)   Vision-to-Language, Eq. 3-4
                                                   └► anchors (h patches the words point at) Language-to-Vision, Eq. 5
SAPruner   spatial-aggregation:    q learned tokens ride through the encoder and collect what the patches know, Eq. 6-7
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.models.mlp import MLP

ANCHOR_RULES = ("similarity", "random", "uniform", "centre")


@flax.struct.dataclass
class IDPruned:
  """What an IDPruner keeps, and why.

  Attributes:
    cues: f[b k d], one weighted sum of patches per salient word, in text order; None when k is 0.
    anchors: f[b h d], the kept patches, unchanged, in raster order.
    similarity: f32[b n m], cosine of patch and word; -1 in masked columns.
    kept: i32[b h], indices of the anchors, ascending.
    salient: i32[b k], indices of the words behind the cues, ascending; None when k is 0.
    cue_weights: f32[b n k], where each cue looks (columns sum to one); None when k is 0.
  """

  cues: Float[Array, "b k d"] | None
  anchors: Float[Array, "b h d"]
  similarity: Float[Array, "b n m"]
  kept: Int[Array, "b h"]
  salient: Int[Array, "b k"] | None
  cue_weights: Float[Array, "b n k"] | None


def cosine_similarity(patches: Float[Array, "b n d"], words: Float[Array, "b m d"]) -> Float[Array, "b n m"]:
  """S_ij = cos(v_i, l_j) in float32, norms clamped at 1e-12 (SemanticVLA Eq. 2)."""

  def unit(x):
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

  return jnp.einsum("bnd,bmd->bnm", unit(patches), unit(words))


def top_indices(scores: Float[Array, "b n"], k: int, what: str) -> Int[Array, "b k"]:
  """Indices of the k highest scores, ascending (raster or text order, not by score: the released code re-sorts)."""
  n = scores.shape[-1]
  if k > n:
    raise ValueError(
      f"pruner: asked to keep {k} {what} of {n}, expected {n} or fewer; lower model.keep (patches) or model.cues."
    )
  return jnp.sort(jax.lax.top_k(scores, k)[1], axis=-1)


def gather(tokens: Float[Array, "b n d"], indices: Int[Array, "b k"]) -> Float[Array, "b k d"]:
  return jnp.take_along_axis(tokens, indices[..., None], axis=1)


def anchor_scores(rule: str, similarity: Float[Array, "b n m"]) -> Float[Array, "b n"]:
  """Scores of patches for Language-to-Vision filtering (Eq. 5), or of a control that ignores the instruction.

  `similarity`: mean over all words (masked words add the same constant to each patch). `random`: one fixed random
  order; `uniform`: every (n/h)-th patch; `centre`: the patches nearest the middle of the image. The last three show
  what a pruning score is worth: a policy that is as good with them does not use the instruction to prune.
  """
  b, n, _ = similarity.shape
  side = round(n**0.5)
  if rule == "similarity":
    return similarity.mean(axis=2)
  if rule == "random":
    scores = jax.random.uniform(jax.random.key(0), (n,))
  elif rule == "uniform":  # bit-reversed raster order: any number of kept patches is spread evenly
    scores = -_bit_reversed(n)
  elif rule == "centre":
    y, x = jnp.divmod(jnp.arange(n), side)
    scores = -jnp.hypot(y - (side - 1) / 2, x - (side - 1) / 2)
  else:
    raise ValueError(
      f"anchor rule: got {rule!r}, expected one of {ANCHOR_RULES}; set model.anchor_rule to one of them."
    )
  return jnp.broadcast_to(scores.astype(jnp.float32), (b, n))


def _bit_reversed(n: int) -> Float[Array, "n"]:
  bits = max(1, (n - 1).bit_length())
  index, reverse = jnp.arange(n), jnp.zeros(n, jnp.int32)
  for i in range(bits):
    reverse = reverse | (((index >> i) & 1) << (bits - 1 - i))
  return reverse.astype(jnp.float32)


class IDPruner(nn.Module):
  """Instruction-driven pruner (SemanticVLA Eq. 2-5).

  Attributes:
    anchors: h, patches kept. cues: k, words kept (0: anchors only).
    temperature: of the softmax over patches behind each cue (Eq. 4); 1 in the released code.
    noise: standard deviation of the Gaussian noise added to S in training.
    anchor_rule: see `anchor_scores`.

  Differs from the paper: W_l is a two-layer GELU MLP; scores are means (same ranking); noise in training.
  """

  anchors: int
  cues: int
  temperature: float = 1.0
  noise: float = 0.1
  anchor_rule: str = "similarity"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    patches: Float[Array, "b n d"],
    words: Float[Array, "b m e"],
    mask: Bool[Array, "b m"],
    normal: Float[Array, "b n m"] | None = None,
  ) -> IDPruned:
    """Patches, text-tower states, which states are words, and standard normal noise (training) or None."""
    width = patches.shape[-1]
    return self.select(patches, MLP((width, width), dtype=self.dtype, name="text_projector")(words), mask, normal)

  @nn.nowrap
  def select(
    self,
    patches: Float[Array, "b n d"],
    words: Float[Array, "b m d"],
    mask: Bool[Array, "b m"],
    normal: Float[Array, "b n m"] | None = None,
  ) -> IDPruned:
    """Pruning proper, with words already projected to the patches' width. Similarity and top-k in float32."""
    s = cosine_similarity(patches, words)
    if normal is not None:
      s = s + self.noise * normal
    s = jnp.where(mask[:, None, :], s, -1.0)
    kept = top_indices(anchor_scores(self.anchor_rule, s), self.anchors, "anchors (patches)")
    anchors = gather(patches, kept)
    if not self.cues:
      return IDPruned(None, anchors, s, kept, None, None)
    salient = top_indices(s.mean(axis=1), self.cues, "cues (instruction tokens)")
    weights = jax.nn.softmax(jnp.take_along_axis(s, salient[:, None, :], axis=2) / self.temperature, axis=1)
    cues = jnp.einsum("bnk,bnd->bkd", weights.astype(patches.dtype), patches)
    return IDPruned(cues, anchors, s, kept, salient, weights)


class SAPruner(nn.Module):
  """Spatial-aggregation pruner (SemanticVLA Eq. 6-7): the learned tokens. FiLM and attention happen in the encoder.

  Attributes:
    tokens: q, aggregation tokens appended behind the patches, without position embedding.
    std: standard deviation of their initial values; 1 in the released code, 0 in the paper.
  """

  tokens: int
  width: int
  std: float = 1.0

  @nn.compact
  def __call__(self) -> Float[Array, "1 q d"]:
    return self.param("queries", nn.initializers.normal(self.std), (1, self.tokens, self.width))

  @nn.nowrap
  def aggregated(self, x: Float[Array, "b l d"]) -> Float[Array, "b q d"]:
    """The aggregation tokens out of an encoder's sequence (they are the last ones)."""
    return x[:, x.shape[1] - self.tokens :]
