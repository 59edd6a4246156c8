"""Which remat policy, mesh and accumulation fit a slice, and the fastest of them: an estimate, nothing is compiled.

The step is traced once for each remat policy. From the trace come its floating-point operations (what is recomputed
included), the bytes its products read and write, and the values that its backward pass keeps; from the rule of
`sharding` the bytes of parameters, moments and gradients on a device. Per device and step:

    memory        parameters, optimizer, gradients; what the examples of one turn keep; one block computed again, with
                  the gradients of its values; two blocks' gathered weights
    arithmetic    operations / peak
    traffic       operands and results of every product, gathered weights written once more, the optimizer's arrays
    collectives   weights gathered for both passes of every turn, gradients summed; two sums a block over `tensor`

A step takes at best as long as the longest of the last three, and as long as their sum if nothing overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.extend.core import Jaxpr, Literal

from semanticvla_jax.errors import refuse
from semanticvla_jax.models.llama import REMAT
from semanticvla_jax.models.semanticvla import abstract_params, dummy_observation
from semanticvla_jax.train import explain, flops, hardware, init, program, sharding
from semanticvla_jax.train import step as stepping
from semanticvla_jax.train.partition import combine
from semanticvla_jax.train.step import AuxLoss

EXAMPLES = 9973  # of the traced batch: a prime that no size of a model contains
ROOM = 0.9  # of a device's memory that a plan fills: the estimate is off by some, and the compiler keeps some
TURNS = (1, 2, 4, 8)
TENSOR = (1, 2, 4, 8)


class Work(NamedTuple):
  """What a step with some remat policy does with one example, on one device.

  Attributes:
    flops: operations. moved: bytes of activations that its products read and write, and weights: those of weights, once
      for a whole batch. kept: bytes that the backward pass keeps. block: of the largest block, all that its backward
      pass reads, kept or computed again.
  """

  flops: float
  moved: float
  weights: float
  kept: float
  block: float


class Candidate(NamedTuple):
  """A way to run the step, and its estimate: seconds, and bytes on a device."""

  remat: str | None
  mesh: dict[str, int]
  turns: int
  memory: float
  arithmetic: float
  traffic: float
  collectives: float

  @property
  def seconds(self) -> float:
    """At best."""
    return max(self.arithmetic, self.traffic, self.collectives)

  @property
  def longest(self) -> float:
    """If nothing overlaps."""
    return self.arithmetic + self.traffic + self.collectives

  @property
  def order(self) -> tuple:
    """The faster one first; where the best cases differ by less than about 3 %, the one that relies less on overlap."""
    return round(math.log(self.seconds) / 0.03), self.longest

  @property
  def flags(self) -> str:
    sizes = " ".join(f"--config.mesh.{axis}={n}" for axis, n in self.mesh.items())
    return f"--config.model.remat={self.remat or 'none'} --config.optim.accumulate={self.turns} {sizes}"


def candidates(config: Any, where: hardware.Topology, slices: int = 1, aux_loss: AuxLoss | None = None) -> list:
  """Every candidate for the config's batch, the fastest of those that fit first, then the others, the smallest first.

  Args:
    config: of training; its own remat policy, mesh and accumulation are not looked at.
    where: the devices, `slices` times.

  Raises:
    ValueError: a config that does not fit together, a batch that no mesh divides, or devices whose rates are unknown.
  """
  peak = flops.peak(where.facts.kind)
  if peak is None:
    raise refuse("--plan", where.facts.kind, "a device whose peak is known", "add it to train.flops.PEAK")
  setup = _Setup(config, where, peak, aux_loss)
  found = [
    _estimate(setup, remat, shape, turns)
    for shape in meshes(where, slices)
    for turns in TURNS
    if config.data.batch_size % (turns * shape["replica"] * shape["data"] * shape["fsdp"]) == 0
    for remat in REMAT
  ]
  if not found:
    n = where.devices * slices
    raise refuse("--plan", f"batch {config.data.batch_size}", f"one that {n} devices divide", "change --batch")
  good = sorted((x for x in found if fits(x, where)), key=lambda x: x.order)
  return good + sorted((x for x in found if not fits(x, where)), key=lambda x: x.memory)


def meshes(where: hardware.Topology, slices: int = 1) -> Iterator[dict[str, int]]:
  """Sizes of the mesh axes: a replica a slice; tensor inside of a host."""
  for tensor in TENSOR:
    if where.near % tensor == 0:
      rest = where.devices // tensor
      for data in (n for n in range(1, rest + 1) if rest % n == 0):
        yield dict(replica=slices, data=data, fsdp=rest // data, tensor=tensor)


class Weights(NamedTuple):
  """Parameters of a mesh, in bytes on a device.

  Attributes:
    state: parameters and optimizer. gradients: of the trainable ones. gathered: all that `fsdp` splits, whole, in the
      type it is computed in. block: likewise, of the largest block of the decoder. trained: trainable ones, whole.
  """

  state: int
  gradients: int
  gathered: int
  block: int
  trained: int


class _Setup:
  """What all candidates share: the traces, one a remat policy, and the parameters' bytes, one set a mesh."""

  def __init__(self, config: Any, where: hardware.Topology, peak: float, aux_loss: AuxLoss | None):
    self.where, self.peak, self.batch = where, peak, config.data.batch_size
    one = program.changed(config, **{"data.batch_size": EXAMPLES, "optim.accumulate": 1})
    self.program, self.rule = program.from_config(one, aux_loss), sharding.rule_of(config.mesh)
    policies = {remat: program.changed(one, **{"model.remat": remat}) for remat in REMAT}
    self.work = {remat: work(policy, self.program, aux_loss) for remat, policy in policies.items()}
    self.kind = jnp.dtype(config.model.dtype)
    self.sums = _sums(config)
    self._weights: dict[tuple, Weights] = {}

  def weights(self, shape: dict[str, int]) -> Weights:
    key = (*shape.values(),)
    if key not in self._weights:
      mesh = sharding.abstract_mesh(shape, math.prod(key))
      self._weights[key] = _weights(self.program, mesh, self.rule, self.kind)
    return self._weights[key]


def work(config: Any, p: program.Program, aux_loss: AuxLoss | None = None) -> Work:
  """Traces the step of a config once, with so odd a batch that every array of the examples is known by its shape.

  Args:
    p: of the config with EXAMPLES examples; its parameters do not depend on the remat policy.
  """
  model, _ = init.make_model(config, aux_loss)

  def both(trainable, frozen, batch):
    """(gradients, what the backward pass reads)."""

    def loss(trainable):
      return stepping.loss_fn(model, combine(trainable, frozen), batch, jax.random.key(0), aux_loss)[0]

    value, backward = jax.vjp(loss, trainable)
    return (value, backward(jnp.ones_like(value))), backward

  jaxpr, shapes = jax.make_jaxpr(both, return_shape=True)(p.state.trainable, p.frozen, p.batch)
  jaxpr = jaxpr.jaxpr
  n = len(jax.tree.leaves(shapes[0]))
  gradients, kept = jaxpr.outvars[:n], {v for v in jaxpr.outvars[n:] if not isinstance(v, Literal)} - set(jaxpr.invars)
  step = jaxpr.replace(outvars=gradients)
  return Work(
    flops=flops.total(step, flops.operations) / EXAMPLES,
    moved=flops.total(step, lambda equation: sum(map(_of_examples, _arrays(equation)))) / EXAMPLES,
    weights=flops.total(step, lambda equation: sum(flops.nbytes(x) - _of_examples(x) for x in _arrays(equation))),
    kept=sum(_of_examples(v.aval) for v in kept) / EXAMPLES,
    block=_largest_block(jaxpr) / EXAMPLES,
  )


def _arrays(equation: Any) -> list[Any]:
  return [v.aval for v in (*equation.invars, *equation.outvars)]


def _of_examples(aval: Any) -> int:
  """Bytes of an array that has the examples in it, 0 of a weight or its gradient."""
  return flops.nbytes(aval) if any(n and n % EXAMPLES == 0 for n in getattr(aval, "shape", ())) else 0


def _largest_block(jaxpr: Jaxpr) -> int:
  """Bytes of all examples that one turn of a loop hands on, of the loop that hands on the most."""
  found = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan":
      stacked = equation.outvars[equation.params["num_carry"] :]
      found = max(found, sum(_of_examples(v.aval) for v in stacked) // equation.params["length"])
    found = max([found, *map(_largest_block, flops.parts(equation.params.values()))])
  return found


def _weights(p: program.Program, mesh: Any, rule: sharding.Rule, kind: Any) -> Weights:
  gathered, block = 0, 0
  for path, x in (flatten_dict(p.state.trainable, sep="/") | flatten_dict(p.frozen, sep="/")).items():
    spec = sharding.param_spec(path, tuple(x.shape), mesh, rule)
    size = x.size * kind.itemsize // (mesh.shape["tensor"] if "tensor" in spec else 1)
    gathered += size if "fsdp" in spec else 0
    block += size // x.shape[0] if "fsdp" in spec and path.startswith("llm/layers/") else 0
  gradients = explain.local_bytes(p.state.trainable, mesh, rule)
  state = sum(explain.local_bytes(tree, mesh, rule) for tree in (p.frozen, p.state.trainable, p.state.optimizer))
  trained = sum(flops.nbytes(x) for x in jax.tree.leaves(p.state.trainable))
  return Weights(state, gradients, gathered, block, trained // mesh.shape["tensor"])


def _sums(config: Any) -> int:
  """Bytes of one example that `tensor` sums over in one pass: two streams a block (Megatron-LM)."""
  _, bare = init.make_model(config)
  shapes = abstract_params(bare, dummy_observation(bare))
  seen = program.abstract_observation(config, bare, 1)

  def read(params, observation):
    return bare.apply({"params": params}, observation).intermediates.get("sequence", observation.prompt)

  length = jax.eval_shape(read, shapes, seen).shape[1]
  total = 2 * bare.llm.depth * length * bare.llm.width
  for vit in (bare.dino, bare.siglip):
    if vit is not None:
      total += 2 * vit.depth * bare.num_views * (vit.num_prefix + vit.num_patches + vit.queries) * vit.width
  return total * jnp.dtype(config.model.dtype).itemsize


def _estimate(setup: _Setup, remat: str | None, shape: dict[str, int], turns: int) -> Candidate:
  rows = setup.batch / (shape["replica"] * shape["data"] * shape["fsdp"])  # of a step, on a device
  work, weights, tensor = setup.work[remat], setup.weights(shape), shape["tensor"]
  block = setup.work[None].block
  again = block + block - work.block  # the gradients of a block's values, and those of its values that were not kept
  memory = weights.state + weights.gradients * min(2, turns) + rows / turns * (work.kept + again / tensor)
  traffic = rows * work.moved / tensor + turns * work.weights / tensor
  traffic += 7 * weights.gradients  # p, m, v read and written, g read
  if shape["fsdp"] > 1:
    memory += 2 * weights.block  # the next is gathered meanwhile
    traffic += 2 * turns * weights.gathered
  return Candidate(
    remat,
    shape,
    turns,
    memory,
    rows * work.flops / tensor / setup.peak,
    traffic / setup.where.facts.bandwidth,
    _collectives(setup, shape, turns, rows, passes=2 if remat is None else 3),
  )


def _collectives(setup: _Setup, shape: dict[str, int], turns: int, rows: float, passes: int) -> float:
  """Seconds of all collectives of a step on a device: what it receives over the rate of its links.

  Args:
    rows: examples of a step on the device. passes: over the blocks, what is computed again included.
  """
  where, weights, (replica, data, fsdp, tensor) = setup.where, setup.weights(shape), shape.values()

  def share(n: int) -> float:  # of a gathered array that comes from the other devices
    return (n - 1) / n

  fsdp_bytes = turns * (2 * weights.gathered + weights.trained) * share(fsdp)  # for both passes; gradients scattered
  tensor_bytes = 2 * passes * rows * setup.sums * share(tensor)  # a sum is a scatter and a gather
  return (
    fsdp_bytes / _rate(where, fsdp * tensor)
    + tensor_bytes / where.facts.link
    + 2 * weights.gradients * share(data) / _rate(where, where.devices)
    + 2 * weights.gradients * share(replica) / where.facts.network
  )


def _rate(where: hardware.Topology, devices: int) -> float:
  """Bytes/s that a device receives in a collective over so many: beyond a host, all its adapters work together."""
  return where.facts.link if devices <= where.near else min(where.facts.link, where.facts.network * where.near)


def fits(candidate: Candidate, where: hardware.Topology) -> bool:
  return candidate.memory <= ROOM * where.facts.memory


def applied(config: Any, candidate: Candidate) -> Any:
  """The config with a candidate's remat policy, mesh and accumulation."""
  sizes = {f"mesh.{axis}": n for axis, n in candidate.mesh.items()}
  return program.changed(config, **{"model.remat": candidate.remat, "optim.accumulate": candidate.turns, **sizes})


def describe(found: list[Candidate], config: Any, where: hardware.Topology, slices: int = 1, rows: int = 8) -> str:
  """The first candidates as a table, and the flags of the first."""
  facts, n = where.facts, sum(fits(x, where) for x in found)
  lines = [
    f"plan: batch {config.data.batch_size} on {slices * where.devices} × {facts.kind} ({facts.memory / 2**30:.1f} GiB, "
    f"{facts.bandwidth / 1e9:.0f} GB/s, {facts.link / 1e9:.0f} GB/s from others)",
    f"an estimate from shapes; nothing was compiled. {n} of {len(found)} ways fit {ROOM:.0%} of the memory",
    "",
    f"{'remat':<6}{'mesh':<34}{'turns':>5}{'GiB':>8}{'arithmetic':>12}{'traffic':>10}{'collectives':>13}{'step':>16}",
  ]
  for x in found[:rows]:
    mesh = " ".join(f"{axis} {size}" for axis, size in x.mesh.items() if size > 1) or "one device"
    times = f"{1e3 * x.arithmetic:>9.3g} ms{1e3 * x.traffic:>7.3g} ms{1e3 * x.collectives:>10.3g} ms"
    step = f"{1e3 * x.seconds:.3g} to {1e3 * x.longest:.3g} ms"
    lines.append(f"{x.remat or 'none':<6}{mesh:<34}{x.turns:>5}{x.memory / 2**30:>8.2f}{times}{step:>16}")
  if n:
    return "\n".join([*lines, "", "the first: " + found[0].flags])
  return "\n".join([*lines, "", "DOES NOT FIT: none of them; a larger slice, or a smaller --batch"])
