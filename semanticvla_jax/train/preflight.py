"""python -m semanticvla_jax.train.preflight --config=configs/libero.py:full@7b --topology=v5e:4x4 --batch=128

Does this config fit that slice? Compiles the real training step (or, with --program=policy, the forward pass of the
policy) ahead of time with abstract arguments, and prints what it needs: for a TPU slice that is not there, through
libtpu's compiler (`make aot` installs it), or for the devices that are. Nothing runs and nothing is allocated: it tells
about memory, sharding and compilation, not about speed.

    --topology  v5e:4x4, v6e:4x4, v5p:2x2x2, v4:2x2x2, …; none: the devices present
    --slices    several such slices, mesh axis `replica`
    --batch     global batch; none: the config's
    --sweep     finds the largest batch that fits

Exit status: 0 fits, 3 does not, 1 an error.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags

from semanticvla_jax import cli, sources
from semanticvla_jax.models.semanticvla import abstract_params, dummy_observation
from semanticvla_jax.train import command_line, explain, flops, init, program, sharding
from semanticvla_jax.train import step as stepping
from semanticvla_jax.train.step import AuxLoss

# libtpu looks for a TPU VM's metadata and takes a lock; there is neither a VM nor a device here.
OFFLINE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}
# GiB of one device, as the makers publish it (the compiler keeps some); the first name that the device kind contains.
HBM = (("TPU v4", 32), ("TPU v5 lite", 16), ("TPU v5e", 16), ("TPU v5", 95), ("TPU v6", 32), ("TPU7x", 96))
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


class Report(NamedTuple):
  """What one compilation found.

  Attributes:
    batch: global. seconds: to compile. memory: bytes a device by kind, {} where it did not fit. problem: the compiler's
    message where it did not fit. largest: (bytes, description), …. collectives: (kind, how many, bytes), …, a scanned
    body counted once. limit: bytes a device has, None where unknown.
  """

  batch: int
  seconds: float
  memory: dict[str, int]
  problem: str | None
  largest: list[tuple[int, str]]
  collectives: list[tuple[str, int, int]]
  limit: int | None

  @property
  def peak(self) -> int:
    return self.memory.get("peak", 0)

  @property
  def fits(self) -> bool:
    return self.problem is None and (self.limit is None or self.peak <= self.limit)


def slice_devices(topology: str | None, slices: int = 1) -> list:
  """The devices of a TPU slice that need not be there, or those present.

  Raises:
    ValueError: libtpu is not installed, or does not know the topology.
  """
  if topology is None:
    return jax.devices()
  if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      f"--topology: got {topology!r} without libtpu, expected its compiler; make aot installs it, then start this with "
      "PYTHONPATH=.venv-aot before it."
    )
  for name, value in OFFLINE.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
  if topology.startswith("v4"):
    options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
  except Exception as error:  # libtpu raises what it likes
    raise ValueError(
      f"--topology: got {topology!r}, expected a slice that libtpu knows, such as v5e:4x4, v6e:4x4, v5p:2x2x2 or "
      f"v4:2x2x2 (chips, not cores). ({str(error).splitlines()[0][:200]})"
    ) from error


def lower_train(config: Any, mesh: Mesh, aux_loss: AuxLoss | None = None) -> Callable[[], Any]:
  """A function that lowers the training step over `mesh`."""
  p, rule = program.from_config(config, aux_loss), sharding.rule_of(config.mesh)
  sharding.check_rows(config.data.batch_size, sharding.devices_of_rows(mesh), config.optim.accumulate)
  jitted = stepping.jit_step(p.step, mesh, p.state, p.frozen, rule)
  return lambda: jitted.lower(p.state, p.frozen, p.batch)


def lower_policy(config: Any, mesh: Mesh, aux_loss: AuxLoss | None = None) -> Callable[[], Any]:
  """A function that lowers the forward pass, adapters folded in, all weights in the compute type."""
  del aux_loss  # a policy has none
  _, bare = init.make_model(config)
  shapes = abstract_params(bare, dummy_observation(bare))
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.model.dtype)), shapes)
  where = sharding.param_sharding(params, mesh, sharding.rule_of(config.mesh))
  jitted = jax.jit(
    lambda params, observation: bare.apply({"params": params}, observation).actions,
    in_shardings=(where, NamedSharding(mesh, P())),
  )
  observation = program.abstract_observation(config, bare, config.data.batch_size)
  return lambda: jitted.lower(params, observation)


PROGRAMS = {"train": lower_train, "policy": lower_policy}


def compile_for(config: Any, mesh: Mesh, which: str = "train", aux_loss: AuxLoss | None = None) -> Report:
  """Compiles a program of the config over the devices of `mesh`.

  Raises:
    ValueError: a config that does not fit together. Too little memory is not an error, see Report.
  """
  lower = PROGRAMS[which](config, mesh, aux_loss)
  began, limit = time.perf_counter(), _limit(mesh.devices.flat[0])
  try:
    with stepping.over(mesh):
      compiled = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
      raise
    seconds = time.perf_counter() - began
    return Report(config.data.batch_size, seconds, {}, _shorten(str(error)), [], [], limit)
  seconds = time.perf_counter() - began
  text = compiled.as_text()
  memory = _memory(compiled.memory_analysis(), config, mesh, which, aux_loss)
  return Report(config.data.batch_size, seconds, memory, None, largest(text), collectives(text), limit)


def _limit(device: Any) -> int | None:
  try:
    return (device.memory_stats() or {}).get("bytes_limit")
  except Exception:  # a device that is only described
    return None


def _shorten(message: str) -> str:
  used = re.search(r"Used [\d.]+\w* of [\d.]+\w* hbm[^.]*\. Exceeded hbm capacity by [\d.]+\w*", message)
  return used.group() if used else message.splitlines()[0][:300]


def _memory(found: Any, config: Any, mesh: Mesh, which: str, aux_loss: AuxLoss | None) -> dict[str, int]:
  """Bytes a device by kind."""
  arguments = found.argument_size_in_bytes
  parts = explain.memory(config, mesh, aux_loss) if which == "train" else {}
  parts.pop("gradients", None)
  parts |= {"batch" if which == "train" else "parameters, observation": arguments - sum(parts.values())}
  fresh = found.output_size_in_bytes - found.alias_size_in_bytes
  parts |= {
    "activations, gradients" if which == "train" else "activations": found.temp_size_in_bytes,
    "results": fresh,
    "program": found.generated_code_size_in_bytes,
  }
  return parts | {"peak": arguments + fresh + found.temp_size_in_bytes + found.generated_code_size_in_bytes}


_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def _results(text: str):
  """(name, bytes, operation, line) of every array that an instruction outside a fusion makes."""
  fused = False
  for line in text.splitlines():
    if line.endswith("{") and " -> " in line:
      fused = "fused_computation" in line.split("(")[0]
    if fused or not (found := _RESULT.match(line)):
      continue
    name, kind, shape, operation = found.groups()
    size = BYTES.get(kind, 4) * math.prod(int(n) for n in shape.split(",") if n)
    yield name, size, operation, f"{kind}[{shape}]", line


def largest(text: str, count: int = 6) -> list[tuple[int, str]]:
  """The largest arrays that the compiled program makes on a device, with the operation of the model behind each."""
  seen: dict[tuple, tuple[int, str]] = {}
  for _, size, operation, shape, line in _results(text):
    if operation in ("parameter", "bitcast", "get-tuple-element", "constant"):
      continue
    source = _OP_NAME.search(line)
    where = "/".join(source.group(1).split("/")[-4:]) if source else operation
    seen.setdefault((shape, where), (size, f"{shape} {where}"))
  return sorted(seen.values(), reverse=True)[:count]


def collectives(text: str) -> list[tuple[str, int, int]]:
  """How many of each kind stand in the program, and the bytes they make; those in a scan's body count once."""
  counts, sizes = Counter(), Counter()
  pattern = re.compile(rf" ({'|'.join(COLLECTIVES)})(-start)?\(")
  for line in text.splitlines():
    if " = " in line and (found := pattern.search(line)):
      shapes = re.findall(r"(\w+)\[([\d,]*)\]", line.split(" = ")[1][: found.start()].split(found.group(1))[0])
      counts[found.group(1)] += 1
      sizes[found.group(1)] += max(
        (BYTES.get(kind, 0) * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in shapes), default=0
      )
  return [(kind, counts[kind], sizes[kind]) for kind in COLLECTIVES if counts[kind]]


def remedies(config: Any, mesh: Mesh, which: str = "train") -> list[str]:
  """What would make it smaller, the cheapest first."""
  rows, turns = sharding.devices_of_rows(mesh), config.optim.accumulate
  size, out = config.data.batch_size, []
  if which == "policy":
    return [*(["a smaller --batch"] if size > 1 else []), "more chips (their weights are split over `tensor`)"]
  if config.model.remat != "full":
    out.append("--config.model.remat=full (recomputes each block in the backward pass)")
  if config.frozen_dtype != "bfloat16" and config.model.dtype == "bfloat16":
    out.append("--config.frozen_dtype=bfloat16 (halves the frozen parameters)")
  if more := next((n for n in range(2 * turns, size // rows + 1) if size % (n * rows) == 0), None):
    out.append(f"--config.optim.accumulate={more} (the same batch and updates, {more} parts one after another)")
  if mesh.shape["data"] > 1:
    out.append("--config.mesh.data=1 --config.mesh.fsdp=-1 (splits parameters further)")
  return [*out, "a larger slice"]


def sweep(
  config: Any, mesh: Mesh, report: Callable[[Report], None], which: str = "train", aux_loss: AuxLoss | None = None
) -> int | None:
  """The largest batch that fits, by doubling and halving the gap; None if the smallest does not."""
  rows = sharding.devices_of_rows(mesh) * config.optim.accumulate if which == "train" else 1

  def fits(n: int) -> bool:
    found = compile_for(program.changed(config, **{"data.batch_size": n * rows}), mesh, which, aux_loss)
    report(found)
    return found.fits

  good, bad = 0, None
  while bad is None and good < 2**12:
    good, bad = (max(1, 2 * good), None) if fits(max(1, 2 * good)) else (good, max(1, 2 * good))
  while bad is not None and good and bad - good > max(1, good // 8):
    middle = (good + bad) // 2
    good, bad = (middle, bad) if fits(middle) else (good, middle)
  return good * rows or None


def describe(report: Report, config: Any, mesh: Mesh, which: str = "train", aux_loss: AuxLoss | None = None) -> str:
  """The report as text."""
  kind = mesh.devices.flat[0].device_kind
  sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
  lines = [f"{which}: batch {report.batch} on {mesh.size} × {kind} ({sizes}); compiled in {report.seconds:.0f} s"]
  if report.problem is None:
    lines += ["", "memory of a device"]
    lines += [f"  {name:<26}{explain.size(size)}" for name, size in report.memory.items()]
    lines += ["", "largest arrays", *(f"  {explain.size(size)}  {what}" for size, what in report.largest)]
    lines += ["", "collectives (a scanned body counted once)"]
    lines += [f"  {kind:<20}{n:>5}  {explain.size(size)}" for kind, n, size in report.collectives] or ["  none"]
  if which == "train":
    work, best = program.example_flops(config, aux_loss) * report.batch, flops.peak(kind)
    floor = f"; at peak {1e3 * work / best / mesh.size:.0f} ms" if best else ""
    lines += ["", f"arithmetic: {work / 1e12:.3g} TFLOP a step{floor}"]
  if report.fits:
    has = next((gib for name, gib in HBM if name in kind), None)
    has = has if report.limit is None else round(report.limit / 2**30, 2)
    lines += [
      "",
      f"memory of this device is not known: {report.peak / 2**30:.2f} GiB a device"
      if has is None
      else f"fits: {report.peak / 2**30:.2f} of {has:g} GiB a device",
    ]
  else:
    lines += ["", f"DOES NOT FIT: {report.problem or f'{report.peak / 2**30:.2f} GiB needed'}"]
    lines += ["what would help:", *(f"  {remedy}" for remedy in remedies(config, mesh, which))]
  return "\n".join(lines)


def print_line(report: Report) -> None:
  """One line of a sweep."""
  outcome = f"fits, {report.peak / 2**30:.2f} GiB" if report.fits else "does not fit"
  print(f"batch {report.batch}: {outcome} ({report.seconds:.0f} s)", flush=True)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = _CONFIG.value
  try:
    if _BATCH.value is not None:
      config = program.changed(config, **{"data.batch_size": _BATCH.value})
    elif _PROGRAM.value == "policy":
      config = program.changed(config, **{"data.batch_size": 1})
    if _TOPOLOGY.value is not None:
      jax.config.update("jax_platforms", "cpu")  # libtpu compiles only
    devices = slice_devices(_TOPOLOGY.value, _SLICES.value)
    sizes = dict(config.mesh.items()) if _PROGRAM.value == "train" else {"tensor": len(devices)}
    if _PROGRAM.value == "train" and _SLICES.value > 1:
      sizes["replica"] = _SLICES.value
    mesh = sharding.make_mesh(sizes, devices)
    aux_loss = sources.aux_loss(config)
    if _SWEEP.value:
      best = sweep(config, mesh, print_line, _PROGRAM.value, aux_loss)
      print(f"largest batch that fits: {best}")
      sys.exit(0 if best else 3)
    report = compile_for(config, mesh, _PROGRAM.value, aux_loss)
  except ValueError as error:
    sys.exit(f"error: {error}")
  print(describe(report, config, mesh, _PROGRAM.value, aux_loss))
  sys.exit(0 if report.fits else 3)


if __name__ == "__main__":  # here, so that the module can be imported by a command that defines --config too
  _CONFIG = config_flags.DEFINE_config_file("config", None, "Config file and argument, e.g. configs/libero.py:full@7b")
  _TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice to compile for, e.g. v5e:4x4; none: the devices present")
  _SLICES = flags.DEFINE_integer("slices", 1, "Number of such slices")
  _BATCH = flags.DEFINE_integer("batch", None, "Global batch size; none: the config's")
  _PROGRAM = flags.DEFINE_enum("program", "train", sorted(PROGRAMS), "Program to compile")
  _SWEEP = flags.DEFINE_bool("sweep", False, "Search for the largest batch that fits")
  flags.mark_flag_as_required("config")
  cli.run(lambda _: app.run(main, flags_parser=command_line.parse))
