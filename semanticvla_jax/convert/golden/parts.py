"""Single parts: the towers and the decoder alone, the ID-Pruner, the two encoders with their Dense-Fuser."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from safetensors.flax import load_file

from semanticvla_jax.convert import llama, semanticvla, table, text, vit
from semanticvla_jax.convert.golden.files import (
  Pair,
  fit,
  hidden_states,
  llama_sizes,
  load,
  pixels_of,
  text_sizes,
  vit_sizes,
)
from semanticvla_jax.models import masks
from semanticvla_jax.models.llama import Llama
from semanticvla_jax.models.pruner import IDPruner
from semanticvla_jax.models.semanticvla import SemanticVLA, build
from semanticvla_jax.models.text import TextEncoder
from semanticvla_jax.models.vit import Transformer, ViT, layer_norm

TEXT_PAD = 1


def backbones(folder: Path, config: dict) -> Iterator[Pair]:
  c = config["config"]
  for name in ("dino", "siglip"):
    yield from _tower(folder, name, c[name])
  yield from _text_tower(folder, c["text"])
  yield from _decoder(folder, c["llama"], config["parts"]["llama"])
  yield from _norms(folder, config)


def _part(folder: Path, name: str) -> tuple[dict, dict, dict]:
  return tuple(load_file(folder / f"{name}_{what}.safetensors") for what in ("weights", "inputs", "outputs"))


def _tower(folder: Path, name: str, c: dict) -> Iterator[Pair]:
  weights, inputs, outputs = _part(folder, name)
  model = ViT(c["img"], c["patch"], **vit_sizes(c, name == "dino"))
  pixels = rearrange(inputs["pixel_values"], "b c h w -> b h w c")
  pooled = "attn_pool_output" in outputs

  def forward(module, pixels):
    x, blocks = module.embed(pixels), []
    for i in range(module.depth):
      x, _ = module.run(x, i, i + 1)
      blocks.append(x)
    normed = module.norm(x)
    return jnp.stack(blocks), normed, module.MAPHead_0(normed) if pooled else None

  params = fit(vit.timm(), {}, weights, lambda: model.init(jax.random.key(0), pixels, method=forward))
  blocks, normed, head = model.apply({"params": params}, pixels, method=forward)
  ours = {
    "all_blocks": blocks,
    "penultimate_patches": model.patches(blocks[-2]),
    "last_patches": model.patches(blocks[-1]),
    "last_patches_normed": model.patches(normed),
    "forward_features": normed,
    "attn_pool_output": head,
  }
  yield from ((f"{name}/{key}", ours[key], x) for key, x in outputs.items())


def _text_tower(folder: Path, c: dict) -> Iterator[Pair]:
  weights, inputs, outputs = _part(folder, "text")
  model = TextEncoder(**text_sizes(c))
  rules = table.prefixed(text.hf_siglip_text(), "", "text_model.")

  def forward(module, ids, mask):
    states = module(ids, mask)
    return states, module.pooled(states)

  def run(mask):
    return model.apply({"params": params}, inputs["input_ids"], mask, method=forward)

  params = fit(rules, {}, weights, lambda: model.init(jax.random.key(0), inputs["input_ids"], None, method=forward))
  ours = dict(zip(("last_hidden_state", "pooler_output"), run(inputs["attention_mask"].astype(bool))))
  ours |= dict(zip(("last_hidden_state_nomask", "pooler_output_nomask"), run(None)))
  yield from ((f"text/{key}", ours[key], x) for key, x in outputs.items())


def _decoder(folder: Path, c: dict, llama_config: dict) -> Iterator[Pair]:
  weights, inputs, outputs = _part(folder, "llama")
  valid = inputs["attention_mask"].astype(bool)
  allowed = masks.attention_mask(jnp.asarray(valid), jnp.zeros(valid.shape[1], bool), "causal")

  def forward(module, ids):
    x = module.embed_tokens(ids)
    hidden, _ = module(x, masks.positions(jnp.asarray(valid)), allowed)
    return x, hidden, module.logits(hidden)

  ids = inputs["input_ids"]
  for scan in (True, False):
    model = Llama(**llama_sizes(c, llama_config), scan=scan)
    init = functools.partial(model.init, jax.random.key(0), ids, method=forward)
    params = fit(llama.hf_llama(), llama.UNUSED, weights, init)
    (x, hidden, logits), sown = model.apply({"params": params}, ids, method=forward, mutable=["intermediates"])
    states = hidden_states(x, hidden, sown["intermediates"], scan)
    suffix = "" if scan else " (unrolled)"
    yield f"llama/logits{suffix}", logits[valid], outputs["logits"][valid]
    yield f"llama/hidden_states{suffix}", states[:, valid], outputs["hidden_states"][:, valid]


def _norms(folder: Path, config: dict) -> Iterator[Pair]:
  """Norm layers on inputs whose variance is near epsilon, which show a wrong epsilon (elsewhere it averages out)."""
  inputs, outputs = (load_file(folder / f"norm_eps_probe_{what}.safetensors") for what in ("inputs", "outputs"))
  weights = {name: load_file(folder / f"{name}_weights.safetensors") for name in ("dino", "siglip", "text", "llama")}
  eps = config["parts"]["llama"]["rms_norm_eps"]
  for key, x in inputs.items():
    part, name = key.split(".", 1)
    if part == "llama":
      module = Llama(vocab=1, width=x.shape[-1], depth=1, num_heads=1, mlp_dim=1, eps=eps)
      params, method = {"norm": {"scale": weights[part][f"{name}.weight"]}}, lambda module, x: module.norm(x)
    else:
      module, method = layer_norm(), None
      params = {"scale": weights[part][f"{name}.weight"], "bias": weights[part][f"{name}.bias"]}
    ours = module.apply({"params": params}, x, method=method)
    yield f"norm_eps_probe/{key}", ours, outputs[key]


def id_pruner(folder: Path, config: dict) -> Iterator[Pair]:
  weights, inputs, outputs = (load_file(folder / f"{what}.safetensors") for what in ("weights", "inputs", "outputs"))
  for name, case in config["cases"].items():
    given = {k.split(".", 1)[1]: x for k, x in inputs.items() if k.split(".", 1)[0] == name}
    stored = {k.split(".", 1)[1]: x for k, x in outputs.items() if k.split(".", 1)[0] == name}
    pruner = IDPruner(case["vision_topk"], case["text_topk"], case["temp"])
    patches, mask = given["vision_embedding"], given["attention_mask"].astype(bool)
    ours: dict[str, Any] = {}
    if "text_config" in case:
      ours["text_last_hidden_state"], ours["text_projected"] = _project_text(weights, name, case, patches, given)
    words = ours.get("text_projected", given.get("text_embedding"))
    pruned = pruner.select(patches, words, mask, given.get("noise_standard_normal") if case["training"] else None)
    tokens = [pruned.anchors] if pruned.cues is None else [pruned.cues, pruned.anchors]
    ours |= dict(
      similarity=pruned.similarity,
      vision_topk_indices=pruned.kept,
      text_topk_indices=pruned.salient,
      text_guided_tokens=pruned.cues,
      vision_selected_tokens=pruned.anchors,
      output=jnp.concatenate(tokens, axis=1),
    )
    yield from ((f"{name}.{key}", ours[key], x) for key, x in stored.items())


def _project_text(weights: dict, name: str, case: dict, patches, given: dict) -> tuple[jax.Array, jax.Array]:
  """States of the text tower, and the same through the pruner's text projector."""
  encoder, pruner = TextEncoder(**text_sizes(case["text_config"])), IDPruner(case["vision_topk"], case["text_topk"])
  ids, mask = given["text_ids"], given["text_ids"] != case.get("pad_token_id", TEXT_PAD)
  own = {k.removeprefix(f"{name}."): x for k, x in weights.items() if k.startswith(f"{name}.")}
  is_tower = {k: k.startswith("text_encoder.") for k in own}
  states = encoder.apply(
    {
      "params": fit(
        table.prefixed(text.hf_siglip_text(), "", "text_encoder.text_model."),
        {r".*\.head\..*": "pooling head"},
        {k: x for k, x in own.items() if is_tower[k]},
        lambda: encoder.init(jax.random.key(0), ids, mask),
      )
    },
    ids,
    mask,
  )
  rules = [r for i in range(2) for r in vit.dense(f"text_projector/Dense_{i}", f"text_post_projector.{2 * i}")]
  params = fit(
    rules,
    {},
    {k: x for k, x in own.items() if not is_tower[k]},
    lambda: pruner.init(jax.random.key(0), patches, states, mask),
  )
  _, seen = pruner.apply({"params": params}, patches, states, mask, capture_intermediates=True)
  return states, seen["intermediates"]["text_projector"]["__call__"][0]


def dense_fuser(folder: Path, config: dict) -> Iterator[Pair]:
  for name, case in config["cases"].items():
    files = {w: case[w] if isinstance(case[w], str) else f"{name}_{w}.safetensors" for w in ("weights", "inputs")}
    inputs, stored = load_file(folder / files["inputs"]), load_file(folder / f"{name}_outputs.safetensors")
    yield from (
      (f"{name}/{key}", ours, stored[key]) for key, ours in _encode(folder, files["weights"], inputs, config, case)
    )


def _encode(folder: Path, weights: str, inputs: dict, config: dict, case: dict) -> Iterator[tuple[str, Any]]:
  c, names = config["config"], ("dino", "siglip")
  flags = dict(zip(names, (case["featurizer_cfg"], case["fused_featurizer_cfg"])))
  variant = dict(
    image=c["img"],
    patch=c["patch"],
    pairs=tuple(map(tuple, c["pairs"])),
    dino=vit_sizes(c["dino"], True),
    siglip=vit_sizes(c["siglip"], False),
    text=None,
    llm=dict(vocab=1, width=c["llm_dim"], depth=1, num_heads=1, mlp_dim=1),
  )
  model = build(
    dict(
      variant=variant,
      keep=c["queries"],
      num_views=1,
      film=tuple(n for n in names if flags[n]["use_film"]),
      dino_pruner="sa" if flags["dino"]["use_reg"] else None,
      siglip_pruner="sa" if flags["siglip"]["use_reg"] else None,
      dense_fuser="variant" if case["cross"] else None,
      vision_layer="last" if case["cross"] else "second_to_last",
    )
  )
  pixels = pixels_of(inputs["pixel_values"])
  condition = inputs["language_embeddings"].mean(axis=1)
  not_here = {r"vision_queries.*|.*\.(scale|shift)\..*|cross_vit_model\..*": "off in this case"}
  unused = semanticvla.unused(model) | ({} if name_is_full(case) else not_here)
  params = fit(
    semanticvla.rules_for(model),
    unused,
    load(folder, weights),
    lambda: model.init(jax.random.key(0), pixels, condition, method="encode"),
  )

  def every_block(module, method):  # the inputs and outputs of single blocks, for looking at
    return (
      method == "__call__" and module.name is not None and module.name.startswith("encoderblock_")
    ) or method == "embed"

  seen, inner = model.apply(
    {"params": params}, pixels, condition, method="encode", capture_intermediates=every_block, mutable=["intermediates"]
  )
  yield "film.mean", condition
  for v, (name, source) in enumerate(zip(names, ("patches", "patches_fused"))):
    captured = inner["intermediates"][name]
    yield f"vit{v}.input", captured["embed"][0]
    x = None
    for i in range(variant[name]["depth"]):
      block = captured["Transformer"].get(f"encoderblock_{i}")
      x = _extra_block(folder, weights, model, name, i, x, condition) if block is None else block["__call__"][0][0]
      yield f"vit{v}.block{i}", x
    for p in range(len(variant["pairs"]) if case["cross"] else 0):
      yield f"vit{v}.after_pair{p}", seen[f"{name}_after_pair_{p}"]
    yield source, seen[f"{name}_aggregated" if flags[name]["use_reg"] else f"{name}_patches"]


def name_is_full(case: dict) -> bool:
  """Whether a dense_fuser case uses all of the weights it names."""
  return not isinstance(case["weights"], str)


def _extra_block(folder: Path, weights: str, model: SemanticVLA, name: str, i: int, x, condition):
  """The block behind the one whose states the model takes; the reference computed it too."""
  tower = getattr(model, name)
  blocks = Transformer(tower.depth, tower.num_heads, tower.mlp_dim, tower.gelu, tower.layer_scale)
  condition = condition if name in model.film else None
  source = {"dino": "featurizer.", "siglip": "fused_featurizer."}[name]
  own = {k.removeprefix(source): w for k, w in load(folder, weights).items() if k.startswith(f"{source}blocks.{i}.")}
  params = fit(
    [dataclasses.replace(rule, target=rule.target.removeprefix("Transformer/")) for rule in vit.timm()],
    {r".*\.(scale|shift)\..*": "off in this case"} if condition is None else {},
    own,
    lambda: blocks.init(jax.random.key(0), x, i, i + 1, condition),
  )
  return blocks.apply({"params": params}, x, i, i + 1, condition)[0]
