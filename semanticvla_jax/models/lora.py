"""LoRA as a wrapper around an unchanged model (Hu et al. 2021).

    model = LoRA(build(config), rank=64, alpha=128, targets=RELEASE_TARGETS)

`lora_a`, `lora_b` are next to the `kernel` they adapt, under scans and rematerialisation too. At initialization the
wrapped model equals the model (B = 0). `merge` folds them into the kernels, once.

Where the rank is not small against the width (a small model), the layer runs once with W + (α/r)·A·B, summed anew in
every call: equal up to rounding, in fewer FLOPs (`summing_is_cheaper`).
"""

from __future__ import annotations

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax.errors import refuse

# Which layers the released fine-tuning adapts: every linear layer of openvla-7b except its projectors; modules created
# after the adapters (FiLM, fusers, text projector, coupler, proprioception) and the frozen text tower have none. The
# release also adapts SigLIP's unused pooling head and the unused lm_head: dead weights, which this model does not have.
RELEASE_TARGETS = (
  r"(dino|siglip)/Transformer/encoderblock_\d+"
  r"/(MultiHeadDotProductAttention_0/(query|key|value|out)|MlpBlock_0/Dense_[01])"
  r"|llm/layers(_\d+)?/(attn|mlp)/\w+_proj"
)
# OpenVLA and OpenVLA-OFT (peft's "all-linear"): patch embeddings and projector too, and lm_head where there is one.
ALL_LINEAR_TARGETS = RELEASE_TARGETS + r"|(dino|siglip)/embedding|sparse_fuser/projector/Dense_\d|llm/lm_head"
TARGETS = {"release": RELEASE_TARGETS, "all_linear": ALL_LINEAR_TARGETS}


Leaf = jax.Array | np.ndarray


class LoRA(nn.Module):
  """Runs `model`; adds (alpha/rank)·x·A·B after each Dense, DenseGeneral or Conv whose path matches `targets`.

  Attributes:
    model: the module to adapt; parameter names stay its own.
    rank, alpha: r and α of the paper; the scale is α/r.
    targets: regular expression over the full path of a layer, e.g. "llm/layers/attn/q_proj".
  """

  model: nn.Module
  rank: int
  alpha: float | int
  targets: str = RELEASE_TARGETS

  def setup(self):
    if self.rank < 1:
      raise refuse("LoRA", f"rank {self.rank}", "1 or more", "to train without adapters, do not wrap")
    nn.share_scope(self, self.model)

  def __call__(self, *args, call: str = "__call__", **kwargs):
    """Runs the method `call` of the wrapped model with the same arguments."""
    with nn.intercept_methods(self._adapt):
      return getattr(self.model, call)(*args, **kwargs)

  @nn.nowrap
  def _adapt(self, call, args, kwargs, context):
    layer = context.module
    adaptable = context.method_name == "__call__" and isinstance(layer, (nn.Dense, nn.DenseGeneral, nn.Conv))
    path = "/".join(layer.path).removeprefix("model/")  # flax names the wrapped field, though its scope is shared
    if not adaptable or not re.fullmatch(self.targets, path):
      return call(*args, **kwargs)
    scale = self.alpha / self.rank
    if not isinstance(layer, nn.Conv) and layer.has_variable("params", "lora_a") and _sums(layer, args[0], self.rank):
      return _summed(layer, args[0], scale)
    y = call(*args, **kwargs)
    update = _convolution if isinstance(layer, nn.Conv) else _product
    return y + scale * update(layer, args[0], self.rank).astype(y.dtype)


def summing_is_cheaper(tokens: int, inputs: int, rank: int, outputs: int) -> bool:
  """Whether x·(W + (α/r)·A·B) takes fewer FLOPs than x·W + (α/r)·x·A·B, gradients of x, A and B included.

  Apart, every token meets W twice (forward, and for the gradient of x) and A and B three times. Summed, it meets the
  sum three times, and A·B and its gradients are three products without tokens. Where the rank is a sixth of a square
  layer's width or less, apart is cheaper at any number of tokens.
  """
  apart = 2 * tokens * inputs * outputs + 3 * tokens * rank * (inputs + outputs)
  return 3 * tokens * inputs * outputs + 3 * inputs * rank * outputs < apart


def _axes(layer: nn.Module) -> tuple[int, ...]:
  axis = getattr(layer, "axis", -1)
  return axis if isinstance(axis, tuple) else (axis,)


def _sums(layer: nn.Module, x: Leaf, rank: int) -> bool:
  """`summing_is_cheaper`, for layers that compute in float32: in 16 bits the sum would round the adapters away."""
  kernel = layer.get_variable("params", "kernel")
  if jnp.dtype(layer.dtype or jnp.result_type(x, kernel)) != jnp.float32:
    return False
  inputs = math.prod(x.shape[i] for i in _axes(layer))
  return summing_is_cheaper(x.size // inputs, inputs, rank, kernel.size // inputs)


def _summed(layer: nn.Module, x: Leaf, scale: float) -> jax.Array:
  """The layer with W + scale·A·B in the place of W, in float32."""
  params, axes = layer.variables["params"], _axes(layer)
  kernel = summed(params["kernel"], params["lora_a"], params["lora_b"], scale)
  contracted = (axes, tuple(range(len(axes))))
  y = jnp.tensordot(x.astype(kernel.dtype), kernel, axes=contracted, precision=layer.precision)
  return y + params["bias"].astype(y.dtype) if layer.use_bias else y


def _pair(layer: nn.Module, inputs: tuple[int, ...], rank: int, outputs: tuple[int, ...]) -> tuple[Leaf, Leaf]:
  """lora_a [*inputs, r] ~ N(0, 1/r) as peft's gaussian init, lora_b [r, *outputs] = 0, in the layer's compute type."""
  a = layer.param("lora_a", nn.initializers.normal(1 / rank), (*inputs, rank))
  b = layer.param("lora_b", nn.initializers.zeros, (rank, *outputs))
  return (a.astype(layer.dtype), b.astype(layer.dtype)) if layer.dtype else (a, b)


def _product(layer, x, rank):
  features = layer.features if isinstance(layer.features, tuple) else (layer.features,)
  axis = _axes(layer)
  a, b = _pair(layer, tuple(x.shape[i] for i in axis), rank, features)
  low = jnp.tensordot(x.astype(a.dtype), a, axes=(axis, tuple(range(len(axis)))))
  return jnp.tensordot(low, b, axes=1)


def _convolution(layer, x, rank):
  a, b = _pair(layer, (*layer.kernel_size, x.shape[-1]), rank, (layer.features,))
  low = jax.lax.conv_general_dilated(
    x.astype(a.dtype), a, layer.strides, layer.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  return jnp.tensordot(low, b, axes=1)


def merge(params: dict, rank: int, alpha: float | int) -> dict:
  """W + (α/r)·A·B for every adapted kernel; the result has no adapters (Hu et al. 2021, §4.1).

  Sums in float32, returned in the kernel's type. Raises ValueError when there is nothing to merge (a tree that was
  merged before: merging the same adapter twice ruins a policy silently) or when the adapters' rank is not `rank`.
  """
  flat = flatten_dict(params)
  adapted = [path[:-1] for path in flat if path[-1] == "lora_a"]
  if not adapted:
    raise refuse(
      "LoRA merge",
      "a tree without lora_a / lora_b",
      "an adapted one (this is already merged, or was never wrapped in LoRA)",
      "load the unmerged parameters",
    )
  for layer in adapted:
    kernel, a, b = flat[*layer, "kernel"], flat.pop((*layer, "lora_a")), flat.pop((*layer, "lora_b"))
    if a.shape[-1] != rank:
      raise refuse(
        f"LoRA merge: {'/'.join(layer)}",
        f"rank {a.shape[-1]}",
        rank,
        "pass the rank (and alpha) of training",
      )
    flat[*layer, "kernel"] = summed(kernel, a, b, alpha / rank).astype(kernel.dtype)
  return unflatten_dict(flat)


def summed(kernel: Leaf, a: Leaf, b: Leaf, scale: float) -> jax.Array:
  """W + scale·A·B, float32."""
  return kernel.astype(jnp.float32) + scale * outer(kernel, a, b)


def outer(kernel: Leaf, a: Leaf, b: Leaf) -> jax.Array:
  """A·B in the shape of `kernel`, float32; leading axes shared by all three (stacked layers) are kept."""
  lead = a.ndim - 1 + b.ndim - 1 - kernel.ndim
  stack, (n, r) = a.shape[:lead], (math.prod(a.shape[lead:-1]), a.shape[-1])
  product = jnp.matmul(
    a.astype(jnp.float32).reshape(*stack, n, r), b.astype(jnp.float32).reshape(*stack, r, -1), precision="highest"
  )
  return product.reshape(kernel.shape)
