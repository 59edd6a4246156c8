"""The part of a report on grounding: a table of figures against chance, and pictures."""

from __future__ import annotations

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence

from semanticvla_jax.evaluate.results import Row, interval_text

_WITH_INTERVAL = ("on_objects", "objects_kept")
_HEAD = ("kept area on objects", "chance", "times chance", "area of objects kept", "its chance", "episodes", "queries")


def section(rows: Sequence[Row], pictures: Sequence[pathlib.Path]) -> str:
  """A section of the page; empty where nothing was measured."""
  some = [row for row in rows if row.summary.get("grounding")]
  if not some:
    return ""
  lines = "".join(_line(row, view, figures) for row in some for view, figures in row.summary["grounding"].items())
  names = "".join(f"<th class=name>{name}</th>" for name in ("suite", "policy", "view"))
  head = f"<thead><tr>{names}{''.join(f'<th class=number>{name}</th>' for name in _HEAD)}</tr></thead>"
  return (
    "<section><h2>Grounding</h2><p>How much of what the pruner keeps lies on the objects that the task names, at every "
    "policy query that shows one of them, with 95 % intervals over episodes. <b>Kept area on objects</b>: the "
    "share of the kept patches' area that shows them; chance is their share of the whole picture, which as many random "
    "patches have on average. <b>Area of objects kept</b>: how much of what is seen of them lies in kept patches; its "
    "chance is the share of patches that is kept. The objects are those of the episode's own task in every row, also "
    f"where the policy was given another one.</p><table class=rates>{head}<tbody>{lines}</tbody></table>"
    f"{''.join(map(_picture, filter(pathlib.Path.exists, pictures)))}</section>"
  )


def _line(row: Row, view: str, figures: Mapping) -> str:
  names = "".join(f"<td class=name>{html.escape(text)}</td>" for text in (row.suite, row.name, view))
  if not figures["episodes"]:
    cells = ["–"] * 5
  else:
    on, kept = (f"{_share(figures[name])} ({interval_text(figures[f'{name}_interval'], 1)})" for name in _WITH_INTERVAL)
    times = f"{figures['on_objects'] / figures['chance']:.2f} ×"
    cells = [on, _share(figures["chance"]), times, kept, _share(figures["kept"])]
  cells += [f"{figures['episodes']}", f"{figures['queries']}"]
  numbers = "".join(f"<td class=number data-label='{name}'>{cell}</td>" for name, cell in zip(_HEAD, cells))
  return f"<tr class='row {row.kind}'>{names}{numbers}</tr>\n"


def _share(value: float) -> str:
  return f"{100 * value:.1f} %"


def _picture(path: pathlib.Path) -> str:
  data = base64.b64encode(path.read_bytes()).decode()
  caption = f"{path.stem.removesuffix('_grounding')}: kept patches, and the outline of the objects that the task names"
  return (
    f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
    f"<figcaption>{html.escape(caption)}</figcaption></figure>"
  )
