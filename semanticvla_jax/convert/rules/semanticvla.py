"""Rules of the whole model: openvla-7b, OpenVLA-OFT and SemanticVLA state dicts under one set of canonical keys."""

from __future__ import annotations

import re

from semanticvla_jax.convert.rules import llama, text, vit
from semanticvla_jax.convert.rules.engine import Rule, prefixed, with_lora
from semanticvla_jax.convert.rules.vit import dense, norm
from semanticvla_jax.models.semanticvla import SemanticVLA

HEADS = {"trans": "model_trans", "rot": "model_rot", "grip": "model_grip", "all": "model"}  # of our coupler: theirs
# The same weight has several names in the wild; each line undoes one habit, in this order.
RENAMES = (
  (r"^module\.", ""),  # DistributedDataParallel
  (r"^base_model\.model\.", ""),  # peft
  (r"^(action_head|proprio_projector)\.module\.", r"\1."),
  (r"\.base_layer\.", "."),  # peft, around an adapted layer
  (r"\.lora_([AB])\.default\.", r".lora_\1."),
  (r"^(vision_backbone\.)+", ""),  # the backbone, once and wrapped
  (r"(blocks\.\d+)\.block\.", r"\1."),  # the FiLM wrapper
  (r"\.(ls[12])\.scale_factor$", r".\1.gamma"),  # openvla's LayerScale patch
)


def canonical(key: str) -> str:
  """A state-dict key without the wrappers around it, e.g. "featurizer.blocks.0.attn.qkv.lora_A.weight"."""
  for pattern, replacement in RENAMES:
    key = re.sub(pattern, replacement, key)
  return key


def _head(target: str, source: str) -> list[Rule]:
  blocks = "mlp_resnet_blocks.{}.ffn.{}"
  return prefixed(
    [
      *norm("norm_in", "layer_norm1"),
      *dense("in", "fc1"),
      *(r for i in range(2) for r in norm(f"block_{i}_norm", blocks.format(i, 0))),
      *(r for i in range(2) for r in dense(f"block_{i}", blocks.format(i, 1))),
      *norm("norm_out", "layer_norm2"),
      *dense("out", "fc2"),
    ],
    target,
    source,
  )


def rules(pairs: int = 0, lora: bool = False) -> list[Rule]:
  """Canonical keys → our tree. `pairs`: of the Dense-Fuser; `lora`: with adapters on every linear layer of the base."""
  base = [
    *prefixed(vit.timm(), "dino/", "featurizer."),
    *prefixed(vit.timm(), "siglip/", "fused_featurizer."),
    *prefixed(llama.hf_llama(), "llm/", "language_model."),
    *(r for i in range(3) for r in dense(f"sparse_fuser/projector/Dense_{i}", f"projector.fc{i + 1}")),
  ]
  base = with_lora(base) if lora else base
  for encoder, source in (("dino", "featurizer"), ("siglip", "fused_featurizer")):
    base += [
      r
      for i in range(2)
      for r in dense(f"sparse_fuser/{encoder}_cue_projector/Dense_{i}", f"{source}_sampler_proj.fc{i + 1}")
    ]
    base += [
      r
      for i in range(2)
      for r in dense(
        f"{encoder}_id_pruner/text_projector/Dense_{i}", f"{source}_mm_sampler.text_post_projector.{2 * i}"
      )
    ]
  base += prefixed(text.hf_siglip_text(), "text/", "fused_featurizer_mm_sampler.text_encoder.text_model.")
  base += [Rule("dino_sa_pruner/queries", "vision_queries"), Rule("siglip_sa_pruner/queries", "vision_queries_fused")]
  for p in range(pairs):
    for v, which in enumerate(("first", "second")):
      base += [
        r
        for i in range(2)
        for r in dense(f"dense_fuser/pair_{p}_{which}/Dense_{i}", f"cross_vit_model.aggregate_proj.{2 * p + v}.{2 * i}")
      ]
  base += [r for i in range(2) for r in dense(f"proprio_projector/Dense_{i}", f"proprio_projector.fc{i + 1}")]
  for group, source in HEADS.items():
    base += _head(f"coupler/{group}/", f"action_head.{source}.")
  return base


def rules_for(model: SemanticVLA, lora: bool = False) -> list[Rule]:
  return rules(0 if model.dense_fuser is None else len(model.dense_fuser.pairs), lora)


def unused(model: SemanticVLA) -> dict[str, str]:
  """Weights of the released checkpoints that this model does not read, each with the reason."""
  out = {
    r"(fused_)?featurizer\.norm\..*": "final LayerNorm: the encoders' states are taken before it",
    r"fused_featurizer\.attn_pool\..*": "SigLIP's pooling head: tokens are used, not the pooled vector",
    r".*text_encoder\.text_model\.head\..*": "SigLIP's text pooling head: the token sequence is used",
    r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed, not learned",
  }
  if model.coupler is not None:
    out[r"language_model\.lm_head\..*"] = "next-token logits: actions come from the coupler"
  if model.vision_layer == "second_to_last":
    for source, encoder in (("featurizer", model.dino), ("fused_featurizer", model.siglip)):
      last = encoder.depth - 1
      out[rf"{source}\.blocks\.{last}\..*"] = "last block: states are taken before it"
  return out
