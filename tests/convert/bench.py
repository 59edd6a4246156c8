"""How fast conversion is beside a plain copy, how much memory it takes, and what a kill in the middle leaves.

python tests/convert/bench.py runs/bench_convert --layers 32

Writes a random checkpoint of openvla-7b's layout below the folder (or takes the one that is there), then, each in a
process of its own and from files that are out of the page cache: a sequential copy, to-orbax, to-torch, a comparison of
what came back with the source, and both conversions killed with -9 in the middle and started again. Needs room for four
times the checkpoint (15 GB at 32 layers). Exit status 1 where something is not equal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import full_size

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
    raise SystemExit(f"kill -9 in the middle: got {target} or no {partial}; expected half a conversion.")


def same(what: str, first: str | dict, second: str | dict, target: Path) -> None:
  """Ends with status 1 unless a conversion that was killed and begun again made what the undisturbed one did."""
  if first != second or target.with_name(f".{target.name}.partial").exists():
    raise SystemExit(f"{what} after kill -9: got {second}, expected {first} and nothing left over.")


def read(folder: Path, file: str, key: str) -> str | dict:
  return json.loads((folder / file).read_text())[key]


def written(folder: Path) -> int:
  total = 0
  for top, _, names in os.walk(folder):
    for name in names:
      try:
        total += os.stat(os.path.join(top, name)).st_size
      except FileNotFoundError:  # renamed while we look
        continue
  return total


def measure(root: Path, layers: int) -> list[Phase]:
  source, policy, back, again = (root / name for name in ("source", "policy", "back", "again"))
  for folder in (root / "copy", policy, back, again):
    shutil.rmtree(folder, ignore_errors=True)
  if not source.exists():
    full_size.write(source, layers)
  config, total = _config(root, layers), size(source)
  if shutil.disk_usage(root).free < 3.1 * total:
    raise SystemExit(f"disk: got {shutil.disk_usage(root).free:,} bytes free; expected {3.1 * total:,.0f}; make room.")
  phases = [show(copy(source, root), None)]
  forget(source)
  phases.append(show(run("to-orbax", total, *to_orbax(source, policy, config)), phases[0]))
  forget(source, policy)
  convert = ["-m", "semanticvla_jax.convert"]
  argv = [*convert, "to-torch", "--policy", str(policy), "--target", str(back), "--base", str(source)]
  phases.append(show(run("to-torch", total, *argv), phases[0]))
  phases.append(show(run("diff", 2 * total, *convert, "diff", str(source), str(back)), phases[0]))
  whole = read(back, "conversion.json", "sha256")
  shutil.rmtree(back)
  forget(source, policy)
  killed(argv, back, total // 2)
  phases.append(show(run("to-torch after kill -9", total, *argv), phases[0]))
  same("to-torch", whole, read(back, "conversion.json", "sha256"), back)
  shutil.rmtree(back)
  forget(source)
  killed(to_orbax(source, again, config), again, size(policy) // 2)
  phases.append(show(run("to-orbax after kill -9", total, *to_orbax(source, again, config)), phases[0]))
  same("to-orbax", *(read(folder, "metadata.json", "params_sha256") for folder in (policy, again)), again)
  for folder in (policy, again):
    shutil.rmtree(folder)
  return phases


def _config(root: Path, layers: int) -> Path:
  from semanticvla_jax.convert.check.golden.whole import OPENVLA
  from semanticvla_jax.models.semanticvla import VARIANTS

  variant = VARIANTS["7b"] | dict(llm=VARIANTS["7b"]["llm"] | dict(depth=layers))
  model = OPENVLA | dict(num_views=1, proprio_dim=None, variant=variant)
  path = root / "config.py"
  path.write_text(CONFIG.format(text=json.dumps({"model": model, "lora": None, "data": {"normalisation": "q99"}})))
  return path


def show(phase: Phase, reference: Phase | None) -> Phase:
  rate, base = phase.nbytes / phase.seconds, reference and reference.nbytes / reference.seconds
  ratio = f"{rate / base:6.0%}" if base else "  100%"
  peak, status = phase.peak / 2**30, f"  exit status {phase.status}" if phase.status else ""
  rates = f"{phase.seconds:8.1f} s  {phase.cpu:8.1f} CPU s {rate / 1e6:8.1f} MB/s {ratio} of copy"
  print(f"{phase.name:24s} {rates} {peak:6.2f} GiB{status}", flush=True)
  return phase


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=Path)
  parser.add_argument("--layers", type=int, default=32, help="of the language model; 32 is openvla-7b")
  args = parser.parse_args()
  args.folder.mkdir(parents=True, exist_ok=True)
  phases = measure(args.folder.resolve(), args.layers)
  print(f"{phases[0].nbytes:,} bytes in {args.folder / 'source'}, which stays for the next time")
  return 1 if any(phase.status for phase in phases) else 0


if __name__ == "__main__":
  sys.exit(main())
