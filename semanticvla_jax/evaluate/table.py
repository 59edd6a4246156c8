"""The paper's result tables with rates measured here: trains what is missing, evaluates it, and puts it together.

    python -m semanticvla_jax.evaluate table --table=4,5,6 --seeds=1 --out=runs/tables
    python -m semanticvla_jax.evaluate table --table=5 --size=7b --suite=libero_object --base=policies/base \\
        --data-dir=DIR --seeds=3 --out=runs/tables_7b

Every row of configs/tables.py is fine-tuned from one base for equally many steps; rows that need no training take the
parameters of another row. The same command resumes: what was trained or measured by the same command is kept. After
every row tables.md, tables.json and pareto.png of --out are written anew.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from semanticvla_jax import action_tokens, cli, files
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import table_report
from semanticvla_jax.evaluate.table_rows import FITTED, PARAMETERS_OF, TABLES, Entry, entries

_PROGRAM = "python -m semanticvla_jax.evaluate table"
CONFIG, BASE = "configs/tables.py", "checkpoints/tabletop_small"  # of the repository
SIZES = {"tiny": "tabletop", "small": "tabletop", "small64": "tabletop", "7b": "libero"}
FIRST_TRAINING_SEED, FIRST_EPISODE = 7, 100_000  # no layout that was shown is measured
SMALL_VOCAB = 256  # of FAST's tokens in the small variants, whose language models have 512 ids
LIBERO_TASKS = 10  # of a suite
# Where rows may differ in robustness: combinations of color and shape that training never shows; the LIBERO-PRO suites.
CHANGED = {"tabletop": ("--split=unseen",), "libero": ("--suite=libero_pro",)}


class Stage(NamedTuple):
  """A command of one row and seed: its name, and the words behind `python -m`."""

  name: str
  command: list[str]


class StageFailed(RuntimeError):
  """A command of a row failed; the other rows continue."""


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
  parser = cli.ArgumentParser(_PROGRAM, __doc__)
  add = parser.add_argument
  add("--table", default="4,5,6", help=f"some of {', '.join(TABLES)}, separated by commas (default: 4,5,6)")
  add("--row", default="", help="measure these rows of the tables alone, separated by commas (default: all)")
  add("--size", default="small64", choices=SIZES, help="of the models (default: small64)")
  add("--suite", default="", help="suite to train on and measure (default: place on the tabletop, libero_object at 7b)")
  add("--base", default="", help=f"policy folder that every row starts from (default: {BASE}; needed at 7b)")
  add("--data-dir", default="", help="folder of RLDS datasets (default: tabletop demonstrations made in OUT/data)")
  add("--demonstrations", type=int, default=800, help="number of tabletop demonstrations to make (default: 800)")
  add("--steps", type=int, help="training steps of every row (default: the config's)")
  add("--seeds", type=int, default=1, help="trainings of every row (default: 1)")
  add("--episodes", type=int, default=256, help="episodes of every training (default: 256)")
  add("--calls", type=int, default=100, help="policy calls to measure the latency over; 0 does not (default: 100)")
  add("--jobs", type=int, default=1, help="rows at once, as many processes; latency comes last, alone (default: 1)")
  add("--out", default="runs/tables", help="folder of everything, resumed if it exists (default: runs/tables)")
  add("--dry-run", action="store_true", help="print the commands of every row and stop")
  args = parser.parse_args(argv)
  _complete(args)
  return args


def _complete(args: argparse.Namespace) -> None:
  """Fills in what depends on other flags, and checks all. Raises ValueError."""
  low = {"seeds": 1, "episodes": 1, "jobs": 1, "calls": 0, "demonstrations": 1} | (
    {} if args.steps is None else {"steps": 1}
  )
  for name, least in low.items():
    if getattr(args, name) < least:
      raise refuse(f"--{name}", getattr(args, name), f"at least {least}", "give more")
  args.benchmark, args.out = SIZES[args.size], Path(args.out)
  libero = args.benchmark == "libero"
  args.suite = args.suite or ("libero_object" if libero else "place")
  if args.suite.startswith("libero_") != libero:
    raise refuse(
      f"--suite with --size={args.size}",
      args.suite,
      "a suite of LIBERO" if libero else "a suite of the tabletop",
      "choose the size that is trained on that benchmark: 7b on LIBERO, the others on the tabletop",
    )
  missing = [name for name in ("base", "data_dir") if libero and not getattr(args, name)]
  if missing:
    raise refuse("--size=7b", f"no --{missing[0].replace('_', '-')}", "a folder", "README.md says how one is made")
  args.base = args.base or cli.in_repository(BASE)
  tables = [name for name in args.table.split(",") if name]
  args.entries, args.tables = entries(tables), tables
  if args.row:
    chosen = args.row.split(",")
    if unknown := sorted({*chosen} - {entry.row for entry in args.entries}):
      raise refuse("--row", unknown, f"some of {', '.join(x.row for x in args.entries)}", "choose among them")
    chosen += [PARAMETERS_OF[row] for row in chosen if row in PARAMETERS_OF]
    args.entries = [entry for entry in args.entries if entry.row in chosen]


def folder_of(out: Path, row: str, seed: int) -> Path:
  """Where everything of one training is."""
  return out / "rows" / row / f"seed_{seed}"


def data_stage(args: argparse.Namespace) -> list[Stage]:
  """The command that makes the tabletop's demonstrations; none where a folder of datasets is given."""
  if args.data_dir:
    return []
  varied = {"noise": 0.1, "perturbed": 0.3}  # see quickstart.VARIED
  flags = {"suite": args.suite, "split": "train", "episodes": args.demonstrations} | varied
  words = [f"--{name}={value}" for name, value in flags.items()]
  return [Stage("demonstrate", ["semanticvla_jax.demonstrate", "tabletop", *words, f"--out={args.out / 'data'}"])]


def stages(args: argparse.Namespace, row: str, seed: int) -> list[Stage]:
  """The commands that train a row and measure it, in order."""
  train = Stage("train", _train(args, row, seed))
  return [*_fit(args, row, seed), train, *_evaluations(args, folder_of(args.out, row, seed))]


def _data(args: argparse.Namespace) -> tuple[Path | str, str]:
  """The folder of datasets, and the name of the one that rows are trained on."""
  name = f"tabletop_{args.suite}" if args.benchmark == "tabletop" else f"{args.suite}_no_noops"
  return args.data_dir or args.out / "data", name


def _fit(args: argparse.Namespace, row: str, seed: int) -> Iterator[Stage]:
  """The command that fits FAST's action tokens to the data, for the rows that speak them."""
  if row in FITTED:
    folder, name = _data(args)
    words = [f"--data-dir={folder}", f"--name={name}", "--chunk=8"]
    words += [] if args.size == "7b" else [f"--vocab={SMALL_VOCAB}", "--trajectory-end=pad"]
    out = folder_of(args.out, row, seed) / action_tokens.NAME
    yield Stage("fit", ["semanticvla_jax.data", "fit-tokenizer", *words, f"--out={out}"])


def _train(args: argparse.Namespace, row: str, seed: int) -> list[str]:
  source, (folder, name) = PARAMETERS_OF.get(row), _data(args)
  given = {"seed": FIRST_TRAINING_SEED + seed, "data.dir": folder, "data.mixture": name}
  if row in FITTED:
    given |= {"data.action_tokens": folder_of(args.out, row, seed) / action_tokens.NAME}
  if source is None:
    given |= {"init_from": f"{args.base},matching"}
    if args.steps is not None:
      given |= {"train.steps": args.steps}
      given |= {"optim.decay_steps": args.steps} if args.benchmark == "tabletop" else {}
      given |= {"model.decoder_pruner.noise_steps": args.steps} if row == "lightvla" else {}  # gone at the end
  else:
    policy = folder_of(args.out, source, seed) / "policy"
    given |= {"init_from": policy, "train.steps": 0, "data.keep_statistics": True}
  words = [f"--config.{key}={value}" for key, value in given.items()]
  workdir = folder_of(args.out, row, seed)
  return [
    "semanticvla_jax.train",
    f"--config={cli.in_repository(CONFIG)}:{row}@{args.size}",
    f"--workdir={workdir}",
    *words,
  ]


def _evaluations(args: argparse.Namespace, folder: Path) -> Iterator[Stage]:
  trials = f"--trials={math.ceil(args.episodes / LIBERO_TASKS)}"
  count = [f"--episodes={args.episodes}", f"--seed={FIRST_EPISODE}"] if args.benchmark == "tabletop" else [trials]
  command = ["semanticvla_jax.evaluate", "run", f"--policy={folder / 'policy'}", "--films=0", *count]
  own = [*command, f"--suite={args.suite}", f"--out={folder / 'report'}"]
  yield Stage("evaluate", own)
  if "robustness" in args.tables:
    yield Stage("controls", [*own, "--controls=shuffled,blind"])  # added to the report of the first
    suite = [] if args.benchmark == "libero" else [f"--suite={args.suite}"]
    yield Stage("changed", [*command, *suite, *CHANGED[args.benchmark], f"--out={folder / 'report_changed'}"])


def latency_stage(args: argparse.Namespace, row: str) -> Stage:
  """The command that measures the policy of a row's first seed."""
  folder = folder_of(args.out, row, 0)
  words = [f"--policy={folder / 'policy'}", f"--calls={args.calls}", f"--out={folder / 'latency_figures.json'}"]
  return Stage("latency", ["semanticvla_jax.benchmark", "latency", *words])


def run(folder: Path, stage: Stage) -> float:
  """Runs a stage with its output in a file; returns its seconds, also if the same command ended well before.

  Raises:
    StageFailed: it failed; says with which last line.
  """
  done, log = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
  if done.exists():
    found = json.loads(done.read_text(encoding="utf-8"))
    if found["command"] == stage.command:
      return found["seconds"]
  folder.mkdir(parents=True, exist_ok=True)
  start = time.perf_counter()
  with log.open("w", encoding="utf-8") as stream:
    status = subprocess.run(
      [sys.executable, "-m", *stage.command], stdout=stream, stderr=stream, check=False
    ).returncode
  if status:
    last = (log.read_text(encoding="utf-8").strip().splitlines() or [f"status {status}"])[-1]
    raise StageFailed(f"{folder}: {stage.name} failed: {last} (all of its output: {log})")
  seconds = round(time.perf_counter() - start, 1)
  files.write_json(done, {"command": stage.command, "seconds": seconds})
  return seconds


def train_and_measure(args: argparse.Namespace, entry: Entry, seed: int) -> float:
  """All stages of a row and seed; returns their seconds. Raises StageFailed."""
  return sum(run(folder_of(args.out, entry.row, seed), stage) for stage in stages(args, entry.row, seed))


def run_all(args: argparse.Namespace) -> list[str]:
  """Runs what is missing, `--jobs` at once, and writes the tables after each; returns what failed."""
  for stage in data_stage(args):
    print(f"demonstrations: {run(args.out, stage):.0f} s", flush=True)
  progress = _Progress(len(args.entries) * args.seeds, args.jobs)
  for without in (False, True):  # rows that take the parameters of others come after them
    group = [entry for entry in args.entries if (entry.row in PARAMETERS_OF) == without]
    pairs = [(entry, seed) for seed in range(args.seeds) for entry in group]  # each row once before any twice
    _run_group(args, pairs, progress)
  return progress.failed


def _run_group(args: argparse.Namespace, pairs: Sequence[tuple[Entry, int]], progress: _Progress) -> None:
  pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
  try:
    jobs = {pool.submit(train_and_measure, args, *pair): pair for pair in pairs}
    for future in concurrent.futures.as_completed(jobs):
      entry, seed = jobs[future]
      try:
        progress.add(f"{entry.row}, seed {seed}", future.result())
        table_report.write(args)
      except StageFailed as error:
        progress.fail(error)
  finally:
    pool.shutdown(cancel_futures=True)  # after an interruption, which has reached the commands as well


class _Progress:
  """Says after each row and seed how many are done and how long the others may take; keeps what failed."""

  def __init__(self, total: int, jobs: int):
    self._total, self._jobs, self._seconds = total, jobs, []
    self.failed: list[str] = []

  def add(self, name: str, seconds: float) -> None:
    self._seconds.append(seconds)
    done = len(self._seconds)
    left = sum(self._seconds) / done * (self._total - done - len(self.failed)) / self._jobs
    print(f"{name}: {seconds:.0f} s; {done} of {self._total} done, about {left / 60:.0f} min left", flush=True)

  def fail(self, error: StageFailed) -> None:
    self.failed.append(str(error))
    print(error, file=sys.stderr, flush=True)


def measure_latency(args: argparse.Namespace) -> list[str]:
  """Times the policy of every row, one after the other; returns what failed."""
  failed = []
  for entry in args.entries if args.calls else ():
    folder = folder_of(args.out, entry.row, 0)
    if not (folder / "policy").exists():
      continue
    try:
      run(folder, latency_stage(args, entry.row))
    except StageFailed as error:
      failed.append(str(error))
      print(error, file=sys.stderr, flush=True)
  return failed


def _print_commands(args: argparse.Namespace) -> None:
  rows = [stages(args, entry.row, seed) for entry in args.entries for seed in range(args.seeds)]
  last = [latency_stage(args, entry.row) for entry in args.entries if args.calls]
  for stage in itertools.chain(data_stage(args), *rows, last):
    print(f"python -m {shlex.join(stage.command)}")


def main(argv: Sequence[str]) -> None:
  """Runs the tables and prints them; ends with status 1 where a row failed."""
  args = _arguments(argv)
  if args.dry_run:
    _print_commands(args)
    return
  if args.jobs > 1:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # rows share the accelerator's memory
  args.out.mkdir(parents=True, exist_ok=True)
  with files.alone(args.out, inside=True):
    failed = run_all(args) + measure_latency(args)
    print(table_report.write(args))
  if failed:
    sys.exit("\n".join(["error: some rows are missing:", *failed]))
