"""Auxiliary losses for training from scratch on the tabletop, from the state that its expert acts on.

A SigLIP that was never pre-trained does not know which patch a word means, and L1 on actions alone teaches it late: the
average trajectory is a deceptively good answer. Losses stand in for that pre-training; none changes the model:

  alignment     the ID-Pruner's scores of the instruction should peak on the objects it names (phrase grounding);
  naming        so should its scores of "pick up the …" for every visible object: the same image, other phrases;
  looks         linear probes on both encoders' patches predict the shape of every visible object, and the yaw of a
                cube in that view: its edges are a few pixels, and no word names them;
  displacement  a linear probe on the first step's action states predicts where the named objects are from the gripper;
  aim           and the yaw of the target cube, as the patch probes see it: attention can copy it from the patches,
                whereas the remaining rotation is a nonlinear function of it;
  turn          and the rotation that remains. Most rotations of a chunk are zero, so that without this loss the
                rotation head settles on zero before its tokens carry any information about attitude.

A model that prunes nothing has no scores. There the language model finds what the words mean, so that `alignment` and
`naming` teach the cosine of a visual token and the words' embeddings, as the language model is given both, and

  pointing      a linear probe on its last states of the visual tokens points at the named objects.

A further weight, `rotation`, counts the L1 of rotations once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float

from semanticvla_jax.models.semanticvla import Output, SemanticVLA
from semanticvla_jax.tabletop import tasks
from semanticvla_jax.types import Observation

PROBE = "probe"  # prefix of the parameters that are not the model's
SHAPES = 3  # cube, ball, cylinder
PHRASES = tasks.GRASPABLE  # "pick up the …" of every object that suite `pick` may name
UNIT = 0.1  # meters
TURN = 0.25  # radians


@flax.struct.dataclass
class Targets:
  """The targets of a batch (`Batch.aux`).

  Attributes:
    where: f32[b g v n], for g sentences a distribution over the patches of each view, or zeros where nothing named is
      seen; the first sentence is the example's own instruction.
    words: i32[b g-1 m], word_mask: bool[b g-1 m], the other sentences: as the ID-Pruner reads them, or as prompts.
    displacement: f32[b 9], target and destination from the gripper in units of 0.1 m, then the rotation vector still
      to turn in units of 0.25 rad.
    shape: i32[b g-1], what the objects of the other sentences are: cube, ball, cylinder.
    edges: f32[b g-1 v 2], cosine and sine of four times a cube's yaw as a view shows it; zeros for what has none.
    aim: f32[b v 2], those of the object that the example's own instruction means.
  """

  where: Any
  words: Any
  word_mask: Any
  displacement: Any
  shape: Any
  edges: Any
  aim: Any


class Grounded(nn.Module):
  """A model and its probes; parameters are the model's own, and `probe…`. `strip` takes the probes off again."""

  model: SemanticVLA
  scored: ClassVar[str] = "siglip_patches"  # the intermediate that `score` takes

  def setup(self):
    nn.share_scope(self, self.model)
    self.probe = nn.Dense(9, kernel_init=nn.initializers.zeros)
    self.probe_aim = nn.Dense(4)
    self.probe_dino = nn.Dense(SHAPES + 2)
    self.probe_siglip = nn.Dense(SHAPES + 2)

  def __call__(
    self, observation: Observation, train: bool = False, part: tuple | None = None, updates: Any = 0
  ) -> Output:
    """As the model; intermediates also hold what the probes say, and the scores of the example's own instruction.

    `displacement` f32[b 9], `aim` f32[b v 2], `dino_looks` and `siglip_looks` f32[(b v) n 5], `scores` f32[(b v) n m].
    """
    out = self.model(observation, train, part=part, updates=updates)
    states = rearrange(out.intermediates["action_states"][:, : self.model.coupler.tokens], "b t d -> b (t d)")
    probes = {"displacement": self.probe(states), "aim": rearrange(self.probe_aim(states), "b (v c) -> b v c", c=2)}
    looks = {
      f"{name}_looks": probe(out.intermediates[f"{name}_patches"])
      for name, probe in (("dino", self.probe_dino), ("siglip", self.probe_siglip))
    }
    return Output(out.actions, out.intermediates | probes | looks | self.found(observation, out.intermediates))

  def found(self, observation: Observation, seen: Mapping[str, Any]) -> dict[str, Any]:
    """`scores` of the example's own instruction."""
    return {"scores": seen["siglip_pruned"].similarity}

  def score(self, patches: Float[Array, "bv n d"], words: Any, mask: Bool[Array, "b g m"]) -> Float[Array, "bgv n m"]:
    """The ID-Pruner's similarities of other sentences i32[b g m] with the patches of the same views, no noise."""
    b, g, _ = words.shape
    v = patches.shape[0] // b
    patches = repeat(patches, "(b v) n d -> (b g v) n d", b=b, g=g)
    words, mask = (repeat(x, "b g m -> (b g v) m", v=v) for x in (words, mask))
    return self.model.pruner("siglip", "id")(patches, self.model.text(words, mask), mask).similarity


class GroundedDecoder(Grounded):
  """The same for a model that prunes nothing: the language model has to find what the words mean."""

  scored: ClassVar[str] = "views"

  def setup(self):
    super().setup()
    self.probe_pointing = nn.Dense(1)

  def found(self, observation: Observation, seen: Mapping[str, Any]) -> dict[str, Any]:
    """`scores` of the example's own instruction, and `pointing` f32[b v n], the logits of the patches it names."""
    tokens, v = seen["views"].shape[1], self.model.num_views
    states = seen["hidden"][:, 1 : 1 + v * tokens]  # behind <s>
    pointing = rearrange(self.probe_pointing(states), "b (v n) 1 -> b v n", v=v)
    own = self.score(seen["views"], observation.prompt[:, None], observation.prompt_mask[:, None])
    return {"scores": own, "pointing": pointing}

  def score(self, patches: Float[Array, "bv n d"], words: Any, mask: Bool[Array, "b g m"]) -> Float[Array, "bgv n m"]:
    """Cosines of the visual tokens with the embeddings of prompts i32[b g m]; 0 where a prompt is padding."""
    b, g, _ = words.shape
    embedded = self.model.llm.embed_tokens(rearrange(words, "b g m -> (b g) m"))
    embedded = unit(rearrange(embedded, "(b g) m d -> b g m d", g=g)) * mask[..., None]
    visual = unit(rearrange(patches, "(b v) n d -> b v n d", b=b))
    return rearrange(jnp.einsum("bvnd,bgmd->bgvnm", visual, embedded), "b g v n m -> (b g v) n m")


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
  """Vectors of length one, in float32."""
  x = x.astype(jnp.float32)
  return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


class Counts(NamedTuple):
  """What the means of the losses divide by, f32[] each.

  Attributes:
    examples: of the batch.
    named: views in which an object that the example's own instruction names is visible.
    seen: (object, view) pairs in which the object is visible.
    cubes: examples whose target is a cube.
  """

  examples: Any
  named: Any
  seen: Any
  cubes: Any


class AuxiliaryLosses(NamedTuple):
  """The losses as training takes them (train.step.AuxLoss). `weights`: config.train.grounding, by name."""

  weights: Mapping[str, float]

  def wrap(self, model: SemanticVLA) -> Grounded:
    """The model with its probes."""
    return (Grounded if model.prunes_by_instruction else GroundedDecoder)(model.clone())

  def counts(self, targets: Targets) -> Counts:
    """Those of a batch."""
    examples = jnp.float32(targets.displacement.shape[0])
    cubes = jnp.any(targets.aim != 0, axis=(1, 2)).sum(dtype=jnp.float32)
    return Counts(examples, targets.where[:, 0].sum(), targets.where[:, 1:].sum(), cubes)

  def loss(
    self, model: Grounded, params: dict, out: Output, metrics: Mapping, targets: Targets, count: Counts
  ) -> tuple[Any, dict]:
    """The weighted sum of the losses and of L1 of the rotations, and each of the losses by name."""
    each = parts(model, params, out, targets, count)
    total = sum(self.weights[name] * value for name, value in each.items())
    return total + self.weights["rotation"] * metrics["l1_rotation"], each

  def strip(self, params: dict) -> dict:
    """The parameters of the model alone."""
    return {name: part for name, part in params.items() if not name.startswith(PROBE)}

  def shapes(self, config: Any, model: SemanticVLA) -> Targets:
    """The targets of a batch as ShapeDtypeStructs."""
    size = config.data.batch_size
    words = config.data.prompt_length if model.text is None else config.data.instruction_length
    shape = lambda dtype, *dims: jax.ShapeDtypeStruct((size, *dims), dtype)  # noqa: E731
    return Targets(
      where=shape(jnp.float32, 1 + PHRASES, model.num_views, model.siglip.num_patches),
      words=shape(jnp.int32, PHRASES, words),
      word_mask=shape(jnp.bool_, PHRASES, words),
      displacement=shape(jnp.float32, 9),
      shape=shape(jnp.int32, PHRASES),
      edges=shape(jnp.float32, PHRASES, model.num_views, 2),
      aim=shape(jnp.float32, model.num_views, 2),
    )


def parts(model: Grounded, params: dict, out: Output, targets: Targets, count: Counts) -> dict[str, Any]:
  """The losses by name, f32[] each; `count` is the whole batch's where these are only some of its examples."""
  seen = out.intermediates
  scores = model.apply({"params": params}, seen[model.scored], targets.words, targets.word_mask, method="score")
  others = rearrange(targets.where[:, 1:], "b g v n -> (b g) v n")
  away = jnp.abs(seen["displacement"].astype(jnp.float32) - targets.displacement)
  dino, siglip = (looks(seen[f"{name}_looks"], targets, count.seen) for name in ("dino", "siglip"))
  points = {"pointing": pointing(seen["pointing"], targets, count.named)} if "pointing" in seen else {}
  return points | {
    "alignment": alignment(seen["scores"], targets.where[:, 0], count=count.named),
    "naming": alignment(scores, others, count=count.seen),
    "looks": (dino + siglip) / 2,
    "displacement": divided(away[:, :6].mean(axis=1).sum(), count.examples),
    "aim": aim(seen["aim"], targets, count.cubes),
    "turn": divided(away[:, 6:].mean(axis=1).sum(), count.examples),
  }


def alignment(
  similarity: Float[Array, "bv n m"],
  focus: Float[Array, "b v n"],
  temperature: float = 0.05,
  count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
  """Pulls the ID-Pruner's patch scores (SemanticVLA Eq. 5) towards the patches of the objects the instruction names.

  Stands in for the contrastive pre-training that a from-scratch SigLIP lacks: cross entropy between a softmax over a
  view's patch scores and `focus`, a distribution over its patches. Views whose focus is empty (sums to 0) carry none.

  Args:
    count: views with a focus to divide by; None for those of `focus`.
  """
  scores = similarity.astype(jnp.float32).mean(axis=2) * (similarity.shape[2] / 8)  # padding adds a constant
  log_p = jax.nn.log_softmax(scores / temperature, axis=-1)
  focus = focus.reshape(log_p.shape)
  return divided(-(focus * log_p).sum(), focus.sum() if count is None else count)


def pointing(logits: Float[Array, "b v n"], targets: Targets, count: Float[Array, ""]) -> Float[Array, ""]:
  """Cross entropy of the patches that are pointed at in a view and of those of the objects the instruction names."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return divided(-(targets.where[:, 0] * log_p).sum(), count)


def looks(probed: Float[Array, "bv n 5"], targets: Targets, count: Float[Array, ""]) -> Float[Array, ""]:
  """Cross entropy of the shape of every visible object, plus twice the L1 of a cube's yaw (cosine, sine of 4 yaw)."""
  where = targets.where[:, 1:]
  probed = rearrange(probed.astype(jnp.float32), "(b v) n c -> b v n c", v=where.shape[2])
  read = jnp.einsum("bgvn,bvnc->bgvc", where, probed)  # at the patches where each object is
  visible = where.sum(axis=-1)
  shape = jnp.broadcast_to(targets.shape[..., None], visible.shape)
  shape_error = optax.softmax_cross_entropy_with_integer_labels(read[..., :SHAPES], shape)
  yaw_error = jnp.abs(read[..., SHAPES:] - targets.edges).mean(axis=-1) * jnp.any(targets.edges != 0, axis=-1)
  return divided((visible * (shape_error + 2 * yaw_error)).sum(), count)


def aim(predicted: Float[Array, "b v 2"], targets: Targets, count: Float[Array, ""]) -> Float[Array, ""]:
  """L1 of the target cube's yaw (cosine, sine of 4 yaw), over examples whose target is a cube."""
  is_cube = jnp.any(targets.aim != 0, axis=(1, 2))
  error = jnp.abs(predicted.astype(jnp.float32) - targets.aim).mean(axis=(1, 2))
  return divided((error * is_cube).sum(), count)


# The same as train.losses.divided: a benchmark may not import training, and one line is no reason for a shared module.
def divided(total: Float[Array, "*d"], count: Float[Array, ""]) -> Float[Array, "*d"]:
  """A sum over a count; where nothing was counted, the sum, which is 0 then."""
  return total / jnp.maximum(count, 1.0)
