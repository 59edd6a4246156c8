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
  return dict(_measured(jax.make_jaxpr(function)(*args).jaxpr, operations, ""))


def total(jaxpr: Jaxpr, measure: Callable[[Any], int]) -> int:
  """`measure` of every product and convolution of a program that an output needs, loops as often as they run."""
  return _measured(jaxpr, measure, "").total()


def _measured(jaxpr: Jaxpr, measure: Callable[[Any], int], scope: str) -> Counter[str]:
  # Backwards, keeping the set of values that an output still needs: what only feeds dropped outputs (an auxiliary
  # result, the primal of a gradient) is removed by the compiler too, and would otherwise be counted.
  needed, found = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, Counter()
  for equation in reversed(jaxpr.eqns):
    if not needed.intersection(equation.outvars) and not equation.effects:
      continue
    needed.update(v for v in equation.invars if not isinstance(v, Literal))
    found.update(_of_equation(equation, measure, f"{scope}/{equation.source_info.name_stack}"))
  return found


def _of_equation(equation: Any, measure: Callable[[Any], int], scope: str) -> Counter[str]:
  name, params = equation.primitive.name, equation.params
  if name in ("dot_general", "conv_general_dilated"):
    return Counter({scope: measure(equation)})
  inside = [_measured(part, measure, scope) for part in parts(params.values())]
  if name == "cond":
    return max(inside, key=Counter.total)  # only one branch runs
  times = params["length"] if name == "scan" else 1
  return Counter({where: times * n for where, n in sum(inside, Counter()).items()})


def operations(equation: Any) -> int:
  """Floating-point operations of a product or convolution."""
  params = equation.params
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
  kernel, out_axis = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(np.delete(kernel, out_axis).tolist())


def nbytes(aval: Any) -> int:
  """Bytes of an abstract array; 0 of what is none."""
  return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize if hasattr(aval, "shape") else 0


def parts(values: Any) -> list[Jaxpr]:
  """The programs among the parameters of an equation: bodies of loops, branches, what is computed again."""
  found = []
  for value in values:
    if isinstance(value, (tuple, list)):
      found += parts(value)
    elif isinstance(value, (ClosedJaxpr, Jaxpr)):
      found.append(value.jaxpr if isinstance(value, ClosedJaxpr) else value)
  return found
