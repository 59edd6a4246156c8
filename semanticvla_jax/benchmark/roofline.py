"""How near a compiled program comes to what the device can do: its bytes and FLOPs against measured rates."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from semanticvla_jax.benchmark.record import Result

_UNREAD = re.compile(r"text/.*|.*/film/.*|.*/text_projector/.*|llm/embed/embedding")


def ideal_seconds(nbytes: int | float, flops: int | float, rates: Mapping[str, float]) -> float:
  """The time that the slower of moving `nbytes` at the copy rate and `flops` at the matmul rate takes."""
  return max(nbytes / rates["copy"], flops / rates["matmul"])


def weight_bytes(params: Any) -> int:
  """Bytes of the parameters that a call reads whose sentence is remembered.

  Not the text tower, FiLM and the words' projection, which only a new sentence reads; of embedding tables it reads some
  rows, which are not counted.
  """
  flat = flatten_dict(params, sep="/")
  return sum(x.size * x.dtype.itemsize for name, x in flat.items() if not _UNREAD.fullmatch(name))


def program_bytes(compiled: Any, params: Any, inputs: Any) -> dict[str, int]:
  """Bytes of a compiled program: weights, inputs and outputs; temporary and accessed ones where XLA tells.

  Args:
    compiled: jax.stages.Compiled. params, inputs: its arguments.
  """
  found = {
    "weights": weight_bytes(params),
    "inputs": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(inputs)),
  }
  memory = compiled.memory_analysis()
  if memory is not None:
    found |= {"outputs": memory.output_size_in_bytes, "temporary": memory.temp_size_in_bytes}
  cost = compiled.cost_analysis() or {}
  cost = cost[0] if isinstance(cost, list) else cost
  if "bytes accessed" in cost:
    found["accessed"] = int(cost["bytes accessed"])
  return found


def add(result: Result, name: str, found: Mapping[str, int], flops: int, rates: Mapping[str, float]) -> float:
  """Adds bytes, FLOPs and the ideal time of a program to a result; returns the ideal seconds.

  Each byte of weights, inputs and outputs moves once in the ideal; activations stay on the chip.
  """
  for kind, nbytes in found.items():
    result.add(f"{name} {kind} bytes", nbytes, "byte")
  result.add(f"{name} FLOPs", flops, "FLOP")
  moved = sum(found.get(kind, 0) for kind in ("weights", "inputs", "outputs"))
  result.add(f"{name} ideal by bytes", 1e3 * moved / rates["copy"], "ms")
  result.add(f"{name} ideal by FLOPs", 1e3 * flops / rates["matmul"], "ms")
  return ideal_seconds(moved, flops, rates)
