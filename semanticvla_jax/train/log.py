"""Metrics: JSONL always, TensorBoard too, one line of progress with its ETA."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from semanticvla_jax import files
from semanticvla_jax.errors import refuse


class Trace:
  """A profiler trace of updates `steps` = (first, last) in `folder`, for TensorBoard or Perfetto; None for none.

  A run that begins between them traces the rest; one that leaves in between keeps what it has.
  """

  def __init__(self, folder: Path, steps: tuple[int, int] | None):
    self.folder, self.steps, self.on = folder, steps, False

  def __enter__(self) -> Trace:
    return self

  def __exit__(self, *_) -> None:
    if self.on:
      jax.profiler.stop_trace()
      self.on = False

  def before(self, step: int) -> None:
    """To be called before update `step` (1, 2, …)."""
    if self.steps is not None and not self.on and self.steps[0] <= step <= self.steps[1]:
      jax.profiler.start_trace(str(self.folder))
      self.on = True

  def after(self, step: int, values: Any) -> None:
    """To be called after it, with something it computed."""
    if self.on and step == self.steps[1]:
      jax.block_until_ready(values)
      self.__exit__()
      logging.info("traced steps %d to %d: %s", *self.steps, self.folder)


def _step(line: str) -> int | None:
  """The step that a line of metrics.jsonl is of; None for any other line."""
  try:
    return int(json.loads(line)["step"])
  except (ValueError, KeyError, TypeError):
    return None


class Metrics:
  """Collects device metrics without waiting for them, writes their means every `every` steps (first process only).

  Attributes:
    path: `metrics.jsonl` in the workdir; one object a line with `step` and floats, null for NaN and Inf. A resumed run
      appends; lines past the step it resumes from are dropped first, so each step is there once.
    recent: the metrics of every update of the last flush, one dict each.

  Args:
    workdir, total, every, start: folder (a Path, or an epath.Path of a bucket), number of updates, updates between
      writes, number resumed from.
    examples: of a batch. flops: of one example, forward and backward. peak: FLOP/s of all devices; with both, MFU is
    written: flops · examples/s / peak (PaLM, appendix B, with FLOPs counted as in train/flops.py).
  """

  def __init__(
    self,
    workdir: Path,
    total: int,
    every: int,
    start: int,
    examples: int,
    flops: float | None = None,
    peak: float | None = None,
  ):
    self.path, self.total, self.every, self.examples = workdir / "metrics.jsonl", total, every, examples
    self._per_example = flops / peak if flops and peak else None
    self.recent: list[Mapping] = []
    self._wandb = None
    self._pending: list[Mapping] = []
    self._first = jax.process_index() == 0
    self._began, self._start, self._last = time.perf_counter(), start, time.perf_counter()
    self._wait, self._untimed = 0.0, 0
    self._board = None
    if self._first:
      self._truncate(start)
      self._board = self._tensorboard(str(workdir / "tensorboard"), start)

  @staticmethod
  def _tensorboard(folder: str, start: int) -> Any:
    from tensorboardX import SummaryWriter

    try:
      return SummaryWriter(folder, purge_step=start)
    except ImportError as error:  # a bucket, without the package that writes to it
      logging.warning("no TensorBoard files in %s: %s", folder, error)
      return None

  def also_to_wandb(self, project: str | None, config: Mapping) -> None:
    """Reports to a wandb project as well (first process); a resumed run goes on with its wandb run.

    Raises:
      ValueError: wandb is not installed.
    """
    if project is None or not self._first:
      return
    try:
      import wandb
    except ImportError as error:
      raise refuse(
        "config.train.wandb",
        f"{project!r} without wandb",
        "it installed",
        "pip install wandb, or unset it",
      ) from error
    folder, known = self.path.parent, self.path.parent / "wandb_id.txt"
    if self._start == 0 or not known.exists():
      files.write(known, secrets.token_hex(4))
    local = str(folder) if isinstance(folder, Path) else None  # wandb writes its files to a disk
    number = known.read_text(encoding="utf-8")
    self._wandb = wandb.init(project=project, id=number, dir=local, config=dict(config), resume="allow")

  def _truncate(self, start: int) -> None:
    if not self.path.exists():
      return
    lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
    steps = [_step(line) for line in lines]
    if None in steps[:-1]:  # a kill may leave half of the last one
      logging.warning("%s: %d damaged lines are dropped", self.path, steps[:-1].count(None))
    self._replace("".join(line + "\n" for line, step in zip(lines, steps) if step is not None and step <= start))

  def _replace(self, content: str) -> None:
    """Writes the file anew: whole or not at all."""
    files.write(self.path, content)

  def add(self, step: int, metrics: Mapping, wait: float, flush: bool = False) -> dict | None:
    """Takes the metrics of update `step` (1, 2, …) and the seconds spent waiting for its batch.

    Returns the means every `every` steps and where `flush` is set (then it waits for the device), else None. Time
    counts from the end of the first update, which compiles, on (unless a window holds nothing else).
    """
    self._pending.append(metrics)
    self._wait += wait
    if step == self._start + 1 and self.every > 1 and not flush:
      jax.block_until_ready(metrics)
      self._began = self._last = time.perf_counter()
      self._wait, self._untimed = 0.0, 1
    if step % self.every and not flush:
      return None
    values = self.recent = jax.device_get(self._pending)
    means = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
    now = time.perf_counter()
    seconds, timed = now - self._last, len(values) - self._untimed
    means |= {
      "step": step,
      "examples_per_s": self.examples * timed / seconds,
      "step_ms": 1e3 * seconds / timed,
      "input_wait_ms": 1e3 * self._wait / timed,
    }
    means |= self._rates(means)
    self._pending, self._wait, self._last, self._untimed = [], 0.0, now, 0
    if self._first:
      self._write(step, means)
    return means

  def _rates(self, means: Mapping) -> dict:
    """Tokens a second, MFU and the highest HBM use of a local device so far; each where it is known."""
    rates = {}
    if "tokens" in means:
      rates["tokens_per_s"] = means["tokens"] / means["step_ms"] * 1e3
    if self._per_example is not None:
      rates["mfu"] = self._per_example * means["examples_per_s"]
    used = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    return rates | ({"hbm_gib": max(used) / 2**30} if used else {})

  def _write(self, step: int, means: dict) -> None:
    line = json.dumps({name: value if np.isfinite(value) else None for name, value in means.items()}) + "\n"
    if isinstance(self.path, Path):
      with self.path.open("a", encoding="utf-8") as f:
        f.write(line)
    else:  # a bucket has no appending
      self._replace((self.path.read_text(encoding="utf-8") if self.path.exists() else "") + line)
    for name, value in means.items():
      if name != "step" and self._board is not None:
        self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(means, step=step)
    eta = (time.perf_counter() - self._began) / (step - self._start) * (self.total - step)
    logging.info(
      "step %d/%d  loss %.4f  lr %.2e  %.0f examples/s  input wait %.0f of %.0f ms  ETA %s",
      step,
      self.total,
      means["loss"],
      means["lr"],
      means["examples_per_s"],
      means["input_wait_ms"],
      means["step_ms"],
      time.strftime("%H:%M:%S", time.gmtime(eta)),
    )

  def close(self) -> None:
    if self._board is not None:
      with contextlib.suppress(OSError):  # a full disk, which metrics.jsonl has met first
        self._board.close()
    if self._wandb is not None:
      self._wandb.finish()
