"""Whole models: SemanticVLA (plain, ALOHA, with adapters), OpenVLA-OFT and OpenVLA, intermediate by intermediate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict

from semanticvla_jax.convert.check.golden.fixtures import (
  ENCODERS,
  Ids,
  Pair,
  encoder_fields,
  expect,
  fit,
  hidden_states,
  ids_of,
  load,
  pairs_of,
  pixels_of,
  stored,
  tensors,
  variant_of,
)
from semanticvla_jax.convert.rules import engine, semanticvla
from semanticvla_jax.data import statistics
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.coupler import BINS, actions_to_tokens, tokens_to_actions
from semanticvla_jax.models.lora import LoRA, merge
from semanticvla_jax.models.semanticvla import STOP, SemanticVLA, build, dummy_observation
from semanticvla_jax.types import Observation


def _prompt(inputs: dict, case: str, special: Ids, generates: bool = False) -> tuple[Any, Any]:
  """The prompt (without action ids) and its mask; prediction appends the empty token where it is missing."""
  ids = inputs[f"{case}.input_ids"]
  if f"{case}.labels" not in inputs:
    if ids[0, -1] != special.empty:
      ids = np.concatenate([ids, [[special.empty]]], axis=1)
    return ids, np.ones(ids.shape, bool)
  if generates:
    return ids, inputs[f"{case}.attention_mask"].astype(bool)
  lengths = (inputs[f"{case}.labels"] >= special.first_action).argmax(axis=1)
  mask = np.arange(lengths.max()) < lengths[:, None]
  return np.where(mask, ids[:, : lengths.max()], special.pad), mask


def _observation(inputs: dict, case: str, special: Ids, generates: bool = False) -> tuple[Observation, dict]:
  pixels = pixels_of(inputs[f"{case}.pixel_values"])
  b, v, h, w, _ = pixels["dino"].shape
  ids, mask = _prompt(inputs, case, special, generates)
  proprio, instruction = inputs.get(f"{case}.proprio"), inputs.get(f"{case}.instruction_ids")
  observation = Observation(
    images=np.zeros((b, v, h, w, 3), np.uint8),
    proprio=None if proprio is None else proprio.reshape(b, -1),
    prompt=ids.astype(np.int32),
    prompt_mask=mask,
    instruction=None if instruction is None else instruction.astype(np.int32),
    instruction_mask=None if instruction is None else instruction != special.text_pad,
  )
  return jax.tree.map(jnp.asarray, observation), pixels


def _read(folder: Path) -> tuple[dict, dict]:
  """Inputs and outputs of a whole model."""
  return tuple(tensors(folder / f"{what}.safetensors") for what in ("inputs", "outputs"))


def _model(config: dict, weights: dict, inputs: dict, outputs: dict, **fields) -> SemanticVLA:
  """The model that a whole-model folder describes; widths of actions and proprioception come from its tensors."""
  case = next((case for case in _cases(outputs) if case.startswith("predict")), None)
  if case is None:
    raise refuse(
      "verify-golden",
      "outputs without a case predict0, predict1, …",
      "one, whose actions give chunk and width",
      "compare a folder that has it",
    )
  proprio = inputs.get(f"{case}.proprio")
  own = dict(num_views=config["config"]["num_images"], proprio_dim=None if proprio is None else proprio.shape[-1])
  if fields.get("coupler", "grouped") is not None:
    own |= dict(zip(("chunk", "action_dim"), outputs[f"{case}.unnormalized_actions"].shape))
  model = build(dict(variant=variant_of(config, weights)) | own | fields)
  if model.coupler is not None and "num_action_tokens" in config["config"]:
    expect("num_action_tokens", config["config"]["num_action_tokens"], model.coupler.tokens)
  return model


def semantic_fields(config: dict) -> dict:
  """Model fields of a SemanticVLA folder that are no sizes: FiLM, pruners, fuser, tokens kept."""
  return encoder_fields(config, config["config"], bool(pairs_of(config["config"]))) | dict(film_pool="all")


def unnormalize(actions, config: dict, eps: float) -> Any:
  """Raw actions, with the folder's own statistics and bounds (quantiles, or min and max on ALOHA)."""
  stats = statistics.from_openvla(next(iter(config["norm_stats"].values()))).action
  mode = config.get("constants", {}).get("NORMALIZATION", "bounds_q99")
  return statistics.unnormalize(np.asarray(actions, np.float32), stats, mode=mode, eps=eps)


def _order(valid: Any) -> Any:
  """Indices that move padding to the right end, where the reference has it."""
  return np.argsort(~np.asarray(valid), axis=1, kind="stable")


def _take(x, order: Any) -> Any:
  return np.take_along_axis(np.asarray(x), order.reshape(*order.shape, *[1] * (np.ndim(x) - 2)), axis=1)


def _cases(outputs: dict) -> list[str]:
  """predict0, predict1, … and train, as far as there are any."""
  return [c for c in dict.fromkeys(key.split(".")[0] for key in outputs) if c.startswith("predict") or c == "train"]


def _of(case: str, outputs: dict) -> dict[str, Any]:
  """What is stored of one case, by name."""
  return {key.removeprefix(f"{case}."): x for key, x in outputs.items() if key.startswith(f"{case}.")}


def _run(model: Any, **static: Any) -> Callable:
  """A compiled apply: (params, *args) → output."""
  return jax.jit(lambda params, *args, **kwargs: model.apply({"params": params}, *args, **kwargs, **static))


def _whole(
  model: SemanticVLA, params: dict, config: dict, inputs: dict, outputs: dict, case: str
) -> Iterator[tuple[str, Any]]:
  """Every intermediate of one case of a model with a coupler, under the reference's names and in its order."""
  observation, pixels = _observation(inputs, case, ids_of(config))
  run = _run(model, capture_intermediates=_text_projector, mutable=["intermediates"])
  out, sown = run(params, observation, pixels=pixels)
  seen, v = out.intermediates, model.num_views
  valid = np.asarray(seen["valid"])
  order = _order(valid)
  ids_valid = np.pad(observation.prompt_mask, ((0, 0), (0, 1)), constant_values=True)
  stop = jnp.broadcast_to(params["llm"]["embed"]["embedding"][STOP], (len(valid), 1, model.llm.width))
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
    yield "unnormalized_actions", unnormalize(out.actions[0], config, 1e-8)
  if f"{case}.actions" in inputs:
    yield "loss_l1", np.abs(np.asarray(out.actions) - inputs[f"{case}.actions"]).mean()
  if model.text is not None:
    yield "text_last_hidden_state", seen["words"]
    yield "text_projected", sown["intermediates"]["siglip_id_pruner"]["text_projector"]["__call__"][0]
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
    if "dino_aggregated" in seen:
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
  (inputs, outputs), source = _read(folder), _whole_source(folder)
  model = _model(config, source, inputs, outputs, **semantic_fields(config))
  params = _params(model, source)
  yield from _compare_cases(model, params, config, inputs, outputs)
  yield from _head_probe(model, params, inputs, outputs)


def _whole_source(folder: Path, *more: str) -> dict[str, Any]:
  """Weights of the model and of its companions, as far as there are any (a missing one is a engine.Mismatch later)."""
  source = load(folder, "weights.safetensors", *more)
  for part in ("action_head", "proprio_projector"):
    if (folder / f"{part}.safetensors").exists():
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
  ours = _run(model, method=lambda module, x: module.coupler(x))(params, states)
  yield from stored("head_probe.", {"normalized_actions": ours}, _of("head_probe", outputs))


def lora_checkpoint(folder: Path, config: dict) -> Iterator[Pair]:
  (inputs, outputs), c = _read(folder), config["config"]
  source = _adapted_source(folder)
  bare = _model(config, source, inputs, outputs, **semantic_fields(config))
  adapted = LoRA(bare.clone(), c["lora_r"], c["lora_alpha"])
  params = _params(adapted, source, lora=True)
  merged = merge(params, c["lora_r"], c["lora_alpha"])
  for case in _cases(outputs):
    observation, pixels = _observation(inputs, case, ids_of(config))
    kept = _run(adapted)(params, observation, pixels=pixels).actions
    folded = _run(bare)(merged, observation, pixels=pixels).actions
    yield from _adapted_case(case, config, inputs, outputs, kept, folded)
  yield from _merged_weights(folder, merged)


def _adapted_source(folder: Path) -> dict[str, Any]:
  """The files of a fine-tuning checkpoint; all carry the number of the same step."""
  vision = sorted(folder.glob("vision_backbone--*"))
  if len(vision) != 1:
    raise refuse("verify-golden", f"{len(vision)} files vision_backbone--* in {folder}", "one", "copy the folder whole")
  step = vision[0].name.removeprefix("vision_backbone--")
  names = ("base_hf.safetensors", f"non_lora_trainables--{step}", "lora_adapter/adapter_model.safetensors")
  source = load(folder, *names, vision[0].name)
  for part in ("action_head", "proprio_projector"):
    source |= load(folder, f"{part}--{step}", prefix=f"{part}.")
  return source


def _adapted_case(case: str, config: dict, inputs: dict, outputs: dict, kept: Any, folded: Any) -> Iterator[Pair]:
  """Actions of one case with adapters kept apart and folded in, against what is stored of it."""
  ours = {f"{case}.normalized_actions": kept}
  if case.startswith("predict"):
    ours[f"{case}.unnormalized_actions"] = unnormalize(kept[0], config, 1e-8)
    ours[f"{case}.unnormalized_actions_after_merge"] = unnormalize(folded[0], config, 1e-8)
  if f"{case}.actions" in inputs:
    ours[f"{case}.loss_l1"] = np.abs(np.asarray(kept) - inputs[f"{case}.actions"]).mean()
  yield from stored("", ours, outputs)
  if f"{case}.normalized_actions" in outputs:
    yield f"{case}.normalized_actions (merged)", folded, outputs[f"{case}.normalized_actions"]


def _merged_weights(folder: Path, merged: dict) -> Iterator[Pair]:
  """Our folded kernels against the shards that the official merge script wrote."""
  ours = flatten_dict(merged, sep="/")
  theirs = load(folder, "merged_language_part.safetensors")
  target = {k: x.shape for k, x in ours.items() if k.startswith(("llm/layers", "llm/norm", "sparse_fuser/"))}
  for path, x in engine.convert(semanticvla.rules(), {}, theirs, target).items():
    yield f"merged/{path}", ours[path], x


def oft(folder: Path, config: dict) -> Iterator[Pair]:
  (inputs, outputs), source = _read(folder), _whole_source(folder)
  model = _model(config, source, inputs, outputs, **OFT)
  params = _params(model, source)
  yield from _compare_cases(model, params, config, inputs, outputs)
  yield from _head_probe(model, params, inputs, outputs)
  if not any(key.startswith("film.") for key in outputs):
    return
  source = _whole_source(folder, "film.safetensors")
  film = _model(config, source, inputs, outputs, **OFT | dict(film=ENCODERS, film_pool="all"))
  as_film = {key.replace("predict0.", "film."): x for key, x in inputs.items() if key.startswith("predict0.")}
  yield from _compare_cases(film, _params(film, source), config, as_film, outputs, ["film"])


BASELINE = dict(film=(), dino_pruner=None, siglip_pruner=None, dense_fuser=None, vision_layer="second_to_last")
OFT = dict(**BASELINE, mask="full", coupler="single")
OPENVLA = dict(**BASELINE, mask="causal", coupler=None, action_dim=7, chunk=1)


class Bins(NamedTuple):
  """How a folder of OpenVLA turns actions into tokens.

  Attributes:
    tokens: spoken for one action. vocab: of the tokenizer, the last 256 of it are actions.
    ids: the stored columns of logits: the ids of actions and the one behind them.
  """

  tokens: int
  vocab: int
  ids: slice


def _bins(config: dict) -> Bins:
  constants = config["constants"]
  expect("n_action_bins", constants.get("n_action_bins", BINS), BINS)
  first, last = constants["action_token_ids"]
  return Bins(constants["ACTION_DIM"], constants.get("vocab_size_for_detokenisation", last + 1), slice(first, last + 2))


def openvla(folder: Path, config: dict) -> Iterator[Pair]:
  (inputs, outputs), source = _read(folder), load(folder, "weights.safetensors")
  bins = _bins(config)
  model = _model(config, source, inputs, outputs, **OPENVLA | dict(action_dim=bins.tokens))
  params = _params(model, source)
  for case in _cases(outputs):
    theirs = _of(case, outputs)
    compute = _spoken_training if case == "train" else _spoken
    yield from stored(f"{case}.", compute(model, params, config, inputs, theirs, case), theirs)
  yield from _tokenizer(inputs, outputs, bins.vocab)


def _spoken(model: SemanticVLA, params: dict, config: dict, inputs: dict, theirs: dict, case: str) -> dict[str, Any]:
  """Greedy tokens of one case, and what led there."""
  bins = _bins(config)
  observation, pixels = _observation(inputs, case, ids_of(config))
  ids, logits, _ = _run(model, method="generate", tokens=bins.tokens)(params, observation, pixels)
  _, seen = _run(model, method="logits")(params, observation, pixels)
  actions = tokens_to_actions(ids[0], bins.vocab)
  ours = dict(_per_view(seen, 1)) | {
    "generated_ids": ids[0],
    "step_logits_action_range": logits[0, :, bins.ids],
    "step0_logits": logits[0, 0],
    "normalized_actions": actions,
    "unnormalized_actions": unnormalize(actions, config, 0.0),
  }
  if "llm_input_embeddings" in theirs:  # the reference stored the prompt and what generate() fed after it
    fed = jnp.concatenate([seen["sequence"], params["llm"]["embed"]["embedding"][ids[:, :-1]]], axis=1)
    ours["llm_input_embeddings"] = fed[:, : theirs["llm_input_embeddings"].shape[1]]
  if "llm_attention_mask_2d" in theirs:  # one prompt without padding: all ones
    ours["llm_attention_mask_2d"] = np.ones_like(theirs["llm_attention_mask_2d"])
  return ours


def _tokenizer(inputs: dict, outputs: dict, vocab: int) -> Iterator[Pair]:
  """Actions to token ids and back, as far as they are stored."""
  if "tokenizer.ids" in outputs:
    given, ids = inputs["tokenizer.actions"], outputs["tokenizer.ids"]
    steps = (given + 1) * (BINS - 1) / 2
    on_edge = np.abs(steps - np.round(steps)) < 1e-4  # stored in float32: either side is right
    ours = np.asarray(actions_to_tokens(jnp.asarray(given), vocab))
    yield "tokenizer.ids", np.where(on_edge, ids, ours), ids
  if "tokenizer.probe_normalized_actions" in outputs:
    probe = tokens_to_actions(jnp.asarray(inputs["tokenizer.probe_ids"]), vocab)
    yield "tokenizer.probe_normalized_actions", probe, outputs["tokenizer.probe_normalized_actions"]


def _spoken_training(
  model: SemanticVLA, params: dict, config: dict, inputs: dict, theirs: dict, case: str
) -> dict[str, Any]:
  """Teacher forcing: logits where labels are, and their cross entropy."""
  observation, pixels = _observation(inputs, case, ids_of(config), generates=True)
  run = _run(model, method="logits", mutable=["intermediates"])
  (logits, seen), sown = run(params, observation, pixels)
  labels = inputs[f"{case}.labels"]
  rows, columns = np.nonzero(labels != -100)
  at_labels = rearrange(logits[rows, columns - 1], "(b n) v -> b n v", b=len(labels))
  ids = rearrange(labels[rows, columns], "(b n) -> b n", b=len(labels))
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(at_labels), jnp.asarray(ids)[..., None], axis=-1)[..., 0]
  valid = np.asarray(seen["valid"])
  states = hidden_states(seen["sequence"], seen["hidden"], sown["intermediates"]["llm"])
  return dict(_per_view(seen, 1)) | {
    "label_ids": ids,
    "logits_action_range": at_labels[..., _bins(config).ids],
    "argmax_ids": jnp.argmax(at_labels, axis=-1),
    "log_prob_of_label": log_probs,
    "loss_ce": -log_probs.mean(),
    "llm_input_embeddings": seen["sequence"],
    "llm_attention_mask_2d": valid,
    "llm_hidden_states": _only_valid(np.asarray(states), valid, theirs.get("llm_hidden_states")),
  }
