"""SH-Fuser: the two encoders exchange dense features, then their pruned tokens become one (SemanticVLA Eq. 8-9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from semanticvla_jax.errors import refuse
from semanticvla_jax.models.mlp import MLP, dense_normal_init


class DenseFuser(nn.Module):
  """Exchanges patch features between the encoders after chosen pairs of blocks (SemanticVLA Eq. 8).

  Attributes:
    pairs: ((a, b), …), 0-based: after block a of the first encoder and block b of the second. The paper counts from 1.

  Differs from the paper: each encoder adds its own MLP of the joint feature (two-way residual, on patch tokens only).
  """

  pairs: tuple[tuple[int, int], ...]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, level: int, first: Float[Array, "b n d1"], second: Float[Array, "b n d2"]
  ) -> tuple[Float[Array, "b n d1"], Float[Array, "b n d2"]]:
    """Patch tokens of both encoders after pair number `level` → what each of them adds to its own."""
    joint = jnp.concatenate([first, second], axis=-1)
    widths = {"first": first.shape[-1], "second": second.shape[-1]}
    return tuple(
      MLP((joint.shape[-1], width), dtype=self.dtype, name=f"pair_{level}_{which}")(joint)
      for which, width in widths.items()
    )


def check_pairs(pairs: tuple[tuple[int, int], ...], depths: tuple[int, int]) -> None:
  """Raises ValueError unless the block numbers of both encoders rise and exist."""
  for which, depth in enumerate(depths):
    blocks = [pair[which] for pair in pairs]
    if any(not 0 <= block < depth for block in blocks) or blocks != sorted(set(blocks)):
      raise refuse(
        "dense fuser",
        f"blocks {blocks} for encoder {which}",
        f"rising numbers in 0..{depth - 1} (0-based)",
        "set model.dense_fuser to pairs that exist (negative numbers do not count from the end)",
      )


class SparseFuser(nn.Module):
  """Pruned tokens → the language model's visual tokens `[cues | fused]` of one view (SemanticVLA Eq. 9).

  Differs from the paper: the channels are concatenated as [aggregated, anchors] and go through OpenVLA's own
  three-layer projector; query k is paired with the k-th kept patch.

  Attributes:
    width: D, of the language model.
    how: "joint" fuses the encoders' tokens channel by channel; "separate" (an ablation) projects each set on its own
      and lists them one after the other; "mixture" (CogVLA, arXiv 2508.21046) adds separate projections, with weights
      that an MLP gives of the pooled instruction.
  """

  width: int
  how: str = "joint"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    kept: dict[str, Float[Array, "b _ _"]],
    cues: dict[str, Float[Array, "b _ _"]],
    instruction: Float[Array, "b D"] | None = None,
  ) -> Float[Array, "b n D"]:
    """Token sets by name, in channel order, and cues by encoder → visual tokens; "mixture" reads the instruction."""
    tokens = [
      MLP((self.width, self.width), dense_normal_init(), self.dtype, name=f"{name}_cue_projector")(x)
      for name, x in cues.items()
    ]
    if self.how == "separate":
      return jnp.concatenate(tokens + [self._project(f"{name}_projector", x) for name, x in kept.items()], axis=1)
    counts = {name: x.shape[1] for name, x in kept.items()}
    if len(set(counts.values())) > 1:
      raise refuse(
        "sparse fuser",
        f"{counts} tokens",
        "as many from each pruner (they are fused one by one)",
        "give both encoders a pruner, or none",
      )
    if self.how == "mixture":
      return jnp.concatenate([*tokens, self._mix(kept, instruction)], axis=1)
    return jnp.concatenate([*tokens, self._project("projector", jnp.concatenate([*kept.values()], axis=-1))], axis=1)

  def _mix(self, kept: dict[str, Float[Array, "b n _"]], instruction: Float[Array, "b D"]) -> Float[Array, "b n D"]:
    weigh = MLP((instruction.shape[-1], len(kept)), dtype=self.dtype, name="router")
    weights = jax.nn.softmax(weigh(instruction).astype(jnp.float32), axis=-1)
    each = [MLP((self.width, self.width), dtype=self.dtype, name=f"{name}_projector")(x) for name, x in kept.items()]
    return sum(weights[:, i, None, None].astype(x.dtype) * x for i, x in enumerate(each))

  def _project(self, name: str, x: Float[Array, "b n d"]) -> Float[Array, "b n D"]:
    return MLP((4 * x.shape[-1], self.width, self.width), dtype=self.dtype, name=name)(x)


def from_config(c: Mapping[str, Any], dtype: Any) -> DenseFuser | None:
  """The Dense-Fuser of a resolved model config, or None."""
  if c["dense_fuser"] is None:
    return None
  pairs = c["variant"]["pairs"] if c["dense_fuser"] == "variant" else c["dense_fuser"]
  pairs = tuple((first, second) for first, second in pairs)
  check_pairs(pairs, tuple(c["variant"][name]["depth"] for name in ("dino", "siglip")))
  return DenseFuser(pairs, dtype)
