"""Reads the settings in a source's own files, tower by tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from semanticvla_jax.convert.detect import Source
from semanticvla_jax.convert.io.source_files import SETTINGS, read_object
from semanticvla_jax.convert.rules.settings_fields import (
  DINO,
  IMAGES,
  LLAMA,
  OPENVLA,
  PROCESSOR,
  SIGLIP,
  TEXT,
  TIMM,
  Field,
)
from semanticvla_jax.errors import refuse

TABLES = {"dino": DINO, "siglip": SIGLIP, "text": TEXT, "llm": LLAMA}


class Section(NamedTuple):
  """The part of a file about one part of the model: its settings (name, value, where) and the raw fields."""

  part: str
  table: Mapping[str, Field]
  stated: tuple[tuple[str, Any, str], ...]
  fields: dict
  where: str


def sections(source: Source, say: Callable[[str], None] = lambda line: None) -> Iterator[Section]:
  """Yields the settings of the source's files, tower by tower."""
  for part, fixed in source.layout.fixed.items():
    yield make_section(part, {name: TABLES[part][name] for name in fixed}, fixed, f"the class of {source.kind}")
  if not source.layout.config:
    return
  for path, content in read_files(source, "config.json", say):
    yield from CONFIGS[source.layout.config](source, path, content)
  for name in SETTINGS[1:]:
    for path, content in read_files(source, name, say):
      content = content if name == SETTINGS[1] else _nested(content, "image_processor", path)
      yield from _of_processor(source, str(path), content)


def read_files(
  source: Source, name: str, say: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[Path, dict]]:
  """The files of a name, read. Raises ValueError where a config.json is of another model."""
  classes = source.layout.model_types
  others = {path.parent for path in source.beside if path.name == "config.json" and not _fits(path, classes)}
  for path in (*source.settings, *source.beside):
    if path.name != name:
      continue
    if path in source.beside and path.parent in others:
      say(f"{path} is not read: it belongs to another model than the named files")
      continue
    if name == "config.json" and not _fits(path, classes):
      raise refuse(
        f"{path} is of another model",
        f"model_type {read_object(path)['model_type']!r} next to weights of {source.kind}",
        f"{' or '.join(classes) or 'none'}",
        "name the files of the weights instead of their folder if it does not describe them",
      )
    try:
      content = read_object(path)
    except ValueError as error:
      if name == "config.json":
        raise
      say(f"WARNING: the constants of the images are not compared: {error}")  # no weight depends on this file
      continue
    yield path, content


def _fits(path: Path, classes: Sequence[str]) -> bool:
  return read_object(path).get("model_type") in (None, *classes)


def make_section(part: str, table: Mapping[str, Field], fields: Mapping[str, Any], where: str) -> Section:
  stated = stated_by_llama(fields, where) if table is LLAMA else _stated(table, fields, where)
  return Section(part, table, (*stated,), dict(fields), where)


def _stated(table: Mapping[str, Field], fields: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any, str]]:
  return ((name, fields[name], where) for name in table if fields.get(name) is not None)


def stated_by_llama(fields: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any, str]]:
  """The rotary embedding as transformers 5 (`rope_parameters`) and 4 (`rope_theta`, `rope_scaling`) write it."""
  yield from _stated(LLAMA, fields, where)
  for name in ("rope_parameters", "rope_scaling"):
    rope, inside = fields.get(name), f"{name} of {where}"
    if not rope:
      continue
    if not isinstance(rope, dict) or any(isinstance(x, dict) for x in rope.values()):
      yield "rope_type", rope, inside
      continue
    yield "rope_type", rope.get("rope_type", rope.get("type", "default")), inside
    yield from ((key, rope[key], inside) for key in ("rope_theta", "partial_rotary_factor") if rope.get(key))


def _nested(content: Mapping[str, Any], name: str, path: Path) -> dict:
  inside = content.get(name)
  if not isinstance(inside, (dict, type(None))):
    raise refuse(f"{path} is damaged", f"{name}={str(inside)[:60]!r}", "an object", "download it again")
  return inside or {}


def _of_openvla(source: Source, path: Path, content: dict) -> Iterator[Section]:
  text = _nested(content, "text_config", path)
  yield make_section("model", OPENVLA, content, str(path))
  yield make_section("model", {"pad_token_id": OPENVLA["pad_token_id"]}, text, f"text_config of {path}")
  yield make_section("llm", LLAMA, text, f"text_config of {path}")
  yield from _overrides(content, path)


def _of_timm(source: Source, path: Path, content: dict) -> Iterator[Section]:
  part = source.layout.towers[0].name
  act = _nested(content, "model_args", path).get("act_layer")
  if act is not None:
    yield make_section(part, TIMM[part], {"hidden_act": act}, f"model_args.act_layer of {path}")
  pretrained = _nested(content, "pretrained_cfg", path) or content
  constants = {name: pretrained[name] for name in ("mean", "std") if name in pretrained}
  yield make_section(part, IMAGES[part], constants, f"pretrained_cfg of {path}")


def _of_tower(source: Source, path: Path, content: dict) -> Iterator[Section]:
  """Of a file that is about the one tower of its layout."""
  part = source.layout.towers[0].name
  yield make_section(part, TABLES[part], content, str(path))


def _overrides(content: Mapping[str, Any], path: Path) -> Iterator[Section]:
  """OpenVLA's towers are timm's, whose GELU is exact where the file does not name another for one of them."""
  acts = content.get("timm_override_act_layers")
  acts = [None, None] if acts is None else acts
  if not isinstance(acts, list) or len(acts) != 2:
    raise refuse(
      f"{path} is of another model",
      f"timm_override_act_layers={acts!r}",
      "one for each of two encoders",
      "correct the file if it does not describe these weights",
    )
  for part, act, table in zip(("dino", "siglip"), acts, (DINO, SIGLIP)):
    fields = {"hidden_act": "gelu" if act is None else act}
    yield make_section(part, {"hidden_act": table["hidden_act"]}, fields, f"timm_override_act_layers of {path}")


def _of_siglip(source: Source, path: Path, content: dict) -> Iterator[Section]:
  """Of both towers in one file, or of one alone."""
  alone = {"siglip_vision_model": "siglip", "siglip_text_model": "text"}.get(content.get("model_type"))
  if alone is None and not any(name in content for name in ("model_type", "vision_config", "text_config")):
    alone = source.prefixes[0].rstrip("/")
  for part, table, name in (("siglip", SIGLIP, "vision_config"), ("text", TEXT, "text_config")):
    if alone is None:
      yield make_section(part, table, _nested(content, name, path), f"{name} of {path}")
    elif alone == part:
      yield make_section(part, table, content, str(path))


def _of_processor(source: Source, where: str, content: Mapping[str, Any]) -> Iterator[Section]:
  if not source.layout.whole:
    renamed = {"mean": "image_mean", "std": "image_std"}
    fields = {name: content.get(renamed.get(name, name)) for name in IMAGES["dino"] if name != "size"}
    for part in ("dino", "siglip"):
      if f"{part}/" in source.prefixes:
        yield make_section(part, IMAGES[part], fields, where)
    return
  if content:
    yield make_section("model", PROCESSOR, content, where)
  for name, fields in (
    ("means", {"mean": lambda x: x}),
    ("stds", {"std": lambda x: x}),
    ("input_sizes", {"size": lambda x: x}),
    ("tvf_normalize_params", {"mean": lambda x: x.get("mean"), "std": lambda x: x.get("std")}),
    ("tvf_resize_params", {"size": lambda x: x.get("size")}),
    ("tvf_crop_params", {"size": lambda x: x.get("output_size")}),
  ):
    several = content.get(name)
    if several is None:
      continue
    try:
      pairs = [(part, {n: f(x) for n, f in fields.items()}) for part, x in zip(IMAGES, several, strict=True)]
    except (ValueError, TypeError, AttributeError) as error:
      raise refuse(
        f"{where} is of another model",
        f"{name}={str(several)[:120]}",
        "one for each of two encoders",
        "correct the file if it does not describe these weights",
      ) from error
    for part, values in pairs:
      yield make_section(part, IMAGES[part], values, f"{name} of {where}")


# How a layout writes its config.json (Layout.config).
CONFIGS: dict[str, Callable[[Source, Path, dict], Iterator[Section]]] = {
  "openvla": _of_openvla,
  "siglip": _of_siglip,
  "timm": _of_timm,
  "tower": _of_tower,
}
