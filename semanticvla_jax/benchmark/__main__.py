"""Measures speed on the machine at hand; every figure comes with its peer, measured in the same run.

    python -m semanticvla_jax.benchmark evaluation --policy=checkpoints/tabletop_small

evaluation: closed-loop episodes a second on the device against a Python loop over the same policy and environment.
simulators: episodes a second in the LIBERO simulator, two workers against one (needs make sim, assets, demonstrations).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from semanticvla_jax import cli
from semanticvla_jax.benchmark import evaluation, simulators
from semanticvla_jax.envs.subprocess_env import BrokenEnvironment


def _arguments(argv: list[str]) -> argparse.Namespace:
  parser = cli.ArgumentParser("python -m semanticvla_jax.benchmark", __doc__)
  verbs = parser.add_subparsers(dest="verb", required=True)
  verb = verbs.add_parser("evaluation", help="episodes a second on the device and in a Python loop")
  verb.add_argument(
    "--policy",
    type=Path,
    default=cli.in_repository("checkpoints/tabletop_small"),
    help="policy folder (default: checkpoints/tabletop_small)",
  )
  verb.add_argument("--suite", default="place", help="suite of the tabletop (default: place)")
  verb.add_argument("--batch", type=int, default=64, help="number of episodes per batch on the device (default: 64)")
  verb.add_argument("--host-episodes", type=int, default=16, help="number of episodes in the Python loop (default: 16)")
  verb = verbs.add_parser("simulators", help="LIBERO episodes a second with several simulators and with one")
  verb.add_argument("--recorded", required=True, metavar="DIR", help="folder of HDF5 demonstrations to replay")
  verb.add_argument("--suite", default="libero_object", help="suite of LIBERO (default: libero_object)")
  verb.add_argument("--task", type=int, default=0, help="number of the task (default: 0)")
  verb.add_argument("--trials", type=int, default=8, help="number of episodes (default: 8)")
  verb.add_argument("--workers", type=int, default=2, help="number of simulators at once (default: 2)")
  return parser.parse_args(argv)


def _measure(args: argparse.Namespace) -> dict:
  if args.verb == "simulators":
    return simulators.measure(args.recorded, args.suite, args.task, args.trials, (1, args.workers))
  return evaluation.measure(args.policy, args.suite, args.batch, args.host_episodes)


def main(argv: list[str]) -> None:
  """Measures and prints a table, then the same as one line of JSON."""
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  args = _arguments(argv)
  try:
    found = _measure(args)
  except (ValueError, BrokenEnvironment) as error:
    sys.exit(f"error: {error}")
  for name, value in found.items():
    print(f"{name:26}{value:.2f}" if isinstance(value, float) else f"{name:26}{value}")
  print(json.dumps(found))


if __name__ == "__main__":
  cli.run(main)
