"""Whole models: SemanticVLA (plain, ALOHA, with adapters), OpenVLA-OFT and OpenVLA, intermediate by intermediate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict
from safetensors.flax import load_file

from semanticvla_jax.convert import semanticvla, table
from semanticvla_jax.convert.golden.files import Pair, fit, hidden_states, load, pixels_of, variant_of
from semanticvla_jax.data import statistics
from semanticvla_jax.models.coupler import actions_to_tokens, tokens_to_actions
from semanticvla_jax.models.lora import LoRA, merge
from semanticvla_jax.models.semanticvla import SemanticVLA, build, dummy_observation
from semanticvla_jax.types import Observation

EMPTY, PAD, TEXT_PAD, FIRST_ACTION_ID = 29871, 32000, 1, 31744


def _prompt(inputs: dict, case: str, generates: bool = False) -> tuple[Any, Any]:
  """The prompt (without action ids) and its mask; prediction appends the empty token 29871 where it is missing."""
  ids = inputs[f"{case}.input_ids"]
  if f"{case}.labels" not in inputs:
    if ids[0, -1] != EMPTY:
      ids = np.concatenate([ids, [[EMPTY]]], axis=1)
    return ids, np.ones(ids.shape, bool)
  if generates:
    return ids, inputs[f"{case}.attention_mask"].astype(bool)
  lengths = (inputs[f"{case}.labels"] >= FIRST_ACTION_ID).argmax(axis=1)
  mask = np.arange(lengths.max()) < lengths[:, None]
  return np.where(mask, ids[:, : lengths.max()], PAD), mask


def _observation(inputs: dict, case: str, generates: bool = False) -> tuple[Observation, dict]:
  pixels = pixels_of(inputs[f"{case}.pixel_values"])
  b, v, h, w, _ = pixels["dino"].shape
  ids, mask = _prompt(inputs, case, generates)
  proprio, instruction = inputs.get(f"{case}.proprio"), inputs.get(f"{case}.instruction_ids")
  observation = Observation(
    images=np.zeros((b, v, h, w, 3), np.uint8),
    proprio=None if proprio is None else proprio.reshape(b, -1),
    prompt=ids.astype(np.int32),
    prompt_mask=mask,
    instruction=None if instruction is None else instruction.astype(np.int32),
    instruction_mask=None if instruction is None else instruction != TEXT_PAD,
  )
  return jax.tree.map(jnp.asarray, observation), pixels


def _model(config: dict, inputs: dict, outputs: dict, **fields) -> SemanticVLA:
  """The model that a whole-model folder describes; widths of actions and proprioception come from its tensors."""
  k, a = outputs["predict0.unnormalized_actions"].shape if "coupler" not in fields else (1, 7)
  proprio = inputs.get("predict0.proprio")
  own = dict(num_views=config["config"]["num_images"], proprio_dim=None if proprio is None else proprio.shape[-1])
  if fields.get("coupler", "grouped") is not None:
    k, a = outputs["predict0.unnormalized_actions"].shape
  return build(dict(variant=variant_of(config), chunk=k, action_dim=a) | own | fields)


def _semantic_fields(config: dict) -> dict:
  c = config["config"]
  if c["queries"] != c["vision_topk"]:
    raise ValueError(f"golden: got {c['queries']} queries and {c['vision_topk']} kept patches, expected as many.")
  temperature = config.get("fused_featurizer_cfg", {}).get("temp", 1.0)
  return dict(keep=c["vision_topk"], cues=c["text_topk"], temperature=temperature, film_pool="all")


def unnormalise(actions, config: dict, eps: float) -> Any:
  """Raw actions, with the folder's own statistics and bounds (quantiles, or min and max on ALOHA)."""
  stats = statistics.from_openvla(next(iter(config["norm_stats"].values()))).action
  mode = config.get("constants", {}).get("NORMALIZATION", "bounds_q99")
  return statistics.unnormalise(np.asarray(actions, np.float32), stats, mode=mode, eps=eps)


def _order(valid: Any) -> Any:
  """Indices that move padding to the right end, where the reference has it."""
  return np.argsort(~np.asarray(valid), axis=1, kind="stable")


def _take(x, order: Any) -> Any:
  return np.take_along_axis(np.asarray(x), order.reshape(*order.shape, *[1] * (np.ndim(x) - 2)), axis=1)


def _cases(outputs: dict) -> list[str]:
  return [c for c in dict.fromkeys(key.split(".")[0] for key in outputs) if c.startswith("predict") or c == "train"]


def _run(model: Any, **static: Any) -> Callable:
  """A compiled apply: (params, *args) → output."""
  return jax.jit(lambda params, *args, **kwargs: model.apply({"params": params}, *args, **kwargs, **static))


def _whole(
  model: SemanticVLA, params: dict, config: dict, inputs: dict, outputs: dict, case: str
) -> Iterator[tuple[str, Any]]:
  """Every intermediate of one case of a model with a coupler, under the reference's names and in its order."""
  observation, pixels = _observation(inputs, case)
  run = _run(model, capture_intermediates=_text_projector, mutable=["intermediates"])
  out, sown = run(params, observation, pixels=pixels)
  seen, v = out.intermediates, model.num_views
  valid = np.asarray(seen["valid"])
  order = _order(valid)
  ids_valid = np.pad(observation.prompt_mask, ((0, 0), (0, 1)), constant_values=True)
  stop = jnp.broadcast_to(params["llm"]["embed"]["embedding"][2], (len(valid), 1, model.llm.width))
  yield "language_embeddings", _take(jnp.concatenate([seen["prompt"], stop], axis=1), _order(ids_valid))
  yield "film_mean", model.apply({"params": params}, seen["prompt"], observation.prompt_mask, method="pool")
  yield "visual_and_proprio_tokens", seen["context"][:, 1:]
  yield "llm_input_embeddings", _take(seen["sequence"], order)
  yield "llm_attention_mask_2d", np.sort(valid, axis=1)[:, ::-1]
  yield "llm_attention_allowed", _allowed(seen["allowed"], order, valid, outputs.get(f"{case}.llm_attention_allowed"))
  states = hidden_states(seen["sequence"], seen["hidden"], sown["intermediates"]["llm"])
  states = np.stack([_take(x, order) for x in states])
  yield "llm_hidden_states", _only_valid(states, valid, outputs.get(f"{case}.llm_hidden_states"))
  yield "action_hidden_states", seen["action_states"]
  yield "normalized_actions", out.actions
  if f"{case}.unnormalized_actions" in outputs:
    yield "unnormalized_actions", unnormalise(out.actions[0], config, 1e-8)
  if f"{case}.actions" in inputs:
    yield "loss_l1", np.abs(np.asarray(out.actions) - inputs[f"{case}.actions"]).mean()
  if model.text is not None:
    yield "text_last_hidden_state", seen["words"]
    yield "text_projected", sown["intermediates"]["siglip_id_pruner"]["text_projector"]["__call__"][0][::v]
  yield from _per_view(seen, v)


def _per_view(seen: dict, v: int) -> Iterator[tuple[str, Any]]:
  for k in range(v):
    yield f"image{k}.llm_tokens", seen["views"][k::v]
    yield f"image{k}.siglip_patches", seen["siglip_patches"][k::v]
    if "siglip_pruned" in seen:
      pruned = seen["siglip_pruned"]
      yield f"image{k}.similarity", pruned.similarity[k::v]
      tokens = [x for x in (pruned.cues, pruned.anchors) if x is not None]
      yield f"image{k}.pruned_tokens", jnp.concatenate(tokens, axis=1)[k::v]
      yield f"image{k}.dino_queries", seen["dino_aggregated"][k::v]
  joint = jnp.concatenate([seen["dino_patches"], seen["siglip_patches"]], axis=-1)
  yield "patch_features", rearrange(joint, "(b v) n d -> b (v n) d", v=v)
  yield "projected_patches", rearrange(seen["views"], "(b v) n d -> b (v n) d", v=v)


def _text_projector(module, method: str) -> bool:
  return module.name == "text_projector" and method == "__call__"


def _allowed(allowed, order: Any, valid: Any, theirs: Any) -> Any:
  """Our mask in the reference's order; rows of padding queries, whose values mean nothing, are copied from it."""
  ours = np.stack([a[o][:, o] for a, o in zip(np.asarray(allowed), order)])
  rows = np.sort(valid, axis=1)[:, ::-1, None]
  return ours if theirs is None else np.where(rows, ours, theirs)


def _only_valid(states: Any, valid: Any, theirs: Any) -> Any:
  rows = np.sort(valid, axis=1)[None, :, ::-1, None]
  return states if theirs is None else np.where(rows, states, theirs)


def _compare_cases(model, params, config, inputs, outputs, cases: list[str] | None = None) -> Iterator[Pair]:
  for case in _cases(outputs) if cases is None else cases:
    for name, ours in _whole(model, params, config, inputs, outputs, case):
      if f"{case}.{name}" in outputs:
        theirs = outputs[f"{case}.{name}"]
        yield f"{case}.{name}", np.asarray(ours).astype(theirs.dtype), theirs


def full(folder: Path, config: dict) -> Iterator[Pair]:
  inputs, outputs = (load_file(folder / f"{what}.safetensors") for what in ("inputs", "outputs"))
  model = _model(config, inputs, outputs, **_semantic_fields(config))
  params = _params(model, _whole_source(folder))
  yield from _compare_cases(model, params, config, inputs, outputs)
  yield from _head_probe(model, params, inputs, outputs)


def _whole_source(folder: Path, *more: str) -> dict[str, Any]:
  source = load(folder, "weights.safetensors", *more)
  for part in ("action_head", "proprio_projector"):
    source |= load(folder, f"{part}.safetensors", prefix=f"{part}.")
  return source


def _params(model: Any, source: dict, lora: bool = False, method: str = "__call__") -> dict:
  bare = model.model if lora else model
  init = lambda: model.init(jax.random.key(0), dummy_observation(bare), method=method)  # noqa: E731
  return fit(semanticvla.rules_for(bare, lora), semanticvla.unused(bare), source, init)


def _head_probe(model: SemanticVLA, params: dict, inputs: dict, outputs: dict) -> Iterator[Pair]:
  """The coupler alone, on states so small that a wrong epsilon shows."""
  if "head_probe.action_hidden_states" not in inputs:
    return
  states = inputs["head_probe.action_hidden_states"]
  ours = model.apply({"params": params}, states, method=lambda module, x: module.coupler(x))
  yield "head_probe.normalized_actions", ours, outputs["head_probe.normalized_actions"]


def lora_checkpoint(folder: Path, config: dict) -> Iterator[Pair]:
  inputs, outputs = (load_file(folder / f"{what}.safetensors") for what in ("inputs", "outputs"))
  step = next(folder.glob("vision_backbone--*")).name.removeprefix("vision_backbone--")
  c = config["config"]
  bare = _model(config, inputs, outputs, **_semantic_fields(config))
  adapted = LoRA(bare.clone(), c["lora_r"], c["lora_alpha"])
  source = load(
    folder,
    "base_hf.safetensors",
    f"non_lora_trainables--{step}",
    "lora_adapter/adapter_model.safetensors",
    f"vision_backbone--{step}",
  )
  for part in ("action_head", "proprio_projector"):
    source |= load(folder, f"{part}--{step}", prefix=f"{part}.")
  params = _params(adapted, source, lora=True)
  merged = merge(params, c["lora_r"], c["lora_alpha"])
  for case in ("predict0", "train"):
    observation, pixels = _observation(inputs, case)
    kept = _run(adapted)(params, observation, pixels=pixels).actions
    folded = _run(bare)(merged, observation, pixels=pixels).actions
    if case == "train":
      yield "train.normalized_actions", kept, outputs["train.normalized_actions"]
      yield "train.normalized_actions (merged)", folded, outputs["train.normalized_actions"]
      yield "train.loss_l1", np.abs(kept - inputs["train.actions"]).mean(), outputs["train.loss_l1"]
    else:
      for name, ours in (("unnormalized_actions", kept), ("unnormalized_actions_after_merge", folded)):
        yield f"predict0.{name}", unnormalise(ours[0], config, 1e-8), outputs[f"predict0.{name}"]
  yield from _merged_weights(folder, merged)


def _merged_weights(folder: Path, merged: dict) -> Iterator[Pair]:
  """Our folded kernels against the shards that the official merge script wrote."""
  ours = flatten_dict(merged, sep="/")
  theirs = load(folder, "merged_language_part.safetensors")
  target = {k: x.shape for k, x in ours.items() if k.startswith(("llm/layers", "llm/norm", "sparse_fuser/"))}
  for path, x in table.convert(semanticvla.rules(), {}, theirs, target).items():
    yield f"merged/{path}", ours[path], x


def oft(folder: Path, config: dict) -> Iterator[Pair]:
  inputs, outputs = (load_file(folder / f"{what}.safetensors") for what in ("inputs", "outputs"))
  model = _model(config, inputs, outputs, **OFT)
  params = _params(model, _whole_source(folder))
  yield from _compare_cases(model, params, config, inputs, outputs)
  yield from _head_probe(model, params, inputs, outputs)
  film = _model(config, inputs, outputs, **OFT | dict(film=("dino", "siglip"), film_pool="all"))
  params = _params(film, _whole_source(folder, "film.safetensors"))
  as_film = {key.replace("predict0.", "film."): x for key, x in inputs.items() if key.startswith("predict0.")}
  yield from _compare_cases(film, params, config, as_film, outputs, ["film"])


BASELINE = dict(film=(), dino_pruner=None, siglip_pruner=None, dense_fuser=None, vision_layer="second_to_last")
OFT = dict(**BASELINE, mask="full", coupler="single")
OPENVLA = dict(**BASELINE, mask="causal", coupler=None, action_dim=7, chunk=1)


def openvla(folder: Path, config: dict) -> Iterator[Pair]:
  inputs, outputs = (load_file(folder / f"{what}.safetensors") for what in ("inputs", "outputs"))
  model = _model(config, inputs, outputs, **OPENVLA)
  params = _params(model, load(folder, "weights.safetensors"))
  first, last = config["constants"]["action_token_ids"]
  actions = slice(first, last + 2)
  for case in [c for c in _cases(outputs) if c != "train"]:
    observation, pixels = _observation(inputs, case)
    ids, logits = _run(model, method="generate")(params, observation, pixels)
    _, seen = _run(model, method="logits")(params, observation, pixels)
    ours = dict(_per_view(seen, 1)) | {
      "generated_ids": ids[0],
      "step_logits_action_range": logits[0, :, actions],
      "step0_logits": logits[0, 0],
      "normalized_actions": tokens_to_actions(ids[0]),
      "unnormalized_actions": unnormalise(tokens_to_actions(ids[0]), config, 0.0),
    }
    if f"{case}.llm_input_embeddings" in outputs:  # the reference stored the prompt and what generate() fed after it
      fed = jnp.concatenate([seen["sequence"], params["llm"]["embed"]["embedding"][ids[:, :-1]]], axis=1)
      ours["llm_input_embeddings"] = fed[:, : outputs[f"{case}.llm_input_embeddings"].shape[1]]
    if f"{case}.llm_attention_mask_2d" in outputs:  # one prompt without padding: all ones
      ours["llm_attention_mask_2d"] = np.ones_like(outputs[f"{case}.llm_attention_mask_2d"])
    yield from (
      (key, np.asarray(ours[key.split(".", 1)[1]]), x) for key, x in outputs.items() if key.startswith(f"{case}.")
    )
  yield from _openvla_training(model, params, inputs, outputs, actions)
  given, ids = inputs["tokenizer.actions"], outputs["tokenizer.ids"]
  on_edge = (
    np.abs((given + 1) * 127.5 - np.round((given + 1) * 127.5)) < 1e-4
  )  # stored in float32: either side is right
  yield "tokenizer.ids", np.where(on_edge, ids, actions_to_tokens(np.asarray(given))), ids
  probe = tokens_to_actions(inputs["tokenizer.probe_ids"].astype(np.int32))
  yield "tokenizer.probe_normalized_actions", probe, outputs["tokenizer.probe_normalized_actions"]


def _openvla_training(model, params, inputs: dict, outputs: dict, actions: slice) -> Iterator[Pair]:
  observation, pixels = _observation(inputs, "train", generates=True)
  run = _run(model, method="logits", mutable=["intermediates"])
  (logits, seen), sown = run(params, observation, pixels)
  labels = inputs["train.labels"]
  rows, columns = np.nonzero(labels != -100)
  at_labels = rearrange(logits[rows, columns - 1], "(b n) v -> b n v", b=len(labels))
  ids = rearrange(labels[rows, columns], "(b n) -> b n", b=len(labels))
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(at_labels), ids[..., None], axis=-1)[..., 0]
  valid = np.asarray(seen["valid"])
  states = hidden_states(seen["sequence"], seen["hidden"], sown["intermediates"]["llm"])
  ours = dict(_per_view(seen, 1)) | {
    "label_ids": ids,
    "logits_action_range": at_labels[..., actions],
    "argmax_ids": jnp.argmax(at_labels, axis=-1),
    "log_prob_of_label": log_probs,
    "loss_ce": -log_probs.mean(),
    "llm_input_embeddings": seen["sequence"],
    "llm_attention_mask_2d": valid,
    "llm_hidden_states": _only_valid(np.asarray(states), valid, outputs["train.llm_hidden_states"]),
  }
  for key, x in outputs.items():
    if key.startswith("train."):
      yield key, np.asarray(ours[key.split(".", 1)[1]]), x
