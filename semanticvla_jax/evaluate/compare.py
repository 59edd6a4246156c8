"""Two results side by side, if they may be compared.

    python -m semanticvla_jax.evaluate compare runs/a/report runs/b/report

says how many episodes each has and what left the count, lists in what the two policies differ, and then compares the
episodes that both completed, pairs of equal seeds: both rates with Wilson intervals, and the paired interval of their
difference. Refuses, naming the fields, where the environments did different things (--anyway compares all the same and
says so in the table).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from semanticvla_jax import cli
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import fingerprint
from semanticvla_jax.evaluate.results import interval_text, percent, wilson

_BECAUSE = {"replay": " (one policy's chunk has no more)", "image.jpeg_quality": " (one policy makes its own JPEG)"}


def paired_interval(both: int, first: int, second: int, neither: int, confidence: float = 0.95) -> tuple[float, float]:
  """The interval of p1 − p2 from episodes that both, only the first, only the second, or neither policy solved.

  Newcombe 1998 (Statistics in Medicine 17:2635), method 10: Wilson intervals of either rate, joined with the
  correlation of the pairs.

  Raises:
    ValueError: a negative count, or no episodes.
  """
  n = both + first + second + neither
  if min(both, first, second, neither) < 0 or not n:
    raise refuse(
      "Paired interval",
      f"counts {(both, first, second, neither)}",
      "at least one episode and none below 0",
      "compare results that share episodes",
    )
  rates = [(both + first) / n, (both + second) / n]
  (low1, high1), (low2, high2) = (wilson(round(rate * n), n, confidence) for rate in rates)
  margins = (both + first) * (second + neither) * (both + second) * (first + neither)
  phi = _correlation(both, first, second, neither, margins) if margins else 0.0

  def width(a: float, b: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

  difference = rates[0] - rates[1]
  down = width(rates[0] - low1, high2 - rates[1])
  up = width(high1 - rates[0], rates[1] - low2)
  return max(-1.0, difference - down), min(1.0, difference + up)


def _correlation(both: int, first: int, second: int, neither: int, margins: int) -> float:
  """Newcombe's φ, with his continuity correction where it is positive."""
  n, raw = both + first + second + neither, both * neither - first * second
  corrected = max(raw - n / 2, 0.0) if raw > 0 else raw
  return corrected / math.sqrt(margins)


def read(folder: str | Path) -> dict[str, dict]:
  """The policy's own result by suite, from a report folder or its results.json.

  Raises:
    ValueError: there is none.
  """
  path = Path(folder)
  path = path / "results.json" if path.is_dir() else path
  if not path.exists():
    raise refuse("Result", f"{path}, which does not exist", "a folder that evaluate wrote (--out)", "check the path")
  try:
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {row["suite"]: _checked(row) for row in rows if row["kind"] == "policy"}
  except (ValueError, KeyError, TypeError) as error:
    raise refuse(
      "Result",
      f"{path}, which is not evaluate's results.json ({error!r})",
      "one that evaluate wrote",
      "run it again",
    ) from error


def _checked(row: Mapping) -> Mapping:
  """A row, if it has what is read of one; KeyError or TypeError if not."""
  [(one["seed"], one["success"]) for one in row["per_episode"]]
  {**row["fingerprint"]}
  return row


class Differences(NamedTuple):
  """In what two fingerprints differ, each a list of lines "simulator.mujoco: 3.8.1 against 3.2.3".

  Attributes:
    environment: what has to agree.
    told: what is listed, each line with its kind before it.
  """

  environment: list[str]
  told: list[str]


def differences(first: Mapping, second: Mapping) -> Differences:
  """Sorts them: what the environment did, and what is listed: forced by a policy, unknown, its own, or compared."""
  every = fingerprint.differences(first, second)
  forced = [*["replay"] * _chunk_forces(first, second), *["image.jpeg_quality"] * _own_jpeg_forces(first, second)]
  unknown = [name for name in every if not all(_recorded(mark, name) for mark in (first, second))]
  kinds = {
    "noted": fingerprint.NOTED,
    "compared": fingerprint.COMPARED,
    "its own": fingerprint.OWN,
    "forced": forced,
    "unknown": unknown,
  }
  strict = fingerprint.OF_ENVIRONMENT.get(first.get("environment"), ())
  environment, told = [], {kind: [] for kind in ("forced", "unknown", "its own", "compared", "noted")}
  for name, pair in every.items():
    kind = next((kind for kind, fields in kinds.items() if fingerprint.within(name, fields)), None)
    if kind is None or (fingerprint.within(name, strict) and name not in unknown):
      environment.append(f"{name}: {pair}")
    else:
      told[kind].append(f"{kind + ':':<10} {name}: {pair}{_BECAUSE.get(name, '') if kind == 'forced' else ''}")
  return Differences(environment, [line for lines in told.values() for line in lines])


def _chunk_forces(first: Mapping, second: Mapping) -> bool:
  """Whether the two executed other numbers of actions a query because one policy's chunk has no more."""
  less = min((first, second), key=lambda mark: mark.get("replay") or 0)
  return None not in (less.get("replay"), less.get("chunk")) and less["replay"] == less["chunk"]


def _own_jpeg_forces(first: Mapping, second: Mapping) -> bool:
  """Whether the protocol's JPEG was left out for one of the policies because that one makes its own."""
  own = [(mark.get("preprocessing") or {}).get("jpeg_quality") for mark in (first, second)]
  imposed = [(mark.get("image") or {}).get("jpeg_quality") for mark in (first, second)]
  return any(a is not None and b is None for a, b in zip(own, imposed))


def _recorded(mark: Mapping, name: str) -> bool:
  """Whether a fingerprint says anything of "simulator.mujoco"; those of earlier versions lack some fields."""
  for part in name.split("."):
    if not isinstance(mark, Mapping) or part not in mark:
      return False
    mark = mark[part]
  return True


def compare(first: Mapping, second: Mapping, anyway: bool = False) -> list[str]:
  """Lines of the table for one suite.

  Raises:
    ValueError: environments that did different things (unless `anyway`), or no episode that both completed.
  """
  found, suite = differences(first["fingerprint"], second["fingerprint"]), first["suite"]
  if found.environment and not anyway:
    raise refuse(
      "Results cannot be compared",
      f"different {'; '.join(found.environment)}",
      "equal ones",
      "run both alike, or compare with --anyway",
    )
  lines = [f"{suite}: all episodes", f"  A  {_count(first)}", f"  B  {_count(second)}"]
  lines += [f"  NOT ALIKE: {line}" for line in found.environment]
  if found.told:
    lines += ["  differences, A against B:", *(f"    {line}" for line in found.told)]
  return lines + _paired(first, second)


def _paired(first: Mapping, second: Mapping) -> list[str]:
  """Both rates and their difference, over the episodes that both completed."""
  pairs = _pairs(first, second)
  counts, n = [sum(pair == kind for pair in pairs) for kind in ((1, 1), (1, 0), (0, 1), (0, 0))], len(pairs)
  lines = [f"{first['suite']}: {n} episodes of equal seeds that both completed{_left_out(first, second, n)}"]
  for name, successes in (("A", counts[0] + counts[1]), ("B", counts[0] + counts[2])):
    interval = interval_text(wilson(successes, n), 1).removesuffix(" %")
    lines.append(f"  {name}  {successes}/{n}  {percent(successes, n):>7}  (95 %: {interval})")
  low, high = (_points(end) for end in paired_interval(*counts))
  lines.append(f"  A − B  {_points((counts[1] - counts[2]) / n)} points  (95 %, paired: {low} to {high})")
  lines.append(f"  solved by both {counts[0]}, only A {counts[1]}, only B {counts[2]}, neither {counts[3]}")
  return lines


def _points(difference: float) -> str:
  """A difference of rates in points; none that there is prints as +0.0."""
  points = 100 * difference
  return f"{points:+.1f}" if abs(points) >= 0.05 or not points else f"{points:+.1g}"


def _broke(one: Mapping) -> bool:
  """Whether the simulator broke, so that the episode says nothing of the policy."""
  return bool(one.get("error"))


def _count(row: Mapping) -> str:
  """All episodes of a result: "38/38, 10 broke", and how many of the failures were actions that are not finite."""
  rows = row["per_episode"]
  completed = [one for one in rows if not _broke(one)]
  text = f"{sum(bool(one['success']) for one in completed)}/{len(completed)}, {len(rows) - len(completed)} broke"
  not_finite = sum(bool(one.get("nonfinite")) for one in completed)
  return text + (f", {not_finite} failed by a non-finite action" if not_finite else "")


def _left_out(first: Mapping, second: Mapping, common: int) -> str:
  """What the paired rates do not count, in words."""
  (a, a_broke), (b, b_broke) = (
    ({one["seed"] for one in row["per_episode"]}, {one["seed"] for one in row["per_episode"] if _broke(one)})
    for row in (first, second)
  )
  shared = a & b
  why = {
    "only A has": a - b,
    "only B has": b - a,
    "broke in A": shared & (a_broke - b_broke),
    "broke in B": shared & (b_broke - a_broke),
    "broke in both": shared & a_broke & b_broke,
  }
  out = len(a | b) - common
  parts = ", ".join(f"{len(seeds)} {words}" for words, seeds in why.items() if seeds)
  return f"; {out} left out: {parts}" if out else "; none left out"


def _pairs(first: Mapping, second: Mapping) -> list[tuple[int, int]]:
  """Successes of the episodes that both completed, by seed."""
  outcomes = [
    {one["seed"]: int(bool(one["success"])) for one in row["per_episode"] if not _broke(one)} for row in (first, second)
  ]
  shared = sorted(outcomes[0].keys() & outcomes[1].keys())
  if not shared:
    raise refuse(
      "Results cannot be compared",
      f"no episode of {first['suite']} that both completed (A: {_count(first)}; B: "
      f"{_count(second)}{_left_out(first, second, 0)})",
      "one of equal seed",
      "run both on the same seeds again",
    )
  return [(outcomes[0][seed], outcomes[1][seed]) for seed in shared]


def main(argv: list[str]) -> None:
  """Prints the comparison of every suite that both results have, and names the others; problems end the program."""
  parser = cli.ArgumentParser("python -m semanticvla_jax.evaluate compare", __doc__)
  parser.add_argument("first", metavar="A", help="report folder, or a results.json")
  parser.add_argument("second", metavar="B", help="report folder, or a results.json")
  parser.add_argument("--anyway", action="store_true", help="compare results of different environments, with a warning")
  args = parser.parse_args(argv)
  problems = []
  try:
    first, second = read(args.first), read(args.second)
    suites = [suite for suite in first if suite in second]
    if not suites:
      raise refuse(
        "Results cannot be compared",
        f"suites {[*first]} and {[*second]}",
        "one in common",
        "measure one suite in both",
      )
    for suite in sorted(first.keys() ^ second.keys()):
      print(f"{suite}: only {'A' if suite in first else 'B'} has it")
    for suite in suites:
      try:
        print("\n".join(compare(first[suite], second[suite], args.anyway)))
      except ValueError as error:  # the other suites are compared all the same
        problems.append(str(error))
  except ValueError as error:
    problems.append(str(error))
  if problems:
    sys.stdout.flush()
    sys.exit("\n".join(problems))
