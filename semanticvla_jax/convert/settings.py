"""How a source's own files say that its weights are computed with, beside what this package's model does.

config.json and the processor's files hold much that leaves every shape alone: the rotary base, epsilons, activations,
heads, bins, the constants of the images. A table a tower says which of their fields change numbers and what our model
does. What the model has a field for is carried into its config; whatever else differs is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from semanticvla_jax.convert.detect import SETTINGS, VLA, Source, read_object
from semanticvla_jax.models.coupler import BINS, EXTRA_ROWS
from semanticvla_jax.models.semanticvla import SemanticVLA, build, resolve
from semanticvla_jax.models.vit import NORM_EPS

UNKNOWN = object()  # nothing to compare with
PROMPT = 64  # tokens of a prompt that the tokeniser must not cut
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # which openvla-7b stores through bfloat16
_GELUS = {
  **dict.fromkeys(("gelu", "gelu_python"), "erf"),
  **dict.fromkeys(("gelu_pytorch_tanh", "gelu_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh"), "tanh"),
  "gelu_accurate": "tanh",
}
ACTIVATIONS = _GELUS | dict.fromkeys(("silu", "swish"), "silu")
NAMES = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}  # ours: transformers'
_CLASSES = {  # model_type of a config.json that describes these weights
  **dict.fromkeys(VLA, ("openvla", "prismatic")),
  "SigLIP, Hugging Face": ("siglip", "siglip_vision_model", "siglip_text_model"),
  "DINOv2, Hugging Face": ("dinov2_with_registers",),
  "Llama, Hugging Face": ("llama",),
  "SigLIP, timm": ("timm_wrapper",),
  "DINOv2, timm": ("timm_wrapper",),
  "SigLIP, big_vision": (),
}


class Field(NamedTuple):
  """A field of a file that changes numbers.

  Attributes:
    ours: what our model does, in our words; UNKNOWN where it does nothing with it.
    default: what the field's class takes where the file leaves it out; UNKNOWN to compare nothing then.
    read: a value of the file in our words; raises ValueError, TypeError or KeyError at another kind of value.
    carry: where the model's config holds it, () where nothing does.
    may: the values that can be carried, () for all.
    alike: whether (theirs, ours) come to the same.
    words: how what is expected is said.
  """

  ours: Callable[[SemanticVLA], Any]
  default: Any = UNKNOWN
  read: Callable[[Any], Any] = lambda x: x
  carry: tuple[str, ...] = ()
  may: tuple = ()
  alike: Callable[[Any, Any], bool] = lambda theirs, ours: theirs == ours
  words: str = "{}"


class _Sized(NamedTuple):
  """A default that holds where the width is that of the class, or of a file which says it."""

  value: int
  width: int


class Said(NamedTuple):
  """What a file says: as it is written, in our words, and where."""

  raw: Any
  value: Any
  where: str


class Section(NamedTuple):
  """The part of a file that is about one part of the model: what it says (name, value, where) and the raw fields."""

  part: str
  table: Mapping[str, Field]
  said: tuple[tuple[str, Any, str], ...]
  fields: dict
  where: str


class Difference(NamedTuple):
  """A field in which a source and our model differ."""

  name: str
  field: Field
  theirs: Said
  ours: Any

  @property
  def text(self) -> str:
    return f"{self.name}={self.theirs.raw!r} ({self.theirs.where})"

  @property
  def expected(self) -> str:
    ours = NAMES.get(self.ours, self.ours) if isinstance(self.ours, str) else self.ours
    return f"{self.name} {self.field.words.format(repr(ours))}"


def _number(x: Any) -> int | float:
  if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) or x <= 0:
    raise ValueError("expected a number above 0")
  return x


def _activation(x: Any) -> Any:
  return ACTIVATIONS.get(x, x)


def _numbers(x: Any) -> tuple[float, ...]:
  return tuple(map(float, [x] * 3 if isinstance(x, (int, float)) else x))


def _size(x: Any) -> tuple[int, ...]:
  """(height, width) of 224, [224, 224], [3, 224, 224] or {"height": …, "width": …}."""
  if isinstance(x, dict):
    x = (x["height"], x["width"])
  return (int(x), int(x)) if isinstance(x, (int, float)) else tuple(map(int, x))[-2:]


def _close(theirs: Sequence[float], ours: Sequence[float]) -> bool:
  return len(theirs) == len(ours) and all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(theirs, ours))


def _gelu(tower: str, default: Any, carry: tuple[str, ...] = ()) -> Field:
  return Field(lambda m: getattr(m, tower).gelu, default, _activation, carry, ("erf", "tanh"))


def _heads(tower: str, default: Any) -> Field:
  return Field(lambda m: getattr(m, tower).num_heads, default)


def _norm_eps() -> Field:
  return Field(lambda m: NORM_EPS, NORM_EPS, _number)


_PLAIN = {"quantization_config": Field(lambda m: None)}  # weights that are not what is stored
LLAMA = _PLAIN | {
  "model_type": Field(lambda m: "llama"),
  "rms_norm_eps": Field(lambda m: m.llm.eps, 1e-6, _number, ("variant", "llm", "eps")),
  "rope_theta": Field(lambda m: m.llm.theta, 10000.0, _number, ("variant", "llm", "theta")),
  "rope_type": Field(lambda m: "default", "default"),
  "partial_rotary_factor": Field(lambda m: 1.0, 1.0),
  "hidden_act": Field(lambda m: "silu", "silu", _activation),
  "num_attention_heads": _heads("llm", _Sized(32, 4096)),
  "num_key_value_heads": _heads("llm", UNKNOWN),
  "head_dim": Field(lambda m: m.llm.width // m.llm.num_heads),
  "attention_bias": Field(lambda m: False, False),
  "mlp_bias": Field(lambda m: False, False),
  "tie_word_embeddings": Field(lambda m: False if m.coupler is None else UNKNOWN, False),
}
SIGLIP = _PLAIN | {
  "hidden_act": _gelu("siglip", "gelu_pytorch_tanh", ("siglip_gelu",)),
  "layer_norm_eps": _norm_eps(),
  "num_attention_heads": _heads("siglip", _Sized(12, 768)),
}
TEXT = _PLAIN | {
  "hidden_act": _gelu("text", "gelu_pytorch_tanh", ("variant", "text", "gelu")),
  "layer_norm_eps": _norm_eps(),
  "num_attention_heads": _heads("text", _Sized(12, 768)),
}
DINO = _PLAIN | {
  "hidden_act": _gelu("dino", "gelu"),
  "layer_norm_eps": _norm_eps(),
  "num_attention_heads": _heads("dino", _Sized(12, 768)),
  "qkv_bias": Field(lambda m: True, True),
  "use_swiglu_ffn": Field(lambda m: False, False),
}
TIMM = {
  name: {"hidden_act": table["hidden_act"]._replace(default=UNKNOWN)}
  for name, table in (("dino", DINO), ("siglip", SIGLIP))
}
OPENVLA = _PLAIN | {
  "arch_specifier": Field(lambda m: "fused-gelu-mlp", read=lambda x: x.split("+")[-1]),
  "use_fused_vision_backbone": Field(lambda m: True),
  "image_resize_strategy": Field(lambda m: "resize-naive"),
  "vision_backbone_id": Field(lambda m: "dinosiglip", read=lambda x: x.split("-")[0]),
  "llm_backbone_id": Field(lambda m: "llama2", read=lambda x: x.split("-")[0].replace("vicuna", "llama2")),
  "timm_model_ids": Field(
    lambda m: ("dinov2", "siglip"),
    read=lambda ids: tuple(next((name for name in ("dinov2", "siglip") if name in x), x) for x in ids),
  ),
  "image_sizes": Field(lambda m: ((m.dino.image,) * 2, (m.siglip.image,) * 2), read=lambda x: tuple(map(_size, x))),
  "n_action_bins": Field(lambda m: BINS),
  "pad_to_multiple_of": Field(lambda m: EXTRA_ROWS),
  "pad_token_id": Field(lambda m: m.spoken_vocab),
  "llm_max_length": Field(lambda m: PROMPT, read=_number, alike=lambda x, y: x >= y, words="{} or more"),
}
PROCESSOR = {  # of OpenVLA's images, whole
  "image_resize_strategy": OPENVLA["image_resize_strategy"],
  "use_fused_vision_backbone": OPENVLA["use_fused_vision_backbone"],
  "tvf_do_letterbox": Field(lambda m: False),
}


def _images(tower: str) -> dict[str, Field]:
  """Of the images of one tower."""

  def constant(name: str, imagenet: Sequence[float]) -> Field:
    accepted = (lambda x, y: _close(x, y) or _close(x, imagenet)) if tower == "dino" else _close
    return Field(lambda m: getattr(getattr(m, tower), name), read=_numbers, alike=accepted)

  return {
    "mean": constant("mean", IMAGENET[0]),
    "std": constant("std", IMAGENET[1]),
    "size": Field(lambda m: (getattr(m, tower).image,) * 2, read=_size),
    "rescale_factor": Field(lambda m: 1 / 255, read=_number, alike=lambda x, y: math.isclose(x, y, rel_tol=1e-5)),
    "do_rescale": Field(lambda m: True),
    "do_normalize": Field(lambda m: True),
  }


IMAGES = {"dino": _images("dino"), "siglip": _images("siglip")}


def carry(
  source: Source, config: Mapping, only: str | None = None, say: Callable[[str], None] = lambda line: None
) -> tuple[dict, list[str]]:
  """The config with what the source's own files say of its model, and a line for each field that this changed.

  Args:
    source: recognised files.
    config: {"model": …, …}.
    only: the one tower that is wanted, as in `plan.make_plan`.
    say: is called with a line for each field that cannot be checked, and with those that are returned.

  Raises:
    ValueError: the files say what our model does not do, or contradict themselves.
  """
  model, lines = dict(config["model"]), []
  prefixes = source.prefixes if only is None else (f"{only}/",)
  found = differences(source, build(model), prefixes, say)
  if refused := [d for d in found if not _carried(d)]:
    expected = ", ".join(d.expected for d in refused)
    raise ValueError(
      f"Source computes otherwise than this model: got {', '.join(d.text for d in refused)}; expected {expected}; "
      "use the config of that model or another checkpoint, or mend the file where it does not describe these weights."
    )
  for d in found:
    _set(model, d.field.carry, d.theirs.value)
    place = ".".join(d.field.carry)
    lines.append(f"carried into the policy's config: {place}={d.theirs.value!r}, not {d.ours!r}, by {d.text}")
    say(lines[-1])
  return {**config, "model": model}, lines


def _carried(d: Difference) -> bool:
  return bool(d.field.carry) and (not d.field.may or d.theirs.value in d.field.may)


def _set(model: dict, place: tuple[str, ...], value: Any) -> None:
  if place[0] == "variant":
    row = copy.deepcopy(resolve(model)["variant"])
    row[place[1]] = {**row[place[1]], place[2]: value}
    model["variant"] = row
  else:
    model[place[0]] = value


def differences(
  source: Source, model: SemanticVLA, prefixes: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> list[Difference]:
  """Every field in which the source's own files and a model differ.

  Args:
    source, model: what to compare.
    prefixes: beginnings of our paths that count, ("",) for a whole model.
    say: is given a line where a file is not read, or there is none.

  Raises:
    ValueError: a file is damaged, of another model, or contradicts itself or another.
  """
  parts = [*sections(source, say)]
  if not any(s.table is not PROCESSOR and "mean" not in s.table for s in parts):
    say("no file of the source says its heads, epsilons, activation and rotary base: they are taken to be the config's")
  wanted = [s for s in parts if prefixes == ("",) or f"{s.part}/" in prefixes]
  wanted = [s for s in wanted if s.part == "model" or getattr(model, s.part) is not None]
  out = []
  for part in dict.fromkeys(s.part for s in wanted):
    own = [s for s in wanted if s.part == part]
    said = _said(own)
    for name, field in {name: field for s in own for name, field in s.table.items()}.items():
      theirs, ours = said.get(name) or _default(name, field, own, model), field.ours(model)
      if theirs is not None and ours is not UNKNOWN and not field.alike(theirs.value, ours):
        out.append(Difference(name, field, theirs, ours))
  _check_top(source, parts)
  return out


def _default(name: str, field: Field, own: Sequence[Section], model: SemanticVLA) -> Said | None:
  """What the class takes where no file has the field; None where this is not known."""
  default, where = field.default, next((s.where for s in own if name in s.table), "")
  if isinstance(default, _Sized):
    width = next((s.fields["hidden_size"] for s in own if s.fields.get("hidden_size")), default.width)
    default = default.value if width == getattr(model, own[0].part).width else UNKNOWN
  return None if default is UNKNOWN else Said(default, field.read(default), f"the default where {where} has none")


def _said(own: Sequence[Section]) -> dict[str, Said]:
  """{field: what is said of it} by every section of one part. Raises ValueError where two say different things."""
  out: dict[str, Said] = {}
  for section in own:
    for name, raw, where in section.said:
      new = _read(name, section.table[name], raw, where)
      old = out.setdefault(name, new)
      if old.value != new.value and not section.table[name].alike(new.value, old.value):
        raise _contradiction(name, old, new)
  return out


def _read(name: str, field: Field, raw: Any, where: str) -> Said:
  try:
    return Said(raw, field.read(raw), where)
  except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
    raise ValueError(
      f"{where} is damaged: got {name}={repr(raw)[:80]}; expected a value as transformers writes it ({error}); "
      "mend the file, or download it again."
    ) from error


def _contradiction(name: str, first: Said, second: Said) -> ValueError:
  return ValueError(
    f"The source's own files disagree: got {name}={first.raw!r} ({first.where}) and {second.raw!r} ({second.where}); "
    "expected one value; mend the one that does not describe these weights."
  )


def _check_top(source: Source, parts: Sequence[Section]) -> None:
  """Raises ValueError where OpenVLA's config.json sets outside its text_config what the text_config does not set."""
  own = [s for s in parts if s.part == "llm"]
  if source.kind not in VLA or not own:
    return
  said = _said(own)
  for path, content in _files(source, "config.json"):
    for name, raw, where in _llama_said(content, str(path)):
      if name in ("model_type", "tie_word_embeddings", "quantization_config"):
        continue
      new, default = _read(name, LLAMA[name], raw, where), LLAMA[name].default
      fallback = UNKNOWN if isinstance(default, _Sized) else default
      old = said.get(name, Said(fallback, fallback, f"the default where {own[0].where} has none"))
      if old.value is not UNKNOWN and old.value != new.value:
        raise _contradiction(name, new, old)


def sections(source: Source, say: Callable[[str], None] = lambda line: None) -> Iterator[Section]:
  """What the source's files say, a tower at a time."""
  if source.kind == "SigLIP, big_vision":  # the class has one activation, and no file
    for part, table in (("siglip", SIGLIP), ("text", TEXT)):
      fields = {"hidden_act": "gelu_pytorch_tanh"}
      yield _section(part, {"hidden_act": table["hidden_act"]}, fields, "big_vision's models")
    return
  for path, content in _files(source, "config.json", say):
    yield from _of_config(source, path, content)
  for name in SETTINGS[1:]:
    for path, content in _files(source, name, say):
      content = content if name == SETTINGS[1] else _nested(content, "image_processor", path)
      yield from _of_processor(source, str(path), content)


def _files(source: Source, name: str, say: Callable[[str], None] = lambda line: None) -> Iterator[tuple[Path, dict]]:
  """The files of a name, read. Raises ValueError where a config.json is of another model."""
  classes = _CLASSES[source.kind]
  others = {path.parent for path in source.beside if path.name == "config.json" and not _fits(path, classes)}
  for path in (*source.settings, *source.beside):
    if path.name != name:
      continue
    if path in source.beside and path.parent in others:
      say(f"{path} is not read: it belongs to another model than the files that were named")
      continue
    if name == "config.json" and not _fits(path, classes):
      raise ValueError(
        f"{path} is of another model: got model_type {read_object(path)['model_type']!r} beside weights of "
        f"{source.kind}; expected {' or '.join(classes) or 'none'}; name the files of the weights instead of their "
        "folder where it does not describe them."
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


def _section(part: str, table: Mapping[str, Field], fields: Mapping[str, Any], where: str) -> Section:
  said = _llama_said(fields, where) if table is LLAMA else _plain_said(table, fields, where)
  return Section(part, table, (*said,), dict(fields), where)


def _plain_said(table: Mapping[str, Field], fields: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any, str]]:
  return ((name, fields[name], where) for name in table if fields.get(name) is not None)


def _llama_said(fields: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any, str]]:
  """The rotary embedding as transformers 5 (`rope_parameters`) and 4 (`rope_theta`, `rope_scaling`) write it."""
  yield from _plain_said(LLAMA, fields, where)
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
    raise ValueError(f"{path} is damaged: got {name}={str(inside)[:60]!r}; expected an object; download it again.")
  return inside or {}


def _of_config(source: Source, path: Path, content: dict) -> Iterator[Section]:
  where = str(path)
  if source.kind in VLA:
    text = _nested(content, "text_config", path)
    yield _section("model", OPENVLA, content, where)
    yield _section("model", {"pad_token_id": OPENVLA["pad_token_id"]}, text, f"text_config of {path}")
    yield _section("llm", LLAMA, text, f"text_config of {path}")
    yield from _overrides(content, path)
  elif source.kind == "SigLIP, Hugging Face":
    yield from _of_siglip(source, path, content)
  elif source.kind.endswith("timm"):
    part = source.prefixes[0].rstrip("/")
    act = _nested(content, "model_args", path).get("act_layer")
    if act is not None:
      yield _section(part, TIMM[part], {"hidden_act": act}, f"model_args.act_layer of {path}")
    pretrained = _nested(content, "pretrained_cfg", path) or content
    constants = {name: pretrained[name] for name in ("mean", "std") if name in pretrained}
    yield _section(part, IMAGES[part], constants, f"pretrained_cfg of {path}")
  else:
    part = source.prefixes[0].rstrip("/")
    yield _section(part, LLAMA if part == "llm" else DINO, content, where)


def _overrides(content: Mapping[str, Any], path: Path) -> Iterator[Section]:
  """OpenVLA's towers are timm's, whose GELU is exact where the file does not name another for one of them."""
  acts = content.get("timm_override_act_layers")
  acts = [None, None] if acts is None else acts
  if not isinstance(acts, list) or len(acts) != 2:
    raise ValueError(
      f"{path} is of another model: got timm_override_act_layers={acts!r}; expected one for each of two encoders; mend "
      "the file where it does not describe these weights."
    )
  for part, act, table in zip(("dino", "siglip"), acts, (DINO, SIGLIP)):
    fields = {"hidden_act": "gelu" if act is None else act}
    yield _section(part, {"hidden_act": table["hidden_act"]}, fields, f"timm_override_act_layers of {path}")


def _of_siglip(source: Source, path: Path, content: dict) -> Iterator[Section]:
  """Of both towers in one file, or of one alone."""
  alone = {"siglip_vision_model": "siglip", "siglip_text_model": "text"}.get(content.get("model_type"))
  if alone is None and not any(name in content for name in ("model_type", "vision_config", "text_config")):
    alone = source.prefixes[0].rstrip("/")
  for part, table, name in (("siglip", SIGLIP, "vision_config"), ("text", TEXT, "text_config")):
    if alone is None:
      yield _section(part, table, _nested(content, name, path), f"{name} of {path}")
    elif alone == part:
      yield _section(part, table, content, str(path))


def _of_processor(source: Source, where: str, content: Mapping[str, Any]) -> Iterator[Section]:
  if source.kind not in VLA:
    renamed = {"mean": "image_mean", "std": "image_std"}
    fields = {name: content.get(renamed.get(name, name)) for name in IMAGES["dino"] if name != "size"}
    for part in ("dino", "siglip"):
      if f"{part}/" in source.prefixes:
        yield _section(part, IMAGES[part], fields, where)
    return
  if content:
    yield _section("model", PROCESSOR, content, where)
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
      raise ValueError(
        f"{where} is of another model: got {name}={str(several)[:120]}; expected one for each of two encoders; mend "
        "the file where it does not describe these weights."
      ) from error
    for part, values in pairs:
      yield _section(part, IMAGES[part], values, f"{name} of {where}")


def fields(source: Source, part: str) -> dict | None:
  """A tower's own fields as its files hold them, one file over the other; None where no file is about it."""
  own = [s for s in sections(source) if s.part == part and "mean" not in s.table]
  merged: dict[str, Any] = {}
  for section in own:
    merged |= {name: value for name, value in section.fields.items() if value is not None}
  return merged if own else None


def stated(config: Mapping[str, Any], model: SemanticVLA) -> dict:
  """An OpenVLA config.json that says what a model computes with, where it said something else or left it out."""
  out, text = dict(config), dict(config.get("text_config") or {})
  said = _said([_section("llm", LLAMA, text, "text_config")])
  for name in ("rms_norm_eps", "rope_theta"):
    ours = LLAMA[name].ours(model)
    if (said[name].value if name in said else LLAMA[name].default) != ours:
      text = {"model_type": "llama"} | text | {name: ours}
      for rope in ("rope_parameters", "rope_scaling"):
        if name in (text.get(rope) or {}):
          text[rope] = {**text[rope], name: ours}
  if text:
    out["text_config"] = text
  acts = config.get("timm_override_act_layers") or [None, None]
  if model.siglip is not None and _activation(acts[-1] or "gelu") != model.siglip.gelu:
    out["timm_override_act_layers"] = [acts[0], "gelu_tanh" if model.siglip.gelu == "tanh" else None]
  return out
