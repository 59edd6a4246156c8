"""How fast conversion is beside a plain copy, how much memory it takes, and what a kill in the middle leaves.

Writes a random checkpoint of openvla-7b's layout below the folder (or takes the one that is there), then, each in a
process of its own and from files that are out of the page cache: a sequential copy, to-orbax, to-torch, a comparison of
what came back with the source, and both conversions killed with -9 in the middle and started again. Needs room for four
times the checkpoint (15 GB at 32 layers).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from semanticvla_jax import cli
from semanticvla_jax.benchmark import rows
from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.errors import refuse

WRITER = "tests/convert/full_size.py"  # reads the released checkpoint's names and shapes, which the tests freeze
CONFIG = """import json
import ml_collections

def get_config(arg=None):
  return ml_collections.ConfigDict(json.loads({text!r}))
"""


class Phase(NamedTuple):
  """Wall time until everything is on the disk, the process's CPU time, bytes moved, and its peak resident memory."""

  name: str
  seconds: float
  cpu: float
  nbytes: int
  peak: int
  status: int


def size(folder: Path) -> int:
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget(*folders: Path) -> None:
  """Writes files back and takes them out of the page cache."""
  for folder in folders:
    for path in folder.rglob("*"):
      if path.is_file():
        with path.open("rb") as file:
          os.fsync(file.fileno())
          os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(name: str, nbytes: int, *argv: str) -> Phase:
  began = time.monotonic()
  process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL)
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  os.sync()
  cpu = usage.ru_utime + usage.ru_stime
  return Phase(name, time.monotonic() - began, cpu, nbytes, usage.ru_maxrss * 1024, process.returncode)


COPY = """import os, sys
for name in os.listdir(sys.argv[1]):
  with open(os.path.join(sys.argv[1], name), "rb") as a, open(os.path.join(sys.argv[2], name), "wb") as b:
    while data := a.read(1 << 24):
      b.write(data)
"""


def copy(source: Path, root: Path) -> Phase:
  forget(source)
  (root / "copy").mkdir()
  phase = run("copy", size(source), "-c", COPY, str(source), str(root / "copy"))
  shutil.rmtree(root / "copy")
  return phase


def to_orbax(source: Path, policy: Path, config: Path) -> list[str]:
  flags = ["--source", str(source), "--target", str(policy), "--config", str(config)]
  return ["-m", "semanticvla_jax.convert", "to-orbax", *flags]


def killed(argv: list[str], target: Path, half: int) -> None:
  """Starts a conversion and kills it when half of the bytes are written."""
  process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL)
  partial = target.parent / f".{target.name}.partial"
  while process.poll() is None and not (partial.exists() and written(partial) > half):
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  if target.exists() or not partial.exists():
    raise RuntimeError(f"kill -9 in the middle: got {target} or no {partial}; expected half a conversion")


def same(what: str, first: str | dict, second: str | dict, target: Path) -> None:
  """Raises RuntimeError unless a conversion that was killed and begun again made what the undisturbed one did."""
  if first != second or target.with_name(f".{target.name}.partial").exists():
    raise RuntimeError(f"{what} after kill -9: got {second}, expected {first} and nothing left over")


def read(folder: Path, file: str, key: str) -> str | dict:
  return json.loads((folder / file).read_text(encoding="utf-8"))[key]


def written(folder: Path) -> int:
  total = 0
  for top, _, names in os.walk(folder):
    for name in names:
      try:
        total += os.stat(os.path.join(top, name)).st_size
      except FileNotFoundError:  # renamed while we look
        continue
  return total


def measure(result: Result, folder: str, layers: int) -> None:
  """Times every phase and adds its seconds, rate, share of the copy's rate and peak memory.

  Raises:
    ValueError: no room on the disk, or not in a checkout of the repository.
    RuntimeError: a phase failed, or a conversion that was killed and begun again made something else.
  """
  root = Path(folder).resolve()
  root.mkdir(parents=True, exist_ok=True)
  source, policy, back, again = (root / name for name in ("source", "policy", "back", "again"))
  for old in (root / "copy", policy, back, again):
    shutil.rmtree(old, ignore_errors=True)
  if not source.exists():
    write(source, layers)
  config, total = _config(root, layers), size(source)
  result.add("checkpoint", total, "byte")
  if (free := shutil.disk_usage(root).free) < 3.1 * total:
    raise refuse("Disk too small", f"{free:,} bytes free in {root}", f"{3.1 * total:,.0f}", "make room")
  show(result, copy(source, root))
  forget(source)
  show(result, run("to-orbax", total, *to_orbax(source, policy, config)))
  forget(source, policy)
  convert = ["-m", "semanticvla_jax.convert"]
  argv = [*convert, "to-torch", "--policy", str(policy), "--target", str(back), "--base", str(source)]
  show(result, run("to-torch", total, *argv))
  show(result, run("diff", 2 * total, *convert, "diff", str(source), str(back)))
  whole = read(back, "conversion.json", "sha256")
  shutil.rmtree(back)
  forget(source, policy)
  killed(argv, back, total // 2)
  show(result, run("to-torch after kill -9", total, *argv))
  same("to-torch", whole, read(back, "conversion.json", "sha256"), back)
  shutil.rmtree(back)
  forget(source)
  killed(to_orbax(source, again, config), again, size(policy) // 2)
  show(result, run("to-orbax after kill -9", total, *to_orbax(source, again, config)))
  same("to-orbax", *(read(folder, "metadata.json", "params_sha256") for folder in (policy, again)), again)
  for made in (policy, again):
    shutil.rmtree(made)
  result.note(f"{source} stays for the next time")


def write(source: Path, layers: int) -> None:
  """Writes the random checkpoint. Raises ValueError outside a checkout of the repository."""
  script = Path(cli.in_repository(WRITER))
  if not script.exists():
    raise refuse("benchmark convert", f"no {WRITER}", "a checkout of the repository", "run it there")
  subprocess.run([sys.executable, str(script), str(source), "--layers", str(layers)], check=True)


def _config(root: Path, layers: int) -> Path:
  variant = rows.SIZES["7b"] | dict(llm=rows.SIZES["7b"]["llm"] | dict(depth=layers))
  model = dict(rows.ROWS["oft"].fields) | dict(coupler=None, mask="causal", chunk=1, num_views=1, proprio_dim=None)
  path = root / "config.py"
  values = {"model": model | {"variant": variant}, "lora": None, "data": {"normalisation": "q99"}}
  path.write_text(CONFIG.format(text=json.dumps(values)), encoding="utf-8")
  return path


def show(result: Result, phase: Phase) -> None:
  """Adds a phase's figures, held against those of the copy."""
  if phase.status:
    raise RuntimeError(f"{phase.name} ended with status {phase.status}")
  rate = phase.nbytes / phase.seconds
  result.add(phase.name, phase.seconds, "s")
  result.add(f"{phase.name}, CPU", phase.cpu, "s")
  result.add(f"{phase.name}, rate", rate / 1e9, "GB/s")
  if phase.name != "copy":
    result.add(f"{phase.name}, rate / copy", rate / 1e9 / result.value("copy, rate"), "ratio")
  result.add(f"{phase.name}, peak memory", phase.peak, "byte")
