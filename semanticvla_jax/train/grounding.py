"""What a model that learns from scratch is told beside the actions, where the expert's state is at hand.

A SigLIP that was never pre-trained does not know which patch a word means, and L1 on actions alone teaches it late: the
average trajectory is a deceptively good answer. Six losses stand in for that pre-training; none touches the model:

  alignment     the ID-Pruner's scores of the instruction lie on the objects it names;
  naming        so do the scores of "pick up the …" for every object in sight: the same image, other words;
  looks         linear probes on both encoders' patches tell the shape of every object in sight, and how a cube is
                turned as that view shows it: its edges are a few pixels, and no word names them;
  displacement  a linear probe on the first step's action states tells where the named objects are from the gripper;
  aim           and how the cube that is meant is turned, as the patches' probes tell it: attention can copy that from
                where the cube is, and the turn still to make is a bent function of it;
  turn          and how far it has still to turn. Most of a chunk's rotations are zero, so that without this the
                rotation head settles on zero before its tokens say anything about attitude.

Beside them stands a weight `rotation`, by which L1 of the rotations counts once more (step.loss_fn).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import optax
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float

from semanticvla_jax.models.semanticvla import Output, SemanticVLA
from semanticvla_jax.train import losses
from semanticvla_jax.types import Observation

PROBE = "probe"  # what names of parameters begin with that are not the model's
SHAPES = 3  # cube, ball, cylinder
UNIT = 0.1  # metres
TURN = 0.25  # radians


@flax.struct.dataclass
class Hints:
  """What the state says about a batch.

  Attributes:
    where: f32[b g v n], for g sentences a distribution over the patches of each view, or zeros where nothing named is
      seen; the first sentence is the example's own instruction.
    words: i32[b g-1 m], word_mask: bool[b g-1 m], the other sentences.
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

  def setup(self):
    nn.share_scope(self, self.model)
    self.probe = nn.Dense(9, kernel_init=nn.initializers.zeros)
    self.probe_aim = nn.Dense(4)
    self.probe_dino = nn.Dense(SHAPES + 2)
    self.probe_siglip = nn.Dense(SHAPES + 2)

  def __call__(self, observation: Observation, train: bool = False, part: tuple | None = None) -> Output:
    """As the model; intermediates also hold what the probes say.

    `displacement` f32[b 9], `aim` f32[b v 2], `dino_looks` and `siglip_looks` f32[(b v) n 5].
    """
    out = self.model(observation, train, part=part)
    states = rearrange(out.intermediates["action_states"][:, : self.model.coupler.tokens], "b t d -> b (t d)")
    told = {"displacement": self.probe(states), "aim": rearrange(self.probe_aim(states), "b (v c) -> b v c", c=2)}
    looks = {
      f"{name}_looks": probe(out.intermediates[f"{name}_patches"])
      for name, probe in (("dino", self.probe_dino), ("siglip", self.probe_siglip))
    }
    return Output(out.actions, out.intermediates | told | looks)

  def score(
    self, patches: Float[Array, "bv n d"], words: Any, mask: Bool[Array, "b g m"]
  ) -> Float[Array, "bgv n m"]:
    """The ID-Pruner's similarities of other sentences i32[b g m] with the patches of the same views, no noise."""
    b, g, _ = words.shape
    v = patches.shape[0] // b
    patches = repeat(patches, "(b v) n d -> (b g v) n d", b=b, g=g)
    words, mask = (repeat(x, "b g m -> (b g v) m", v=v) for x in (words, mask))
    return self.model.pruner("siglip", "id")(patches, self.model.text(words, mask), mask).similarity


class Counts(NamedTuple):
  """What the means of `loss` are taken over, f32[] each.

  Attributes:
    examples: of the batch.
    named: views in which something that the example's own instruction names is seen.
    seen: (object, view) pairs in which the object is seen.
    cubes: examples whose instruction means a cube.
  """

  examples: Any
  named: Any
  seen: Any
  cubes: Any


def counts(hints: Hints) -> Counts:
  """Those of a batch."""
  examples = jnp.float32(hints.displacement.shape[0])
  cubes = jnp.any(hints.aim != 0, axis=(1, 2)).sum(dtype=jnp.float32)
  return Counts(examples, hints.where[:, 0].sum(), hints.where[:, 1:].sum(), cubes)


def loss(
  model: Grounded, params: dict, out: Output, hints: Hints, c: Any, count: Counts | None = None
) -> tuple[Any, dict]:
  """The weighted sum of the six losses, weights from config.train.grounding, and each of them by name.

  `count` is what their means are taken over, where that is more than these examples (see losses).
  """
  count = counts(hints) if count is None else count
  seen = out.intermediates
  scores = model.apply({"params": params}, seen["siglip_patches"], hints.words, hints.word_mask, method="score")
  others = rearrange(hints.where[:, 1:], "b g v n -> (b g) v n")
  away = jnp.abs(seen["displacement"].astype(jnp.float32) - hints.displacement)
  parts = {
    "alignment": losses.alignment(seen["siglip_pruned"].similarity, hints.where[:, 0], count=count.named),
    "naming": losses.alignment(scores, others, count=count.seen),
    "looks": (looks(seen["dino_looks"], hints, count.seen) + looks(seen["siglip_looks"], hints, count.seen)) / 2,
    "displacement": losses.divided(away[:, :6].mean(axis=1).sum(), count.examples),
    "aim": aim(seen["aim"], hints, count.cubes),
    "turn": losses.divided(away[:, 6:].mean(axis=1).sum(), count.examples),
  }
  return sum(c[name] * value for name, value in parts.items()), parts


def looks(probed: Float[Array, "bv n 5"], hints: Hints, count: Float[Array, ""]) -> Float[Array, ""]:
  """Cross entropy of the shape of every object in sight, and twice the L1 of how a cube's edges run."""
  where = hints.where[:, 1:]
  probed = rearrange(probed.astype(jnp.float32), "(b v) n c -> b v n c", v=where.shape[2])
  said = jnp.einsum("bgvn,bvnc->bgvc", where, probed)
  in_sight = where.sum(axis=-1)
  shape = jnp.broadcast_to(hints.shape[..., None], in_sight.shape)
  wrong = optax.softmax_cross_entropy_with_integer_labels(said[..., :SHAPES], shape)
  askew = jnp.abs(said[..., SHAPES:] - hints.edges).mean(axis=-1) * jnp.any(hints.edges != 0, axis=-1)
  return losses.divided((in_sight * (wrong + 2 * askew)).sum(), count)


def aim(said: Float[Array, "b v 2"], hints: Hints, count: Float[Array, ""]) -> Float[Array, ""]:
  """L1 of how the edges of the cube that is meant run, over examples that mean one."""
  is_cube = jnp.any(hints.aim != 0, axis=(1, 2))
  wrong = jnp.abs(said.astype(jnp.float32) - hints.aim).mean(axis=(1, 2))
  return losses.divided((wrong * is_cube).sum(), count)


def strip(params: dict) -> dict:
  """The parameters of the model alone."""
  return {name: part for name, part in params.items() if not name.startswith(PROBE)}
