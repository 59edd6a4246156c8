"""What a model that learns from scratch is told beside the actions, where the expert's state is at hand.

A SigLIP that was never pre-trained does not know which patch a word means, and L1 on actions alone teaches it late: the
average trajectory is a deceptively good answer. Three losses stand in for that pre-training; none touches the model:

  alignment     the ID-Pruner's scores of the instruction lie on the objects it names;
  naming        so do the scores of "pick up the …" for every object in sight: the same image, other words;
  displacement  a linear probe on the first step's action states tells where the named objects are from the gripper,
                and how far it has still to turn. Most of a chunk's rotations are zero, so that without this the
                rotation head settles on zero before its tokens say anything about attitude.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float

from semanticvla_jax.models.semanticvla import Output, SemanticVLA
from semanticvla_jax.train import losses
from semanticvla_jax.types import Observation

PROBE = "probe"
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
  """

  where: Any
  words: Any
  word_mask: Any
  displacement: Any


class Grounded(nn.Module):
  """A model and its probe; parameters are the model's own, and `probe`. `strip` takes the probe off again."""

  model: SemanticVLA

  def setup(self):
    nn.share_scope(self, self.model)
    self.probe = nn.Dense(9, kernel_init=nn.initializers.zeros)

  def __call__(self, observation: Observation, train: bool = False) -> Output:
    """As the model; intermediates also hold `displacement` f32[b 9]."""
    out = self.model(observation, train)
    states = out.intermediates["action_states"][:, : self.model.coupler.tokens]
    displacement = self.probe(rearrange(states, "b t d -> b (t d)"))
    return Output(out.actions, out.intermediates | {"displacement": displacement})

  def score(
    self, patches: Float[Array, "bv n d"], words: Any, mask: Bool[Array, "b g m"]
  ) -> Float[Array, "bgv n m"]:
    """The ID-Pruner's similarities of other sentences i32[b g m] with the patches of the same views, no noise."""
    b, g, _ = words.shape
    v = patches.shape[0] // b
    patches = repeat(patches, "(b v) n d -> (b g v) n d", b=b, g=g)
    words, mask = (repeat(x, "b g m -> (b g v) m", v=v) for x in (words, mask))
    return self.model.siglip_id_pruner(patches, self.model.text(words, mask), mask).similarity


def loss(model: Grounded, params: dict, out: Output, hints: Hints, c: Any) -> tuple[Any, dict]:
  """The weighted sum of the three losses, weights from config.train.grounding, and each of them by name."""
  seen = out.intermediates
  scores = model.apply({"params": params}, seen["siglip_patches"], hints.words, hints.word_mask, method="score")
  parts = {
    "alignment": losses.alignment(seen["siglip_pruned"].similarity, hints.where[:, 0]),
    "naming": losses.alignment(scores, rearrange(hints.where[:, 1:], "b g v n -> (b g) v n")),
    "displacement": jnp.abs(seen["displacement"].astype(jnp.float32) - hints.displacement).mean(),
  }
  return sum(c[name] * value for name, value in parts.items()), parts


def strip(params: dict) -> dict:
  """The parameters of the model alone."""
  return {name: part for name, part in params.items() if name != PROBE}
