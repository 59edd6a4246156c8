"""FLOPs of every row of the paper's tables, by part of the model, next to the paper's figures; nothing is run.

Counts are of the matrix products and convolutions of the real program (`train.flops`). Forward is one pass from
observation to actions; training is one example forward and backward, as the recipe trains it: gradients of activations
everywhere they are needed, of weights for trainable ones, nothing recomputed, no optimizer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from semanticvla_jax.benchmark import programs, rows
from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.train import flops

# The first expression that a scope holds names its part: modules by their names, under any methods and transformations.
PARTS = {
  "dense fuser": r"/dense_fuser\b",
  "text tower": r"/text/",
  "pruners": r"/(dino|siglip)_(id|sa)_pruner\b",
  "sparse fuser": r"/sparse_fuser\b",
  "towers": r"/(dino|siglip)\b",
  "decoder": r"/llm\b",
  "heads": r"/(coupler|proprio_projector)\b",
}
OTHER = "other"
_ATTENTION = re.compile(r"\bBSNH\b")  # the two products of jax.nn.dot_product_attention
_LOOKED_AT = re.compile("blhc,bshc->bhls")  # vit.attention_weights


def part(scope: str) -> str:
  """The part of the model that a name scope of `train.flops.by_scope` belongs to."""
  return next((name for name, where in PARTS.items() if re.search(where, scope)), OTHER)


def by_part(function: Callable, *args) -> dict[str, int]:
  """FLOPs of a function by part of the model; they add up to `train.flops.count`."""
  return _parts(flops.by_scope(function, *args))


def forward(name: str, size: str, prompt: int = 32, **fields: Any) -> dict[str, int]:
  """FLOPs by part of one forward pass of a row, `prompt` tokens long; **fields: of the model config."""
  return _parts(_forward_scopes(name, size, prompt, **fields))


def profiled(name: str, size: str) -> int:
  """FLOPs of a forward pass as a profiler of modules finds them, which the paper's figures agree with.

  How the paper counts is not published; this is the count that fits it: without the products inside fused attention,
  which such a profiler does not see, without the text tower, and with a prompt of 20 tokens, which a short instruction
  of LIBERO has.
  """
  views = {} if rows.ROWS[name].fields.get("num_views") is None else {"num_views": 2}
  scopes = _forward_scopes(name, size, 20, **views)
  return sum(n for scope, n in scopes.items() if not _ATTENTION.search(scope) and part(scope) != "text tower")


def training(name: str, size: str, prompt: int = 32) -> dict[str, int]:
  """FLOPs by part of one training example of a row, forward and backward."""
  program = programs.training(name, rows.model(name, size, scan_encoders=True), prompt)
  gradient = jax.value_and_grad(program.loss)
  return _parts(_unlooped(gradient, program.trainable, program.frozen, program.batch, program.key))


def _forward_scopes(name: str, size: str, prompt: int, **fields: Any) -> dict[str, int]:
  program = programs.inference(rows.model(name, size, scan_encoders=True, **fields), prompt)
  return _unlooped(program.apply, program.params, program.observation)


def _unlooped(function: Callable, *args: Any) -> dict[str, int]:
  """FLOPs by scope of a model whose encoders are loops (three times faster to trace), as if they were not.

  A loop carries the weights that Figure 5 looks at, where the blocks one by one would compute none that nobody reads.
  """
  return {scope: n for scope, n in flops.by_scope(function, *args).items() if not _LOOKED_AT.search(scope)}


def _parts(scopes: Mapping[str, int]) -> dict[str, int]:
  found: Counter[str] = Counter()
  for scope, n in scopes.items():
    found[part(scope)] += n
  names = (*PARTS, OTHER) if found[OTHER] else PARTS
  return {name: found[name] for name in names}


def measure(result: Result, names: Sequence[str], size: str, prompt: int) -> None:
  """Counts rows and prints tables: TFLOP by part, the whole, the paper's, and why they differ."""
  for name in names:
    result.models[name] = rows.model(name, size)
  _table(result, "forward", names, size, prompt)
  if size == "7b":
    result.note("paper: its own figure; profiled: ours with 20 prompt tokens, no attention products, no text tower")
  _table(result, "training", names, size, prompt)
  if {"full", "oft"} <= {*names}:
    both = [result.value(f"{name} training whole") for name in ("oft", "full")]
    result.add("training, oft / full", both[0] / both[1], "ratio")
    result.add("training, oft / full, the paper's", rows.PAPER_TRAINING_RATIO, "ratio")
  for name in names if size == "7b" else ():
    result.note(f"{name}: {rows.row(name).why}")


def _table(result: Result, kind: str, names: Sequence[str], size: str, prompt: int) -> None:
  extra = ("profiled", "paper") if (kind, size) == ("forward", "7b") else ()
  result.say(f"\n{kind}, TFLOP an example ({size}, prompt of {prompt} tokens)")
  result.say(_line("row", [*PARTS, "whole", *extra]))
  for name in names:
    found = forward(name, size, prompt) if kind == "forward" else training(name, size, prompt)
    found["whole"] = sum(found.values())
    paper = rows.row(name).paper
    if extra and paper is not None:
      found |= {"profiled": profiled(name, size), "paper": round(paper.tflops * 1e12)}
    for key, value in found.items():
      result.add(f"{name} {kind} {key}", value, "FLOP", quiet=True)
    columns = (found.get(key) for key in (*PARTS, "whole", *extra))
    result.say(_line(name, ["-" if value is None else f"{value / 1e12:#.3g}" for value in columns]))


def _line(name: str, cells: Sequence[str]) -> str:
  return f"{name:20}" + "".join(f"{cell:>13}" for cell in cells)
