"""Single parts: the towers and the decoder alone, the ID-Pruner, the two encoders with their Dense-Fuser."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from semanticvla_jax.convert.check.golden.fixtures import (
  ENCODERS,
  Ids,
  Pair,
  arrays,
  encoder_fields,
  fit,
  hidden_states,
  llama_sizes,
  load,
  pairs_of,
  pixels_of,
  stored,
  tensors,
  text_sizes,
  vit_sizes,
)
from semanticvla_jax.convert.rules import engine, llama, semanticvla, text, vit
from semanticvla_jax.models import masks
from semanticvla_jax.models.llama import Llama
from semanticvla_jax.models.pruner import IDPruner
from semanticvla_jax.models.semanticvla import DEFAULTS, SemanticVLA, build
from semanticvla_jax.models.text import TextEncoder
from semanticvla_jax.models.vit import Transformer, ViT, layer_norm


def backbones(folder: Path, config: dict) -> Iterator[Pair]:
  c = config["config"]
  for name in ENCODERS:
    yield from _tower(folder, name, c[name])
  yield from _text_tower(folder, c["text"])
  yield from _decoder(folder, c["llama"], config["parts"]["llama"])
  yield from _norms(folder, config)


def _part(folder: Path, name: str) -> tuple[dict, dict, dict]:
  weights, outputs = (tensors(folder / f"{name}_{what}.safetensors") for what in ("weights", "outputs"))
  return weights, arrays(folder / f"{name}_inputs.safetensors"), outputs


def _tower(folder: Path, name: str, c: dict) -> Iterator[Pair]:
  weights, inputs, outputs = _part(folder, name)
  model = ViT(c["img"], c["patch"], **vit_sizes(c, weights))
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
  blocks, normed, head = jax.jit(lambda p, x: model.apply({"params": p}, x, method=forward))(params, pixels)
  ours = {
    "all_blocks": blocks,
    "penultimate_patches": model.patches(blocks[-2]),
    "last_patches": model.patches(blocks[-1]),
    "last_patches_normed": model.patches(normed),
    "forward_features": normed,
    "attn_pool_output": head,
  }
  yield from stored(f"{name}/", ours, outputs)


def _text_tower(folder: Path, c: dict) -> Iterator[Pair]:
  weights, inputs, outputs = _part(folder, "text")
  model = TextEncoder(**text_sizes(c))
  rules = engine.prefixed(text.hf_siglip_text(), "", "text_model.")

  def forward(module, ids, mask):
    states = module(ids, mask)
    return states, module.pooled(states)

  @jax.jit
  def run(mask):
    return model.apply({"params": params}, inputs["input_ids"], mask, method=forward)

  params = fit(rules, {}, weights, lambda: model.init(jax.random.key(0), inputs["input_ids"], None, method=forward))
  ours = dict(zip(("last_hidden_state", "pooler_output"), run(inputs["attention_mask"].astype(bool))))
  ours |= dict(zip(("last_hidden_state_nomask", "pooler_output_nomask"), run(None)))
  yield from stored("text/", ours, outputs)


def _decoder(folder: Path, c: dict, llama_config: dict) -> Iterator[Pair]:
  weights, inputs, outputs = _part(folder, "llama")
  valid = inputs["attention_mask"].astype(bool)
  allowed = masks.attention_mask(valid, jnp.zeros(valid.shape[1], bool), "causal")

  def forward(module, ids):
    x = module.embed_tokens(ids)
    hidden, _ = module(x, masks.positions(valid), allowed)
    return x, hidden, module.logits(hidden)

  ids = inputs["input_ids"]
  for scan in (True, False):
    model = Llama(**llama_sizes(c, llama_config), scan=scan)
    init = functools.partial(model.init, jax.random.key(0), ids, method=forward)
    params = fit(llama.hf_llama(), llama.UNUSED, weights, init)
    run = functools.partial(model.apply, method=forward, mutable=["intermediates"])
    (x, hidden, logits), sown = jax.jit(run)({"params": params}, ids)
    states = np.asarray(hidden_states(x, hidden, sown["intermediates"], scan))
    suffix, real = "" if scan else " (unrolled)", np.asarray(valid)
    yield f"llama/logits{suffix}", np.asarray(logits)[real], outputs["logits"][real]
    yield f"llama/hidden_states{suffix}", states[:, real], outputs["hidden_states"][:, real]


def _norms(folder: Path, config: dict) -> Iterator[Pair]:
  """Norm layers on inputs whose variance is near epsilon, which show a wrong epsilon (elsewhere it averages out)."""
  inputs, outputs = (arrays(folder / f"norm_eps_probe_{what}.safetensors") for what in ("inputs", "outputs"))
  weights = {name: tensors(folder / f"{name}_weights.safetensors") for name in (*ENCODERS, "text", "llama")}
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


def _pruner(case: dict) -> IDPruner:
  fields = dict(keep=case["vision_topk"], cues=case["text_topk"], temperature=case["temp"])
  return IDPruner.from_config(DEFAULTS | fields, width=0, name="siglip_id_pruner")


def id_pruner(folder: Path, config: dict) -> Iterator[Pair]:
  weights, outputs = (tensors(folder / f"{what}.safetensors") for what in ("weights", "outputs"))
  inputs = arrays(folder / "inputs.safetensors")
  for name, case in config["cases"].items():
    given = {k.split(".", 1)[1]: x for k, x in inputs.items() if k.split(".", 1)[0] == name}
    theirs = {k.split(".", 1)[1]: x for k, x in outputs.items() if k.split(".", 1)[0] == name}
    pruner = _pruner(case)
    patches, mask = given["vision_embedding"], given["attention_mask"].astype(bool)
    ours: dict[str, Any] = {}
    if "text_config" in case:
      ours["text_last_hidden_state"], ours["text_projected"] = _project_text(weights, name, case, patches, given)
    words = ours.get("text_projected", given.get("text_embedding"))
    noise = given.get("noise_standard_normal") if case["training"] else None
    pruned = jax.jit(pruner.select)(patches, words, mask, noise)
    tokens = [pruned.anchors] if pruned.cues is None else [pruned.cues, pruned.anchors]
    ours |= dict(
      similarity=pruned.similarity,
      vision_topk_indices=pruned.kept,
      text_topk_indices=pruned.salient,
      text_guided_tokens=pruned.cues,
      vision_selected_tokens=pruned.anchors,
      output=jnp.concatenate(tokens, axis=1),
    )
    yield from stored(f"{name}.", ours, theirs)


def _project_text(weights: dict, name: str, case: dict, patches, given: dict) -> tuple[jax.Array, jax.Array]:
  """States of the text tower, and the same through the pruner's text projector."""
  encoder, pruner = TextEncoder(**text_sizes(case["text_config"])), _pruner(case)
  ids, mask = given["text_ids"], given["text_ids"] != case.get("pad_token_id", Ids().text_pad)
  own = {k.removeprefix(f"{name}."): x for k, x in weights.items() if k.startswith(f"{name}.")}
  is_tower = {k: k.startswith("text_encoder.") for k in own}
  params = fit(
    engine.prefixed(text.hf_siglip_text(), "", "text_encoder.text_model."),
    {r".*\.head\..*": "pooling head"},
    {k: x for k, x in own.items() if is_tower[k]},
    lambda: encoder.init(jax.random.key(0), ids, mask),
  )
  states = jax.jit(encoder.apply)({"params": params}, ids, mask)
  rules = [r for i in range(2) for r in vit.dense(f"text_projector/Dense_{i}", f"text_post_projector.{2 * i}")]
  params = fit(
    rules,
    {},
    {k: x for k, x in own.items() if not is_tower[k]},
    lambda: pruner.init(jax.random.key(0), patches, states, mask),
  )
  run = functools.partial(pruner.apply, capture_intermediates=True)
  _, seen = jax.jit(run)({"params": params}, patches, states, mask)
  return states, seen["intermediates"]["text_projector"]["__call__"][0]


def dense_fuser(folder: Path, config: dict) -> Iterator[Pair]:
  for name, case in config["cases"].items():
    files = {w: case[w] if isinstance(case[w], str) else f"{name}_{w}.safetensors" for w in ("weights", "inputs")}
    inputs, theirs = arrays(folder / files["inputs"]), tensors(folder / f"{name}_outputs.safetensors")
    yield from stored(f"{name}/", dict(_encode(load(folder, files["weights"]), inputs, config["config"], case)), theirs)


def _encode(weights: dict, inputs: dict, c: dict, case: dict) -> Iterator[tuple[str, Any]]:
  """Every intermediate of one case: both encoders block by block, with their exchanges."""
  model = _encoders(weights, c, case)
  pixels = pixels_of(inputs["pixel_values"])
  condition = inputs["language_embeddings"].mean(axis=1)
  conditions = {name: condition for name in model.film}
  init = functools.partial(model.init, jax.random.key(0), pixels, conditions, method="encode")
  params = fit(semanticvla.rules_for(model), semanticvla.unused(model) | _off(model), weights, init)
  run = functools.partial(model.apply, method="encode", capture_intermediates=_every_block, mutable=["intermediates"])
  seen, inner = jax.jit(run)({"params": params}, pixels, conditions)
  yield "film.mean", condition
  for v, (name, source) in enumerate(zip(ENCODERS, ("patches", "patches_fused"))):
    captured = inner["intermediates"][name]
    yield f"vit{v}.input", captured["embed"][0]
    x = None
    for i in range(getattr(model, name).depth):
      block = captured["Transformer"].get(f"encoderblock_{i}")
      # A last block that ran for the queries alone ran for all tokens after that.
      x = _extra_block(weights, model, name, i, x, condition) if block is None else block["__call__"][-1][0]
      yield f"vit{v}.block{i}", x
    for p in range(0 if model.dense_fuser is None else len(model.dense_fuser.pairs)):
      yield f"vit{v}.after_pair{p}", seen[f"{name}_after_pair_{p}"]
    yield source, seen.get(f"{name}_queries", seen[f"{name}_patches"])


def _encoders(weights: dict, c: dict, case: dict) -> SemanticVLA:
  """A model of which only the encoders and their Dense-Fuser are run."""
  variant = dict(
    image=c["img"],
    patch=c["patch"],
    pairs=pairs_of(c),
    dino=vit_sizes(c["dino"], weights, "featurizer."),
    siglip=vit_sizes(c["siglip"], weights, "fused_featurizer."),
    text=None,
    llm=dict(vocab=1, width=c["llm_dim"], depth=1, num_heads=1, mlp_dim=1),
  )
  return build(dict(variant=variant, num_views=1) | encoder_fields(case, c, case["cross"]))


def _off(model: SemanticVLA) -> dict[str, str]:
  """Weights that a case shares with others and does not use."""
  off = {} if model.dense_fuser is not None else {r"cross_vit_model\..*": "no Dense-Fuser in this case"}
  for name, source, queries in zip(
    ENCODERS, ("featurizer", "fused_featurizer"), ("vision_queries", "vision_queries_fused")
  ):
    if name not in model.film:
      off[rf"{source}\.blocks\.\d+\.(scale|shift)\..*"] = "no FiLM in this case"
    if model.pruner(name, "sa") is None:
      off[queries] = "no aggregation tokens in this case"
  return off


def _every_block(module, method: str) -> bool:
  """The inputs and outputs of single blocks, for looking at."""
  is_block = module.name is not None and module.name.startswith("encoderblock_")
  return method == "embed" or (method == "__call__" and is_block)


def _extra_block(weights: dict, model: SemanticVLA, name: str, i: int, x, condition):
  """The block behind the one whose states the model takes; the reference computed it too."""
  tower = getattr(model, name)
  blocks = Transformer(tower.depth, tower.num_heads, tower.mlp_dim, tower.gelu, tower.layer_scale)
  condition = condition if name in model.film else None
  source = {"dino": "featurizer.", "siglip": "fused_featurizer."}[name]
  own = {k.removeprefix(source): w for k, w in weights.items() if k.startswith(f"{source}blocks.{i}.")}
  params = fit(
    [dataclasses.replace(rule, target=rule.target.removeprefix("Transformer/")) for rule in vit.timm()],
    {r".*\.(scale|shift)\..*": "off in this case"} if condition is None else {},
    own,
    lambda: blocks.init(jax.random.key(0), x, i, i + 1, condition),
  )
  return jax.jit(lambda p, x, e: blocks.apply({"params": p}, x, i, i + 1, e)[0])(params, x, condition)
