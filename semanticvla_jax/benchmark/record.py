"""A result: figures with units, and a record of how they were made. Printed as it comes, written as JSON."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import semanticvla_jax
from semanticvla_jax import files

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
TORCH = ("torch", "transformers")  # recorded where they were used
_WIDTH = 48
_DECIMALS = {"ms": 2, "s": 2, "ratio": 3, "examples/s": 3, "episodes/s": 2, "actions/s": 1, "GB/s": 1, "TFLOP/s": 3}


class Result:
  """What one run of a verb found.

  Args:
    verb: of the benchmark command.
    settings: JSON values that the figures depend on: row, size, dtype, prompt length, views, batch, calls, seed, …
    say: prints a line.
  """

  def __init__(self, verb: str, settings: Mapping[str, Any], say: Callable[[str], None] | None = None):
    self.verb, self.settings = verb, dict(settings)
    self.figures: dict[str, dict[str, Any]] = {}
    self.models: dict[str, Any] = {}
    self.notes: list[str] = []
    self.say = say or functools.partial(print, flush=True)

  def add(self, name: str, value: Any, unit: str, quiet: bool = False) -> None:
    """Records a figure and, unless `quiet`, prints it."""
    self.figures[name] = {"value": value, "unit": unit}
    if not quiet:
      self.say(f"{name:{_WIDTH}} {shown(value, unit):>12} {unit}")

  def note(self, text: str) -> None:
    """Records and prints a sentence that a figure needs to be read with."""
    self.notes.append(text)
    self.say(f"  {text}")

  def value(self, name: str) -> Any:
    """A figure that was added."""
    return self.figures[name]["value"]

  def to_json(self) -> dict[str, Any]:
    """{"verb", "figures": {name: {"value", "unit"}}, "notes", "record": how they were made}."""
    made = {"settings": self.settings, "models": self.models, **machine(), **origin()}
    return {"verb": self.verb, "figures": self.figures, "notes": self.notes, "record": made}

  def write(self, path: str | os.PathLike) -> None:
    """Writes the result as JSON, in a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, self.to_json())


def shown(value: Any, unit: str) -> str:
  """A value as tables print it."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if unit in ("FLOP", "byte"):
    return f"{value:.4g}"
  return f"{value:.{_DECIMALS.get(unit, 2)}f}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
  """Where it ran: {"device": {"kind", "platform", "count"}, "cpu": {"model", "cores"}, "load": of the last minute}."""
  import jax

  first = jax.devices()[0]
  device = {"kind": first.device_kind, "platform": first.platform, "count": jax.device_count()}
  return {"device": device, "cpu": {"model": cpu_model(), "cores": cores()}, "load": round(os.getloadavg()[0], 2)}


def origin() -> dict[str, Any]:
  """What ran: versions, the package's own, git commit and whether the tree differs from it, the words, the time."""
  packages = (*PACKAGES, *(name for name in TORCH if name in sys.modules))
  commit = _git("rev-parse", "HEAD")
  return {
    "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    "package": semanticvla_jax.__version__,
    "commit": commit,
    "dirty": None if commit is None else bool(_git("status", "--porcelain")),
    "command": sys.argv[1:],
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def cores() -> int:
  """How many CPU cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
  """The CPU's name, as the kernel gives it."""
  path = Path("/proc/cpuinfo")
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
  return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(head: Sequence[str], lines: Sequence[Sequence[str]], say: Callable[[str], None]) -> None:
  """Prints columns as wide as their longest cell, the first to the left, the others to the right."""
  widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
  for line in (head, *lines):
    say("  ".join(f"{x:{w}}" if i == 0 else f"{x:>{w}}" for i, (x, w) in enumerate(zip(line, widths))).rstrip())


def _git(*words: str) -> str | None:
  command = ["git", "-C", str(Path(__file__).parent), *words]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
