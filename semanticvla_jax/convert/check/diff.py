"""What a checkpoint holds, and how two differ, in either format and without holding more than one tensor of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semanticvla_jax.convert.detect import Source, describe, recognize
from semanticvla_jax.convert.io.orbax_reader import PolicyFolder, is_policy
from semanticvla_jax.convert.plan import Options, make_plan

Paths = str | Path | Sequence[str | Path]
Reader = Callable[[], Iterator[np.ndarray]]  # the pieces of one tensor
_BLOCK = 1 << 20  # numbers compared together


class Difference(NamedTuple):
  """How one tensor differs.

  Attributes:
    name: path in our tree, or canonical key where both sides are PyTorch's.
    maximum: max |a - b|, in float32; inf where only one side has NaN or Inf.
    relative: maximum / max |a|.
    note: what else differs (shape, dtype, missing on one side), "" for nothing.
  """

  name: str
  maximum: float
  relative: float
  note: str


def inspect(path: Paths) -> list[str]:
  """Lines: kind, tensors with shape and dtype, counts, statistics and config; no weight is read."""
  if not isinstance(path, (str, Path)) or not is_policy(path):
    source = recognize([path] if isinstance(path, (str, Path)) else path)
    rows = {key: (tensor.shape, tensor.dtype) for key, tensor in source.tensors.items()}
    return [
      *describe(source),
      *_rows(rows),
      *_json("config", {k: v for k, v in source.config.items() if k != "norm_stats"}),
    ]
  policy = PolicyFolder(path)
  facts = policy.metadata
  adapters = "with adapters" if policy.adapted else f"merged, {facts['lora']}" if facts.get("lora") else "no adapters"
  return [
    f"policy folder, origin {facts.get('origin', 'trained here')}, step {facts.get('step')}, {adapters}",
    *_rows({path: tuple(leaf) for path, leaf in policy.leaves.items()}),
    f"statistics: {sorted(policy.statistics) or 'none'}",
    *_json("config", policy.config),
  ]


def _rows(tensors: Mapping[str, tuple]) -> list[str]:
  width = max(len(name) for name in tensors)
  lines = [f"  {name:{width}}  {dtype!s:9} {list(shape)}" for name, (shape, dtype) in sorted(tensors.items())]
  parts: dict[str, int] = {}
  for name, (shape, _) in tensors.items():
    part = name.replace("/", ".").split(".")[0]
    parts[part] = parts.get(part, 0) + math.prod(shape)
  total = sum(parts.values())
  counts = [f"  {part:{width}}  {n:,}" for part, n in sorted(parts.items())]
  return [*lines, f"{len(tensors)} tensors, {total:,} parameters:", *counts]


def _json(name: str, content: Mapping[str, Any]) -> list[str]:
  return [f"{name}:", *(f"  {key}: {value}" for key, value in content.items())] if content else []


def diff(a: Paths, b: Paths) -> list[Difference]:
  """Every tensor of two checkpoints, each a policy folder or a PyTorch source (through the rules).

  Raises:
    ValueError: one side cannot be read, or a source does not fit the policy's config.
  """
  a, b = _open(a), _open(b)
  policy = next((x for x in (a, b) if isinstance(x, PolicyFolder)), None)
  readers = [_policy_readers(x) if isinstance(x, PolicyFolder) else _source_readers(x, policy) for x in (a, b)]
  out = []
  for name in sorted(readers[0] | readers[1]):
    if name not in readers[0] or name not in readers[1]:
      out.append(Difference(name, math.inf, math.inf, f"only in {'the first' if name in readers[0] else 'the second'}"))
    else:
      out.append(_compare(name, *(side[name] for side in readers)))
  return out


def _open(path: Paths) -> PolicyFolder | Source:
  if isinstance(path, (str, Path)):
    return PolicyFolder(path) if is_policy(path) else recognize([path])
  return recognize(path)


def _policy_readers(policy: PolicyFolder) -> dict[str, Reader]:
  return {path: lambda path=path: policy.pieces(path) for path in policy.leaves}


def _source_readers(source: Source, policy: PolicyFolder | None) -> dict[str, Reader]:
  if policy is None:
    return {key: lambda tensor=tensor: iter([tensor.read()]) for key, tensor in source.tensors.items()}
  lora = policy.config.get("lora") or policy.metadata.get("lora")
  plan = make_plan(source, policy.config["model"], lora, Options(lora="keep" if policy.adapted else "merge"))

  def pieces(path: str) -> Iterator[np.ndarray]:
    return (plan.piece(source, path, layer) for layer in plan.entries[path].layers)

  return {path: functools.partial(pieces, path) for path in plan.entries}


def _compare(name: str, first: Reader, second: Reader) -> Difference:
  maximum, largest, notes = 0.0, 0.0, []
  for x, y in zip(first(), second(), strict=True):
    if x.dtype != y.dtype and not notes:
      notes.append(f"{x.dtype} and {y.dtype}")
    if x.shape != y.shape:
      return Difference(name, math.inf, math.inf, f"shapes {list(x.shape)} and {list(y.shape)}")
    for u, v in _blocks(x, y):
      finite = np.isfinite(u) & np.isfinite(v)
      same = finite | (u == v) | (np.isnan(u) & np.isnan(v))
      if not same.all() and maximum < math.inf:
        maximum, notes = math.inf, [*notes, "NaN or Inf on one side"]
      maximum = max(maximum, float(np.abs(u - v).max(initial=0.0, where=finite)))
      largest = max(largest, float(np.abs(u).max(initial=0.0, where=finite)))
  return Difference(name, maximum, maximum / largest if largest else maximum, "; ".join(notes))


def _blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Both in float32, a few megabytes at a time."""
  x, y = x.reshape(-1), y.reshape(-1)
  for i in range(0, x.size, _BLOCK):
    yield x[i : i + _BLOCK].astype(np.float32), y[i : i + _BLOCK].astype(np.float32)


def lines(differences: Sequence[Difference]) -> list[str]:
  """One line a tensor, the largest last, and a summary."""
  rows = sorted(differences, key=lambda d: (d.relative, d.name))
  unequal = [d for d in rows if d.maximum > 0 or d.note]
  out = [f"{d.maximum:9.2e} {d.relative:9.2e}  {d.name}{'  ' + d.note if d.note else ''}" for d in unequal]
  return [*out, f"{len(rows)} tensors, {len(rows) - len(unequal)} equal, {len(unequal)} different"]
