"""The names and layouts of towers → those of transformers' classes, written out apart from the conversion rules.

A rule that is wrong must not vouch for itself, so nothing here comes from rules/.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

State = dict[str, Any]  # tensors of PyTorch by name


def siglip_from_timm(state: State) -> State:
  """timm's names of a SigLIP image tower → those of transformers' SiglipVisionModel."""
  renames = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.{}_proj."),
    (r"blocks\.(\d+)\.", r"encoder.layers.\1."),
  )
  out = _renamed(state, renames)
  if "pos_embed" in out:
    out["embeddings.position_embedding.weight"] = out.pop("pos_embed")[0]
  return out


def dinov2_from_timm(state: State) -> State:
  """timm's names of a DINOv2 with registers → those of transformers' Dinov2WithRegistersModel."""
  import torch

  renames = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.register_tokens"),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.o_proj."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layer.\1.attention.{}_proj."),
    (r"blocks\.(\d+)\.ls(\d)\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.", r"encoder.layer.\1."),
  )
  out = _renamed(state, renames)
  if "pos_embed" in out:
    positions = out.pop("pos_embed")
    none = torch.zeros_like(positions[:, :1])  # timm adds no position to the class token
    out["embeddings.position_embeddings"] = torch.cat([none, positions], dim=1)
    out["embeddings.mask_token"] = none[0]
  return out


def _renamed(state: State, renames: Sequence[tuple[str, str]]) -> State:
  """New names; a name with "{}" is that of a fused q, k, v, which is split."""
  out = {}
  for key, x in state.items():
    for pattern, name in renames:
      if re.match(pattern, key):
        key = re.sub(f"^{pattern}", name, key)
        break
    if "{}" in key:
      out |= {key.format(name): part for name, part in zip("qkv", x.chunk(3))}
    else:
      out[key] = x
  return out


def from_big_vision(state: State) -> State:
  """big_vision's names and layouts of either SigLIP tower → those of transformers' classes."""
  attention = "MultiHeadDotProductAttention_0"
  renames = (
    (r"(Transformer|Encoder_0)/encoderblock_(\d+)/", r"encoder.layers.\2."),
    ("LayerNorm_0", "layer_norm1"),
    ("LayerNorm_1", "layer_norm2"),
    (r"MlpBlock_0/Dense_0", "mlp.fc1"),
    (r"MlpBlock_0/Dense_1", "mlp.fc2"),
    ("Transformer/encoder_norm", "post_layernorm"),
    ("Encoder_0/encoder_norm", "final_layer_norm"),
    ("^embedding/", "embeddings.patch_embedding/"),
    ("^Embed_0/embedding", "embeddings.token_embedding.weight"),
    ("^pos_embedding", "embeddings.position_embedding.weight"),
    (f"{attention}/(query|key|value)/", lambda m: f"self_attn.{m[1][0]}_proj."),
    (f"{attention}/out/", "self_attn.out_proj."),
    (r"[./](kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
  )
  out = {}
  for key, x in state.items():
    name = key
    for pattern, new in renames:
      name = re.sub(pattern, new, name)
    if key.endswith("kernel"):
      out_proj = key.endswith("out/kernel")
      x = x.permute(3, 2, 0, 1) if x.ndim == 4 else (x.flatten(0, 1) if out_proj else x.flatten(1)).T
    elif "embeddings.position" in name:
      x = x[0]
    elif attention in key:
      x = x.flatten()
    out[name] = x
  return out
