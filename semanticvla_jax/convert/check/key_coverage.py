"""Checks that every state-dict key of the real 7B checkpoints is mapped, or left unread for a stated reason.

Works on names and shapes alone: the target tree comes from `jax.eval_shape`, no weight is made or read.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from semanticvla_jax.convert.check.golden.fixtures import read_json
from semanticvla_jax.convert.check.golden.whole import OFT, OPENVLA
from semanticvla_jax.convert.rules import engine, semanticvla
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.lora import ALL_LINEAR_TARGETS, RELEASE_TARGETS, LoRA
from semanticvla_jax.models.semanticvla import abstract_params, build, dummy_observation

Shapes = Mapping[str, tuple[int, ...]]
Report = tuple[str, int, dict[str, str]]  # what was checked, parameters made, {unread key: reason}


def verify(path: str | Path) -> list[str]:
  """Returns lines about what was mapped. Raises engine.Mismatch, or ValueError for a file of neither known layout."""
  keys = read_json(path)
  try:
    if "base_hf_state_dict" in keys:
      reports, notes = list(_release(keys)), _release_counts(keys)
    else:
      reports, notes = list(_oft(keys)), []
  except KeyError as error:
    raise refuse(
      "verify-golden",
      f"{path} without {error} (keys {sorted(keys)[:12]})",
      "the layout of full_size_keys.json or full_size_keys_oft.json",
      "copy the file whole",
    ) from error
  return [line for report in reports for line in _lines(*report)] + notes


def _lines(what: str, made: int, unread: dict[str, str]) -> Iterator[str]:
  yield f"{what}: {made} parameters mapped, {len(unread)} tensors left unread"
  for reason, n in collections.Counter(unread.values()).items():
    yield f"    {n:5d} unread: {reason}"


def shapes_of(model: Any, prefixes: tuple[str, ...] = ("",)) -> Shapes:
  """{path: shape} of a model's parameters under any of `prefixes`."""
  bare = model.model if isinstance(model, LoRA) else model
  flat = flatten_dict(abstract_params(model, dummy_observation(bare)), sep="/")
  return {path: tuple(x.shape) for path, x in flat.items() if path.startswith(prefixes)}


def _source(*parts: Mapping[str, Any], **named: Mapping[str, Any]) -> Shapes:
  """Canonical keys of several files; a later file replaces what an earlier one has too. Named ones get their prefix."""
  out = {}
  for part in parts:
    out |= {semanticvla.canonical(key): tuple(shape) for key, shape in part.items()}
  for name, part in named.items():
    out |= {semanticvla.canonical(f"{name}.{key}"): tuple(shape) for key, shape in part.items()}
  return out


def _rank(shapes: Mapping[str, Any]) -> int:
  """The rank of a file's adapters."""
  ranks = {shape[0] for key, shape in shapes.items() if ".lora_A." in key}
  if len(ranks) != 1:
    raise refuse(
      "verify-golden",
      f"adapters of ranks {sorted(ranks)}",
      "one rank in lora_A of every adapted layer",
      "copy the file whole",
    )
  return ranks.pop()


def _check(what: str, model: Any, source: Shapes, prefixes=("",), lora: bool = False, more_unused=None) -> Report:
  bare = model.model if lora else model
  target = shapes_of(model, prefixes)
  unused = semanticvla.unused(bare) | (more_unused or {})
  _, unread = engine.plan(semanticvla.rules_for(bare, lora), unused, source, target)
  return what, len(target), unread


def _release(keys: dict) -> Iterator[Report]:
  heads = dict(action_head=keys["action_head"], proprio_projector=keys["proprio_projector"])
  files = (
    keys["base_hf_state_dict"],
    keys["non_lora_trainables"],
    keys["lora_adapter"],
    keys["vision_backbone_checkpoint"],
  )
  rank = _rank(keys["lora_adapter"])
  adapted = LoRA(build({}), rank, 2 * rank)
  yield _check("SemanticVLA, fine-tuning checkpoint with adapters", adapted, _source(*files, **heads), lora=True)
  _check_targets(keys["lora_target_modules"], adapted)
  base = {r"fused_featurizer_sampler_proj\..*": "of the fine-tuned model only"}
  openvla = build(OPENVLA | dict(num_views=1, proprio_dim=None))
  yield _check(
    "openvla-7b base under the openvla config", openvla, _source(keys["base_hf_state_dict"]), more_unused=base
  )


def _oft(keys: dict) -> Iterator[Report]:
  heads = dict(action_head=keys["action_head"], proprio_projector=keys["proprio_projector"])
  yield _check("OpenVLA-OFT, merged shards and heads", build(OFT), _source(keys["base"], **heads))
  openvla = build(OPENVLA | dict(num_views=1, proprio_dim=None))
  yield _check("OpenVLA, merged shards", openvla, _source(keys["base"]))
  film = build(OFT | dict(film=("dino", "siglip")))
  file = keys["film_vision_backbone_file"]
  rank = _rank(file)
  adapted = LoRA(film, rank, rank / 2, ALL_LINEAR_TARGETS)
  yield _check("OpenVLA-OFT with FiLM, vision file", adapted, _source(file), prefixes=("dino/", "siglip/"), lora=True)
  _check_targets(keys["lora_targets"], adapted)


def _check_targets(targets: list[str], adapted: LoRA) -> None:
  """Raises engine.Mismatch unless our adapters sit on exactly the listed layers that this model has."""
  wanted = {semanticvla.canonical(f"{name}.weight") for name in targets}
  unused = semanticvla.unused(adapted.model)
  wanted = {key for key in wanted if not engine.reason(unused, key)}
  rules = semanticvla.rules_for(adapted.model, lora=True)
  ours = {key.replace(".lora_A.", ".") for key in engine.keys_read(rules, shapes_of(adapted)) if ".lora_A." in key}
  if ours != wanted:
    raise engine.Mismatch(
      f"LoRA targets differ: only ours {sorted(ours - wanted)[:6]}, only theirs {sorted(wanted - ours)[:6]}."
    )


def release_counts(model: LoRA) -> dict[str, int]:
  """Trainable parameters of our SemanticVLA by the names of the release's own list (PAPER.md accounts for each)."""
  flat = flatten_dict(abstract_params(model, dummy_observation(model.model)))
  sizes = {"/".join(path): math.prod(x.shape) for path, x in flat.items()}

  def total(test) -> int:
    return sum(n for path, n in sizes.items() if test(path))

  return {
    "vision_queries": total(lambda p: p.endswith("/queries")),
    "lora:vision": total(lambda p: "/lora_" in p and not p.startswith("llm")),
    "featurizer.film": total(lambda p: "/film/" in p),
    "fused_featurizer_mm_sampler.text_post_projector": total(lambda p: "/text_projector/" in p),
    "cross_vit_model": total(lambda p: p.startswith("dense_fuser/")),
    "projector": total(lambda p: p.startswith("sparse_fuser/projector/")),
    "fused_featurizer_sampler_proj": total(lambda p: p.startswith("sparse_fuser/siglip_cue_projector/")),
    "lora:llm": total(lambda p: "/lora_" in p and p.startswith("llm")),
    "action_head": total(lambda p: p.startswith("coupler/")),
    "proprio_projector": total(lambda p: p.startswith("proprio_projector/")),
  }


def lora_difference(rank: int) -> dict[str, int]:
  """Why our vision adapters count differently: three copies of A where qkv is split; no pooling head, no lm_head."""
  sizes = build({})
  extra = sum(2 * rank * vit.width * vit.depth for vit in (sizes.dino, sizes.siglip))
  d, f = sizes.siglip.width, sizes.siglip.mlp_dim
  pool = rank * ((d + d) + (d + 2 * d) + (d + d) + (d + f) + (f + d))  # q, kv, proj, fc1, fc2
  return {"shared A of q, k, v": extra, "attn_pool": -pool, "lm_head": -rank * (sizes.llm.width + sizes.llm.vocab)}


def _release_counts(keys: dict) -> list[str]:
  rank = _rank(keys["lora_adapter"])
  ours, theirs = release_counts(LoRA(build({}), rank, 2 * rank, RELEASE_TARGETS)), dict(keys["trainable_params"])
  theirs |= dict(action_head=keys["action_head_params"], proprio_projector=keys["proprio_projector_params"])
  difference = lora_difference(rank)
  expected = dict(theirs)
  lm_head = expected.pop("lora:lm_head")
  expected["lora:vision"] += difference["shared A of q, k, v"] + difference["attn_pool"]
  if ours != expected or lm_head != -difference["lm_head"]:
    raise engine.Mismatch(
      f"trainable counts: got {ours}, expected {expected} (release {theirs}, accounted {difference})."
    )
  aloha = build(dict(num_views=3, proprio_dim=14, action_dim=14, chunk=25))
  count = sum(math.prod(shape) for shape in shapes_of(aloha, ("coupler/",)).values())
  second_arm = 7 * (aloha.llm.width + 1)  # the list counts seven outputs; two arms have fourteen
  if count - second_arm != keys["action_head_aloha_params"]:
    raise engine.Mismatch(f"ALOHA head: got {count} - {second_arm}, expected {keys['action_head_aloha_params']}.")
  total = sum(theirs.values())
  return [
    f"trainable: {sum(ours.values()):,} here, {total:,} in the release; the difference is {difference}",
    f"ALOHA coupler: {count:,} here; the release's list counts one arm's seven outputs, {second_arm:,} fewer",
  ]
