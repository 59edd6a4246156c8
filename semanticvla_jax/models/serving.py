"""How parameters lie for inference: decoder layers apart, projections that read one input as one product.

    llm/layers_{i}/attn/{q,k,v}_proj [d h c]                  → llm/layers_{i}/attn/qkv_proj [d 3 h c]
    llm/layers_{i}/mlp/{gate,up}_proj [d f]                   → llm/layers_{i}/mlp/gate_up_proj [d 2 f]
    (dino|siglip)/…/MultiHeadDotProductAttention_0/{query,key,value} [d h c] → …/qkv [d 3 h c]

A stack of layers is copied out of at every step of a loop, and XLA joins products of one input by joining their weights
at every call: for 7 billion parameters 6.7 of 31.5 GB moved. Laid out once, when a policy is loaded, neither happens.
"""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

LAYOUT = {"scan": False, "scan_encoders": False, "fused": True}  # the fields of a model config that say so
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


def lay_out(flat: dict[str, Any]) -> dict:
  """A policy's parameters, without adapters → those of the model with `LAYOUT`, bit for bit.

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
