"""A report in one file: report.html, with its pictures and films inside, that opens anywhere without a network."""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from semanticvla_jax import files
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import controls, fingerprint, report_grounding
from semanticvla_jax.evaluate.results import Row, interval_text, percent, shard_text
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.evaluate.visualize import Tile, png

T = TypeVar("T")

_PAUSE = "this.paused?this.play():this.pause()"  # films have no controls, which would hide their captions


class Stages(dict[str, float]):
  """Seconds spent by stage, in the order in which stages began."""

  def timed(self, stage: str, work: Callable[[], T]) -> T:
    """What `work` returns; its time is added to the stage's."""
    start = time.perf_counter()
    result = work()
    self[stage] = self.get(stage, 0.0) + time.perf_counter() - start
    return result


class Film(NamedTuple):
  """An mp4 of one episode, and what to write under it."""

  path: pathlib.Path
  told: str
  success: bool
  steps: int
  seed: int


class Scene(NamedTuple):
  """What the policy looked at, at one moment, under several instructions.

  Attributes:
    moment: e.g. "first step of episode 3".
    looks: (instruction, label, rows of tiles) of each.
    cues: a tile a word, for the first instruction.
  """

  moment: str
  looks: list[tuple[str, str, list[list[Tile]]]]
  cues: list[Tile]


class Page(NamedTuple):
  """What a report shows.

  Attributes:
    title: of the page.
    rows: measured rates, those of kind "policy" first.
    films, scenes: the first of each is also shown at the top.
    metrics: lines of the training's metrics.jsonl: dicts with "step", "loss" and others.
    command: how to get this report again.
    seconds: time spent per stage.
    film_note: how fast the films run.
    grounding: files of pictures of kept patches and named objects, shown where they exist and rows have such figures.
    sections: of one benchmark, HTML that follows the controls.
  """

  title: str
  rows: Sequence[Row]
  films: Sequence[Film] = ()
  scenes: Sequence[Scene] = ()
  metrics: Sequence[Mapping] = ()
  command: str = ""
  seconds: Mapping[str, float] = {}
  film_note: str = "at half speed"
  grounding: Sequence[pathlib.Path] = ()
  sections: Sequence[str] = ()


def write(path: str | os.PathLike, page: Page) -> pathlib.Path:
  """Writes a report to a file, whose folder exists; returns its path."""
  title, rows = page.title, page.rows
  parts = [
    _header(title, rows),
    _story(page.films, page.scenes),
    _table(
      "Success",
      "How often the task was done, each bar with its 95 % Wilson interval.",
      [row for row in rows if row.kind != "control"],
    ),
    _table(
      "Controls",
      "The same parameters on the same episodes, with one thing taken away. A policy that follows "
      "instructions must fail under another instruction, and one that uses images must fail on gray frames; a "
      "useful pruner must do better than patches chosen without looking at the image.",
      [row for row in rows if row.kind == "control"],
    ),
    *page.sections,
    _tasks(rows),
    _films(page.films, page.film_note),
    _scenes(page.scenes),
    report_grounding.section(rows, page.grounding),
    _curves(page.metrics),
    _fingerprint(rows, page.command, page.seconds),
  ]
  body = "\n".join(part for part in parts if part)
  style = importlib.resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
  text = (
    f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
    f"<body><main>{body}</main></body></html>\n"
  )
  files.write(path, text)
  return pathlib.Path(path)


def read_metrics(path: str | os.PathLike) -> list[dict]:
  """The lines of a metrics.jsonl; a last line that a running or killed training left unfinished is dropped.

  Raises:
    ValueError: the file does not exist, or another line is not a JSON object.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise refuse("No metrics", f"{path}, which does not exist", "a metrics.jsonl", "leave --metrics out")
  lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
  found = []
  for number, line in enumerate(lines, start=1):
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number == len(lines):
        break
      raise refuse(f"{path}, line {number}", f"{line[:60]!r}", "a JSON object", "repair or remove the line") from error
    if not isinstance(found[-1], dict):
      raise refuse(f"{path}, line {number}", f"{line[:60]!r}", "a JSON object", "remove the line")
  return found


def _header(title: str, rows: Sequence[Row]) -> str:
  sentences = []
  for row in (row for row in rows if row.kind == "policy"):
    before = next((x for x in rows if x.kind == "baseline" and x.suite == row.suite), None)
    told = next((x for x in rows if x.name == controls.NAMES["shuffled"] and x.suite == row.suite), None)
    text = _verdict(row.summary, row.suite, row.fingerprint.get("split", "unknown"))
    text += f"; before fine-tuning {_of(before.summary)}" if before else ""
    text += f"; told another episode's instruction, {_of(told.summary)}" if told else ""
    sentences.append(f"<p class=verdict>{text}.</p>")
  return f"<header><h1>{html.escape(title)}</h1>{''.join(sentences)}</header>"


def _verdict(summary: Mapping, suite: str, split: str) -> str:
  """How many of a suite's episodes succeeded, as a clause; with what was left out of the count."""
  suite, apart = f"<b>{html.escape(suite)}</b>", _apart(summary)
  if not summary["episodes"]:
    return f"<b>No</b> episode of {suite} can be counted: {apart}"
  text = f"<b>{_of(summary)}</b> episodes of {suite} end with the task done"
  text += f" <span class=soft>({_interval(summary)}, layouts: {html.escape(split)})</span>"
  text += f" in <b>{html.escape(shard_text(summary))}</b>, counted from 0" if "shard" in summary else ""
  return text + (f", {apart}" if apart else "")


def _of(summary: Mapping) -> str:
  return f"{summary['successes']} of {summary['episodes']}" if summary["episodes"] else "none that counts"


def _apart(summary: Mapping) -> str:
  """What is not in a rate, and which failures were no attempt: "10 broke and are not counted"; often nothing."""
  errors, spoilt = summary.get("errors", 0), summary.get("nonfinite", 0)
  if not summary["episodes"]:
    return f"all {errors} broke" if errors else "none was run"
  parts = [f"{errors} broke and {'are' if errors > 1 else 'is'} not counted"] * bool(errors)
  return ", ".join([*parts, *[f"{spoilt} failed by a non-finite action"] * bool(spoilt)])


def _interval(summary: Mapping) -> str:
  return interval_text(summary["interval"]) if summary["episodes"] else "–"


def _story(films: Sequence[Film], scenes: Sequence[Scene]) -> str:
  """Told, looked, did: one episode in three pictures."""
  if not films or not scenes or not scenes[0].looks:
    return ""
  _, _, views = scenes[0].looks[0]
  looked = "".join(_tile(tile) for row in views for tile in row[:2])
  kind, verdict = ("good", "It did.") if films[0].success else ("bad", "It did not.")
  return (
    "<section class=story><div><h3>1 · What the robot was told</h3>"
    f"<blockquote>“{html.escape(films[0].told)}”</blockquote></div>"
    f"<div><h3>2 · What it looked at</h3><div class=pair>{looked}</div></div>"
    f"<div><h3>3 · What it did: <span class={kind}>{verdict}</span></h3>{_video(films[0])}</div></section>"
  )


_NUMBERS = ("success", "95 % interval", "episodes")


def _table(heading: str, lead: str, rows: Sequence[Row]) -> str:
  if not rows:
    return ""
  lines = []
  for row in rows:
    steps = row.summary["mean_steps_to_success"]
    steps = "–" if steps is None else f"{steps:.0f}"
    lines.append(
      f"<tr class='row {row.kind}'><td class=suite data-label=suite>{html.escape(row.suite)}</td>"
      f"<td class=name data-label=policy>{html.escape(row.name)}</td>{_rate(row.summary, row.kind)}"
      f"<td class=number data-label=steps>{steps}</td></tr>\n"
      f"<tr class=episodes><td colspan=7>{_dots(row.episodes)}</td></tr>\n"
    )
  head = _head("suite", "policy", last="steps")
  return (
    f"<section><h2>{heading}</h2><p>{lead} A dot is an episode (point at it): green done, pale not done, a ring an "
    "action that is not finite, a black square a simulator that broke.</p>"
    f"<table class=rates>{head}<tbody>{''.join(lines)}</tbody></table></section>"
  )


def _head(*names: str, last: str | None) -> str:
  """The head of a table of rates: `names`, a bar, the numbers of `_rate`, and one more."""
  cells = "".join(f"<th class={'suite' if name == 'suite' else 'name'}>{name}</th>" for name in names)
  numbers = "".join(f"<th class=number>{name}</th>" for name in (*_NUMBERS, *([last] if last else [])))
  return f"<thead><tr>{cells}<th class=bar></th>{numbers}</tr></thead>"


def _rate(summary: Mapping, kind: str) -> str:
  """Four cells: a bar, the rate, its interval, and the count with what left it."""
  apart = _apart(summary)
  count = _of(summary) if summary["episodes"] else "–"
  cells = (_percent(summary), _interval(summary), count + (f" <small>{apart}</small>" if apart else ""))
  numbers = "".join(f"<td class=number data-label='{name}'>{cell}</td>" for name, cell in zip(_NUMBERS, cells))
  return f"<td class=bar>{_bar(summary, kind)}</td>{numbers}"


def _percent(summary: Mapping) -> str:
  return percent(summary["successes"], summary["episodes"], decimals=0)


def _bar(summary: Mapping, kind: str) -> str:
  """A bar from 0 to 1 with its interval, as SVG of variable width; empty if there is no rate."""
  low, high = (200 * x for x in summary["interval"])
  rate = 200 * (summary["rate"] or 0)
  drawn = (
    f'<rect class="fill {kind}" width="{rate:.1f}" height="18"/><path class="whisker" d="M{low:.1f} 9H{high:.1f}'
    f'M{low:.1f} 5v8M{high:.1f} 5v8"/>'
  )
  return (
    '<svg viewBox="0 0 200 18" preserveAspectRatio="none" aria-hidden="true"><rect class="rail" width="200" '
    f'height="18"/>{drawn if summary["episodes"] else ""}</svg>'
  )


def _dots(episodes: Episodes) -> str:
  dots, words = (
    [],
    {
      "yes": "done in {} steps",
      "no": "not done",
      "error": "the simulator broke",
      "spoilt": "an action that is not finite after {} steps",
    },
  )
  spoilt = np.zeros(len(episodes.seeds), bool) if episodes.nonfinite is None else episodes.nonfinite
  for seed, success, error, steps, asked, told, bad in zip(
    episodes.seeds, episodes.success, episodes.error, episodes.steps, episodes.instruction, episodes.told, spoilt
  ):
    kind = "error" if error else "spoilt" if bad else "yes" if success else "no"
    title = f"seed {seed}: {asked}" + ("" if told == asked else f" (told: {told})")
    dots.append(f'<i class={kind} title="{html.escape(title)}: {words[kind].format(steps)}"></i>')
  return f"<div class=dots>{''.join(dots)}</div>"


def _tasks(rows: Sequence[Row]) -> str:
  """Success by task, next to that of the baseline if there is one."""
  blocks = []
  for row in (row for row in rows if row.kind == "policy" and row.summary.get("tasks")):
    before = next((x for x in rows if x.kind == "baseline" and x.suite == row.suite), None)
    old = None if before is None else before.summary.get("tasks", {})
    lines = []
    for task, s in row.summary["tasks"].items():
      cell = "" if old is None else f"<td class=number data-label=before>{_of(old[task]) if task in old else '–'}</td>"
      lines.append(f"<tr class=row><td class=name>{html.escape(task)}</td>{_rate(s, 'policy')}{cell}</tr>\n")
    head = _head("task", last=None if old is None else "before")
    body = f"<table class=rates>{head}<tbody>{''.join(lines)}</tbody></table>"
    blocks.append(f"<h3>{html.escape(row.suite)}</h3>{body}")
  return f"<section><h2>By task</h2>{''.join(blocks)}</section>" if blocks else ""


def _video(film: Film) -> str:
  """A film, inside the page; a note where its file cannot be read."""
  try:
    data = film.path.read_bytes()
    reason = "" if data else "it is empty"
  except OSError as error:
    reason = error.strerror or type(error).__name__
  if reason:
    return f"<p class=missing>The film {html.escape(film.path.name)} is missing: {html.escape(reason)}.</p>"
  source = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
  return f'<video src="{source}" autoplay loop muted playsinline onclick="{_PAUSE}"></video>'


def _films(films: Sequence[Film], note: str) -> str:
  if not films:
    return ""
  figures = "".join(
    f"<figure>{_video(film)}<figcaption><span class={'good' if film.success else 'bad'}>"
    f"{'done' if film.success else 'not done'}</span> in {film.steps} steps · seed {film.seed}</figcaption></figure>"
    for film in films
  )
  return (
    f"<section><h2>Episodes</h2><p>Left the front camera, right the wrist camera, {html.escape(note)}; a click stops "
    "one. The first in the order of their seeds, half of them failures if there are as many.</p>"
    f"<div class=films>{figures}</div></section>"
  )


def _tile(tile: Tile) -> str:
  data = base64.b64encode(png(tile.image)).decode()
  caption = html.escape(tile.caption)
  return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _scenes(scenes: Sequence[Scene]) -> str:
  if not scenes:
    return ""
  return (
    "<section><h2>Where it looks</h2><p><b>Kept</b>: the patches most like the words; of the others only sums reach "
    "the language model. <b>Cues</b>: where the most informative words look. <b>Aggregation tokens</b>: where the "
    "learned tokens that sum up the scene look. Colors are scaled to each picture, from violet (least) to "
    "yellow (most); <i>peak</i> is the weight of the brightest patch, in multiples of an even share.</p>"
    f"{''.join(map(_scene, scenes))}</section>"
  )


def _scene(scene: Scene) -> str:
  blocks = []
  for instruction, label, views in scene.looks:
    tiles = "".join(_tile(tile) for row in views for tile in row)
    blocks.append(
      f"<h3>{html.escape(label)}: <q>{html.escape(instruction)}</q></h3>"
      f"<div class=tiles style='--columns:{max(map(len, views), default=1)}'>{tiles}</div>"
    )
  if scene.cues:
    tiles = "".join(_tile(tile) for tile in scene.cues)
    cues = f"<div class=tiles style='--columns:5'>{tiles}</div>"
    blocks.append(f"<details><summary>Each cue under the first instruction</summary>{cues}</details>")
  return f"<h2 class=moment>{html.escape(scene.moment)}</h2>{''.join(blocks)}"


def _curves(metrics: Sequence[Mapping]) -> str:
  """Losses (logarithmic) and rates over steps; nothing where nothing was measured."""
  series: dict[str, list[tuple[float, float]]] = {}
  for line in metrics:
    for name, value in line.items():
      wanted = any(part.startswith(("loss", "l1", "success")) for part in name.split("/"))
      if "step" in line and wanted and isinstance(value, int | float) and np.isfinite(value):
        series.setdefault(name, []).append((line["step"], value))
  rates = {name: points for name, points in series.items() if "success" in name}
  losses = {name: points for name, points in series.items() if name not in rates and any(y > 0 for _, y in points)}
  panels = [(kind, part) for kind, part in (("loss", losses), ("success", rates)) if part]
  if not panels:
    return ""
  drawings = "".join(f"<div>{_panel(kind, part)}</div>" for kind, part in panels)
  return f"<section><h2>Training</h2><div class=curves>{drawings}</div></section>"


def _panel(kind: str, series: Mapping[str, Sequence[tuple]]) -> str:
  """The curves of one kind, "loss" or "success", as SVG; one each, so that they can be placed below each other."""
  with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, points in sorted(series.items()):
      _draw(axis, name, np.array(points, float), smooth=kind == "loss")
    axis.set(xlabel="step", yscale="log" if kind == "loss" else "linear", ylabel=kind)
    if kind == "success":
      axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(ScalarFormatter())
    low, high = axis.get_ylim()
    crowded = kind == "success" or high > 10 * low  # then the decades say enough
    axis.yaxis.set_minor_formatter(NullFormatter() if crowded else ScalarFormatter())
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
  drawing = buffer.getvalue()
  return drawing[drawing.index("<svg") :]


def _draw(axis, name: str, points: np.ndarray, smooth: bool) -> None:
  """A curve; a long and noisy one pale, with its moving mean over it."""
  x, y = points.T
  width = len(y) // 40
  if not smooth or width < 2:
    axis.plot(x, y, label=name, marker="o" if len(y) < 12 else None, markersize=3)
    return
  (line,) = axis.plot(x, y, alpha=0.25, linewidth=0.8)
  mean = np.convolve(y, np.ones(width) / width, mode="valid")
  axis.plot(x[width - 1 :], mean, color=line.get_color(), label=f"{name} (mean of {width})")


def _fingerprint(rows: Sequence[Row], command: str, seconds: Mapping[str, float]) -> str:
  blocks = []
  for row in rows:
    facts = [(html.escape(key), html.escape(_short(key, value))) for key, value in row.fingerprint.items()]
    lines = "".join(f"<tr><th scope=row>{key}</th><td><code>{value}</code></td></tr>\n" for key, value in facts)
    opened, name = " open" if row is rows[0] else "", html.escape(f"{row.suite} · {row.name}")
    table = f"<table class=facts><tbody>{lines}</tbody></table>"
    blocks.append(f"<details{opened}><summary>{name}</summary>{table}</details>")
  again = f"<h3>Command</h3><pre>{html.escape(command)}</pre>" if command else ""
  spent = " · ".join(f"{html.escape(name)} {value:.0f} s" for name, value in seconds.items())
  return (
    "<section><h2>How it was measured</h2><p>Numbers may be compared only where these agree. An episode counts as done "
    "if the task is fulfilled within the allowed steps. An action that is not finite is a failure of the policy; an "
    "episode whose simulator breaks every time is not counted.</p>"
    f"{''.join(blocks)}{again}{f'<p class=soft>{spent}</p>' if spent else ''}</section>"
  )


def _short(key: str, value: object) -> str:
  if isinstance(value, Mapping):
    return ", ".join(f"{part}: {_short(part, x)}" for part, x in value.items()) or "–"
  text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else fingerprint.named(key, value)
  return text if len(text) < 300 else text[:297] + "…"
