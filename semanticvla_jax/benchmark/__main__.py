"""Measures speed on the machine at hand, each figure with what it is held against, measured in the same run.

    python -m semanticvla_jax.benchmark latency --row=full --size=mid --peer=eager,compile --out=runs/bench/latency.json

Every verb prints its figures as they come; --out=FILE writes them as JSON with a record of how they were made.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from semanticvla_jax import cli
from semanticvla_jax.benchmark import rows
from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.errors import refuse

PROG = "python -m semanticvla_jax.benchmark"
VERBS = {
  "flops": "FLOPs of the paper's rows by part of the model, next to the paper's figures; runs nothing",
  "latency": "a policy's call in layers, its roofline, and the same architecture in PyTorch",
  "train": "examples a second, MFU, memory and the parts of a LoRA step; SemanticVLA against OpenVLA-OFT",
  "data": "examples a second of the input pipeline against what a training step needs",
  "scale": "a synthetic dataset of LIBERO's size: time of its index, memory over many batches, resuming",
  "evaluate": "closed-loop episodes a second on the device and in a Python loop",
  "simulators": "LIBERO episodes a second with several simulators and with one",
  "convert": "conversion of a random checkpoint of openvla-7b's layout against a plain copy",
  "serve": "a policy server under load: latency, observations a second, what a door costs",
  "delay": "success on the tabletop against delay of the actions, by how a client uses chunks",
  "compare": "two results side by side; refused where they were not measured alike",
}
DTYPES = ("float32", "bfloat16", "float16")
PEERS = ("eager", "compile")


def _list(words: str) -> list[str]:
  return [word.strip() for word in words.split(",") if word.strip()]


def _counts(words: str) -> list[int]:
  found = [int(word) if word.isdecimal() else 0 for word in _list(words)]
  if not found or min(found) < 1:
    raise argparse.ArgumentTypeError(f"got {words!r}; expected whole numbers from 1, such as 1,2,4")
  return found


def _count(word: str) -> int:
  (found,) = _counts(word) if "," not in word else (0,)
  return found


def _peers(words: str) -> list[str]:
  found = _list(words)
  if unknown := [word for word in found if word not in PEERS]:
    raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; expected some of {', '.join(PEERS)}")
  return found


def _model_flags(parser: argparse.ArgumentParser, row: str, size: str, dtype: str | None) -> None:
  parser.add_argument("--row", type=_list, default=_list(row), help=f"rows of rows.ROWS, with commas (default: {row})")
  parser.add_argument("--size", default=size, help=f"one of {', '.join(rows.SIZES)} (default: {size})")
  parser.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"type to compute in (default: {dtype})")
  parser.add_argument("--prompt", type=_count, default=32, help="length of the prompt in tokens (default: 32)")
  parser.add_argument("--seed", type=int, default=0, help="of random weights and inputs (default: 0)")
  parser.add_argument(
    "--peer",
    type=_peers,
    nargs="?",
    const=["eager"],
    default=[],
    help="also time the same architecture in PyTorch: eager, compile or both (needs requirements-parity.txt)",
  )


def _flops(parser: argparse.ArgumentParser) -> None:
  tables = [name for table in rows.TABLES.values() for name in table]
  every = list(dict.fromkeys(tables))
  parser.add_argument("--row", type=_list, default=every, help="rows of rows.ROWS, with commas (default: all)")
  parser.add_argument("--size", default="7b", help=f"one of {', '.join(rows.SIZES)} (default: 7b)")
  parser.add_argument("--prompt", type=_count, default=32, help="length of the prompt in tokens (default: 32)")


def _latency(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--policy", help="policy folder to time, instead of rows with random weights")
  _model_flags(parser, "full", "mid", None)
  parser.add_argument("--batch", type=_counts, default=[1], help="batch sizes, with commas (default: 1)")
  parser.add_argument("--calls", type=_count, default=200, help="timed calls of each layer (default: 200)")
  parser.add_argument(
    "--option", action="append", default=[], metavar="NAME=VALUE", help="of Policy's constructor; may be repeated"
  )


def _train(parser: argparse.ArgumentParser) -> None:
  _model_flags(parser, "full", "mid", "float32")
  parser.add_argument("--batch", type=_count, default=8, help="examples a step (default: 8)")
  parser.add_argument("--calls", type=_count, default=10, help="timed steps (default: 10)")
  parser.add_argument("--remat", choices=("none", "full", "dots"), help="what the backward pass computes again")
  parser.add_argument("--compare", action="store_true", help="SemanticVLA (full) and OpenVLA-OFT, and their ratio")


def _data(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--image-size", type=_count, default=224, help="pixels of a side (default: 224)")
  parser.add_argument("--batch", type=_count, default=32, help="examples a batch (default: 32)")
  parser.add_argument("--calls", type=_count, default=20, help="timed batches of a round (default: 20)")
  parser.add_argument("--rounds", type=_count, default=3, help="rounds, of which the best counts (default: 3)")
  parser.add_argument(
    "--size", default="7b", help=f"of the model a v5e-16 trains: {', '.join(rows.SIZES)} (default: 7b)"
  )
  parser.add_argument("--step", help="result of the verb train to hold the rate against (a file of --out)")


def _scale(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("folder", help="where the dataset is written (25 kB a frame) and kept for the next time")
  parser.add_argument("--frames", type=_count, default=270_000, help="of the dataset, about (default: 270000)")
  parser.add_argument("--batch", type=_count, default=8, help="examples a batch (default: 8)")
  parser.add_argument("--calls", type=_count, default=20_000, help="batches to draw (default: 20000)")
  parser.add_argument("--image-size", type=_count, default=64, help="pixels of a side as read (default: 64)")


def _evaluate(parser: argparse.ArgumentParser) -> None:
  folder = cli.in_repository("checkpoints/tabletop_small")
  parser.add_argument("--policy", default=folder, help="policy folder (default: checkpoints/tabletop_small)")
  parser.add_argument("--suite", default="place", help="suite of the tabletop (default: place)")
  parser.add_argument("--batch", type=_count, default=64, help="episodes per batch on the device (default: 64)")
  parser.add_argument("--host-episodes", type=_count, default=16, help="episodes in the Python loop (default: 16)")


def _simulators(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--recorded", required=True, metavar="DIR", help="folder of HDF5 demonstrations to replay")
  parser.add_argument("--suite", default="libero_object", help="suite of LIBERO (default: libero_object)")
  parser.add_argument("--task", type=int, default=0, help="number of the task (default: 0)")
  parser.add_argument("--trials", type=_count, default=8, help="number of episodes (default: 8)")
  parser.add_argument("--workers", type=_count, default=2, help="number of simulators at once (default: 2)")


def _convert(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("folder", help="where the checkpoint and its conversions go; kept for the next time")
  parser.add_argument("--layers", type=_count, default=32, help="of the language model; 32 is openvla-7b (default)")


def _serve(parser: argparse.ArgumentParser) -> None:
  folder = cli.in_repository("checkpoints/tabletop_small")
  parser.add_argument("--policy", default=folder, help="policy folder (default: checkpoints/tabletop_small)")
  parser.add_argument("--clients", type=_counts, default=[1, 8, 32, 64], help="clients at once (default: 1,8,32,64)")
  parser.add_argument("--seconds", type=_count, default=10, help="for each number of clients (default: 10)")
  parser.add_argument(
    "--soak",
    type=_count,
    default=0,
    metavar="SECONDS",
    help="then the last number of clients, with the server's memory",
  )


def _delay(parser: argparse.ArgumentParser) -> None:
  folder = cli.in_repository("checkpoints/tabletop_small")
  parser.add_argument("--policy", default=folder, help="policy folder (default: checkpoints/tabletop_small)")
  parser.add_argument("--suite", default="place", help="suite of the tabletop (default: place)")
  parser.add_argument("--delays", type=_delays, default=[0, 50, 100, 200, 500], help="ms (default: 0,50,100,200,500)")
  parser.add_argument("--episodes", type=_count, default=64, help="of every cell (default: 64)")


def _delays(words: str) -> list[int]:
  found = [int(word) if word.isdecimal() else -1 for word in _list(words)]
  if not found or min(found) < 0:
    raise argparse.ArgumentTypeError(f"got {words!r}; expected whole numbers from 0, such as 0,50,100")
  return found


def _compare(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("results", nargs=2, metavar="FILE", help="two files that a verb wrote with --out")
  parser.add_argument("--across-devices", action="store_true", help="compares results of different devices and CPUs")
  parser.add_argument("--across", type=_list, default=[], metavar="FIELDS", help="parts of the record that may differ")


FLAGS = {name: globals()[f"_{name}"] for name in VERBS}


def _arguments(argv: list[str]) -> argparse.Namespace:
  verb, words = cli.subcommand(PROG, __doc__, VERBS, argv)
  if not verb:
    raise refuse(PROG, argv[0], f"a verb first: {', '.join(VERBS)}", "put the verb before its flags")
  parser = cli.ArgumentParser(f"{PROG} {verb}", VERBS[verb])
  FLAGS[verb](parser)
  if verb != "compare":
    parser.add_argument("--out", metavar="FILE", help="writes figures and the record of how they were made as JSON")
    parser.add_argument("--smoke", action="store_true", help="smallest model and few calls: does it run?")
  args = parser.parse_args(words)
  args.verb = verb
  if verb == "latency" and args.policy is None:
    args.dtype = args.dtype or "float32"
  return _smallest(args) if getattr(args, "smoke", False) else args


def _smallest(args: argparse.Namespace) -> argparse.Namespace:
  """The same command with the smallest model and few calls."""
  small = {"size": "tiny", "calls": 3, "image_size": 32, "layers": 1, "host_episodes": 2}
  small |= {"trials": 2, "seconds": 1, "rounds": 1}
  for name, value in small.items():
    if hasattr(args, name):
      setattr(args, name, value)
  if args.verb == "flops":
    args.row = args.row[:3]
  if args.verb == "evaluate":
    args.batch = 4
  if args.verb == "serve":
    args.clients = args.clients[:2]
  if args.verb == "delay":
    args.delays, args.episodes = args.delays[:1], 2
  return args


def _settings(args: argparse.Namespace) -> dict[str, Any]:
  """What of the command line the figures depend on."""
  left_out = ("verb", "out", "results", "across", "across_devices", "step")
  return {name: value for name, value in vars(args).items() if name not in left_out}


def run(args: argparse.Namespace) -> Mapping[str, Any]:
  """Runs a verb: measures, prints, writes; returns the result as JSON values. Each verb's module is imported here."""
  module = importlib.import_module(f"semanticvla_jax.benchmark.{args.verb}")
  if args.verb == "compare":
    across = (*args.across, *(module.DEVICES if args.across_devices else ()))
    return module.compare(args.results, across, print)
  result = Result(args.verb, _settings(args))
  MEASURE[args.verb](module, result, args)
  if args.out is not None:
    result.write(args.out)
    print(f"wrote {args.out}")
  return result.to_json()


def _measure_latency(module: Any, result: Result, args: argparse.Namespace) -> None:
  names = (*module.Settings._fields,)
  given = vars(args) | {"rows": args.row, "batches": args.batch}
  module.measure(result, module.Settings(**{name: given[name] for name in names}))


def _measure_train(module: Any, result: Result, args: argparse.Namespace) -> None:
  given = vars(args) | {"rows": ["full", "oft"] if args.compare else args.row}
  module.measure(result, module.Settings(**{name: given[name] for name in module.Settings._fields}))


MEASURE: dict[str, Callable] = {
  "flops": lambda module, result, args: module.measure(result, args.row, args.size, args.prompt),
  "latency": _measure_latency,
  "train": _measure_train,
  "data": lambda module, result, args: module.measure(
    result, args.image_size, args.batch, args.calls, args.rounds, args.step, args.size
  ),
  "scale": lambda module, result, args: module.measure(
    result, args.folder, args.frames, args.batch, args.calls, args.image_size
  ),
  "evaluate": lambda module, result, args: module.measure(
    result, args.policy, args.suite, args.batch, args.host_episodes
  ),
  "simulators": lambda module, result, args: module.measure(
    result, args.recorded, args.suite, args.task, args.trials, (1, args.workers)
  ),
  "convert": lambda module, result, args: module.measure(result, args.folder, args.layers),
  "delay": lambda module, result, args: module.measure(result, args.policy, args.suite, args.delays, args.episodes),
  "serve": lambda module, result, args: module.measure(
    result, args.policy, args.clients, float(args.seconds), float(args.soak)
  ),
}


def main(argv: list[str]) -> None:
  """Runs one verb; see VERBS."""
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  run(_arguments(argv))


if __name__ == "__main__":
  cli.run(main, keep_compiled=False)
