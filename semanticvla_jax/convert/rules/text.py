"""Rules of SigLIP's text tower (transformers' SiglipTextModel, keys without a leading `text_model.`)."""

from __future__ import annotations

from semanticvla_jax.convert.rules.engine import Rule
from semanticvla_jax.convert.rules.vit import dense, hf_encoder_layers, norm


def hf_siglip_text() -> list[Rule]:
  return [
    Rule("Embed_0/embedding", "embeddings.token_embedding.weight"),
    Rule("pos_embedding", "embeddings.position_embedding.weight", "n d -> 1 n d"),
    *hf_encoder_layers("encoder.layers.{i}", "Encoder_0/encoderblock_{i}"),
    *norm("Encoder_0/encoder_norm", "final_layer_norm"),
    *dense("head", "head"),
  ]
