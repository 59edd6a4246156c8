"""The one small MLP that projectors, fusers and the proprioception token share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from semanticvla_jax.errors import refuse

# PyTorch's default for nn.Linear (Kaiming uniform with a = sqrt(5)): kernel and bias from U(-1/sqrt(in), 1/sqrt(in)).
# The released code never overrides it for FiLM, the Dense-Fuser, the text projector and the proprioception projector.
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def gelu(x: Float[Array, "..."], kind: str) -> Float[Array, "..."]:
  """GELU, exact (`erf`: timm, the released code) or its tanh approximation (`tanh`: big_vision, SigLIP's text)."""
  if kind not in ("erf", "tanh"):
    raise refuse("gelu kind", f"{kind!r}", "'erf' or 'tanh'", "set the model's `gelu` field to one of them")
  if x.dtype == jnp.float32:
    return nn.gelu(x, approximate=kind == "tanh")
  # In float32, as PyTorch's kernels compute it, and as one kernel of a GPU instead of two; training keeps x alone.
  wide = lambda x: nn.gelu(x.astype(jnp.float32), approximate=kind == "tanh").astype(x.dtype)  # noqa: E731
  return jax.checkpoint(wide)(x)


class MLP(nn.Module):
  """Linear layers `Dense_0 … Dense_k` with an exact GELU between two of them and none at the end.

  Attributes:
    features: output width of each layer.
    kernel_init: of every layer; biases start at zero.
    dtype: compute type.
  """

  features: tuple[int, ...]
  kernel_init: Callable = torch_kernel_init
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
    for i, width in enumerate(self.features):
      x = nn.Dense(width, kernel_init=self.kernel_init, dtype=self.dtype)(x)
      x = gelu(x, "erf") if i < len(self.features) - 1 else x
    return x


def dense_normal_init(stddev: float = 0.02) -> Callable:
  """Kernel initializer of the released `fused_featurizer_sampler_proj`: N(0, 0.02)."""
  return jax.nn.initializers.normal(stddev)
