"""Rules of Llama-2 (transformers' LlamaForCausalLM), into either layout of models/llama.py."""

from __future__ import annotations

from semanticvla_jax.convert.rules.engine import Rule


def hf_llama() -> list[Rule]:
  rules = [
    Rule("embed/embedding", "model.embed_tokens.weight"),
    Rule("norm/scale", "model.norm.weight"),
    Rule("lm_head/kernel", "lm_head.weight", "o i -> i o"),
  ]
  layer = "model.layers.{i}"
  for ours in ("layers", "layers_{i}"):
    rules += [
      *(Rule(f"{ours}/attn/{x}_proj/kernel", f"{layer}.self_attn.{x}_proj.weight", "(h c) d -> d h c") for x in "qkv"),
      Rule(f"{ours}/attn/o_proj/kernel", f"{layer}.self_attn.o_proj.weight", "d (h c) -> h c d"),
      *(
        Rule(f"{ours}/mlp/{x}_proj/kernel", f"{layer}.mlp.{x}_proj.weight", "o i -> i o")
        for x in ("gate", "up", "down")
      ),
      Rule(f"{ours}/input_norm/scale", f"{layer}.input_layernorm.weight"),
      Rule(f"{ours}/post_attention_norm/scale", f"{layer}.post_attention_layernorm.weight"),
    ]
  return rules


UNUSED = {r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed, not learned"}
