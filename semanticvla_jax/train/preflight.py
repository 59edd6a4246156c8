"""python -m semanticvla_jax.train.preflight --config=configs/libero.py:full@7b --topology=v5e:4x4 --batch=128

Does this config fit those devices? Compiles the real training step (or, with --program=policy, the forward pass of the
policy) ahead of time with abstract arguments, and prints what it needs: for TPU slices or GPUs that are not there, or
for the devices that are. Nothing runs and nothing is allocated: it tells about memory, sharding, collectives, launches
and bytes, not about speed.

    --topology  v5e:4x4, v6e:4x4, v5p:2x2x2, … (make aot) or h100:8, h200, a100:8, l40s, b200:8 (make aot-gpu);
                none: the devices present
    --slices    several such slices, mesh axis `replica`
    --batch     global batch; none: the config's
    --sweep     finds the largest batch that fits
    --quick     compiles for TPUs in a quarter of the time, with other memory
    --plan      compares remat policies, meshes and accumulation by an estimate; compiles nothing
    --verify    with --plan: compiles the fastest one

Exit status: 0 fits, 3 does not, 1 an error.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags

from semanticvla_jax import cli, sources
from semanticvla_jax.errors import refuse
from semanticvla_jax.models import programs, serving
from semanticvla_jax.models.semanticvla import abstract_params, build, dummy_observation
from semanticvla_jax.train import command_line, explain, flops, from_specs, hardware, program, sharding
from semanticvla_jax.train import plan as planning
from semanticvla_jax.train import step as stepping
from semanticvla_jax.train.hlo_traffic import BYTES, Traffic, traffic
from semanticvla_jax.train.step import AuxLoss


class Report(NamedTuple):
  """What one compilation found.

  Attributes:
    batch: global. seconds: to compile. memory: bytes a device by kind, {} where it did not fit. problem: the compiler's
    message where it did not fit. largest: (bytes, description), …. traffic: what a call moves, None where it did not
    fit. limit: bytes a device has, None where unknown.
  """

  batch: int
  seconds: float
  memory: dict[str, int]
  problem: str | None
  largest: list[tuple[int, str]]
  traffic: Traffic | None
  limit: int | None

  @property
  def peak(self) -> int:
    return self.memory.get("peak", 0)

  @property
  def fits(self) -> bool:
    return self.problem is None and (self.limit is None or self.peak <= self.limit)


def lower_train(config: Any, mesh: Mesh, aux_loss: AuxLoss | None = None) -> Callable[[], Any]:
  """A function that lowers the training step over `mesh`."""
  p, rule = program.from_config(config, aux_loss), sharding.rule_of(config.mesh)
  sharding.check_rows(config.data.batch_size, sharding.devices_of_rows(mesh), config.optim.accumulate)
  jitted = stepping.jit_step(p.step, mesh, p.state, p.frozen, rule)
  return lambda: jitted.lower(p.state, p.frozen, p.batch)


def lower_policy(config: Any, mesh: Mesh, aux_loss: AuxLoss | None = None) -> Callable[[], Any]:
  """A function that lowers a policy's call: its sentence known, adapters folded in, all weights in the compute type.

  Its prompt has at least config.data.prompt_length tokens, and as many more as give the sequence a multiple of 8
  positions, as `Policy.load(prompt_lengths=…)` compiles it. Attention is config.model.attention, where there is one.
  """
  del aux_loss  # a policy has none
  how = serving.layout(mesh.devices.flat[0].platform, config.model.get("attention", serving.ATTENTION[0]))
  bare = build(config.model.to_dict() | how)
  shapes = abstract_params(bare, dummy_observation(bare))
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.model.dtype)), shapes)
  where, everywhere = sharding.param_sharding(params, mesh, sharding.rule_of(config.mesh)), NamedSharding(mesh, P())
  o = program.abstract_observation(config, bare, config.data.batch_size)
  more = -(programs.positions_besides_prompt(bare, shapes, o) + config.data.prompt_length) % serving.MULTIPLE
  longer = program.changed(config, **{"data.prompt_length": config.data.prompt_length + more})
  o = program.abstract_observation(longer, bare, config.data.batch_size)
  words = [o.prompt, o.prompt_mask, o.instruction, o.instruction_mask]
  sentence = jax.eval_shape(programs.sentence(bare), params, words)
  jitted = jax.jit(programs.actions(bare), in_shardings=(where, everywhere, everywhere, everywhere))
  return lambda: jitted.lower(params, sentence, o.images, o.proprio)


PROGRAMS = {"train": lower_train, "policy": lower_policy}


# TPU's compiler with the least search for a fast program: a quarter of the time, somewhat other memory.
QUICK_OPTIONS = {"exec_time_optimization_effort": -1.0}


def compile_for(
  config: Any, mesh: Mesh, which: str = "train", aux_loss: AuxLoss | None = None, quick: bool = False
) -> Report:
  """Compiles a program of the config over the devices of `mesh`; `quick`: see QUICK_OPTIONS.

  Raises:
    ValueError: a config that does not fit together. Too little memory is not an error, see Report.
  """
  lower = PROGRAMS[which](config, mesh, aux_loss)
  began, limit = time.perf_counter(), _limit(mesh.devices.flat[0])
  try:
    with stepping.over(mesh):
      compiled = lower().compile(compiler_options=_options(mesh, quick))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
      raise
    seconds = time.perf_counter() - began
    return Report(config.data.batch_size, seconds, {}, _shorten(str(error)), [], None, limit)
  seconds = time.perf_counter() - began
  text = compiled.as_text()
  memory = _memory(compiled.memory_analysis(), config, mesh, which, aux_loss)
  return Report(config.data.batch_size, seconds, memory, None, largest(text), traffic(text), limit)


def _options(mesh: Mesh, quick: bool) -> dict | None:
  if described_gpu(mesh):
    return hardware.GPU_OPTIONS
  return QUICK_OPTIONS if quick and mesh.devices.flat[0].platform == "tpu" else None


def described_gpu(mesh: Mesh) -> bool:
  """Whether the devices of a mesh are GPUs that are not there."""
  return mesh.devices.flat[0].platform == "gpu" and not _present(mesh.devices.flat[0])


def _present(device: Any) -> bool:
  try:
    device.memory_stats()
    return True
  except Exception:  # a device that is only described
    return False


def _limit(device: Any) -> int | None:
  if _present(device):
    return (device.memory_stats() or {}).get("bytes_limit")
  known = hardware.facts(device.device_kind)  # libtpu refuses by itself what does not fit
  return int(known.memory) if known is not None and device.platform == "gpu" else None


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
    lines += _moves(report.traffic, hardware.facts(kind))
  if which == "train":
    work, best = program.example_flops(config, aux_loss) * report.batch, flops.peak(kind)
    floor = f"; at peak {1e3 * work / best / mesh.size:.0f} ms" if best else ""
    lines += ["", f"arithmetic: {work / 1e12:.3g} TFLOP a step{floor}"]
  if report.fits:
    known = hardware.facts(kind)
    has = report.limit if report.limit is not None or known is None else known.memory
    lines += [
      "",
      f"memory of this device is not known: {report.peak / 2**30:.2f} GiB a device"
      if has is None
      else f"fits: {report.peak / 2**30:.2f} of {round(has / 2**30, 2):g} GiB a device",
    ]
  else:
    lines += ["", f"DOES NOT FIT: {report.problem or f'{report.peak / 2**30:.2f} GiB needed'}"]
    lines += ["what would help:", *(f"  {remedy}" for remedy in remedies(config, mesh, which))]
  return "\n".join(lines)


def _moves(found: Traffic, known: hardware.Facts | None) -> list[str]:
  """Collectives, launches and bytes of one call, as lines."""
  lines = ["", "collectives of a call"]
  lines += [f"  {kind:<20}{n:>6}  {explain.size(size)}" for kind, n, size in found.collectives] or ["  none"]
  stray = {kind: found.count(kind) for kind in ("collective-permute", "all-to-all")}
  if any(stray.values()):
    listed = ", ".join(f"{n} {kind}" for kind, n in stray.items() if n)
    lines.append(f"  WARNING: {listed}: arrays change their layout between devices; parameters should only be gathered")
  at = f", {1e3 * found.bytes / known.bandwidth:.1f} ms at {known.bandwidth / 1e9:.0f} GB/s" if known else ""
  lines += [
    "",
    f"launches of a call: {found.launches}, {found.products} of them with matrix products",
    f"bytes moved: {explain.size(found.bytes).strip()}{at}",
    f"weights copied again: {explain.size(found.copied_weights).strip()}",
  ]
  return lines + [f"  {explain.size(size)}  {n:>3} × {what}" for size, n, what in found.copies[:6]]


def print_line(report: Report) -> None:
  """One line of a sweep."""
  outcome = f"fits, {report.peak / 2**30:.2f} GiB" if report.fits else "does not fit"
  print(f"batch {report.batch}: {outcome} ({report.seconds:.0f} s)", flush=True)


def show_plan(config: Any, aux_loss: AuxLoss | None) -> None:
  """Prints the plan and, with --verify, the compiled program of its first line; exits."""
  where = hardware.topology(_TOPOLOGY.value)
  found = planning.candidates(config, where, _SLICES.value, aux_loss)
  print(planning.describe(found, config, where, _SLICES.value))
  best = found[0]
  if not _VERIFY.value or not planning.fits(best, where):
    sys.exit(0 if planning.fits(best, where) else 3)
  chosen = planning.applied(config, best)
  mesh = sharding.make_mesh(chosen.mesh, hardware.devices(where.name, _SLICES.value))
  report = compile_for(chosen, mesh, "train", aux_loss)
  print(f"\n{describe(report, chosen, mesh, 'train', aux_loss)}")
  print(f"estimated: {best.memory / 2**30:.2f} GiB a device")
  sys.exit(0 if report.fits else 3)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  which = _PROGRAM.value
  try:
    config = from_specs.resolve(_CONFIG.value)
    if _BATCH.value is not None:
      config = program.changed(config, **{"data.batch_size": _BATCH.value})
    elif which == "policy":
      config = program.changed(config, **{"data.batch_size": 1})
    if _ATTENTION.value != serving.ATTENTION[0]:
      with config.unlocked():
        config.model.attention = _ATTENTION.value
    if _TOPOLOGY.value is not None:
      jax.config.update("jax_platforms", "cpu")  # such devices compile only
    aux_loss = sources.aux_loss(config)
    if _PLAN.value:
      if _TOPOLOGY.value is None or which == "policy":
        raise refuse("--plan", f"--topology={_TOPOLOGY.value} --program={which}", "a topology to train on", "name one")
      show_plan(config, aux_loss)
    devices = hardware.devices(_TOPOLOGY.value, _SLICES.value)
    sizes = dict(config.mesh.items()) if which == "train" else {"tensor": len(devices)}
    if which == "train" and _SLICES.value > 1:
      sizes["replica"] = _SLICES.value
    mesh = sharding.make_mesh(sizes, devices)
    if _SWEEP.value:
      best = sweep(config, mesh, print_line, which, aux_loss)
      print(f"largest batch that fits: {best}")
      sys.exit(0 if best else 3)
    report = compile_for(config, mesh, which, aux_loss, _QUICK.value)
  except ValueError as error:
    sys.exit(f"error: {error}")
  print(describe(report, config, mesh, which, aux_loss))
  if _QUICK.value:
    print("--quick: the program of a run is compiled with more effort, and takes somewhat other memory")
  sys.exit(0 if report.fits else 3)


if __name__ == "__main__":  # here, so that the module can be imported by a command that defines --config too
  _CONFIG = config_flags.DEFINE_config_file("config", None, "Config file and argument, e.g. configs/libero.py:full@7b")
  _TOPOLOGY = flags.DEFINE_string("topology", None, "Devices to compile for, e.g. v5e:4x4, h100:8; none: those present")
  _SLICES = flags.DEFINE_integer("slices", 1, "Number of such slices")
  _BATCH = flags.DEFINE_integer("batch", None, "Global batch size; none: the config's")
  _PROGRAM = flags.DEFINE_enum("program", "train", sorted(PROGRAMS), "Program to compile")
  _ATTENTION = flags.DEFINE_enum("attention", serving.ATTENTION[0], serving.ATTENTION, "With --program=policy")
  _SWEEP = flags.DEFINE_bool("sweep", False, "Search for the largest batch that fits")
  _PLAN = flags.DEFINE_bool("plan", False, "Compare remat policies, meshes and accumulation by an estimate")
  _QUICK = flags.DEFINE_bool("quick", False, "For TPUs: a quarter of the compile time, memory to a fifth")
  _VERIFY = flags.DEFINE_bool("verify", False, "With --plan: compile the fastest of them")
  flags.mark_flag_as_required("config")
  cli.run(lambda _: app.run(main, flags_parser=command_line.parse), keep_compiled=False)
