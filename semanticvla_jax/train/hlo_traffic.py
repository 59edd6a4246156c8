"""What a compiled program starts and moves, from its text (`compiled.as_text()`): CPU, GPU or TPU.

    found = traffic(jax.jit(f).lower(params, observation).compile().as_text())
    found.launches, found.products, found.bytes, found.copied_weights

The body of a loop counts as often as it runs. An instruction moves its operands and its result once; what is fused into
it moves nothing. A dynamic slice or a gather reads what it takes, a dynamic update writes what it puts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from semanticvla_jax.errors import refuse

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}  # others: their name's digits
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WEIGHTS = r"params|frozen|state"  # names of arguments that are the same at every call, as the jitted function has them
# Instructions that run nothing.
FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "opt-barrier", "add-dependency"}
FREE |= {"partition-id", "replica-id", "get-dimension-size", "domain"}
PRODUCTS = {"dot", "convolution", "scaled-dot", "ragged-dot"}
_PRODUCT_CALL = re.compile(r'custom_call_target="[^"]*(matmul|gemm|conv|fmha|dot)[^"]*"', re.IGNORECASE)
# What an instruction depends on, in rising order.
CONSTANT, WEIGHT, DATA = 0, 1, 2

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CHAIN = re.compile(r"channel_id=(\d+).*chain_id=")  # of a collective that TPUs run in pieces, each in another fusion
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")


class Instruction(NamedTuple):
  """A line of a computation: its result's type as text, its operands by name, and all behind them."""

  name: str
  result: str
  operation: str
  operands: tuple[str, ...]
  rest: str

  @property
  def op_name(self) -> str:
    """The operation of the model behind it, "" where it has none."""
    found = _OP_NAME.search(self.rest)
    return found.group(1) if found else ""


class Traffic(NamedTuple):
  """What one call of a program does on a device.

  Attributes:
    launches: instructions that run something. products: those with a matrix product or a convolution in them.
    bytes: read and written by all of them in device memory (what a TPU keeps in VMEM is left out).
    copied_weights: bytes written by instructions that depend on weights alone, collectives apart: weights that are
      concatenated, transposed, converted or sliced again at every call.
    copies: (bytes, how often, type and origin), …, of those, the largest first.
    collectives: (kind, how many, bytes of their results), ….
    kinds: (operation, launches, bytes), …, the most bytes first.
  """

  launches: int
  products: int
  bytes: int
  copied_weights: int
  copies: tuple[tuple[int, int, str], ...]
  collectives: tuple[tuple[str, int, int], ...]
  kinds: tuple[tuple[str, int, int], ...]

  def count(self, kind: str) -> int:
    """How many collectives of a kind."""
    return next((n for name, n, _ in self.collectives if name == kind), 0)


def traffic(text: str, weights: str = WEIGHTS) -> Traffic:
  """Counts a compiled program.

  Args:
    text: of the compiled program.
    weights: regular expression at the beginning of the names of the arguments that are weights.

  Raises:
    ValueError: a text without an entry computation.
  """
  computations, entry = parse(text)
  walk = _Walk(computations)
  matches = re.compile(rf"(?:{weights})\b").match
  walk.count(entry, {x.name: WEIGHT if matches(x.op_name) else DATA for x in _parameters(computations[entry])}, 1)
  copies = sorted(((size, n, what) for what, (n, size) in walk.copies.items()), reverse=True)
  return Traffic(
    sum(walk.launches.values()),
    walk.products,
    sum(walk.moved.values()),
    sum(size for size, _, _ in copies),
    tuple(copies),
    tuple(
      (kind, walk.collectives[kind], walk.collective_bytes[kind]) for kind in COLLECTIVES if walk.collectives[kind]
    ),
    tuple((kind, walk.launches[kind], size) for kind, size in walk.moved.most_common()),
  )


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """The computations of a program by name, and the name of its entry."""
  found: dict[str, list[Instruction]] = {}
  current, entry = None, None
  for line in text.splitlines():
    if current is None:
      if head := _HEADER.match(line):
        current = found[head.group(2)] = []
        entry = head.group(2) if head.group(1) else entry
    elif line.startswith("}"):
      current = None
    elif match := _LINE.match(line):
      name, result, operation, rest = match.groups()
      names, rest = ((), rest) if operation in ("constant", "parameter") else _operands(rest)
      current.append(Instruction(name, result, operation, names, rest))
  if entry is None:
    raise refuse("hlo_traffic", "a text without ENTRY", "that of a compiled program", "pass compiled.as_text()")
  return found, entry


def _operands(rest: str) -> tuple[tuple[str, ...], str]:
  """Text after "operation(" → (names of the operands, what follows the closing bracket)."""
  depth = 0
  for found in re.finditer(r"[()]", rest):
    depth += 1 if found.group() == "(" else -1
    if depth < 0:
      return tuple(re.findall(r"%([\w.\-]+)", rest[: found.start()])), rest[found.end() :]
  return (), rest


def arrays(result: str, without: Container = ()) -> list[int]:
  """Bytes of every array of a type that lies in device memory, but for some shapes (see `_shapes`)."""
  return [
    _width(kind) * math.prod(int(n) for n in shape.split(",") if n)
    for kind, shape, layout in _ARRAY.findall(result)
    if "S(1)" not in layout and (kind, shape) not in without
  ]


def _shapes(result: str) -> list[tuple[str, str]]:
  """("bf16", "4096,688") of every array of a type."""
  return [(kind, shape) for kind, shape, _ in _ARRAY.findall(result)]


def _type_of(name: str, instructions: Sequence[Instruction]) -> str:
  return next((x.result for x in instructions if x.name == name), "")


def _width(kind: str) -> int:
  digits = re.search(r"\d+", kind)
  return BYTES.get(kind, max(1, int(digits.group()) // 8) if digits else 0)


def _parameters(body: Sequence[Instruction]) -> list[Instruction]:
  """Those of a computation, in order."""
  found = [x for x in body if x.operation == "parameter"]
  return sorted(found, key=lambda x: int(x.rest.split(")")[0]))


Kind = int | tuple  # CONSTANT, WEIGHT or DATA, or those of a tuple's elements


def _highest(kind: Kind) -> int:
  return max((_highest(part) for part in kind), default=CONSTANT) if isinstance(kind, tuple) else kind


def _join(a: Kind, b: Kind) -> Kind:
  if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
    return tuple(_join(x, y) for x, y in zip(a, b))
  return max(_highest(a), _highest(b))


class _Walk:
  """Adds up a program, instruction by instruction, knowing of each whether it depends on weights alone."""

  def __init__(self, computations: Mapping[str, list[Instruction]]):
    self.computations = computations
    self.launches, self.moved, self.collectives, self.collective_bytes = Counter(), Counter(), Counter(), Counter()
    self.copies: dict[str, tuple[int, int]] = {}
    self.products = 0
    self.chains: set[str] = set()  # collectives in pieces whose first piece was counted, of the computation under way

  def count(self, name: str, kinds: Mapping[str, Kind], times: int) -> Kind:
    """Adds computation `name` `times` over (0: only looks); `kinds` of its parameters → that of its result."""
    known, types, kind = dict(kinds), {}, CONSTANT
    outer, self.chains = self.chains, set()
    for x in self.computations[name]:
      types[x.name] = x.result
      if x.operation == "parameter":
        kind = known[x.name]
        continue
      inputs = tuple(known.get(operand, CONSTANT) for operand in x.operands)
      kind = known[x.name] = self._one(x, inputs, types, times)
    self.chains = outer
    return kind  # ROOT is the last instruction of every computation

  def _one(self, x: Instruction, inputs: tuple[Kind, ...], types: Mapping[str, str], times: int) -> Kind:
    if x.operation == "tuple":
      return inputs
    if x.operation == "get-tuple-element":
      return inputs[0][int(re.search(r"index=(\d+)", x.rest).group(1))] if isinstance(inputs[0], tuple) else inputs[0]
    if x.operation in ("opt-barrier", "bitcast", "domain") and len(inputs) == 1:
      return inputs[0]
    if x.operation == "while":
      return self._loop(x, inputs[0], times)
    if x.operation in ("call", "async-start", "conditional"):
      return self._calls(x, inputs, times)
    kind = max(map(_highest, inputs), default=CONSTANT)
    if times and x.operation not in FREE and not x.operation.endswith(("-done", "-update")):
      self._add(x, kind, types, times)
    return kind

  def _loop(self, x: Instruction, carry: Kind, times: int) -> Kind:
    body = re.search(r"body=%?([\w.\-]+)", x.rest).group(1)
    (argument,) = _parameters(self.computations[body])
    for _ in range(8):  # a dependence may have to go through several elements; each turn only raises
      after = _join(carry, self.count(body, {argument.name: carry}, 0))
      if after == carry:
        break
      carry = after
    self.count(body, {argument.name: carry}, times * self._trips(x))
    return carry

  def _trips(self, x: Instruction) -> int:
    """How often a loop runs: as the compiler wrote it down, else the one constant of its condition, else 1."""
    if found := _TRIPS.search(x.rest):
      return int(found.group(1))
    condition = self.computations[re.search(r"condition=%?([\w.\-]+)", x.rest).group(1)]
    bounds = [
      y.rest.split(")")[0] for y in condition if y.operation == "constant" and re.match(r"[su]\d+\[\]", y.result)
    ]
    return int(bounds[0]) if len(bounds) == 1 else 1

  def _calls(self, x: Instruction, inputs: tuple[Kind, ...], times: int) -> Kind:
    """Every branch of a conditional counts."""
    names = _CALLED.findall(x.rest) + [n.strip(" %") for b in _BRANCHES.findall(x.rest) for n in b.split(",")]
    given = inputs[1:] if x.operation == "conditional" else inputs
    kind: Kind | None = None
    for i, name in enumerate(names):
      parameters = _parameters(self.computations[name])
      part = given[i : i + 1] if x.operation == "conditional" else given
      found = self.count(name, dict(zip((p.name for p in parameters), part)), times)
      kind = found if kind is None else _join(kind, found)
    return max(map(_highest, inputs), default=CONSTANT) if kind is None or x.operation == "async-start" else kind

  def _add(self, x: Instruction, kind: int, types: Mapping[str, str], times: int) -> None:
    inside = self._fused(x)
    operations = {y.operation for y in inside}
    pieces = [y for y in inside if _CHAIN.search(y.rest)]
    ends = [text for y in pieces for text in (_type_of(y.operands[0], inside), y.result)]  # of whole collectives
    read, written = self._bytes(x, types, {shape for text in ends for shape in _shapes(text)})
    self.launches[_label(x)] += times
    self.products += times * (bool(operations & PRODUCTS) or any(_PRODUCT_CALL.search(y.rest) for y in inside))
    collective = False
    for y in inside:
      operation = y.operation.removesuffix("-start")
      if operation in COLLECTIVES:
        collective = True
        if y in pieces:
          if self._is_later(y):
            continue
          read, written = read + sum(arrays(_type_of(y.operands[0], inside))), written + sum(arrays(y.result))
        self.collectives[operation] += times
        self.collective_bytes[operation] += times * _collective_bytes(y)
    self.moved[_label(x)] += times * (read + written)
    if kind == WEIGHT and not collective and written:
      what = f"{_ARRAY.search(x.result).group().split('{')[0]} {'/'.join(x.op_name.split('/')[-3:]) or x.name}"
      n, size = self.copies.get(what, (0, 0))
      self.copies[what] = (n + times, size + times * written)

  def _is_later(self, piece: Instruction) -> bool:
    """Whether another piece of the same collective was counted in this computation; if not, this one is the first."""
    channel = _CHAIN.search(piece.rest).group(1)
    later = channel in self.chains
    self.chains.add(channel)
    return later

  def _fused(self, x: Instruction) -> list[Instruction]:
    """The instruction itself and all that is fused into it."""
    found = [x]
    if x.operation in ("fusion", "fusion-start"):
      for name in _CALLED.findall(x.rest):
        found += [z for y in self.computations.get(name, ()) for z in self._fused(y)]
    return found

  def _bytes(self, x: Instruction, types: Mapping[str, str], passing: Container) -> tuple[int, int]:
    """(read, written) by one instruction; arrays of the shapes `passing` only pass through it."""
    operation = x.operation.removesuffix("-start")
    names = dict.fromkeys(x.operands) if operation == "custom-call" else x.operands  # a kernel may be given one twice
    operands = [sum(arrays(types.get(name, ""), passing)) for name in names]
    results = arrays(x.result, passing)
    if operation in ("fusion",) and (called := _CALLED.findall(x.rest)):
      return self._fusion_bytes(x, called[0], operands, results)
    if operation == "custom-call" and len(results) > 1:
      results = results[:1]  # the others are a library's workspace
    if operation in ("dynamic-slice", "slice", "gather"):
      return sum(results[-1:]), sum(results[-1:])
    if operation == "dynamic-update-slice":
      return operands[1], operands[1]
    if x.operation.endswith("-start"):
      results = [max(sum(results) - sum(operands), 0)]  # a start's result names its operands once more
    return sum(operands), sum(results)

  def _fusion_bytes(self, x: Instruction, called: str, operands: list[int], results: list[int]) -> tuple[int, int]:
    body = self.computations[called]
    by_name, users = {y.name: y for y in body}, {}
    for y in body:
      for position, name in enumerate(y.operands):
        users.setdefault(name, []).append((y, position))
    read = 0
    for parameter, size in zip(_parameters(body), operands):
      read += min(size, _taken(parameter.name, users, size))
    root = body[-1]
    while root.operation == "bitcast":
      root = by_name[root.operands[0]]
    if root.operation == "dynamic-update-slice":
      return read, sum(arrays(by_name[root.operands[1]].result))
    if '"__' in x.rest and len(results) > 1:
      results = results[:1]  # a library's product and its workspace
    return read, sum(results)


def _taken(name: str, users: Mapping[str, list[tuple[Instruction, int]]], size: int) -> int:
  """Bytes of an operand of `size` that a fusion reads, where all its users take slices of it."""
  total = 0
  for user, position in users.get(name, ()):
    if user.operation in ("dynamic-slice", "slice", "gather") and position == 0:
      total += sum(arrays(user.result))
    elif user.operation == "bitcast":
      total += _taken(user.name, users, size)
    elif user.operation != "dynamic-update-slice" or position > 0:  # which is done in place
      return size
  return total


def _label(x: Instruction) -> str:
  """What a launch is called in a list: a library's call by its name, a fusion by its kind."""
  if target := re.search(r'custom_call_target="([^"]+)"', x.rest):
    return target.group(1)
  if kind := re.search(r'"kind":"(__[^"]+)"', x.rest):
    return kind.group(1)
  return x.operation


def _collective_bytes(x: Instruction) -> int:
  """Of all arrays that a collective makes, wherever they lie; one that starts names its operands before them."""
  sizes = [_width(kind) * math.prod(map(int, shape.split(","))) for kind, shape, _ in _ARRAY.findall(x.result) if shape]
  return sum(sizes[len(sizes) // 2 :] if x.operation in ("all-gather-start", "collective-permute-start") else sizes)
