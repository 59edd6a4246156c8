"""Success and kept patches against the number of distractors, as a table and a picture, from results of `evaluate run`.

    python -m semanticvla_jax.evaluate run --policy=checkpoints/tabletop_small \\
        --suite=place_clutter0,place_clutter2,place_clutter4,place_clutter6,place_clutter8 --controls=random \\
        --grounding --episodes=256 --films=0 --out=runs/clutter
    python -m semanticvla_jax.evaluate clutter runs/clutter --plot=runs/clutter/clutter.png
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from semanticvla_jax import cli
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import folder, results

_SUITE = re.compile(r"place_clutter(\d+)")
_VIEWS = {"image": "front view", "wrist_image": "wrist view"}


def rows_of(out: pathlib.Path) -> dict[str, dict[int, dict]]:
  """{name of a row: {number of distractors: its summary}} of a folder's results.json, ascending.

  Raises:
    ValueError: it cannot be read, or has no cluttered suite.
  """
  found: dict[str, dict[int, dict]] = {}
  for (suite, _, name), row in folder.read_rows(out)[0].items():
    if match := _SUITE.fullmatch(suite):
      found.setdefault(name, {})[int(match[1])] = row.summary
  if not found:
    raise refuse(f"{out}", "no suite place_clutter…", "at least one", "evaluate run --suite=place_clutter8")
  return {name: dict(sorted(by.items())) for name, by in found.items()}


def table(rows: Mapping[str, Mapping[int, dict]]) -> Iterator[str]:
  """Lines of a Markdown table: success and, where it was measured, the share of named objects' area that is kept."""
  yield "| distractors | row | success | kept of the named objects, front | wrist |"
  yield "|---|---|---|---|---|"
  for count in sorted({count for by in rows.values() for count in by}):
    for name, by in rows.items():
      if (row := by.get(count)) is not None:
        cells = [_kept(row, view) for view in _VIEWS]
        yield f"| {count} | {name} | {results.rate_text(row)} | {' | '.join(cells)} |"


def _kept(row: Mapping, view: str) -> str:
  found = row.get("grounding", {}).get(view, {})
  if "objects_kept" not in found:
    return "–"
  return f"{100 * found['objects_kept']:.1f} % ({results.interval_text(found['objects_kept_interval'], 1)})"


def plot(rows: Mapping[str, Mapping[int, dict]], path: pathlib.Path) -> None:
  """Writes a PNG: success on the left, kept area of the named objects on the right, with 95 % intervals."""
  figure = Figure(figsize=(8.0, 3.0), dpi=110, layout="constrained")
  left, right = figure.subplots(1, 2, sharex=True)
  for i, (name, by) in enumerate(rows.items()):
    _line(left, name, f"C{i}", "-", {n: (row["rate"], row["interval"]) for n, row in by.items() if row["episodes"]})
    for view, style in zip(_VIEWS, ("-", "--")):
      kept = {n: row.get("grounding", {}).get(view, {}) for n, row in by.items()}
      kept = {n: (x["objects_kept"], x["objects_kept_interval"]) for n, x in kept.items() if "objects_kept" in x}
      _line(right, f"{name}, {_VIEWS[view]}", f"C{i}", style, kept)
  for axis, title in ((left, "success"), (right, "kept area of the named objects")):
    axis.set(title=title, xlabel="distractors", ylim=(-3, 103), ylabel="%")
    axis.grid(alpha=0.3)
    if axis.lines:
      axis.legend(fontsize=7)
  figure.savefig(path)


def _line(axis: Any, label: str, color: str, style: str, points: Mapping[int, tuple[float, Sequence[float]]]) -> None:
  """A curve in percent with the intervals as an area: {x: (value, (low, high))}."""
  if not points:
    return
  values = [100 * value for value, _ in points.values()]
  low, high = ([100 * ends[i] for _, ends in points.values()] for i in (0, 1))
  axis.plot([*points], values, style, color=color, marker="o", markersize=3, label=label)
  axis.fill_between([*points], low, high, color=color, alpha=0.15, linewidth=0)


def main(argv: Sequence[str]) -> None:
  """Prints the table and writes the picture; problems end the program with their message."""
  parser = cli.ArgumentParser("python -m semanticvla_jax.evaluate clutter", __doc__)
  parser.add_argument("folder", type=pathlib.Path, help="folder with the results.json of `evaluate run`")
  parser.add_argument("--plot", type=pathlib.Path, help="PNG file to write (default: none)")
  args = parser.parse_args(argv)
  try:
    rows = rows_of(args.folder)
    print("\n".join(table(rows)))
    if args.plot is not None:
      plot(rows, args.plot)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
