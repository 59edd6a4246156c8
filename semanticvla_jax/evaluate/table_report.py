"""What `evaluate table` found, as tables.md, tables.json and a plot of success against arithmetic."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from semanticvla_jax import files
from semanticvla_jax.evaluate import controls
from semanticvla_jax.evaluate.results import interval_text, percent, wilson
from semanticvla_jax.evaluate.table_rows import PARAMETERS_OF, TABLES

_CONTROLS = {"shuffled": "another's instruction", "blind": "gray images"}


class Rate(NamedTuple):
  """Successes of each seed's episodes."""

  successes: list[int]
  episodes: list[int]

  def text(self) -> str:
    """The rate over all seeds, its Wilson interval, and each seed's own if there are several: "79 % (74–84 %)"."""
    count, of = sum(self.successes), sum(self.episodes)
    if not of:
      return "–"
    own = " ".join(f"{100 * a / b:.0f}" for a, b in zip(self.successes, self.episodes) if b)
    seeds = f", seeds {own}" if len(self.episodes) > 1 else ""
    return f"{percent(count, of)} ({interval_text(wilson(count, of))}{seeds})"


class Found(NamedTuple):
  """All that was measured of a row.

  Attributes:
    rates: by what was measured: "success", "changed" (other layouts), and the names of controls.
    steps: of training; None for a row that takes another row's parameters.
    minutes: of each training. hashes: of each policy. device: that it ran on.
    flops, milliseconds: of one call of the policy, and its median time; None where that was not measured.
  """

  rates: dict[str, Rate]
  steps: int | None
  minutes: list[float]
  hashes: list[str]
  device: str
  flops: float | None
  milliseconds: float | None


def read(out: Path, row: str, seeds: int) -> Found | None:
  """What is in the folders of a row; None where no seed is finished."""
  folders = [out / "rows" / row / f"seed_{seed}" for seed in range(seeds)]
  folders = [folder for folder in folders if (folder / "evaluate.json").exists()]
  if not folders:
    return None
  rates: dict[str, Rate] = {}
  hashes, steps, device = [], None, ""
  for folder in folders:
    for measured, path in (("success", folder / "report"), ("changed", folder / "report_changed")):
      for result in _results(path / "results.json"):
        name = result["name"] if result["kind"] == "control" else measured
        rate = rates.setdefault(name, Rate([], []))
        rate.successes.append(result["successes"])
        rate.episodes.append(result["episodes"])
        if name == "success":
          mark = result["fingerprint"]
          hashes.append(mark["policy"]["policy_hash"])
          steps, device = mark["policy"]["step"], mark["device"]
  figures = _json(folders[0] / "latency_figures.json").get("figures", {})
  values = [_value(figures, name) for name in ("policy FLOPs", "policy infer p50")]
  minutes = [_json(folder / "train.json")["seconds"] / 60 for folder in folders]
  return Found(rates, None if row in PARAMETERS_OF else steps, minutes, hashes, device, *values)


def _value(figures: Mapping[str, Any], name: str) -> float | None:
  return float(figures[name]["value"]) if name in figures else None


def _results(path: Path) -> list[dict]:
  return _json(path).get("results", [])


def _json(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(args: argparse.Namespace) -> str:
  """Writes tables.md, tables.json and pareto.png of all rows that are finished; returns the tables as text."""
  found = {entry.row: read(args.out, entry.row, args.seeds) for entry in args.entries}
  found = {row: one for row, one in found.items() if one is not None}
  text = "\n\n".join([_header(args, found), *(_table(name, found) for name in args.tables)]) + "\n"
  files.write(args.out / "tables.md", text)
  files.write_json(args.out / "tables.json", {row: one._asdict() for row, one in found.items()})
  if points := {row: one for row, one in found.items() if one.flops}:
    draw(points, args.out / "pareto.png")
  return text


def _header(args: argparse.Namespace, found: Mapping[str, Found]) -> str:
  devices = ", ".join(sorted({one.device for one in found.values()})) or "none yet"
  return (
    f"Size {args.size}, suite {args.suite}, {args.episodes} episodes a training, {args.seeds} training(s) a row, base "
    f"{args.base}, device {devices}. Rates with 95 % Wilson intervals. The paper's are means over LIBERO's four suites "
    "at 7B: orders may be compared, rates may not."
  )


def _table(name: str, found: Mapping[str, Found]) -> str:
  title = f"Table {name}" if name.isdecimal() else name.capitalize()
  extra = ["changed layouts", *_CONTROLS.values()] if name == "robustness" else []
  head = ["row", "success", *extra, "the paper, %", "FLOPs a call", "latency", "steps", "training", "policy"]
  lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
  for entry in TABLES[name]:
    if (one := found.get(entry.row)) is not None:
      lines.append(f"| {' | '.join(_cells(entry.label, entry.paper, one, bool(extra)))} |")
  return "\n".join(lines)


def _cells(label: str, paper: float | None, one: Found, robust: bool) -> list[str]:
  names = ["success", *(["changed", *(controls.NAMES[key] for key in _CONTROLS)] if robust else [])]
  rates = [one.rates[name].text() if name in one.rates else "–" for name in names]
  return [
    label,
    *rates,
    "–" if paper is None else f"{paper}",
    "–" if one.flops is None else f"{one.flops / 1e9:.3g} G",
    "–" if one.milliseconds is None else f"{one.milliseconds:.1f} ms",
    "none" if one.steps is None else f"{one.steps}",
    " ".join(f"{minutes:.1f}" for minutes in one.minutes) + " min",
    " ".join(digits[:8] for digits in one.hashes),
  ]


def draw(found: Mapping[str, Found], path: Path) -> None:
  """Success against FLOPs of a call, with intervals; rows that no other beats in both are joined by a line."""
  figure = Figure(figsize=(8, 5), layout="constrained")
  axis = figure.subplots()
  points = {row: (one.flops, *_percents(one.rates["success"])) for row, one in found.items()}
  for row, (flops, rate, low, high) in points.items():
    axis.errorbar(flops / 1e9, rate, [[rate - low], [high - rate]], fmt="o", capsize=2, color="tab:blue")
    axis.annotate(row, (flops / 1e9, rate), textcoords="offset points", xytext=(5, 4), fontsize=8)
  best = sorted(points[row][:2] for row in undominated({row: point[:2] for row, point in points.items()}))
  axis.plot([flops / 1e9 for flops, _ in best], [rate for _, rate in best], color="tab:orange", zorder=0)
  axis.set(xlabel="GFLOPs of a policy call", ylabel="success, %", ylim=(0, 100))
  axis.spines[["top", "right"]].set_visible(False)
  axis.grid(alpha=0.25)
  figure.savefig(path, dpi=120)


def _percents(rate: Rate) -> Sequence[float]:
  count, of = sum(rate.successes), sum(rate.episodes)
  return [100 * value for value in (count / max(of, 1), *wilson(count, of))]


def undominated(points: Mapping[str, tuple[float, float]]) -> list[str]:
  """The names of (cost, gain) pairs to which no other is at least equal in both and better in one."""

  def beaten(name: str) -> bool:
    cost, gain = points[name]
    others = (point for other, point in points.items() if other != name)
    return any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in others)

  return [name for name in points if not beaten(name)]
