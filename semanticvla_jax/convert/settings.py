"""How a source's own files say that its weights are computed with, beside what this package's model does.

config.json and the processor's files hold much that leaves every shape alone: the rotary base, epsilons, activations,
heads, bins, the constants of the images. A table a tower says which of their fields change numbers and what our model
does. What the model has a field for is carried into its config; whatever else differs is refused.
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
from semanticvla_jax.models.semanticvla import SemanticVLA, build, resolve


class Said(NamedTuple):
  """What a file says: as it is written, in our words, and where."""

  raw: Any
  value: Any
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


def carry(
  source: Source, config: Mapping, only: str | None = None, say: Callable[[str], None] = lambda line: None
) -> tuple[dict, list[str]]:
  """The config with what the source's own files say of its model, and a line for each field that this changed.

  Args:
    source: recognized files.
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
  if isinstance(default, Sized):
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
  if not source.layout.whole or not own:
    return
  said = _said(own)
  for path, content in read_files(source, "config.json"):
    for name, raw, where in stated_by_llama(content, str(path)):
      if name in ("model_type", "tie_word_embeddings", "quantization_config"):
        continue
      new, default = _read(name, LLAMA[name], raw, where), LLAMA[name].default
      fallback = UNKNOWN if isinstance(default, Sized) else default
      old = said.get(name, Said(fallback, fallback, f"the default where {own[0].where} has none"))
      if old.value is not UNKNOWN and old.value != new.value:
        raise _contradiction(name, new, old)


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
  said = _said([make_section("llm", LLAMA, text, "text_config")])
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
  if model.siglip is not None and activation(acts[-1] or "gelu") != model.siglip.gelu:
    out["timm_override_act_layers"] = [acts[0], "gelu_tanh" if model.siglip.gelu == "tanh" else None]
  return out
