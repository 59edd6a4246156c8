"""How parameters lie for inference: separate decoder layers, projections that read one input as one product.

    llm/layers_{i}/attn/{q,k,v}_proj [d h c]                  → llm/layers_{i}/attn/qkv_proj [d 3 h c]
    llm/layers_{i}/mlp/{gate,up}_proj [d f]                   → llm/layers_{i}/mlp/gate_up_proj [d 2 f]
    (dino|siglip)/…/MultiHeadDotProductAttention_0/{query,key,value} [d h c] → …/qkv [d 3 h c]

A stack of layers is copied out of at every step of a loop, and XLA joins products of one input by joining their weights
at every call: for 7 billion parameters 6.7 of 31.5 GB moved. Laid out once, when a policy is loaded, neither happens.
On a GPU the encoders' sequences are filled up to a multiple of 8 as well, and attention can be one kernel.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax.errors import refuse

MULTIPLE = 8  # positions: matrix units work on sequences of whole eights, and GPU libraries pad others at every product
ATTENTION = ("xla", "triton")  # the default first
GPU = ("gpu", "cuda", "rocm")  # as jax calls that platform
_LAYOUT = {"scan": False, "scan_encoders": False, "fused": True, "remat": None}
_FUSED = (
  (re.compile(r"(llm/layers_\d+/attn)/q_proj/(\w+)"), ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
  (re.compile(r"(llm/layers_\d+/mlp)/gate_proj/(\w+)"), ("gate_proj", "up_proj"), "gate_up_proj"),
  (
    re.compile(r"((?:dino|siglip)/Transformer/encoderblock_\d+/MultiHeadDotProductAttention_0)/query/(\w+)"),
    ("query", "key", "value"),
    "qkv",
  ),
)
_STACKED = re.compile(r"llm/layers/(.*)")


def layout(platform: str, attention: str = "xla") -> dict[str, Any]:
  """The fields of a model config that make it run parameters laid out so, on jax's `platform`.

  Args:
    attention: "triton" runs models/attention_kernel.py, a kernel for GPUs.

  Raises:
    ValueError: another kind of attention, or that one elsewhere.
  """
  on_gpu = platform in GPU
  if attention not in ATTENTION:
    raise refuse("attention", repr(attention), f"one of {ATTENTION}", "choose one of them")
  if attention == "triton" and not on_gpu:
    raise refuse("attention", f"'triton' on {platform}", "a GPU, for which that kernel is compiled", "choose 'xla'")
  chosen = {} if attention == ATTENTION[0] else {"attention": attention}
  return _LAYOUT | chosen | ({"token_multiple": MULTIPLE} if on_gpu else {})


def log_choices(dtype: str | None, attention: str, platform: str) -> None:
  """Logs how a policy of `dtype` attends on jax's `platform` and why, and warns where another type would be faster."""
  if attention != ATTENTION[0]:
    how = "one kernel a layer, as asked for, after a comparison with XLA's on this device"
  elif platform in GPU:
    how = "XLA's: attention='triton' moves fewer bytes, but nobody has timed it (docs/performance.md)"
  else:
    how = f"XLA's, the only one here for a {platform.upper()}"
  logging.info("attention: %s", how)
  if (platform, dtype) == ("cpu", "bfloat16"):
    logging.warning(
      "A CPU converts bfloat16 to float32 at every product, which takes half as long again (docs/performance.md): "
      "load with dtype='float32' where there is room for twice the memory."
    )


@functools.cache
def verify_attention(kind: str, dtype: Any) -> None:
  """Compares a kernel of attention with XLA's on the device that is here, once for each type.

  Raises:
    ValueError: they differ by more than rounding, or the device is none that the kernel is for.
  """
  if kind == ATTENTION[0]:
    return
  layout(jax.default_backend(), kind)
  from semanticvla_jax.models import attention_kernel

  if not (error := attention_kernel.difference(dtype)) < 0.03:
    remedy = f"choose {ATTENTION[0]!r}, and report the device and jax's version"
    raise refuse("attention", f"results that differ from XLA's by {error:.2g}", "0.03 at most", remedy)


def lay_out(flat: dict[str, Any]) -> dict:
  """A policy's parameters, without adapters → those of the model with `layout`, bit for bit.

  Args:
    flat: arrays by path ("llm/layers/attn/q_proj/kernel"). It is emptied, so that where nothing else holds the arrays
      at most one stacked leaf is in memory twice.
  """
  for path in [path for path in flat if _STACKED.fullmatch(path)]:
    leaf, name = flat.pop(path), _STACKED.fullmatch(path).group(1)
    flat |= {f"llm/layers_{i}/{name}": leaf[i] for i in range(leaf.shape[0])}
  for pattern, names, joined in _FUSED:
    for module, leaf in [match.groups() for match in map(pattern.fullmatch, flat) if match]:
      parts = [flat.pop(f"{module}/{name}/{leaf}") for name in names]
      flat[f"{module}/{joined}/{leaf}"] = jnp.stack(parts, axis=1 if leaf == "kernel" else 0)
  return unflatten_dict({path: flat.pop(path) for path in [*flat]}, sep="/")


KINDS = {"int8": (jnp.int8, 127), "fp8": (jnp.float8_e4m3fn, 448)}  # type, and the largest number that a scale maps to


class Quantized(nn.Module):
  """Runs `model` with the decoder's kernels in 8 bits and one scale per output channel (`quantize` makes them).

  Weights alone are rounded; products are in the model's compute type, so that no hardware for 8 bits is needed.
  """

  model: nn.Module
  kind: str

  def setup(self):
    nn.share_scope(self, self.model)

  def __call__(self, *args, call: str = "__call__", **kwargs):
    """Runs the method `call` of the wrapped model with the same arguments."""
    with nn.intercept_methods(functools.partial(_product, KINDS[self.kind][0])):
      return getattr(self.model, call)(*args, **kwargs)


def quantize(params: Mapping[str, Any], kind: str) -> dict:
  """Parameters in the serving layout → those of `Quantized` around the model; the tree's own arrays are not changed.

  Args:
    params: of the model.
    kind: "int8" rounds to 1/254 of an output channel's largest weight, "fp8" (4 bits of exponent, 3 of mantissa) to
      1/16 of the weight itself.
  """
  flat, (dtype, largest) = flatten_dict(params, sep="/"), KINDS[kind]
  for path in [path for path in flat if path.endswith("/kernel") and _is_quantized(path.removesuffix("/kernel"))]:
    kernel = flat[path].astype(jnp.float32)
    inputs = tuple(range(_inputs(path)))
    scale = jnp.maximum(jnp.abs(kernel).max(axis=inputs), jnp.finfo(jnp.float32).tiny) / largest
    scaled = jnp.clip(kernel / scale, -largest, largest)
    flat[path] = (jnp.round(scaled) if kind == "int8" else scaled).astype(dtype)
    flat[f"{path.removesuffix('kernel')}scale"] = scale
  return unflatten_dict(flat, sep="/")


def _is_quantized(path: str) -> bool:
  return re.fullmatch(r"llm/layers_\d+/(attn|mlp)/\w+_proj", path) is not None


def _inputs(path: str) -> int:
  """How many axes of a kernel are summed over: heads and channels of the attention's output, else the width."""
  return 2 if "/o_proj" in path else 1


def _product(kernel_dtype, call, args, kwargs, context):
  layer, path = context.module, "/".join(context.module.path).removeprefix("model/")
  if context.method_name != "__call__" or not _is_quantized(path):
    return call(*args, **kwargs)
  (x,), count = args, _inputs(path)
  features = layer.features if isinstance(layer.features, tuple) else (layer.features,)
  shape = (*x.shape[x.ndim - count :], *features)
  kernel = layer.param("kernel", lambda _: jnp.zeros(shape, kernel_dtype))
  scale = layer.param("scale", lambda _: jnp.ones(features, jnp.float32))
  x = x.astype(layer.dtype or x.dtype)
  return (jnp.tensordot(x, kernel.astype(x.dtype), axes=count) * scale).astype(x.dtype)
