"""Measures policies in closed loop, compares results, and looks for known causes of wrong numbers.

    python -m semanticvla_jax.evaluate run --policy=DIR --suite=place --controls
    python -m semanticvla_jax.evaluate run --policy=DIR --suite=libero_object --workers=4
    python -m semanticvla_jax.evaluate run --policy=DIR --suite=libero_object --shard=3/16 --out=runs/a/3
    python -m semanticvla_jax.evaluate merge runs/a/* --out=runs/a_merged
    python -m semanticvla_jax.evaluate compare runs/a/report runs/b/report
    python -m semanticvla_jax.evaluate table --table=4,5,6 --seeds=1 --out=runs/tables
    python -m semanticvla_jax.evaluate choices --policy=DIR
    python -m semanticvla_jax.evaluate clutter runs/clutter --plot=runs/clutter/clutter.png
    python -m semanticvla_jax.evaluate cues --policy=DIR --suite=place
    python -m semanticvla_jax.evaluate coupling --policy=DIR --suite=align
    python -m semanticvla_jax.evaluate doctor --policy=DIR
    python -m semanticvla_jax.evaluate doctor --model --policy=DIR --suite=place

Without a subcommand, flags are those of `run`.
"""

from __future__ import annotations

from semanticvla_jax import cli
from semanticvla_jax.evaluate import choices, clutter, compare, coupling, cues, merge, model_doctor, run, table
from semanticvla_jax.libero import doctor

_PROGRAM = "python -m semanticvla_jax.evaluate"
_COMMANDS = {
  "run": "measure a policy on suites of a benchmark (the tabletop, LIBERO) and write a report",
  "merge": "put the shards of an evaluation (run --shard) together into one result",
  "compare": "compare two results episode by episode, if they were measured in the same way",
  "table": "train and measure the rows of the paper's tables, next to the paper's figures",
  "choices": "count which object a policy takes where several fit the words, on the tabletop",
  "clutter": "list success and kept patches against the number of distractors, from results of run",
  "coupling": "measure errors of translation and rotation against the tabletop's expert, and their correlation",
  "cues": "list which words the cues of a policy choose, and success, under other ways to choose them",
  "doctor": "check a LIBERO installation and a policy for known causes of wrong numbers; --model: what its parts do",
}


def main(argv: list[str]) -> None:
  """Runs a subcommand; problems end the program with their message."""
  name, rest = cli.subcommand(_PROGRAM, __doc__, _COMMANDS, argv)
  examine = model_doctor.main if "--model" in rest else doctor.main
  commands = {"": run, "run": run, "merge": merge, "compare": compare, "table": table}
  commands |= {"choices": choices, "clutter": clutter, "coupling": coupling, "cues": cues}
  (examine if name == "doctor" else commands[name].main)(rest)


if __name__ == "__main__":
  cli.run(main)
