"""Wrong values of a model config, refused before anything is built: each message names the field and what to set."""

from __future__ import annotations

import dataclasses
import itertools
import numbers
from collections.abc import Mapping
from typing import Any

from semanticvla_jax.errors import refuse
from semanticvla_jax.models import compressor, decoder_pruner, fast, masks, serving, speech
from semanticvla_jax.models.coupler import EXTRA_ROWS
from semanticvla_jax.models.decoder_pruner import ATTENTION, CONTROLS, FORMS, LIGHT, DecoderPruner
from semanticvla_jax.models.history import History
from semanticvla_jax.models.llama import REMAT
from semanticvla_jax.models.pruner import ANCHOR_RULES, KINDS, kinds

ENCODERS = ("dino", "siglip")
PRUNERS = (*("+".join(x) for n in range(1, len(KINDS) + 1) for x in itertools.combinations(KINDS, n)), None)
CHOICES = {
  "dino_pruner": PRUNERS,
  "siglip_pruner": PRUNERS,
  "film_pool": ("words", "all"),
  "anchor_rule": ANCHOR_RULES,
  "sparse_fuser": ("joint", "separate", "mixture"),
  "cue_pool": ("mean", "max"),
  "vision_layer": ("last", "second_to_last"),
  "siglip_gelu": ("erf", "tanh"),
  "coupler": ("grouped", "paper", "single", None),
  "decoding": speech.DECODINGS,
  "mask": masks.KINDS,
  "scan": (True, False),
  "attention": serving.ATTENTION,
  "remat": (*REMAT,),
  "dtype": ("float32", "bfloat16", "float16"),
}
OR = {"anchor_rule": ", or register your own with models.pruner.anchor_rule"}  # what else a user can do
COUNTS = {"keep": 1, "cues": 0, "num_views": 1, "action_dim": 1, "chunk": 1, "token_multiple": 1}  # field: the least
AMOUNTS = ("similarity_noise", "aggregation_std")  # numbers from 0
# Sizes that a part of a variant must have, and values that it may have.
VIT = ("width", "depth", "num_heads", "mlp_dim")
SIZES = {"dino": VIT, "siglip": VIT, "text": ("vocab", "positions", *VIT), "llm": ("vocab", *VIT)}
VIT_OPTIONS = ("registers", "layer_scale", "position_init")
OPTIONS = {"dino": VIT_OPTIONS, "siglip": VIT_OPTIONS, "text": ("gelu",), "llm": ("eps", "theta")}


def check(c: Mapping[str, Any]) -> None:
  """Raises ValueError at the first value of a resolved model config that no model can be built from."""
  for field, allowed in CHOICES.items():
    if c[field] not in (*allowed,):
      _refuse(field, c[field], f"one of {(*allowed,)}", f"set model.{field} to one of them{OR.get(field, '')}")
  for field, least in COUNTS.items():
    if not _is_count(c[field], least):
      _refuse(field, c[field], f"a whole number from {least}", f"set model.{field} to one")
  if c["proprio_dim"] is not None and not _is_count(c["proprio_dim"], 1):
    _refuse("proprio_dim", c["proprio_dim"], "a whole number from 1, or None", "None leaves proprioception out")
  for field in AMOUNTS:
    if not _is_number(c[field]) or c[field] < 0:
      _refuse(field, c[field], "a number from 0", f"set model.{field} to one; 0 turns it off")
  if not _is_number(c["temperature"]) or c["temperature"] <= 0:
    _refuse("temperature", c["temperature"], "a number above 0", "small ones sharpen the cues, 1 is the release's")
  if c["cue_temperature"] is not None and not (_is_number(c["cue_temperature"]) and c["cue_temperature"] > 0):
    _refuse("cue_temperature", c["cue_temperature"], "None, or a number above 0", "None is model.temperature")
  if not isinstance(c["cue_stop"], (list, tuple)) or not all(_is_count(one, 0) for one in c["cue_stop"]):
    _refuse("cue_stop", c["cue_stop"], "token ids, e.g. (5, 17)", "() lets every word be a cue")
  if c["keep_least"] is not None and not (_is_count(c["keep_least"], 1) and c["keep_least"] <= c["keep"]):
    _refuse("keep_least", c["keep_least"], f"None, or 1 to {c['keep']} (keep)", "None shows all patches that are kept")
  if c["keep_least"] is not None and c["sparse_fuser"] != "joint":
    _refuse(
      "keep_least", c["keep_least"], f"None with sparse_fuser={c['sparse_fuser']!r}", "set model.sparse_fuser='joint'"
    )
  _check_views(c)
  _check_groups(c)
  _check_encoders(c)
  _check_dense_fuser(c)
  _check_variant(c)
  _check_decoder_pruner(c)
  _check_compressor(c)
  if c["attention"] != "xla" and not c["fused"]:
    _refuse(
      "attention", c["attention"], "'xla' without model.fused: that kernel has no gradient", "load it as a Policy"
    )
  fast.check(c, EXTRA_ROWS)
  _check_skipped(c)
  _check_routing(c)


def _refuse(field: str, got: Any, expected: str, remedy: str) -> None:
  raise refuse("model config", f"{field}={got!r}", expected, remedy)


def _is_count(x: Any, least: int) -> bool:
  return isinstance(x, numbers.Integral) and not isinstance(x, bool) and x >= least


def _is_number(x: Any) -> bool:
  return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _check_views(c: Mapping[str, Any]) -> None:
  """Optional views are some of the views, not all."""
  optional, views = c["optional_views"], c["num_views"]
  is_list = isinstance(optional, (list, tuple)) and all(_is_count(view, 0) and view < views for view in optional)
  if not is_list or len({*optional}) not in (len(optional), 0) or len(optional) >= views:
    _refuse("optional_views", optional, f"some of the views 0 to {views - 1}, not all", "() where all are always there")


def _check_groups(c: Mapping[str, Any]) -> None:
  """Groups hold every action dimension once, under different names."""
  groups, dims = c["groups"], c["action_dim"]
  if groups is None:
    return
  if c["coupler"] not in ("grouped", "paper"):
    _refuse("groups", groups, f"None with coupler={c['coupler']!r}", "set model.coupler='grouped', or no groups")
  pairs = isinstance(groups, (list, tuple)) and all(isinstance(x, (list, tuple)) and len(x) == 2 for x in groups)
  named = pairs and all(isinstance(name, str) and name.isidentifier() for name, _ in groups)
  listed = named and all(isinstance(own, (list, tuple)) and len(own) for _, own in groups)
  if not listed or len({name for name, _ in groups}) < len(groups):
    _refuse("groups", groups, "((name, (dimension, …)), …) with different names", "write them so")
  held = sorted(dim for _, own in groups for dim in own)
  if held != [*range(dims)]:
    _refuse(
      "groups", groups, f"each of the dimensions 0 to {dims - 1} in one group", "correct the groups or action_dim"
    )


def _check_encoders(c: Mapping[str, Any]) -> None:
  """Encoders in channel order, and FiLM on none but them."""
  encoders, film = c["encoders"], c["film"]
  is_list = isinstance(encoders, (list, tuple))
  if not is_list or not encoders or [*encoders] != [name for name in ENCODERS if name in encoders]:
    remedy = "one of them is written ('siglip',); DINOv2's channels come first"
    _refuse("encoders", encoders, f"one or both of {ENCODERS}, in this order", remedy)
  if not isinstance(film, (list, tuple)) or any(name not in encoders for name in film):
    remedy = "() leaves FiLM out; one encoder is written ('dino',)"
    _refuse("film", film, f"some of the encoders {(*encoders,)}", remedy)


def _check_dense_fuser(c: Mapping[str, Any]) -> None:
  """None, 'variant' or pairs of block numbers; whether the blocks exist is `fuser.check_pairs`'s to say."""
  fuser = c["dense_fuser"]
  if fuser is None:
    return
  if len(c["encoders"]) < 2:
    remedy = "set model.dense_fuser=None and model.vision_layer='second_to_last', or both encoders"
    _refuse("dense_fuser", fuser, f"None beside the one encoder {(*c['encoders'],)}", remedy)
  if fuser != "variant" and not _are_pairs(fuser):
    remedy = "None (in a config file, not on the command line) leaves the fuser out"
    _refuse("dense_fuser", fuser, "'variant', None or pairs ((dino block, siglip block), …)", remedy)


def _check_decoder_pruner(c: Mapping[str, Any]) -> None:
  """None, or the fields of a DecoderPruner, in a model that acts in one pass through separate layers."""
  pruner = c["decoder_pruner"]
  if pruner is None:
    return
  known = tuple(field.name for field in dataclasses.fields(DecoderPruner))
  if not isinstance(pruner, Mapping) or not {"block", "keep"} <= {*pruner} <= {*known}:
    _refuse("decoder_pruner", pruner, f"None, or a dict of {known}, block and keep at least", "write it so")
  one, depth = DecoderPruner(**{**pruner, "history": None}), c["variant"]["llm"]["depth"]
  scores = (*ATTENTION, *CONTROLS, LIGHT)
  if one.score not in scores or one.form not in FORMS:
    _refuse("decoder_pruner", pruner, f"score one of {scores}, form one of {FORMS}", "choose some of them")
  least = 1 if one.score in ATTENTION else 0  # a score is of a layer that has run
  if not _is_count(one.block, least) or one.block >= depth or not _is_count(one.keep, 1):
    _refuse("decoder_pruner", pruner, f"block from {least} to {depth - 1}, keep from 1", "change them")
  if c["coupler"] is None:
    _refuse("decoder_pruner", pruner, "None with coupler=None, which speaks in tokens", "set model.coupler")
  if one.score == LIGHT:
    _check_light(one, pruner, c["mask"])
  elif one.noise_steps is not None:
    _refuse("decoder_pruner", pruner, f"noise_steps with score={LIGHT!r} alone", "leave it out")
  elif c["scan"]:
    _refuse("decoder_pruner", pruner, "None with scan=True, whose layers are one loop", "set model.scan=False")
  if pruner.get("history") is not None:
    _check_history(pruner, depth)


def _check_history(pruner: Mapping[str, Any], depth: int) -> None:
  """The fields of a History, of a layer that a decoder pruner of "mean+action" has behind it or in front of it."""
  fields, known = pruner["history"], tuple(field.name for field in dataclasses.fields(History))
  if not isinstance(fields, Mapping) or not {*fields} <= {*known}:
    _refuse("decoder_pruner", pruner, f"a history of None or a dict of {known}", "write it so")
  own, least = History(**fields), pruner["block"] - 1
  if not _is_count(own.window, 1) or not _is_number(own.decay) or not 0 < own.decay <= 1:
    _refuse("decoder_pruner", pruner, "a history's window from 1, decay above 0 and at most 1", "change them")
  if not _is_count(own.block, least) or own.block > depth - 2:
    what = f"a history's block from {least}, the layer of the score, to {depth - 2}, the last but one"
    _refuse("decoder_pruner", pruner, what, "change it")
  if pruner.get("score") != "mean+action":
    _refuse("decoder_pruner", pruner, "a history with score='mean+action' alone", "change one of the two")


def _check_light(one: DecoderPruner, written: Mapping[str, Any], mask: str) -> None:
  """LightVLA's acts on the decoder's input; in training its slots are in no order that a causal mask could go by."""
  if one.block != 0:
    _refuse("decoder_pruner", written, f"block=0 with score={LIGHT!r}", "set it so")
  if mask != "full":
    _refuse("mask", mask, f"'full' with decoder_pruner's score={LIGHT!r}", "set model.mask='full'")
  if one.noise_steps is not None and not _is_count(one.noise_steps, 1):
    _refuse("decoder_pruner", written, "noise_steps from 1, or None", "set it to the updates of the training")


def _check_compressor(c: Mapping[str, Any]) -> None:
  """None, or a kind with its numbers."""
  fields = c["compressor"]
  if fields is None:
    return
  each = {kind: ", ".join(f"{number}=6" for number in numbers) for kind, (numbers, _) in compressor.KINDS.items()}
  written = " or ".join(f"dict(kind={kind!r}, {numbers})" for kind, numbers in each.items())
  kind = fields.get("kind") if isinstance(fields, Mapping) else None
  numbers = compressor.KINDS[kind][0] if kind in compressor.KINDS else ()
  if not numbers or {*fields} != {"kind", *numbers} or not all(_is_count(fields[number], 1) for number in numbers):
    _refuse("compressor", fields, f"None, {written}", "write it so")


def _check_skipped(c: Mapping[str, Any]) -> None:
  """Some of the decoder's layers, separate ones, and neither all nor the one whose attention a pruner reads."""
  skipped, depth = c["skip_layers"], c["variant"]["llm"]["depth"]
  known = isinstance(skipped, (list, tuple)) and all(_is_count(layer, 0) and layer < depth for layer in skipped)
  if not known or len({*skipped}) < len(skipped):
    _refuse("skip_layers", skipped, f"different ones of the layers 0 to {depth - 1}", "() leaves none out")
  if skipped and c["scan"]:
    _refuse("skip_layers", skipped, "() with scan=True, whose layers are one loop", "set model.scan=False")
  pruner = decoder_pruner.from_config(c["decoder_pruner"])
  first = 0 if pruner is None else pruner.block
  if {*range(first, depth)} <= {*skipped}:
    _refuse("skip_layers", skipped, f"one of the layers {first} to {depth - 1} left", "leave one of them in")
  read = [] if pruner is None or not pruner.parts else [first - 1]
  read += [] if pruner is None or pruner.history is None else [pruner.history.block]
  if missing := [layer for layer in read if layer in skipped]:
    _refuse("skip_layers", skipped, f"not layer {missing[0]}, whose attention decoder_pruner reads", "leave it in")


def _check_routing(c: Mapping[str, Any]) -> None:
  """None, or two shares, in a model that acts in one pass through separate layers and prunes in no other way there."""
  routing = c["routing"]
  if routing is None:
    return
  is_written = isinstance(routing, Mapping) and {*routing} == {"least", "most"}
  if not is_written or not all(_is_number(x) and 0 < x <= 1 for x in routing.values()):
    _refuse("routing", routing, "None, or dict(least, most) of shares above 0, 1 at most", "write it so")
  if c["coupler"] is None or c["decoder_pruner"] is not None:
    _refuse("routing", routing, "None with coupler=None or a decoder_pruner", "leave one of them out")
  if c["scan"]:
    _refuse("routing", routing, "None with scan=True, whose layers are one loop", "set model.scan=False")


def _are_pairs(x: Any) -> bool:
  pairs = isinstance(x, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in x)
  return pairs and all(isinstance(block, numbers.Integral) for pair in x for block in pair)


def _check_variant(c: Mapping[str, Any]) -> None:
  """A row of sizes has every part that this model has, with every size and nothing unknown."""
  row, remedy = c["variant"], "copy a row of semanticvla.VARIANTS and change its numbers"
  uses_text = any(KINDS[kind].reads_words for name in c["encoders"] for kind in kinds(c[f"{name}_pruner"]))
  parts = [*c["encoders"], *(["text"] if uses_text else []), "llm"]
  needed = ["image", "patch", *parts, *(["pairs"] if c["dense_fuser"] == "variant" else [])]
  if missing := [name for name in needed if name not in row or row[name] is None]:
    raise refuse("model config", f"a variant without {missing}", needed, remedy)
  for part in parts:
    missing = [name for name in SIZES[part] if name not in row[part]]
    unknown = [name for name in row[part] if name not in (*SIZES[part], *OPTIONS[part])]
    if missing or unknown:
      raise refuse(
        "model config",
        f"variant.{part} without {missing} and with unknown {unknown}",
        f"{SIZES[part]} and perhaps {OPTIONS[part]}",
        remedy,
      )
  sizes = {name: row[name] for name in ("image", "patch")}
  sizes |= {f"{part}.{name}": row[part][name] for part in parts for name in SIZES[part]}
  for name, size in sizes.items():
    if not _is_count(size, 1):
      _refuse(f"variant.{name}", size, "a whole number from 1", remedy)
