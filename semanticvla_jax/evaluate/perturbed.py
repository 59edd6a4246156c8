"""The section of a report about perturbed suites: what each changes, next to the suite that it perturbs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from semanticvla_jax.evaluate.results import Row, interval_text, percent


def section(rows: Sequence[Row]) -> list[str]:
  """A table in one section; none where no suite is perturbed.

  Args:
    rows: measured rows; the fingerprint of a perturbed suite has `perturbed`, {"suite": …, "changes": …}.
  """
  own = {row.suite: row for row in rows if row.kind == "policy"}
  lines = [_line(row, own.get(row.fingerprint["perturbed"]["suite"])) for row in own.values() if _is_perturbed(row)]
  if not lines:
    return []
  head = "".join(f"<th>{name}</th>" for name in ("suite", "what it changes", "success", "unperturbed"))
  return [
    "<section><h2>Perturbed suites</h2><p>LIBERO-PRO changes one thing of each task. A policy that has memorized its "
    "training scenes fails where one that looks and listens does not. Each rate has its 95 % Wilson interval.</p>"
    f"<table class=rates><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></section>"
  ]


def _is_perturbed(row: Row) -> bool:
  return "perturbed" in row.fingerprint


def _line(row: Row, before: Row | None) -> str:
  what = row.fingerprint["perturbed"]
  unperturbed = (
    f"{_rate(before.summary)} of {what['suite']}" if before is not None else f"{what['suite']}: not measured here"
  )
  cells = (row.suite, what["changes"], _rate(row.summary), unperturbed)
  return "<tr class=row>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>\n"


def _rate(summary: Mapping) -> str:
  if not summary["episodes"]:
    return "no episode that counts"
  successes, episodes = summary["successes"], summary["episodes"]
  return f"{successes} of {episodes}, {percent(successes, episodes, decimals=0)} ({interval_text(summary['interval'])})"
