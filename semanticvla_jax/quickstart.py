"""The main job with one command: demonstrations → RLDS → LoRA fine-tuning of the shipped base → evaluation → report.

    python -m semanticvla_jax.quickstart --suite=place --split=unseen --out=runs/quickstart

Runs the commands that a user would type, each printed before it starts, on something the base has not seen, and ends
with the success before and after. Run again after an interruption it goes on where it was: finished demonstrations and
a finished evaluation are kept where they are of the same flags and policies, training resumes from its last checkpoint
(and refuses to go on with another base, config or data), and so does the evaluation after its last row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from semanticvla_jax import cli, files
from semanticvla_jax.errors import refuse

BASE, CONFIG = "checkpoints/tabletop_small", "configs/quickstart.py"  # of the repository
# States are varied by where episodes begin: under the noise of `demonstrate`'s default the later actions of a chunk
# answer what has yet to happen, and fine-tuning on them lost a third of the base's success.
VARIED = {"noise": 0.1, "perturbed": 0.3}
EVALUATION_SEED = 100_000  # demonstrations count from 0: no layout that was shown is measured


def demonstrate(args: argparse.Namespace) -> list[str] | None:
  """The command that writes the demonstrations; None when they are there.

  Raises:
    ValueError: the folder holds demonstrations of something else.
  """
  wanted = {"suite": args.suite, "split": args.split, "episodes": args.demonstrations, "size": args.size} | VARIED
  facts = args.out / "data" / f"tabletop_{args.suite}" / "1.0.0" / "demonstrations.json"
  if facts.exists():
    found = _read(facts, "remove that folder, and they are made again")
    if any(found.get(key) != value for key, value in wanted.items()):
      raise refuse(
        f"{facts.parent}",
        f"demonstrations of { {key: found.get(key) for key in wanted} }",
        wanted,
        "choose another --out, or remove that folder",
      )
    return None
  flags = [f"--{key}={value}" for key, value in wanted.items()]
  return ["semanticvla_jax.demonstrate", *flags, f"--out={args.out / 'data'}"]


def train(args: argparse.Namespace) -> list[str]:
  """The command that fine-tunes the base; it resumes by itself."""
  flags = {"data.dir": args.out / "data", "data.mixture": f"tabletop_{args.suite}", "init_from": args.base}
  if args.steps:
    flags |= {"train.steps": args.steps}
  given = [f"--config.{key}={value}" for key, value in flags.items()]
  return ["semanticvla_jax.train", f"--config={args.config}", f"--workdir={args.out}", *given]


def evaluate(args: argparse.Namespace) -> list[str] | None:
  """The command that measures before, after and the controls; None when just that was done, of the same policies.

  A report of anything else is set aside, which is said; one of it that is not finished is gone on with.

  Raises:
    ValueError: another run is at work in the report's folder.
  """
  report, policy = args.out / "report", args.out / "policy"
  command = [
    "semanticvla_jax.evaluate",
    "run",
    f"--policy={policy}",
    f"--baseline={args.base}",
    f"--suite={args.suite}",
    f"--split={args.split}",
    f"--episodes={args.episodes}",
    f"--seed={EVALUATION_SEED}",
    f"--controls={args.controls}",
    f"--metrics={args.out / 'metrics.jsonl'}",
    f"--out={report}",
  ]
  results = report / "results.json"
  if not results.exists():
    return command
  with files.alone(report, inside=True):
    reason = outdated(results, command, {"policy": policy, "baseline": args.base})
    if reason is None:
      return None if finished(results) else command
    aside = set_aside(report)
    (aside / ".lock").unlink(missing_ok=True)
  print(f"\n{report} {reason}: kept as {aside}, measured again", flush=True)
  return command


def finished(results: Path) -> bool:
  """Whether nothing of results.json is left to do: all rows are in it, none of their episodes broke, it is shown."""
  found = json.loads(results.read_text(encoding="utf-8"))
  return found.get("finished", True) and not any(row.get("errors") for row in found["results"])


def outdated(results: Path, command: Sequence[str], policies: Mapping[str, Path]) -> str | None:
  """Why results.json is not what a command would give, or None.

  Args:
    results: the file.
    command: of the evaluation, with all its flags, which alone are compared.
    policies: folders by the kind of their row in the results.
  """
  from semanticvla_jax import policy_folder  # takes seconds to import, and most runs do not need it

  try:
    found = json.loads(results.read_text(encoding="utf-8"))
    flags = shlex.split(found["command"])
    hashes = {row["kind"]: row["fingerprint"]["policy"]["policy_hash"] for row in found["results"]}
  except (ValueError, KeyError, TypeError, AttributeError):
    return "holds a results.json that cannot be read"
  if other := [word for word in command if word.startswith("--") and word not in flags]:
    return f"was measured without {' '.join(other)}"
  there = [kind for kind in policies if kind in hashes or found.get("finished", True)]  # others are yet to be measured
  other = [kind for kind in there if hashes.get(kind) != policy_folder.policy_hash(policies[kind])]
  return f"was measured with another {' and another '.join(other)}" if other else None


def set_aside(folder: Path) -> Path:
  """Renames a folder to the first free of folder_1, folder_2, … and returns that."""
  free = next(path for i in itertools.count(1) if not (path := folder.with_name(f"{folder.name}_{i}")).exists())
  return folder.rename(free)


def run(name: str, command: Sequence[str] | None) -> float:
  """Runs a stage and returns its seconds. Raises SystemExit with the stage's exit status when it fails."""
  if command is None:
    print(f"\n── {name}: done before, kept", flush=True)
    return 0.0
  print(f"\n── {name}\n$ python -m {shlex.join(command)}", flush=True)
  start = time.perf_counter()
  status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
  if status:
    sys.exit(status if status > 0 else 128 - status)
  return time.perf_counter() - start


def summary(results: Sequence[Mapping], seconds: Mapping[str, float], out: Path) -> str:
  """What a person wants to know at the end."""
  labels = {"baseline": "before fine-tuning", "policy": "after fine-tuning"}
  order = ["baseline", "policy", "control"]
  lines = [""]
  for row in sorted(results, key=lambda row: order.index(row["kind"])):
    label = labels.get(row["kind"], f"control: {row['name']}")
    lines.append(f"{label:44}{_rate(row)}")
  stages = "   ".join(f"{name} {_clock(value)}" for name, value in seconds.items())
  lines += ["", f"time        {stages}   in all {_clock(sum(seconds.values()))}"]
  lines += [f"report      {out / 'report' / 'report.html'}", f"checkpoint  {out / 'policy'}"]
  return "\n".join(lines)


def _rate(row: Mapping) -> str:
  """A row's count, rate and interval, and what is not in them; or that there is none."""
  errors, spoilt = row.get("errors", 0), row.get("nonfinite", 0)
  if row["rate"] is None:
    return f"no rate: all {errors} episodes broke"
  low, high = (_percent(end, 0) for end in row["interval"])
  share, rate = f"{row['successes']}/{row['episodes']}", _percent(row["rate"], 1)
  broke = f", {errors} broke and are not counted" if errors else ""
  failed = f", {spoilt} failed by a non-finite action" if spoilt else ""
  return f"{share:>9}  {rate:>5} %  (95 %: {low}–{high}){broke}{failed}"


def _percent(share: float, decimals: int) -> str:
  """A share of one in percent, with more decimals where it would be rounded to 0 or 100 but is neither."""
  while float(text := f"{100 * share:.{decimals}f}") in (0, 100) and 0 < share < 1 and decimals < 6:
    decimals += 1
  return text


def _read(path: Path, remedy: str) -> dict:
  """A JSON object. Raises ValueError, with the file's name, where it is none."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
      raise ValueError(f"a {type(found).__name__}")
    return found
  except ValueError as error:
    raise refuse(f"{path} is damaged", f"{cli.first_line(error)}", "a JSON object", f"{remedy}") from error


def _check(args: argparse.Namespace) -> None:
  """Raises ValueError for what a later stage would refuse, before an earlier one spends minutes on it."""
  from semanticvla_jax.evaluate import controls  # takes seconds to import, which --help need not wait for

  if not (args.base / "config.json").exists():
    raise refuse("Base", args.base, "a policy folder", "run from the repository or pass --base")
  config = Path(args.config.partition(".py:")[0] + ".py" if ".py:" in args.config else args.config)
  if not config.is_file():
    raise refuse("Config", config, "a file", "run from the repository or pass --config")
  for name in ("demonstrations", "episodes", "steps", "size"):
    if (count := getattr(args, name)) is not None and count < 1:
      raise refuse(f"--{name}", count, "at least 1", "pass a positive number")
  controls.check(args.controls.split(",") if args.controls else [])
  _check_folders(args.out)


def _check_folders(out: Path) -> None:
  """Raises ValueError where a folder that stages write is a file."""
  for folder in (out, *out.parents, out / "data", out / "report", out / "policy"):
    if folder.exists() and not folder.is_dir():
      raise refuse("Folder", f"{folder}, which is a file", "a folder", "choose another --out")


def _clock(seconds: float) -> str:
  return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _arguments(argv: list[str]) -> argparse.Namespace:
  parser = cli.ArgumentParser("python -m semanticvla_jax.quickstart", __doc__)
  parser.add_argument("--suite", default="place", help="suite of the tabletop (default: place)")
  parser.add_argument("--split", default="unseen", help="layouts to use (default: unseen, other colors and shapes)")
  parser.add_argument("--demonstrations", type=int, default=800, help="number of training episodes (default: 800)")
  parser.add_argument("--episodes", type=int, default=128, help="number of evaluation episodes (default: 128)")
  parser.add_argument("--steps", type=int, help="number of training steps (default: the config's)")
  parser.add_argument(
    "--controls", default="shuffled,random", help="controls of the evaluation, by commas (default: shuffled,random)"
  )
  base = Path(cli.in_repository(BASE))
  parser.add_argument("--base", type=Path, default=base, help=f"policy folder to start from (default: {BASE})")
  parser.add_argument("--config", default=cli.in_repository(CONFIG), help=f"training config (default: {CONFIG})")
  parser.add_argument("--size", type=int, default=64, help="height and width of the recorded views (default: 64)")
  parser.add_argument(
    "--out", type=Path, default=Path("runs/quickstart"), help="folder of everything that is made (default: %(default)s)"
  )
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  """Runs the stages and prints the summary; problems end the program with their message."""
  args = _arguments(argv)
  try:
    _check(args)
    seconds = {"demonstrations": run("demonstrations", demonstrate(args))}
    seconds["training"] = run("training", train(args))
    seconds["evaluation"] = run("evaluation", evaluate(args))
    results = _read(args.out / "report" / "results.json", "run the same command again")["results"]
  except ValueError as error:
    sys.exit(f"error: {error}")
  print(summary(results, seconds, args.out))


if __name__ == "__main__":
  cli.run(main)
