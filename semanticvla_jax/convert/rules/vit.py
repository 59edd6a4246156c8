"""Rules of the image encoders: names of timm (openvla-7b), Hugging Face and big_vision; targets are models/vit.py's."""

from __future__ import annotations

from semanticvla_jax.convert.rules.engine import Rule

QKV = ("query", "key", "value")


def norm(target: str, source: str) -> list[Rule]:
  """A LayerNorm: scale and bias."""
  return [Rule(f"{target}/scale", f"{source}.weight"), Rule(f"{target}/bias", f"{source}.bias")]


def dense(target: str, source: str) -> list[Rule]:
  """A linear layer with bias."""
  return [Rule(f"{target}/kernel", f"{source}.weight", "o i -> i o"), Rule(f"{target}/bias", f"{source}.bias")]


def heads(target: str, source: str) -> list[Rule]:
  """A linear layer into heads (q, k or v)."""
  return [
    Rule(f"{target}/kernel", f"{source}.weight", "(h c) d -> d h c"),
    Rule(f"{target}/bias", f"{source}.bias", "(h c) -> h c"),
  ]


def merge_heads(target: str, source: str) -> list[Rule]:
  """A linear layer out of heads (the output projection)."""
  return [Rule(f"{target}/kernel", f"{source}.weight", "d (h c) -> h c d"), Rule(f"{target}/bias", f"{source}.bias")]


def fused_heads(target: str, weight: str, bias: str, names: tuple[str, ...]) -> list[Rule]:
  """A fused matrix that holds `names` one after the other."""
  rules = []
  for i, name in enumerate(names):
    part = (i, len(names))
    rules.append(Rule(f"{target}/{name}/kernel", weight, "(t h c) d -> t d h c", part))
    rules.append(Rule(f"{target}/{name}/bias", bias, "(t h c) -> t h c", part))
  return rules


ATTENTION = "MultiHeadDotProductAttention_0"


def timm() -> list[Rule]:
  """timm's VisionTransformer; FiLM next to each block as in the released wrapper; LayerScale as `ls{1,2}.gamma`."""
  block, ours = "blocks.{i}", "Transformer/encoderblock_{i}"
  return [
    Rule("embedding/kernel", "patch_embed.proj.weight", "d c p q -> p q c d"),
    Rule("embedding/bias", "patch_embed.proj.bias"),
    Rule("pos_embedding", "pos_embed"),
    Rule("cls", "cls_token"),
    Rule("reg", "reg_token"),
    *norm(f"{ours}/LayerNorm_0", f"{block}.norm1"),
    *fused_heads(f"{ours}/{ATTENTION}", f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias", QKV),
    *merge_heads(f"{ours}/{ATTENTION}/out", f"{block}.attn.proj"),
    Rule(f"{ours}/ls1", f"{block}.ls1.gamma"),
    *norm(f"{ours}/LayerNorm_1", f"{block}.norm2"),
    *dense(f"{ours}/MlpBlock_0/Dense_0", f"{block}.mlp.fc1"),
    *dense(f"{ours}/MlpBlock_0/Dense_1", f"{block}.mlp.fc2"),
    Rule(f"{ours}/ls2", f"{block}.ls2.gamma"),
    *dense(f"{ours}/film/scale", f"{block}.scale"),
    *dense(f"{ours}/film/shift", f"{block}.shift"),
    *norm("Transformer/encoder_norm", "norm"),
    Rule("MAPHead_0/probe", "attn_pool.latent"),
    *heads(f"MAPHead_0/{ATTENTION}/query", "attn_pool.q"),
    *fused_heads(f"MAPHead_0/{ATTENTION}", "attn_pool.kv.weight", "attn_pool.kv.bias", QKV[1:]),
    *merge_heads(f"MAPHead_0/{ATTENTION}/out", "attn_pool.proj"),
    *norm("MAPHead_0/LayerNorm_0", "attn_pool.norm"),
    *dense("MAPHead_0/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1"),
    *dense("MAPHead_0/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2"),
  ]


def hf_encoder_layers(source: str, ours: str) -> list[Rule]:
  """The transformer layers of Hugging Face's SigLIP, image and text alike."""
  return [
    *norm(f"{ours}/LayerNorm_0", f"{source}.layer_norm1"),
    *(
      r for name, key in zip(QKV, "qkv") for r in heads(f"{ours}/{ATTENTION}/{name}", f"{source}.self_attn.{key}_proj")
    ),
    *merge_heads(f"{ours}/{ATTENTION}/out", f"{source}.self_attn.out_proj"),
    *norm(f"{ours}/LayerNorm_1", f"{source}.layer_norm2"),
    *dense(f"{ours}/MlpBlock_0/Dense_0", f"{source}.mlp.fc1"),
    *dense(f"{ours}/MlpBlock_0/Dense_1", f"{source}.mlp.fc2"),
  ]


def hf_siglip() -> list[Rule]:
  """transformers' SiglipVisionModel, keys without a leading `vision_model.`."""
  pool = f"MAPHead_0/{ATTENTION}"
  return [
    Rule("embedding/kernel", "embeddings.patch_embedding.weight", "d c p q -> p q c d"),
    Rule("embedding/bias", "embeddings.patch_embedding.bias"),
    Rule("pos_embedding", "embeddings.position_embedding.weight", "n d -> 1 n d"),
    *hf_encoder_layers("encoder.layers.{i}", "Transformer/encoderblock_{i}"),
    *norm("Transformer/encoder_norm", "post_layernorm"),
    Rule("MAPHead_0/probe", "head.probe"),
    *fused_heads(pool, "head.attention.in_proj_weight", "head.attention.in_proj_bias", QKV),
    *merge_heads(f"{pool}/out", "head.attention.out_proj"),
    *norm("MAPHead_0/LayerNorm_0", "head.layernorm"),
    *dense("MAPHead_0/MlpBlock_0/Dense_0", "head.mlp.fc1"),
    *dense("MAPHead_0/MlpBlock_0/Dense_1", "head.mlp.fc2"),
  ]


def hf_dinov2() -> list[Rule]:
  """transformers' Dinov2WithRegistersModel, keys through `canonical_dinov2`.

  Its class token carries a position embedding, which ours adds for good.
  """
  layer, ours = "encoder.layer.{i}", "Transformer/encoderblock_{i}"
  position = "embeddings.position_embeddings"
  return [
    Rule("embedding/kernel", "embeddings.patch_embeddings.projection.weight", "d c p q -> p q c d"),
    Rule("embedding/bias", "embeddings.patch_embeddings.projection.bias"),
    Rule("pos_embedding", position, combine=lambda x: x[:, 1:], shared=True),
    Rule("cls", ("embeddings.cls_token", position), combine=lambda cls, x: cls + x[:, :1], shared=True),
    Rule("reg", "embeddings.register_tokens"),
    *norm(f"{ours}/LayerNorm_0", f"{layer}.norm1"),
    *(r for name, key in zip(QKV, "qkv") for r in heads(f"{ours}/{ATTENTION}/{name}", f"{layer}.attention.{key}_proj")),
    *merge_heads(f"{ours}/{ATTENTION}/out", f"{layer}.attention.o_proj"),
    Rule(f"{ours}/ls1", f"{layer}.layer_scale1.lambda1"),
    *norm(f"{ours}/LayerNorm_1", f"{layer}.norm2"),
    *dense(f"{ours}/MlpBlock_0/Dense_0", f"{layer}.mlp.fc1"),
    *dense(f"{ours}/MlpBlock_0/Dense_1", f"{layer}.mlp.fc2"),
    Rule(f"{ours}/ls2", f"{layer}.layer_scale2.lambda1"),
    *norm("Transformer/encoder_norm", "layernorm"),
  ]


def canonical_dinov2(key: str) -> str:
  """Names of released files (transformers before 5) as transformers 5 calls them."""
  for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
    key = key.replace(f".attention.attention.{old}.", f".attention.{new}.")
  return key.replace(".attention.output.dense.", ".attention.o_proj.")


HF_DINOV2_UNUSED = {r"embeddings\.mask_token": "masked-image pre-training only"}
