"""Two results side by side, if they may be compared.

    python -m semanticvla_jax.evaluate compare runs/a/report runs/b/report

pairs the episodes of equal seeds and prints both rates with Wilson intervals and the paired interval of their
difference; refuses, naming the fields, where the fingerprints differ in more than whose policy it is and what was
changed on purpose (--anyway compares all the same and says so in the table).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from semanticvla_jax.evaluate import protocol


def paired_interval(both: int, first: int, second: int, neither: int, confidence: float = 0.95) -> tuple[float, float]:
  """The interval of p1 − p2 from episodes that both, only the first, only the second, or neither policy solved.

  Newcombe 1998 (Statistics in Medicine 17:2635), method 10: Wilson intervals of either rate, joined with the
  correlation of the pairs.

  Raises:
    ValueError: a negative count, or no episodes.
  """
  n = both + first + second + neither
  if min(both, first, second, neither) < 0 or not n:
    raise ValueError(f"Paired interval: got counts {(both, first, second, neither)}; expected at least one episode.")
  rates = [(both + first) / n, (both + second) / n]
  (low1, high1), (low2, high2) = (protocol.wilson(round(rate * n), n, confidence) for rate in rates)
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
    raise ValueError(f"Result: got {path}, which does not exist; expected a folder that evaluate wrote (--out).")
  try:
    rows = json.loads(path.read_text())["results"]
  except (json.JSONDecodeError, KeyError) as error:
    raise ValueError(f"Result: got {path}, which is not evaluate's results.json ({error!r}); run it again.") from error
  return {row["suite"]: row for row in rows if row["kind"] == "policy"}


def compare(first: Mapping, second: Mapping, anyway: bool = False) -> list[str]:
  """Lines of the table for one suite.

  Raises:
    ValueError: fingerprints that differ (unless `anyway`), or no episode in common.
  """
  warning = []
  try:
    protocol.require_alike(first["fingerprint"], second["fingerprint"])
  except ValueError as error:
    if not anyway:
      raise
    warning = ["NOT ALIKE: " + " ".join(str(error).split())]
  for name, pair in protocol.differences(first["fingerprint"], second["fingerprint"]).items():
    if protocol.within(name, protocol.COMPARED) and not name.startswith("policy"):
      warning.append(f"  compared:  {name}: {pair}")
    elif protocol.within(name, protocol.NOTED):
      warning.append(f"  noted:     {name}: {pair}")
  pairs = _pairs(first["per_episode"], second["per_episode"])
  counts = [sum(pair == kind for pair in pairs) for kind in ((1, 1), (1, 0), (0, 1), (0, 0))]
  low, high = paired_interval(*counts)
  lines = [f"{first['suite']}: {len(pairs)} episodes of equal seeds"] + warning
  for name, row in (("A", first), ("B", second)):
    a, b = (100 * x for x in row["interval"])
    lines.append(f"  {name}  {row['successes']}/{row['episodes']}  {100 * row['rate']:5.1f} %  (95 %: {a:.1f}–{b:.1f})")
  difference = 100 * (counts[1] - counts[2]) / len(pairs)
  lines.append(f"  A − B  {difference:+.1f} points  (95 %, paired: {100 * low:+.1f} to {100 * high:+.1f})")
  lines.append(f"  solved by both {counts[0]}, only A {counts[1]}, only B {counts[2]}, neither {counts[3]}")
  return lines


def _pairs(first: Sequence[Mapping], second: Sequence[Mapping]) -> list[tuple[int, int]]:
  """Successes of the episodes that both ran without an error, by seed."""
  outcomes = [{one["seed"]: int(one["success"]) for one in rows if not one["error"]} for rows in (first, second)]
  shared = sorted(outcomes[0].keys() & outcomes[1].keys())
  if not shared:
    raise ValueError("Results cannot be compared: got no episode of equal seed in both; run both on the same seeds.")
  return [(outcomes[0][seed], outcomes[1][seed]) for seed in shared]


def main(argv: list[str]) -> None:
  """Prints the comparison of every suite that both results have, and names the others; problems end the program."""
  parser = argparse.ArgumentParser(
    prog="python -m semanticvla_jax.evaluate compare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("first", metavar="A", help="report folder")
  parser.add_argument("second", metavar="B", help="report folder")
  parser.add_argument("--anyway", action="store_true", help="compare although the fingerprints differ; says so")
  args = parser.parse_args(argv)
  try:
    first, second = read(args.first), read(args.second)
    suites = [suite for suite in first if suite in second]
    if not suites:
      raise ValueError(f"Results cannot be compared: got suites {[*first]} and {[*second]}; expected one in common.")
    for suite in first.keys() ^ second.keys():
      print(f"{suite}: only {'A' if suite in first else 'B'} has it")
    for suite in suites:
      print("\n".join(compare(first[suite], second[suite], args.anyway)))
  except ValueError as error:
    sys.exit(str(error))
