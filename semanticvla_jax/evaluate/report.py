"""A report in one file: report.html, with its pictures and films inside, that opens anywhere without a network."""

from __future__ import annotations

import base64
import html
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

from semanticvla_jax.evaluate import controls
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.evaluate.visualize import Tile, png

T = TypeVar("T")

STYLE = """
:root { --ink: #1c1e22; --soft: #6b7280; --line: #e5e7eb; --good: #168248; --bad: #be322d; --main: #2f5fd0;
  --old: #9aa3b2; --control: #c58a1b; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 20px; margin: 0 0 8px; }
h3 { font-size: 15px; margin: 16px 0 8px; }
header { margin-bottom: 24px; }
.verdict { font-size: 19px; margin: 6px 0; }
.soft { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin: 0 0 18px; }
.moment { font-size: 16px; margin-top: 22px; padding-top: 14px; border-top: 1px solid var(--line); }
section > p { margin: 0 0 12px; max-width: 78ch; color: #3c4250; }
.story { display: grid; grid-template-columns: 1fr 1.15fr 1.75fr; gap: 22px; align-items: start; }
.story h3 { margin-top: 0; }
.story blockquote { margin: 0; font-size: 21px; line-height: 1.35; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
video, img { display: block; width: 100%; border-radius: 4px; }
img { image-rendering: auto; }
figure { margin: 0; }
figcaption { font-size: 12.5px; line-height: 1.35; color: var(--soft); margin-top: 4px; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px;
  border-bottom: 1px solid var(--line); }
th, td { padding: 5px 10px 5px 0; vertical-align: middle; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.results td:first-child { width: 70px; } .results td:nth-child(2) { width: 270px; }
tr.policy td:nth-child(2) { font-weight: 600; }
.bar { width: 210px; } .bar svg { display: block; }
.rail { fill: #eef0f4; } .fill { fill: var(--main); } .fill.baseline { fill: var(--old); }
  .fill.control { fill: var(--control); }
.whisker { stroke: var(--ink); stroke-width: 1.6; fill: none; }
.dots { display: flex; flex-wrap: wrap; gap: 3px; padding-bottom: 8px; }
.dots i { width: 9px; height: 9px; border-radius: 50%; background: #d9dde4; }
.dots .yes { background: var(--good); } .dots .no { background: #e8b4b1; } .dots .error { background: #111; }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 16px; }
.tiles { display: grid; grid-template-columns: repeat(var(--columns, 4), 1fr); gap: 12px; }
.curves svg { width: 100%; height: auto; }
details { margin: 8px 0; } summary { cursor: pointer; font-weight: 600; font-size: 14px; }
details .tiles { margin-top: 10px; }
.facts { font-size: 13px; } .facts td:first-child { color: var(--soft); white-space: nowrap; width: 1%;
  padding-right: 18px; vertical-align: top; }
code { font-size: 12.5px; overflow-wrap: anywhere; } pre { background: #f1f3f6; padding: 10px 12px;
  border-radius: 6px; overflow-x: auto; font-size: 13px; }
@media (max-width: 820px) { .story { grid-template-columns: 1fr; } .tiles { grid-template-columns: 1fr 1fr; }
  .bar { display: none; } }
"""


_PAUSE = "this.paused?this.play():this.pause()"  # films have no controls, which would hide their captions


class Row(NamedTuple):
  """One measured success rate.

  Attributes:
    name: what was measured, e.g. "this policy", "before", "keeps random patches".
    kind: "policy", "baseline" or "control".
    suite: of the environment.
    summary: of protocol.summary.
    fingerprint: of protocol.fingerprint.
    episodes: all of them.
  """

  name: str
  kind: str
  suite: str
  summary: dict
  fingerprint: dict
  episodes: Episodes


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


def write(
  path: str | os.PathLike,
  *,
  title: str,
  rows: Sequence[Row],
  films: Sequence[Film] = (),
  scenes: Sequence[Scene] = (),
  metrics: Sequence[Mapping] = (),
  command: str = "",
  seconds: Mapping[str, float] | None = None,
  film_note: str = "at half speed",
) -> pathlib.Path:
  """Writes the report.

  Args:
    path: of the file; its folder exists.
    title: of the page.
    rows: measured rates, those of kind "policy" first.
    films, scenes: to show; the first of each stands at the top.
    metrics: lines of the training's metrics.jsonl: dicts with "step", "loss" and others.
    command: how to get this report again.
    seconds: time spent by stage.
    film_note: how fast the films run.
  """
  parts = [
    _header(title, rows),
    _story(films, scenes),
    _table("Success", "How often the task was done, each bar with its 95 % Wilson interval.",
           [row for row in rows if row.kind != "control"]),
    _table("Controls", "The same parameters on the same episodes, with one thing taken away. A policy that listens "
           "must fall when it is told something else, one that looks when its frames are grey; a pruner that matters "
           "must beat patches chosen without looking.",
           [row for row in rows if row.kind == "control"]),
    _tasks(rows),
    _films(films, film_note),
    _scenes(scenes),
    _curves(metrics),
    _fingerprint(rows, command, seconds or {}),
  ]  # fmt: skip
  body = "\n".join(part for part in parts if part)
  page = (
    f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
    f"<body><main>{body}</main></body></html>\n"
  )
  path = pathlib.Path(path)
  path.write_text(page)
  return path


def folder(policy: str, suite: str) -> str:
  """Where a report goes unless told: `runs/<policy>_<suite>`; a policy folder called "policy" has its parent's name."""
  path = pathlib.PurePath(policy)
  name = path.parent.name if path.name == "policy" and path.parent.name else path.name
  return f"runs/{name}_{suite.replace(',', '_')}"


def results(rows: Sequence[Row], command: str, seconds: Mapping[str, float]) -> dict:
  """What results.json holds."""
  return {
    "command": command,
    "seconds": {name: round(value, 1) for name, value in seconds.items()},
    "results": [
      {
        "name": row.name, "kind": row.kind, "suite": row.suite, **row.summary, "fingerprint": row.fingerprint,
        "per_episode": _per_episode(row.episodes),
      }
      for row in rows
    ],
  }  # fmt: skip


def _per_episode(episodes: Episodes) -> list[dict]:
  """A dict for each episode, as JSON values."""
  rows = [
    dict(seed=int(seed), success=bool(success), steps=int(steps), error=bool(error), asked=asked, told=told)
    for seed, success, steps, error, asked, told in zip(*episodes[:6])
  ]
  if episodes.retries is not None:
    times = zip(episodes.retries.tolist(), episodes.seconds.tolist())
    rows = [row | dict(retries=retries, seconds=seconds) for row, (retries, seconds) in zip(rows, times)]
  return rows


def read_metrics(path: str | os.PathLike) -> list[dict]:
  """The lines of a metrics.jsonl; a last line that a running or killed training left unfinished is dropped.

  Raises:
    ValueError: there is no such file, or another line is no JSON object.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise ValueError(f"No metrics: got {path}, which does not exist; expected a metrics.jsonl; leave --metrics out.")
  lines = [line for line in path.read_text().splitlines() if line.strip()]
  found = []
  for number, line in enumerate(lines, start=1):
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number == len(lines):
        break
      raise ValueError(
        f"{path}, line {number}: got {line[:60]!r}; expected a JSON object; repair or remove the line."
      ) from error
  return found


def _header(title: str, rows: Sequence[Row]) -> str:
  sentences = []
  for row in (row for row in rows if row.kind == "policy"):
    before = next((x for x in rows if x.kind == "baseline" and x.suite == row.suite), None)
    told = next((x for x in rows if x.name == controls.NAMES["shuffled"] and x.suite == row.suite), None)
    text = f"<b>{_of(row.summary)}</b> episodes of <b>{html.escape(row.suite)}</b> end with the task done"
    text += f" <span class=soft>({_interval(row.summary)}, layouts: {html.escape(row.fingerprint['split'])})</span>"
    text += f"; before fine-tuning {_of(before.summary)}" if before else ""
    text += f"; told another episode's instruction, {_of(told.summary)}" if told else ""
    sentences.append(f"<p class=verdict>{text}.</p>")
  return f"<header><h1>{html.escape(title)}</h1>{''.join(sentences)}</header>"


def _of(summary: dict) -> str:
  errors = f" (and {summary['errors']} broke)" if summary["errors"] else ""
  return f"{summary['successes']} of {summary['episodes']}{errors}"


def _interval(summary: dict) -> str:
  low, high = summary["interval"]
  return f"{100 * low:.0f}–{100 * high:.0f} %"


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


def _table(heading: str, lead: str, rows: Sequence[Row]) -> str:
  if not rows:
    return ""
  lines = []
  for row in rows:
    s = row.summary
    steps = "–" if s["mean_steps_to_success"] is None else f"{s['mean_steps_to_success']:.0f}"
    lines.append(
      f"<tr class={row.kind}><td>{html.escape(row.suite)}<td>{html.escape(row.name)}<td class=bar>{_bar(s, row.kind)}"
      f"<td class=number>{_percent(s)}<td class=number>{_interval(s)}<td class=number>{_of(s)}<td class=number>{steps}"
      f"<tr><td><td><td colspan=5>{_dots(row.episodes)}"
    )
  return (
    f"<section><h2>{heading}</h2><p>{lead} A dot is an episode (point at it).</p><table class=results><thead><tr>"
    "<th>suite<th>policy<th><th class=number>success<th class=number>95 % interval<th class=number>episodes"
    "<th class=number>steps</thead>"
    f"<tbody>{''.join(lines)}</tbody></table></section>"
  )


def _percent(summary: dict) -> str:
  return "–" if summary["rate"] is None else f"{100 * summary['rate']:.0f} %"


def _bar(summary: dict, kind: str) -> str:
  """A bar from 0 to 1 with its interval, as SVG."""
  low, high = (200 * x for x in summary["interval"])
  rate = 200 * (summary["rate"] or 0)
  return (
    '<svg viewBox="0 0 200 18" width="200" height="18"><rect class="rail" width="200" height="18" rx="3"/>'
    f'<rect class="fill {kind}" width="{rate:.1f}" height="18" rx="3"/><path class="whisker" d="M{low:.1f} 9H{high:.1f}'
    f'M{low:.1f} 5v8M{high:.1f} 5v8"/></svg>'
  )


def _dots(episodes: Episodes) -> str:
  dots = []
  for seed, success, error, steps, asked, told in zip(
    episodes.seeds, episodes.success, episodes.error, episodes.steps, episodes.instruction, episodes.told
  ):
    kind = "error" if error else "yes" if success else "no"
    words = f"seed {seed}: {asked}" + ("" if told == asked else f" (told: {told})")
    outcome = {"yes": f"done in {steps} steps", "no": "not done", "error": "broke"}[kind]
    dots.append(f'<i class={kind} title="{html.escape(words)}: {outcome}"></i>')
  return f"<div class=dots>{''.join(dots)}</div>"


def _tasks(rows: Sequence[Row]) -> str:
  """Success by task, with what went before where there is something."""
  blocks = []
  for row in (row for row in rows if row.kind == "policy" and row.summary.get("tasks")):
    before = next((x for x in rows if x.kind == "baseline" and x.suite == row.suite), None)
    lines = []
    for task, s in row.summary["tasks"].items():
      old = f"<td class=number>{_of(before.summary['tasks'][task])}" if before else ""
      lines.append(
        f"<tr><td>{html.escape(task)}<td class=bar>{_bar(s, 'policy')}<td class=number>{_percent(s)}"
        f"<td class=number>{_interval(s)}<td class=number>{_of(s)}{old}"
      )
    head = "<th class=number>before" if before else ""
    blocks.append(
      f"<h3>{html.escape(row.suite)}</h3><table><thead><tr><th>task<th><th class=number>success"
      f"<th class=number>95 % interval<th class=number>episodes{head}</thead><tbody>{''.join(lines)}</tbody></table>"
    )
  return f"<section><h2>By task</h2>{''.join(blocks)}</section>" if blocks else ""


def _video(film: Film) -> str:
  data = base64.b64encode(film.path.read_bytes()).decode()
  return f'<video src="data:video/mp4;base64,{data}" autoplay loop muted playsinline onclick="{_PAUSE}"></video>'


def _films(films: Sequence[Film], note: str) -> str:
  if not films:
    return ""
  figures = "".join(
    f'<figure>{_video(film)}<figcaption><span class={"good" if film.success else "bad"}>'
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
    "the language model. <b>Cues</b>: where the most telling words look. <b>Aggregation tokens</b>: where the learned "
    "tokens that sum up the scene look. Colours are scaled to each picture, from violet (least) to yellow (most); "
    "<i>peak</i> says how many times an even share the brightest patch gets.</p>"
    f"{''.join(map(_scene, scenes))}</section>"
  )


def _scene(scene: Scene) -> str:
  blocks = []
  for instruction, label, views in scene.looks:
    tiles = "".join(_tile(tile) for row in views for tile in row)
    blocks.append(
      f"<h3>{html.escape(label)}: <q>{html.escape(instruction)}</q></h3>"
      f"<div class=tiles style='--columns:{max(map(len, views))}'>{tiles}</div>"
    )
  if scene.cues:
    tiles = "".join(_tile(tile) for tile in scene.cues)
    cues = f"<div class=tiles style='--columns:5'>{tiles}</div>"
    blocks.append(f"<details><summary>Each cue of the first on its own</summary>{cues}</details>")
  return f"<h2 class=moment>{html.escape(scene.moment)}</h2>{''.join(blocks)}"


def _curves(metrics: Sequence[Mapping]) -> str:
  """Losses (logarithmic) and rates over steps, as one SVG; nothing where nothing was measured."""
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
  with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (kind, part) in zip(axes, panels):
      for name, points in sorted(part.items()):
        _draw(axis, name, np.array(points, float), smooth=kind == "loss")
      axis.set(xlabel="step", yscale="log" if kind == "loss" else "linear", ylabel=kind)
      if kind == "success":
        axis.set_ylim(0, 1)
      axis.yaxis.set_major_formatter(ScalarFormatter())
      axis.yaxis.set_minor_formatter(ScalarFormatter() if kind == "loss" else NullFormatter())
      axis.spines[["top", "right"]].set_visible(False)
      axis.grid(alpha=0.25)
      axis.legend(frameon=False, fontsize=9)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
  drawing = buffer.getvalue()
  return f"<section><h2>Training</h2><div class=curves>{drawing[drawing.index('<svg') :]}</div></section>"


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
    facts = [(html.escape(key), html.escape(_short(value))) for key, value in row.fingerprint.items()]
    lines = "".join(f"<tr><td>{key}<td><code>{value}</code>" for key, value in facts)
    opened, name = " open" if row is rows[0] else "", html.escape(f"{row.suite} · {row.name}")
    blocks.append(f"<details{opened}><summary>{name}</summary><table class=facts>{lines}</table></details>")
  again = f"<h3>The same again</h3><pre>{html.escape(command)}</pre>" if command else ""
  spent = " · ".join(f"{html.escape(name)} {value:.0f} s" for name, value in seconds.items())
  return (
    "<section><h2>How it was measured</h2><p>Numbers may be compared only where these agree. An episode counts as done "
    "if the task is fulfilled within the allowed steps; one that breaks (a non-finite action, a simulator that crashes "
    "every time) is counted apart.</p>"
    f"{''.join(blocks)}{again}{f'<p class=soft>{spent}</p>' if spent else ''}</section>"
  )


def _short(value: object) -> str:
  if isinstance(value, Mapping):
    return ", ".join(f"{key}: {_short(x)}" for key, x in value.items()) or "–"
  text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
  return text if len(text) < 300 else text[:297] + "…"
