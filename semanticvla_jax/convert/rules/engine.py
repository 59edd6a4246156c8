"""The conversion engine: rules match a target tree with a source's tensors exactly, or list what is left over.

A rule is one line: `Rule("attn/q_proj/kernel", "self_attn.q_proj.weight", "(h c) d -> d h c")`. Sizes are never written
down: they come from the target tree (`jax.eval_shape` of the model) and are checked against every source tensor before
anything is read. `{i}` in a source is the block number; a target without it is a stack over the blocks.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

Shape = tuple[int, ...]
Array = Any  # of numpy or jax


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one parameter is made.

  Attributes:
    target: path in our tree, joined by "/".
    source: key of the PyTorch tensor; several, when `combine` makes one parameter out of them.
    pattern: einops pattern from the source's axes to ours; "" keeps them.
    part: (index, parts): after the rearrangement the leading axis holds `parts` equal parts of which this is one (the
      q, k, v of a fused matrix).
    combine: function of the source arrays that replaces `pattern`.
    shared: whether other rules may read the same source whole.
  """

  target: str
  source: str | tuple[str, ...]
  pattern: str = ""
  part: tuple[int, int] | None = None
  combine: Callable[..., Array] | None = None
  shared: bool = False

  @property
  def sources(self) -> tuple[str, ...]:
    return (self.source,) if isinstance(self.source, str) else self.source


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter of the target and the source keys of each of its layers (one element if it is not a stack)."""

  target: str
  shape: Shape
  rule: Rule
  keys: tuple[tuple[str, ...], ...]
  stacked: bool

  @property
  def layers(self) -> Sequence[int | None]:
    """The layers of a stack; (None,), the whole parameter, of anything else."""
    return range(len(self.keys)) if self.stacked else (None,)


class Mismatch(ValueError):
  """Source and target do not cover each other; the message lists both sides."""


def prefixed(rules: Iterable[Rule], target: str, source: str) -> list[Rule]:
  """The same rules one level deeper in both trees."""
  return [
    dataclasses.replace(
      rule,
      target=target + rule.target,
      source=source + rule.source if isinstance(rule.source, str) else tuple(source + s for s in rule.source),
    )
    for rule in rules
  ]


def with_lora(rules: Iterable[Rule]) -> list[Rule]:
  """Adds the adapter rules of every `kernel`: peft's `lora_A` (r, in) and `lora_B` (out, r), from the kernel's pattern.

  Where a fused matrix is split, each part gets its rows of B and an exact copy of A.
  """
  out = list(rules)
  for rule in out[:]:
    if rule.target.endswith("/kernel") and isinstance(rule.source, str) and rule.source.endswith(".weight"):
      (first, *inputs), right = _groups(rule.pattern.split("->")[0]), _names(rule.pattern.split("->")[1])
      in_names = [name for group in inputs for name in group]
      out_names = [name for name in right if name in first]
      ones = " 1" * (len(inputs) - 1)  # a convolution's B is (out, r, 1, 1)
      base, source = rule.target.removesuffix("kernel"), rule.source.removesuffix("weight")
      a = f"r {_join(inputs)} -> {' '.join(n for n in right if n in in_names)} r"
      lead, rest = ("t ", out_names[1:]) if rule.part else ("", out_names)
      b = f"{_join([first])} r{ones} -> {lead}r {' '.join(rest)}"
      out.append(Rule(f"{base}lora_a", f"{source}lora_A.weight", a, shared=rule.part is not None))
      out.append(Rule(f"{base}lora_b", f"{source}lora_B.weight", b, rule.part))
  return out


def plan(rules: Sequence[Rule], unused: Mapping[str, str], source: Mapping[str, Shape], target: Mapping[str, Shape]):
  """Matches every parameter of `target` with tensors of `source`.

  Args:
    rules: the table. Rules whose target the model lacks do nothing.
    unused: {regular expression over source keys: reason}, weights this model does not read.
    source, target: {key or path: shape}.

  Returns:
    (entries, skipped): what to make, and {source key: reason} of what is left unread on purpose.

  Raises:
    Mismatch: a parameter without a tensor (+ list), a tensor without a parameter (- list), a tensor read twice, or a
      wrong shape. Nothing has been read then.
  """
  entries = [entry for rule in rules for entry in expand(rule, target)]
  readers: dict[str, list[Rule]] = {}
  problems = []
  for entry in entries:
    for keys in entry.keys:
      for key in keys:
        readers.setdefault(key, []).append(entry.rule)
    problems += _shape_problems(entry, source)
  problems += [f"! {path}: made by {n} rules" for path, n in _repeated(entry.target for entry in entries)]
  problems += [f"! {key}: read more than once" for key, by in readers.items() if key in source and _read_twice(by)]
  problems += [
    f"+ {path} {shape}: no rule makes it" for path, shape in target.items() if path not in {e.target for e in entries}
  ]
  skipped = {}
  for key, shape in source.items():
    if key in readers:
      continue
    skipped[key] = reason(unused, key)
    if skipped[key] is None:
      problems.append(f"- {key} {shape}: no parameter wants it")
  if problems:
    raise Mismatch(_message(problems, source))
  return entries, skipped


def reason(unused: Mapping[str, str], key: str) -> str | None:
  """Why a source key is left unread, or None where `unused` does not name it."""
  return next((why for pattern, why in unused.items() if re.fullmatch(pattern, key)), None)


def keys_read(rules: Sequence[Rule], target: Mapping[str, Shape]) -> set[str]:
  """Every source key that the parameters of `target` are made from."""
  return {key for rule in rules for entry in expand(rule, target) for keys in entry.keys for key in keys}


def make(entry: Entry, read: Callable[[str], Array]) -> Array:
  """The parameter of `entry`, in the stored type; `read` fetches one source tensor."""
  layers = [make_layer(entry, layer, read) for layer in entry.layers]
  return np.stack(layers) if entry.stacked else layers[0]


def make_layer(entry: Entry, layer: int | None, read: Callable[[str], Array]) -> Array:
  """One layer of a stacked parameter, or (None) the whole of another, as `make`."""
  keys, shape = entry.keys[layer or 0], entry.shape if layer is None else entry.shape[1:]
  arrays = [read(key) for key in keys]
  value = arrays[0] if entry.rule.combine is None else entry.rule.combine(*arrays)
  if value.shape != shape:
    raise Mismatch(f"{entry.target}: got shape {value.shape}, expected {shape} from {keys}.")
  return value


def convert(rules, unused, source: Mapping[str, Array], target: Mapping[str, Shape]) -> dict[str, Array]:
  """{path: parameter} of a source that fits in memory (see `plan` for errors)."""
  entries, _ = plan(rules, unused, {key: tuple(x.shape) for key, x in source.items()}, target)
  return {entry.target: make(entry, source.__getitem__) for entry in entries}


def expand(rule: Rule, target: Mapping[str, Shape]) -> list[Entry]:
  """The parameters of `target` that a rule makes, with the source keys of each."""
  stacked = "{i}" not in rule.target and any("{i}" in key for key in rule.sources)
  if "{i}" not in rule.target:
    if rule.target not in target:
      return []
    shape = target[rule.target]
    keys = [tuple(key.replace("{i}", str(i)) for key in rule.sources) for i in range(shape[0] if stacked else 1)]
    return [Entry(rule.target, shape, _sized(rule, shape[1:] if stacked else shape), tuple(keys), stacked)]
  pattern = re.compile(re.escape(rule.target).replace(r"\{i\}", r"(\d+)"))
  entries = []
  for path, shape in target.items():
    if match := pattern.fullmatch(path):
      keys = tuple(key.replace("{i}", match[1]) for key in rule.sources)
      entries.append(Entry(path, shape, _sized(rule, shape), (keys,), False))
  return entries


def _sized(rule: Rule, shape: Shape) -> Rule:
  """The rule with the composed axes of its pattern split as `shape` demands: "(h c) d -> d h c" becomes numbers."""
  if not rule.pattern:
    return rule
  right = rule.pattern.split("->")[1]
  names = _names(right)
  lengths = dict(zip(names[1:] if rule.part else names, shape))
  if len(lengths) != len(shape):
    return rule  # a shape problem, reported by `plan`
  lengths |= {"t": rule.part[1]} if rule.part else {}
  return dataclasses.replace(rule, combine=_Rearrange(rule.pattern, tuple(lengths.items()), rule.part))


@dataclasses.dataclass(frozen=True)
class _Rearrange:
  pattern: str
  lengths: tuple[tuple[str, int], ...]
  part: tuple[int, int] | None

  def __call__(self, x: Array) -> Array:
    used = {name for group in _groups(self.pattern.split("->")[0]) for name in group}
    x = rearrange(x, self.pattern, **{name: n for name, n in self.lengths if name in used})
    return x[self.part[0]] if self.part else x

  def source_shape(self) -> Shape:
    lengths = dict(self.lengths) | {"1": 1}
    return tuple(math.prod(lengths[name] for name in group) for group in _groups(self.pattern.split("->")[0]))


def _shape_problems(entry: Entry, source: Mapping[str, Shape]) -> list[str]:
  problems = []
  for keys in entry.keys:
    if entry.rule.combine is not None and not entry.rule.pattern and all(key in source for key in keys):
      problems += _combined_problems(entry, keys, source)
      continue
    for key in keys:
      if key not in source:
        problems.append(f"+ {entry.target} {entry.shape}: needs {key}")
        continue
      rule = entry.rule
      if isinstance(rule.combine, _Rearrange):
        expected = rule.combine.source_shape()
      elif rule.combine is not None:
        continue  # of a combination that lacks another source
      elif not rule.pattern:
        expected = entry.shape[1:] if entry.stacked else entry.shape
      else:
        expected = f"{len(_names(rule.pattern.split('->')[1]))} axes in the target"
      if source[key] != expected:
        problems.append(f"! {key}: got shape {source[key]}, expected {expected} for {entry.target} {entry.shape}")
  return problems


def _combined_problems(entry: Entry, keys: Sequence[str], source: Mapping[str, Shape]) -> list[str]:
  """Of a rule whose function makes one parameter out of `keys`: it is traced on their shapes."""
  expected = entry.shape[1:] if entry.stacked else entry.shape
  have = ", ".join(f"{key} {source[key]}" for key in keys)
  try:
    made = jax.eval_shape(entry.rule.combine, *(jax.ShapeDtypeStruct(source[key], np.float32) for key in keys)).shape
  except (TypeError, ValueError, IndexError) as error:
    return [f"! {have}: cannot be combined ({str(error).splitlines()[0][:80]}) to {entry.target} {entry.shape}"]
  return [] if made == expected else [f"! {have}: make shape {made}, expected {expected} for {entry.target}"]


def _groups(side: str) -> list[list[str]]:
  """ "(h c) d" → [["h", "c"], ["d"]]"""
  return [match.strip("()").split() for match in re.findall(r"\([^)]*\)|\S+", side)]


def _names(side: str) -> list[str]:
  return [name for group in _groups(side) for name in group]


def _join(groups: Sequence[Sequence[str]]) -> str:
  return " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] for group in groups)


def _read_twice(rules: list[Rule]) -> bool:
  if all(rule.shared for rule in rules):
    return False
  parts = [rule.part for rule in rules]
  return len(rules) > 1 and (None in parts or len(set(parts)) < len(parts))


def _repeated(items: Iterable[str]) -> list[tuple[str, int]]:
  counts: dict[str, int] = {}
  for item in items:
    counts[item] = counts.get(item, 0) + 1
  return [(item, n) for item, n in counts.items() if n > 1]


def counts(problems: Iterable[str]) -> str:
  """How many lines begin with each sign: "3 +, 0 -, 1 !"."""
  signs = [line[0] for line in problems]
  return ", ".join(f"{signs.count(sign)} {sign}" for sign in "+-!")


def shown(problems: Sequence[str], most: int = 20) -> list[str]:
  """The lines for the screen: of each sign the first `most`, and how many there are beyond them."""
  lines = []
  for sign in "+-!":
    own = [line for line in problems if line[0] == sign]
    lines += [*own[:most], *([f"{sign} … and {len(own) - most} more"] if len(own) > most else [])]
  return lines


def _message(problems: list[str], source: Mapping[str, Shape]) -> str:
  wanted = [line.split("needs ")[1] for line in problems if "needs " in line][:1]
  near = difflib.get_close_matches(wanted[0], source, n=1) if wanted else []
  hint = f" Nearest source key to {wanted[0]}: {near[0]}." if near else ""
  return (
    f"source and model do not cover each other ({counts(problems)}; + missing in the source, - not wanted by the "
    f"model, ! wrong). Nothing was written. Is this the config of that checkpoint?{hint}\n" + "\n".join(shown(problems))
  )
