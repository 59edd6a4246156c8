"""A LoRA training step: examples a second, MFU, memory, and how its time is split; SemanticVLA against OpenVLA-OFT.

Parameters are trained as the row's recipe says (rows.RECIPES, those of configs/libero.py and openvla_oft.py), on random
data.
"forward", "backward" and "optimizer" are programs compiled apart: the loss, its gradient less the loss, and the update;
they need not add up to the step, which is one program.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from semanticvla_jax.benchmark import flops, programs, rows, timing
from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.train import flops as counter
from semanticvla_jax.train import optimizer
from semanticvla_jax.train import step as stepping


class Settings(NamedTuple):
  """What is timed, and how often.

  Attributes:
    rows, size, dtype, prompt: models of rows.ROWS; frozen parameters and computation in dtype, trainable ones float32.
    batch: examples a step. calls: timed steps.
    remat: what the backward pass computes again: "none", "full", "dots"; None for "full" at 7b (configs/), else "none".
    peer: which PyTorch steps run alongside: some of ("eager", "compile").
    seed: of weights and data. smoke: small copies and products.
  """

  rows: Sequence[str]
  size: str
  dtype: str
  prompt: int
  batch: int
  calls: int
  remat: str | None = None
  peer: Sequence[str] = ()
  seed: int = 0
  smoke: bool = False


class Fields(dict):
  """Settings read as attributes, as a training config's are."""

  __getattr__ = dict.__getitem__


class Step(NamedTuple):
  """A step and its parts, each of which returns when it is done; `seconds` to compile it; `program` compiled."""

  run: Callable[[], Any]
  parts: Mapping[str, Callable[[], Any]]
  seconds: float
  program: jax.stages.Compiled


def measure(result: Result, settings: Settings) -> None:
  """Times every row; with both SemanticVLA and OpenVLA-OFT among them, their ratio."""
  rates = timing.rates(settings.dtype, settings.smoke)
  result.add("copy", rates["copy"] / 1e9, "GB/s")
  result.add("matmul", rates["matmul"] / 1e12, "TFLOP/s")
  for row in settings.rows:
    _measure_row(result, row, settings, rates)
  if {"full", "oft"} <= {*settings.rows}:
    ours, theirs = (result.value(f"{row} examples") for row in ("full", "oft"))
    result.add("full / oft, measured", ours / theirs, "ratio")
    ours, theirs = (result.value(f"{row} example") for row in ("full", "oft"))
    result.add("full / oft, by FLOPs", theirs / ours, "ratio")
    result.add("full / oft, the paper's", rows.PAPER_TRAINING_RATIO, "ratio")


def _measure_row(result: Result, row: str, settings: Settings, rates: Mapping[str, float]) -> None:
  config = _config(row, settings)
  result.models[row] = config
  step = make_step(row, config, settings)
  result.add(f"{row} compile", step.seconds, "s")
  seconds = timing.in_turns({"step": step.run}, settings.calls)["step"]
  timing.add_quantiles(result, f"{row} step", seconds)
  usual = float(np.median(seconds))
  result.add(f"{row} examples", settings.batch / usual, "examples/s")
  ops = sum(flops.training(row, settings.size, settings.prompt).values())
  result.add(f"{row} example", ops, "FLOP")
  rate = ops * settings.batch / usual
  result.add(f"{row} of the matmul rate", rate / rates["matmul"], "ratio")
  peak = counter.peak(jax.devices()[0].device_kind)
  if peak is not None:
    result.add(f"{row} MFU", rate / peak, "ratio")
  _add_memory(result, row, step.program)
  parts = timing.in_turns(step.parts, max(settings.calls // 2, 1))
  forward, gradient, update = (float(np.median(parts[name])) for name in ("forward", "gradient", "optimizer"))
  for name, value in (("forward", forward), ("backward", gradient - forward), ("optimizer", update)):
    result.add(f"{row} {name}", 1e3 * value, "ms")
  if settings.peer:
    _measure_peer(result, row, step.run, settings)


def _config(row: str, settings: Settings) -> dict[str, Any]:
  remat = settings.remat or ("full" if settings.size == "7b" else "none")
  return rows.model(row, settings.size, settings.dtype, remat=remat, scan_encoders=True)


def make_step(row: str, config: Mapping[str, Any], settings: Settings) -> Step:
  """The compiled step of a row with random parameters and data, and its parts."""
  program = programs.training(row, config, settings.prompt, settings.batch, settings.dtype)
  tx, rate = (make(Fields(rows.OPTIMIZER)) for make in (optimizer.transform, optimizer.schedule))
  frozen = programs.random_params(program.frozen, seed=settings.seed)
  state = jax.jit(lambda t: stepping.new_state(tx, t))(programs.random_params(program.trainable, seed=settings.seed))
  vocab = min(rows.SIZES[settings.size][part]["vocab"] for part in ("llm", "text"))
  batch = jax.device_put(programs.random_batch(program.batch, vocab, settings.seed))
  step = jax.jit(stepping.make_step(program.model, tx, rate, settings.seed), donate_argnums=0)
  begin = time.perf_counter()
  compiled = step.lower(state, frozen, batch).compile()
  seconds = time.perf_counter() - begin
  kept = [state]

  def run():
    kept[0], metrics = compiled(kept[0], frozen, batch)
    jax.block_until_ready((kept[0], metrics))

  return Step(run, _parts(program, tx, kept, frozen, batch), seconds, compiled)


def _parts(program: programs.Training, tx: optax.GradientTransformation, kept: list, frozen: Any, batch: Any) -> dict:
  loss, gradient = jax.jit(program.loss), jax.jit(jax.value_and_grad(program.loss))

  @jax.jit
  def update(state, gradients):
    updates, moments = tx.update(gradients, state.optimizer, state.trainable)
    return optax.apply_updates(state.trainable, updates), moments

  def optimize():
    state = kept[0]
    jax.block_until_ready(update(state, state.trainable))  # any numbers of the gradients' shapes do

  return {
    "forward": lambda: jax.block_until_ready(loss(kept[0].trainable, frozen, batch, program.key)),
    "gradient": lambda: jax.block_until_ready(gradient(kept[0].trainable, frozen, batch, program.key)),
    "optimizer": optimize,
  }


def _add_memory(result: Result, row: str, program: jax.stages.Compiled) -> None:
  """Bytes of the step by its compiler, and the peak so far of the device or, where it does not tell, of the process."""
  memory = program.memory_analysis()
  if memory is not None:
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    result.add(f"{row} step by its compiler", total - memory.alias_size_in_bytes, "byte")
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    result.add(f"{row} peak of the device so far", stats["peak_bytes_in_use"], "byte")
  else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.add(f"{row} peak of the process so far", peak, "byte")


def _measure_peer(result: Result, row: str, ours: Callable[[], Any], settings: Settings) -> None:
  """Our step and PyTorch's in turns, one kind after the other."""
  from semanticvla_jax.benchmark import peer

  model = peer.Peer(row, settings.size, settings.dtype, settings.prompt, settings.batch)
  for kind in settings.peer:
    theirs, seconds = model.lora_step(kind)
    result.add(f"{row} PyTorch {kind} compile", seconds, "s")
    found = timing.in_turns({"ours": ours, "theirs": theirs}, settings.calls, settle=0.3)
    timing.add_quantiles(result, f"{row} PyTorch {kind} step", found["theirs"])
    ratios = (float(f(found["theirs"]) / f(found["ours"])) for f in (np.median, np.min))
    for name, ratio in zip(("", ", minima"), ratios):
      result.add(f"{row} PyTorch {kind} / ours{name}", ratio, "ratio")
  result.note(peer.LEAVES_OUT)
