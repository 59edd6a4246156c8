"""SA-Coupler: the states of the action tokens → a chunk of continuous actions (SemanticVLA Eq. 10-11).

Also the 256-bin action tokens of the original OpenVLA, which has no coupler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from semanticvla_jax.errors import refuse
from semanticvla_jax.models.mlp import torch_kernel_init

HEAD_NORM_EPS = 1e-5

Groups = tuple[tuple[str, tuple[int, ...]], ...]


def grouped(action_dim: int) -> Groups:
  """Translation, rotation and gripper dimensions of one arm (7) or of two arms (14: [t r g] left, [t r g] right).

  What a model has whose config names no groups.
  """
  if action_dim % 7:
    raise refuse(
      "coupler",
      f"action_dim {action_dim}",
      "a multiple of 7 (3 translation, 3 rotation, 1 gripper an arm)",
      "use the 'single' coupler for other robots, or name their groups in model.groups (`groups` of a DatasetSpec)",
    )
  starts = range(0, action_dim, 7)
  return (
    ("trans", tuple(s + i for s in starts for i in (0, 1, 2))),
    ("rot", tuple(s + i for s in starts for i in (3, 4, 5))),
    ("grip", tuple(s + 6 for s in starts)),
  )


class ResNetHead(nn.Module):
  """LayerNorm, Dense, ReLU, two residual [LayerNorm, Dense, ReLU] blocks, LayerNorm, Dense (the released heads)."""

  hidden: int
  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b k d"]) -> Float[Array, "b k out"]:
    dense = dict(kernel_init=torch_kernel_init, dtype=self.dtype)
    norm = dict(epsilon=HEAD_NORM_EPS, use_fast_variance=False, dtype=self.dtype)
    x = nn.relu(nn.Dense(self.hidden, name="in", **dense)(nn.LayerNorm(name="norm_in", **norm)(x)))
    for i in range(2):
      y = nn.LayerNorm(name=f"block_{i}_norm", **norm)(x)
      x = x + nn.relu(nn.Dense(self.hidden, name=f"block_{i}", **dense)(y))
    return nn.Dense(self.features, name="out", **dense)(nn.LayerNorm(name="norm_out", **norm)(x))


class Coupler(nn.Module):
  """Heads over the action tokens of each step.

  Attributes:
    groups: ((name, action dimensions), …); one head each, every dimension in exactly one group.
    tokens: action tokens a step (one per group; 6 for the groups of two arms; one per dimension in the baselines).
    hidden: width of the heads.
    read: 'step', each head reads all tokens of its step (released code); 'own', head u reads tokens u, u+U, … only
      (the paper's Eq. 11; U heads).
    head: 'resnet' (released code) or 'linear' (Eq. 11: d = W h + b).
  """

  groups: Groups
  tokens: int
  hidden: int
  read: str = "step"
  head: str = "resnet"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, states: Float[Array, "b kt D"]) -> Float[Array, "b k a"]:
    """Action-token states, `tokens` a step → normalized actions, float32, not squashed."""
    self._check(states.shape[1])
    steps = rearrange(states, "b (k t) D -> b k t D", t=self.tokens)
    parts = []
    for u, (name, dims) in enumerate(self.groups):
      own = steps if self.read == "step" else steps[:, :, u :: len(self.groups)]
      parts.append(self._head(name, len(dims))(rearrange(own, "b k t D -> b k (t D)")))
    order = np.argsort([dim for _, dims in self.groups for dim in dims])
    return jnp.concatenate(parts, axis=-1)[..., order].astype(jnp.float32)

  def _head(self, name: str, features: int) -> nn.Module:
    if self.head == "resnet":
      return ResNetHead(self.hidden, features, self.dtype, name=name)
    return nn.Dense(features, kernel_init=torch_kernel_init, dtype=self.dtype, name=name)

  @nn.nowrap
  def _check(self, length: int) -> None:
    if self.read not in ("step", "own") or self.head not in ("resnet", "linear"):
      raise refuse(
        "coupler",
        f"read={self.read!r}, head={self.head!r}",
        "'step' or 'own', 'resnet' or 'linear'",
        "set model.coupler, which chooses both",
      )
    if length % self.tokens or (self.read == "own" and self.tokens % len(self.groups)):
      raise refuse(
        "coupler",
        f"{length} states, {self.tokens} tokens a step and {len(self.groups)} heads",
        "states that the tokens divide (and tokens that the heads divide, where each reads its own)",
        "pass chunk × tokens states",
      )


# Original OpenVLA: 256 edges of [-1, 1], 255 intervals; the last 256 ids of Llama's own 32000 stand for them.
BINS = 256
TOKENIZER_VOCAB = 32000
EXTRA_ROWS = 64  # of the embedding, beyond the ids of the tokenizer
_EDGES = np.linspace(-1, 1, BINS)
_CENTERS = ((_EDGES[:-1] + _EDGES[1:]) / 2).astype(np.float32)


def actions_to_tokens(
  actions: Float[Array, "*b"] | Float[np.ndarray, "*b"], vocab: int = TOKENIZER_VOCAB
) -> Int[Array, "*b"]:
  """Normalized actions → token ids 31744..31999 (31999 is −1), as OpenVLA's training does; clips to [-1, 1].

  `vocab`: ids of the tokenizer; the last 256 of them are taken.
  """
  return vocab - jnp.digitize(jnp.clip(jnp.asarray(actions), -1, 1), jnp.asarray(_EDGES, jnp.float32))


def tokens_to_actions(ids: Int[Array, "..."], vocab: int = TOKENIZER_VOCAB) -> Float[Array, "..."]:
  """Token ids → center of their interval in (-1, 1); ids outside 31744..31999 land on the nearest end (as OpenVLA)."""
  return jnp.asarray(_CENTERS)[jnp.clip(vocab - ids - 1, 0, BINS - 2)]


def from_config(c: Mapping[str, Any], width: int, dtype: Any) -> Coupler | None:
  """The coupler of a resolved model config, or None: a model that speaks a token for each action dimension."""
  a, kind = c["action_dim"], c["coupler"]
  if kind is None:
    return None
  if kind == "single":
    return Coupler((("all", tuple(range(a))),), tokens=a, hidden=width, dtype=dtype)
  literal = dict(read="own", head="linear") if kind == "paper" else {}
  if c["groups"] is None:
    return Coupler(grouped(a), tokens=3 * (a // 7), hidden=width, dtype=dtype, **literal)
  groups = tuple((name, tuple(dims)) for name, dims in c["groups"])
  return Coupler(groups, tokens=len(groups), hidden=width, dtype=dtype, **literal)
