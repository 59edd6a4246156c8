"""How much arithmetic a program asks for, and how fast the devices could do it: the two halves of MFU."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Dense bfloat16 FLOP/s of one device, as the makers publish it; the first name that the device kind holds as words.
PEAK = (
  ("TPU v4", 275e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5e", 197e12),
  ("TPU v5p", 459e12),
  ("TPU v5", 459e12),
  ("TPU v6 lite", 918e12),
  ("TPU v6e", 918e12),
  ("TPU7x", 2307e12),
  ("H200", 989e12),
  ("H100 PCIe", 756e12),
  ("H100 NVL", 835e12),
  ("H100", 989e12),
  ("A100", 312e12),
  ("A800", 312e12),
  ("L40S", 362e12),
  ("L40", 181e12),
  ("L4", 121e12),
  ("B200", 2250e12),
)


def peak(kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of a device of this kind (`jax.Device.device_kind`), None where it is not known."""
  return next((value for name, value in PEAK if re.search(rf"\b{name}\b", kind)), None)


def count(function: Callable, *args: Any) -> int:
  """Floating-point operations of the matrix products and convolutions of `function(*args)`.

  A product [m k]·[k n] counts 2·m·k·n, a convolution 2 · outputs · kernel positions · input channels of its group; the
  body of a scan as often as it runs; elementwise work, and what no output needs, nothing. (XLA's own count takes a
  scanned body once.)

  Args:
    function: what to count. args: arrays or ShapeDtypeStructs; nothing is computed.
  """
  return sum(by_scope(function, *args).values())


def by_scope(function: Callable, *args: Any) -> dict[str, int]:
  """`count`, split by where in the modules each operation is: {"/SemanticVLA/llm/layers/mlp/up_proj": …, …}.

  The names are jax's name scopes, which flax's modules open: the path of a module, with the methods on the way to it;
  of a gradient they are inside "jvp(…)" and "transpose(…)". The values add up to `count`.
  """
  return dict(_count(jax.make_jaxpr(function)(*args).jaxpr, ""))


def _count(jaxpr: Jaxpr, scope: str) -> Counter[str]:
  # Backwards, keeping the set of values that an output still needs: what only feeds dropped outputs (an auxiliary
  # result, the primal of a gradient) is removed by the compiler too, and would otherwise be counted.
  needed, total = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, Counter()
  for equation in reversed(jaxpr.eqns):
    if not needed.intersection(equation.outvars) and not equation.effects:
      continue
    needed.update(v for v in equation.invars if not isinstance(v, Literal))
    total.update(_operations(equation, f"{scope}/{equation.source_info.name_stack}"))
  return total


def _operations(equation: Any, scope: str) -> Counter[str]:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return Counter({scope: 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)})
  if name == "conv_general_dilated":
    kernel, out_axis = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
    positions = math.prod(np.delete(kernel, out_axis).tolist())
    return Counter({scope: 2 * math.prod(equation.outvars[0].aval.shape) * positions})
  inner = [_count(part, scope) for value in params.values() for part in _jaxprs(value)]
  if name == "cond":
    return max(inner, key=Counter.total)  # only one branch runs
  times = params["length"] if name == "scan" else 1
  return Counter({where: times * n for where, n in sum(inner, Counter()).items()})


def _jaxprs(value: Any) -> list[Jaxpr]:
  if isinstance(value, (tuple, list)):
    return [part for item in value for part in _jaxprs(item)]
  if isinstance(value, ClosedJaxpr):
    return [value.jaxpr]
  return [value] if isinstance(value, Jaxpr) else []
