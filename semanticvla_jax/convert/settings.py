"""Compares the settings in a source's own files with what the model computes.

config.json and the processor's files hold many settings that change no shape: the rotary base, epsilons, activations,
heads, bins, image mean and std. rules/settings_fields.py lists, for each tower, the fields that change numbers and what
the model does. A setting that the model's config can hold is carried into it; any other difference is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from semanticvla_jax.convert.detect import Source
from semanticvla_jax.convert.rules.settings_fields import (
  LLAMA,
  NAMES,
  PROCESSOR,
  UNKNOWN,
  Field,
  Sized,
  activation,
)
from semanticvla_jax.convert.settings_files import Section, make_section, read_files, sections, stated_by_llama
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.semanticvla import SemanticVLA, build, resolve


class Stated(NamedTuple):
  """A setting in a file: as it is written, in this package's terms, and where."""

  raw: Any
  value: Any
  where: str


class Difference(NamedTuple):
  """A setting in which a source and the model differ."""

  name: str
  field: Field
  theirs: Stated
  ours: Any

  @property
  def text(self) -> str:
    return f"{self.name}={self.theirs.raw!r} ({self.theirs.where})"

  @property
  def expected(self) -> str:
    ours = NAMES.get(self.ours, self.ours) if isinstance(self.ours, str) else self.ours
    return f"{self.name} {self.field.words.format(repr(ours))}"


def carry(
  source: Source, config: Mapping, only: str | None = None, say: Callable[[str], None] = lambda line: None
) -> tuple[dict, list[str]]:
  """Returns the config with the settings of the source's own files, and a line for each field that this changed.

  Args:
    source: recognized files.
    config: {"model": …, …}.
    only: the one tower that is wanted, as in `plan.Options`.
    say: is called with a line for each field that cannot be checked, and with those that are returned.

  Raises:
    ValueError: the files have settings that the model cannot compute, or contradict each other.
  """
  model, lines = dict(config["model"]), []
  prefixes = source.prefixes if only is None else (f"{only}/",)
  found = differences(source, build(model), prefixes, say)
  if refused := [d for d in found if not _carried(d)]:
    expected = ", ".join(d.expected for d in refused)
    raise refuse(
      "The source's settings do not match the model",
      f"{', '.join(d.text for d in refused)}",
      f"{expected}",
      "use the config of that model or another checkpoint, or correct the file if it does not describe these weights",
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
  """Returns every setting in which the source's own files and a model differ.

  Args:
    source, model: what to compare.
    prefixes: beginnings of our paths that count, ("",) for a whole model.
    say: is called with a line where a file is not read, or no file has settings.

  Raises:
    ValueError: a file is damaged, of another model, or contradicts itself or another.
  """
  parts = [*sections(source, say)]
  if not any(s.table is not PROCESSOR and "mean" not in s.table for s in parts):
    say("no file of the source has its heads, epsilons, activation and rotary base: those of the config are assumed")
  wanted = [s for s in parts if prefixes == ("",) or f"{s.part}/" in prefixes]
  wanted = [s for s in wanted if s.part == "model" or getattr(model, s.part) is not None]
  out = []
  for part in dict.fromkeys(s.part for s in wanted):
    own = [s for s in wanted if s.part == part]
    stated = _stated(own)
    for name, field in {name: field for s in own for name, field in s.table.items()}.items():
      theirs, ours = stated.get(name) or _default(name, field, own, model), field.ours(model)
      if theirs is not None and ours is not UNKNOWN and not field.alike(theirs.value, ours):
        out.append(Difference(name, field, theirs, ours))
  _check_top(source, parts)
  return out


def _default(name: str, field: Field, own: Sequence[Section], model: SemanticVLA) -> Stated | None:
  """What the class takes where no file has the field; None where this is not known."""
  default, where = field.default, next((s.where for s in own if name in s.table), "")
  if isinstance(default, Sized):
    width = next((s.fields["hidden_size"] for s in own if s.fields.get("hidden_size")), default.width)
    default = default.value if width == getattr(model, own[0].part).width else UNKNOWN
  return None if default is UNKNOWN else Stated(default, field.read(default), f"the default where {where} has none")


def _stated(own: Sequence[Section]) -> dict[str, Stated]:
  """{field: setting} of all sections of one part. Raises ValueError where two sections contradict each other."""
  out: dict[str, Stated] = {}
  for section in own:
    for name, raw, where in section.stated:
      new = _read(name, section.table[name], raw, where)
      old = out.setdefault(name, new)
      if old.value != new.value and not section.table[name].alike(new.value, old.value):
        raise _contradiction(name, old, new)
  return out


def _read(name: str, field: Field, raw: Any, where: str) -> Stated:
  try:
    return Stated(raw, field.read(raw), where)
  except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
    raise refuse(
      f"{where} is damaged",
      f"{name}={repr(raw)[:80]}",
      f"a value as transformers writes it ({error})",
      "correct the file, or download it again",
    ) from error


def _contradiction(name: str, first: Stated, second: Stated) -> ValueError:
  return refuse(
    "The source's own files disagree",
    f"{name}={first.raw!r} ({first.where}) and {second.raw!r} ({second.where})",
    "one value",
    "correct the file that does not describe these weights",
  )


def _check_top(source: Source, parts: Sequence[Section]) -> None:
  """Raises ValueError where OpenVLA's config.json sets outside its text_config what the text_config does not set."""
  own = [s for s in parts if s.part == "llm"]
  if not source.layout.whole or not own:
    return
  stated = _stated(own)
  for path, content in read_files(source, "config.json"):
    for name, raw, where in stated_by_llama(content, str(path)):
      if name in ("model_type", "tie_word_embeddings", "quantization_config"):
        continue
      new, default = _read(name, LLAMA[name], raw, where), LLAMA[name].default
      fallback = UNKNOWN if isinstance(default, Sized) else default
      old = stated.get(name, Stated(fallback, fallback, f"the default where {own[0].where} has none"))
      if old.value is not UNKNOWN and old.value != new.value:
        raise _contradiction(name, new, old)


def fields(source: Source, part: str) -> dict | None:
  """A tower's own fields as its files hold them, one file over the other; None where no file is about it."""
  own = [s for s in sections(source) if s.part == part and "mean" not in s.table]
  merged: dict[str, Any] = {}
  for section in own:
    merged |= {name: value for name, value in section.fields.items() if value is not None}
  return merged if own else None


def written(config: Mapping[str, Any], model: SemanticVLA) -> dict:
  """Returns an OpenVLA config.json with the settings of a model where they were missing or different."""
  out, text = dict(config), dict(config.get("text_config") or {})
  stated = _stated([make_section("llm", LLAMA, text, "text_config")])
  for name in ("rms_norm_eps", "rope_theta"):
    ours = LLAMA[name].ours(model)
    if (stated[name].value if name in stated else LLAMA[name].default) != ours:
      text = {"model_type": "llama"} | text | {name: ours}
      for rope in ("rope_parameters", "rope_scaling"):
        if name in (text.get(rope) or {}):
          text[rope] = {**text[rope], name: ours}
  if text:
    out["text_config"] = text
  acts = config.get("timm_override_act_layers") or [None, None]
  if model.siglip is not None and activation(acts[-1] or "gelu") != model.siglip.gelu:
    out["timm_override_act_layers"] = [acts[0], "gelu_tanh" if model.siglip.gelu == "tanh" else None]
  return out
