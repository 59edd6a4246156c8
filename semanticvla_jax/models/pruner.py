"""SD-Pruner: which visual tokens reach the language model (SemanticVLA §"Semantic-driven Hierarchical …", Eq. 2-7).

IDPruner   instruction-driven:     patches + words ─► cues (k words looking at the image)   Vision-to-Language, Eq. 3-4
                                                   └► anchors (h patches the words point at) Language-to-Vision, Eq. 5
SAPruner   spatial-aggregation:    q learned tokens ride through the encoder and collect what the patches know, Eq. 6-7

A further kind is a class with the interface of `Pruner` and an entry in KINDS; a further rule that scores patches is a
function registered with `anchor_rule`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.errors import refuse
from semanticvla_jax.models.mlp import MLP


@flax.struct.dataclass
class Encoded:
  """What an encoder hands to one of its pruners.

  Attributes:
    patches: f[b n d], the patch tokens, in raster order.
    queries: f[b q d], the pruner's own queries after the encoder; None for a pruner without queries.
    attention: f32[b h q l], where these look in the last block (over the encoder's whole sequence); None without them.
  """

  patches: Float[Array, "b n d"]
  queries: Float[Array, "b q d"] | None = None
  attention: Float[Array, "b h q l"] | None = None


@flax.struct.dataclass
class Words:
  """The instruction, as a pruner reads it.

  Attributes:
    states: f[b m e], of the text tower.
    mask: bool[b m], which states are words.
    noise: f32[b n m], standard normal numbers in training; None outside it.
    projected: f[b m d], what the pruner's `project` made of the states, if it has been called already.
    stop: bool[b m], which words become cues only where too few others are there; None for none.
  """

  states: Float[Array, "b m e"]
  mask: Bool[Array, "b m"]
  noise: Float[Array, "b n m"] | None = None
  projected: Float[Array, "b m d"] | None = None
  stop: Bool[Array, "b m"] | None = None


@flax.struct.dataclass
class Pruned:
  """What a pruner hands on.

  Attributes:
    tokens: f[b h d], one token set of the encoder, which the Sparse-Fuser reads.
    cues: f[b k d], further tokens with a projector of their own; None for none. Only one pruner per encoder has them.
    info: intermediates by name; the model lists each as "{encoder}_{name}".
  """

  tokens: Float[Array, "b h d"]
  cues: Float[Array, "b k d"] | None = None
  info: dict[str, Any] = flax.struct.field(default_factory=dict)


class Pruner(Protocol):
  """The interface of a kind of pruner, a flax module.

  Attributes:
    keeps: name of its token set: the Sparse-Fuser's parameters go by "{encoder}_{keeps}" where it projects each set.
    reads_words: whether `prune` needs the instruction; the model has a text tower if a pruner does.
    reads_patches: whether `prune` needs the patches as the encoder leaves them (taken for True where it is missing).
    num_queries: tokens that `queries` appends to the encoder's sequence; 0 where it is not called.
  """

  keeps: ClassVar[str]
  reads_words: ClassVar[bool]
  reads_patches: ClassVar[bool]
  num_queries: int

  @classmethod
  def from_config(cls, config: Mapping[str, Any], width: int, name: str) -> Pruner:
    """The pruner that a resolved model config asks for, in an encoder of this width; parameters go under `name`."""

  def queries(self) -> Float[Array, "1 q d"]:
    """Learned tokens that ride through the encoder behind the patches."""

  def project(self, states: Float[Array, "b m e"], width: int) -> Float[Array, "b m d"]:
    """What `prune` would make of the text tower's states alone, for `Words.projected`: once per sentence.

    A pruner may do without this method.
    """

  def prune(self, encoded: Encoded, words: Words | None) -> Pruned:
    """What is kept of the encoder's tokens; `words` is None unless `reads_words`."""


@flax.struct.dataclass
class IDPruned:
  """What an IDPruner keeps, and why.

  Attributes:
    anchors: f[b h d], the kept patches, unchanged, in raster order.
    similarity: f32[b n m], cosine of patch and word; -1 in masked columns.
    kept: i32[b h], indices of the anchors, ascending.
    shown: bool[b h], which of these the language model sees; None for all.
    cues: f[b k d], one weighted sum of patches per salient word, in text order; None when k is 0.
    salient: i32[b k], indices of the words behind the cues, ascending; None when k is 0.
    cue_weights: f32[b n k], where each cue looks (columns sum to one); None when k is 0.
  """

  anchors: Float[Array, "b h d"]
  similarity: Float[Array, "b n m"]
  kept: Int[Array, "b h"]
  shown: Bool[Array, "b h"] | None = None
  cues: Float[Array, "b k d"] | None = None
  salient: Int[Array, "b k"] | None = None
  cue_weights: Float[Array, "b n k"] | None = None


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
    raise refuse("pruner", f"{k} {what} to keep of {n}", f"{n} or fewer", "lower model.keep (patches) or model.cues")
  return jnp.sort(jax.lax.top_k(scores, k)[1], axis=-1)


def dynamic_count(scores: Float[Array, "b n"], temperature: float, least: int, most: int) -> Int[Array, " b"]:
  """How many patches to show: from `least`, where all weight is on one, to `most`, where all patches score alike.

  By the entropy of softmax(scores / temperature), as a share of the largest, log n.
  """
  log = jax.nn.log_softmax(scores / temperature, axis=-1)
  share = -(jnp.exp(log) * log).sum(axis=-1) / jnp.log(scores.shape[-1])
  return jnp.round(least + (most - least) * share).astype(jnp.int32)


def gather(tokens: Float[Array, "b n d"], indices: Int[Array, "b k"]) -> Float[Array, "b k d"]:
  return jnp.take_along_axis(tokens, indices[..., None], axis=1)


def cue_scores(
  similarity: Float[Array, "b n m"], mask: Bool[Array, "b m"], stop: Bool[Array, "b m"] | None, pool: str
) -> Float[Array, "b m"]:
  """How much each word is to become a cue (Eq. 3): its similarities over the patches, 'mean' or 'max'.

  With `stop`, those words come after all others, padding last.
  """
  scores = similarity.mean(axis=1) if pool == "mean" else similarity.max(axis=1)
  if stop is None:
    return scores
  return jnp.where(mask, scores - 2.0 * stop, -4.0)  # cosines lie in [-1, 1]


# (similarity f32[b n m], patches f[b n d], words f[b m d], mask bool[b m]) → scores f32[n] or f32[b n]
Rule = Callable[[Array, Array, Array, Array], Array]


def _similarity(similarity, patches, words, mask):
  """The paper's: mean over all words (masked words add the same constant to each patch)."""
  return similarity.mean(axis=2)


def _random(similarity, patches, words, mask):
  """One fixed random order."""
  return jax.random.uniform(jax.random.key(0), similarity.shape[1:2])


def _uniform(similarity, patches, words, mask):
  """Every (n/h)-th patch: bit-reversed raster order, so that any number of kept patches is spread evenly."""
  return -_bit_reversed(similarity.shape[1])


def _center(similarity, patches, words, mask):
  """The patches nearest the middle of the image."""
  n = similarity.shape[1]
  side = round(n**0.5)
  y, x = jnp.divmod(jnp.arange(n), side)
  return -jnp.hypot(y - (side - 1) / 2, x - (side - 1) / 2)


# The last three ignore the instruction and show what a pruning score is worth: a policy that is as good with them does
# not use the instruction to prune.
ANCHOR_RULES: dict[str, Rule] = {
  "similarity": _similarity,
  "random": _random,
  "uniform": _uniform,
  "centre": _center,
}
_OWN_RULES = frozenset(ANCHOR_RULES)  # of this package


def anchor_rule(name: Any) -> Callable[[Any], Rule]:  # what comes from users is checked by value, not by type
  """Registers a function as a rule that scores patches: `model.anchor_rule=name` then keeps those it scores highest.

      @anchor_rule("norm")
      def norm(similarity, patches, words, mask):
        return jnp.linalg.norm(patches, axis=-1)

  The function is traced by JAX. It gets the cosines f32[b n m] of patches and words (-1 in masked columns; in training
  with their noise), the patches f[b n d], the words f[b m d] projected to the patches' width, and which of them are
  real, bool[b m]. It returns one score for each patch, f[b n], or f[n] for all examples alike. A policy that was
  trained with a rule is loaded after the rule is registered. A name registered twice has the later function.

  Raises:
    ValueError: the name of a rule of this package, or what cannot be called with four arguments.
  """
  if not isinstance(name, str) or not name or name in _OWN_RULES:
    raise refuse(
      "anchor rule",
      f"the name {name!r}",
      f"a text other than {(*ANCHOR_RULES,)}",
      "choose a name of your own",
    )

  def register(rule: Any) -> Rule:
    try:
      inspect.signature(rule).bind(*range(4))
    except (TypeError, ValueError) as error:
      raise refuse(
        f"anchor rule {name!r}",
        f"{rule!r} ({error})",
        "a function of (similarity, patches, words, mask)",
        "give it these four arguments",
      ) from None
    ANCHOR_RULES[name] = rule
    return rule

  return register


def anchor_scores(
  rule: str,
  similarity: Float[Array, "b n m"],
  patches: Float[Array, "b n d"],
  words: Float[Array, "b m d"],
  mask: Bool[Array, "b m"],
) -> Float[Array, "b n"]:
  """Scores of patches for Language-to-Vision filtering (Eq. 5) by a rule of ANCHOR_RULES, in float32.

  Raises:
    ValueError: the rule is not registered, or returns anything but one number for each patch.
  """
  if rule not in ANCHOR_RULES:
    raise refuse(
      "anchor rule",
      f"{rule!r}",
      f"one of {(*ANCHOR_RULES,)}",
      "set model.anchor_rule to one of them, or register your own with pruner.anchor_rule",
    )
  b, n, _ = similarity.shape
  scores = ANCHOR_RULES[rule](similarity, patches, words, mask)
  shape, dtype = getattr(scores, "shape", None), getattr(scores, "dtype", None)
  if shape not in ((n,), (b, n)) or not jnp.issubdtype(dtype, jnp.number):
    got = type(scores).__name__ if shape is None else f"{dtype}{[*shape]}"
    raise refuse(f"anchor rule {rule!r}", f"scores {got}", f"numbers [{b}, {n}] or [{n}]", "return one for each patch")
  return jnp.broadcast_to(scores.astype(jnp.float32), (b, n))


def _bit_reversed(n: int) -> Float[Array, " n"]:
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
    anchor_rule: a name in ANCHOR_RULES.
    least: patches that are shown at least; how many between this and h follows how widely the scores spread over the
      picture (`dynamic_count`). None shows all h.
    cue_temperature: of the softmax behind each cue; None for `temperature`.
    cue_pool: how a word's similarities over the patches make its score as a cue, 'mean' (Eq. 3) or 'max'.

  Differs from the paper: W_l is a two-layer GELU MLP; scores are means (same ranking); noise in training.
  """

  anchors: int
  cues: int
  temperature: float
  noise: float
  anchor_rule: str
  least: int | None = None
  dtype: Any = jnp.float32
  cue_temperature: float | None = None
  cue_pool: str = "mean"

  keeps: ClassVar[str] = "anchors"
  reads_words: ClassVar[bool] = True
  reads_patches: ClassVar[bool] = True
  num_queries: ClassVar[int] = 0

  @classmethod
  def from_config(cls, config: Mapping[str, Any], width: int, name: str) -> IDPruner:
    c = config
    how = (c["keep"], c["cues"], c["temperature"], c["similarity_noise"], c["anchor_rule"], c["keep_least"])
    return cls(*how, jnp.dtype(c["dtype"]), c["cue_temperature"], c["cue_pool"], name=name)

  def prune(self, encoded: Encoded, words: Words) -> Pruned:
    """Anchors as tokens, and cues; `info` has the whole IDPruned as "pruned"."""
    projected = words.projected
    if projected is None:
      projected = self.project(words.states, encoded.patches.shape[-1])
    found = self.select(encoded.patches, projected, words.mask, words.noise, words.stop)
    return Pruned(found.anchors, found.cues, {"pruned": found})

  @nn.compact
  def project(self, states: Float[Array, "b m e"], width: int) -> Float[Array, "b m d"]:
    """The text tower's states in the patches' width (W_l of Eq. 2)."""
    return MLP((width, width), dtype=self.dtype, name="text_projector")(states)

  def __call__(
    self,
    patches: Float[Array, "b n d"],
    words: Float[Array, "b m e"],
    mask: Bool[Array, "b m"],
    normal: Float[Array, "b n m"] | None = None,
  ) -> IDPruned:
    """Patches, text-tower states, which states are words, and standard normal noise (training) or None."""
    return self.select(patches, self.project(words, patches.shape[-1]), mask, normal)

  @nn.nowrap
  def select(
    self,
    patches: Float[Array, "b n d"],
    words: Float[Array, "b m d"],
    mask: Bool[Array, "b m"],
    normal: Float[Array, "b n m"] | None = None,
    stop: Bool[Array, "b m"] | None = None,
  ) -> IDPruned:
    """Pruning proper, with words already projected to the patches' width. Similarity and top-k in float32."""
    s = cosine_similarity(patches, words)
    if normal is not None:
      s = s + self.noise * normal
    s = jnp.where(mask[:, None, :], s, -1.0)
    scores = anchor_scores(self.anchor_rule, s, patches, words, mask)
    kept = top_indices(scores, self.anchors, "anchors (patches)")
    found = IDPruned(anchors=gather(patches, kept), similarity=s, kept=kept)
    if self.least is not None:
      count = dynamic_count(scores, self.temperature, self.least, self.anchors)
      own = jnp.take_along_axis(scores, kept, axis=1)
      better = (own[:, None] > own[..., None]) | (
        (own[:, None] == own[..., None]) & jnp.tri(self.anchors, k=-1, dtype=bool)
      )
      found = found.replace(shown=better.sum(axis=-1) < count[:, None])
    if not self.cues:
      return found
    salient = top_indices(cue_scores(s, mask, stop, self.cue_pool), self.cues, "cues (instruction tokens)")
    temperature = self.temperature if self.cue_temperature is None else self.cue_temperature
    weights = jax.nn.softmax(jnp.take_along_axis(s, salient[:, None, :], axis=2) / temperature, axis=1)
    cues = jnp.einsum("bnk,bnd->bkd", weights.astype(patches.dtype), patches)
    return found.replace(cues=cues, salient=salient, cue_weights=weights)


class SAPruner(nn.Module):
  """Spatial-aggregation pruner (SemanticVLA Eq. 6-7): the learned tokens. FiLM and attention happen in the encoder.

  Attributes:
    tokens: q, aggregation tokens appended behind the patches, without position embedding.
    width: d, of the encoder.
    std: standard deviation of their initial values; 1 in the released code, 0 in the paper.
  """

  tokens: int
  width: int
  std: float

  keeps: ClassVar[str] = "aggregated"
  reads_words: ClassVar[bool] = False
  reads_patches: ClassVar[bool] = False

  @classmethod
  def from_config(cls, config: Mapping[str, Any], width: int, name: str) -> SAPruner:
    return cls(config["keep"], width, config["aggregation_std"], name=name)

  @property
  def num_queries(self) -> int:
    return self.tokens

  @nn.compact
  def queries(self) -> Float[Array, "1 q d"]:
    """The aggregation tokens as they enter the encoder."""
    return self.param("queries", nn.initializers.normal(self.std), (1, self.tokens, self.width))

  def prune(self, encoded: Encoded, words: None = None) -> Pruned:
    """The aggregation tokens as they leave the encoder, instead of its patches; `info` has their "attention"."""
    return Pruned(encoded.queries, info={"attention": encoded.attention})


# Kinds of pruner by their name in a config, in the order of an encoder's token sets.
KINDS: dict[str, type[nn.Module]] = {"sa": SAPruner, "id": IDPruner}


def kinds(written: str | None) -> tuple[str, ...]:
  """ "sa+id", as a config writes it → ("sa", "id"); None → ()."""
  return () if written is None else (*written.split("+"),)


def noise(
  key: Array,
  patches: Float[Array, "bv n d1"],
  words: Float[Array, "bv m d2"],
  views: int,
  part: tuple[Int[Array, ""], int] | None = None,
) -> Float[Array, "bv n m"]:
  """Standard normal numbers for similarities; of a part of a batch, those that its examples have in the whole of it.

  Args:
    part: (i, p) where these are the examples i, i + p, i + 2p, … of a batch.
  """
  (bv, n, _), m = patches.shape, words.shape[1]
  i, parts = (0, 1) if part is None else part
  normal = jax.random.normal(key, (bv * parts, n, m), jnp.float32)
  if parts == 1:
    return normal
  normal = rearrange(normal, "(b p v) n m -> b p v n m", p=parts, v=views)
  return rearrange(jax.lax.dynamic_index_in_dim(normal, i, axis=1, keepdims=False), "b v n m -> (b v) n m")
