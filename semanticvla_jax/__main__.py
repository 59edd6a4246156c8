"""The commands of this package: `semanticvla VERB …`, or `python -m semanticvla_jax.VERB …`."""

from __future__ import annotations

import difflib
import runpy
import sys

from semanticvla_jax import cli
from semanticvla_jax.errors import refuse

VERBS = {
  "quickstart": "demonstrations, fine-tuning, evaluation and a report on the embedded tabletop",
  "demonstrate": "demonstrations as an RLDS dataset: scripted experts, LIBERO's recordings replayed, LeRobot's data",
  "data": "inspect a dataset, preview its frames, compute its statistics",
  "train": "train or fine-tune a policy on all devices there are; resumes when run again",
  "train.preflight": "does a training config fit a TPU slice or GPUs? Compiles it without the hardware",
  "train.image_server": "makes the images of a run's batches on a CPU host beside it",
  "evaluate": "measure a policy in closed loop on the tabletop or LIBERO; compare results; find known traps",
  "serve": "a policy behind a port, for the robot clients and harnesses that people have",
  "convert": "PyTorch checkpoints to policy folders and back; verify, compare, fold adapters",
  "benchmark": "speed, each figure with the peer it was measured against",
}
_CACHE = (
  f"Compiled programs are kept in {cli.COMPILED}; JAX_COMPILATION_CACHE_DIR names another folder, "
  "JAX_ENABLE_COMPILATION_CACHE=false keeps none."
)


def usage() -> str:
  """One line for each verb."""
  lines = [f"  {verb:18} {what}" for verb, what in VERBS.items()]
  return "\n".join(["usage: semanticvla VERB …   (semanticvla VERB --help lists its flags)", "", *lines, "", _CACHE])


def main() -> None:
  """Runs a verb as `python -m` would; without one, or with --help, lists them."""
  if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
    cli.run(_without_verb)
  verb = sys.argv.pop(1)
  runpy.run_module(f"semanticvla_jax.{verb}", run_name="__main__", alter_sys=True)


def _without_verb(argv: list[str]) -> None:
  if not argv or argv[0] in ("-h", "--help"):
    print(usage())
    return
  (near,) = difflib.get_close_matches(argv[0], VERBS, 1, 0.0)
  raise refuse("verb", f"{argv[0]!r}", f"one of {', '.join(VERBS)}", f"choose one of them (did you mean {near!r}?)")


if __name__ == "__main__":
  main()
