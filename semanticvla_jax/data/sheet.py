"""The HTML sheet of `data preview`: frames as stored, evaluated and trained on, and the actions of whole episodes."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from semanticvla_jax.data import images, rlds, statistics, tfrecord_index

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; max-width: 1400px; color: #222 }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5em 0 }
td, th { padding: .1em .6em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
figure { display: inline-block; margin: 0 .5em .5em 0 } figcaption { font-size: 12px; color: #666 }
section { border-top: 1px solid #ccc; padding: 1em 0 } svg { background: #fafafa; border: 1px solid #ddd }
"""
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2")
_WIDTH, _HEIGHT, _PAD = 640, 140, 6  # pixels of a chart


def page(
  datasets: Sequence[rlds.Dataset], descriptions: Sequence[str], *, count: int = 6, size: int = 224, seed: int = 0
) -> str:
  """One HTML document without links to other files.

  Args:
    datasets: what to show. descriptions: the text above each.
    count: frames of each, spread evenly over it. size: pixels of a side of the model's images.
    seed: of the augmentation that is shown.
  """
  title = ", ".join(dataset.name for dataset in datasets)
  parts = ["<!doctype html><html lang=en><meta charset=utf-8>", f"<title>{html.escape(title)}</title>"]
  parts.append(f"<style>{_STYLE}</style><body>")
  for dataset, description in zip(datasets, descriptions, strict=True):
    parts += [f"<h1>{html.escape(dataset.name)}</h1><pre>{html.escape(description)}</pre>"]
    parts += [*_charts(dataset)]
    frames = np.linspace(0, len(dataset.actions) - 1, count).astype(int).tolist()
    parts += [_frame(dataset, number, frame, size, seed) for number, frame in enumerate(frames)]
  return "\n".join([*parts, "</body></html>\n"])


def _frame(dataset: rlds.Dataset, number: int, frame: int, size: int, seed: int) -> str:
  """One frame: its images in three forms and its numbers."""
  reader = tfrecord_index.Reader(dataset.index)
  figures = []
  for view, name in enumerate(dataset.spec.views):
    encoded = reader.image(int(dataset.frames[frame]), view)
    if not encoded:
      figures.append(_figure(np.zeros((size, size, 3), np.uint8), f"{name}: no image, hidden from the model"))
      continue
    image = images.decode(encoded)
    uniform = images.draws(seed, number, view)[None]
    figures += [
      _figure(images.resize(image, size), f"{name}: stored, {image.shape[0]} x {image.shape[1]}"),
      _figure(images.prepare(image, size, crop_area=0.9), f"{name}: evaluation"),
      _figure(images.augment(images.resize(image, size)[None], uniform)[0], f"{name}: training"),
    ]
  where = f"episode {dataset.episodes[frame]}, frame {frame}: {html.escape(dataset.instruction(frame))}"
  return f"<section><h2>{where}</h2>{''.join(figures)}{_numbers(dataset, frame)}</section>"


def _figure(image: UInt8[np.ndarray, "h w 3"], caption: str) -> str:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG")
  data = base64.b64encode(buffer.getvalue()).decode()
  label = html.escape(caption)
  return f"<figure><img alt='{label}' src='data:image/png;base64,{data}'><figcaption>{label}</figcaption></figure>"


def _numbers(dataset: rlds.Dataset, frame: int) -> str:
  """The tables of a frame's action and proprioception, raw and normalized."""
  spec, stats = dataset.spec, dataset.statistics
  groups = {dim: name for name, dims in (spec.groups or {}).items() for dim in dims}
  tables = []
  for kind, values, one in (
    ("action", dataset.actions[frame], stats.action),
    ("proprioception", dataset.proprio[frame], stats.proprio),
  ):
    normalized = statistics.normalize(values[None], one, mode=spec.mode)[0] if len(values) else values
    names = [groups.get(i, "") for i in range(len(values))] if kind == "action" else [""] * len(values)
    rows = [
      f"<tr><td>{i} {html.escape(name)}<td>{raw:.4f}<td>{scaled:.3f}"
      for i, (name, raw, scaled) in enumerate(zip(names, values, normalized, strict=True))
    ]
    tables.append(f"<td><table><tr><th>{kind}<th>raw<th>normalized{''.join(rows)}</table>")
  return f"<table><tr style='vertical-align: top'>{''.join(tables)}</table>"


def _charts(dataset: rlds.Dataset) -> Iterator[str]:
  """The actions of the first episode over time, a chart a group."""
  groups = dataset.spec.groups or {"action": (*range(dataset.actions.shape[1]),)}
  episode = dataset.actions[dataset.episodes == 0]
  yield "<p>Actions of episode 0, raw units:</p>"
  for name, dims in groups.items():
    unit = dataset.spec.units.get(name, "")
    yield _figure_of(f"{name} {dims} {unit}", episode[:, list(dims)])


def _figure_of(caption: str, values: Float32[np.ndarray, "t d"]) -> str:
  low, high = float(values.min()), float(values.max())
  scale = (_HEIGHT - 2 * _PAD) / max(high - low, 1e-9)
  x = np.linspace(_PAD, _WIDTH - _PAD, len(values))
  lines = []
  for i, column in enumerate(values.T):
    points = " ".join(f"{a:.1f},{_HEIGHT - _PAD - (b - low) * scale:.1f}" for a, b in zip(x, column, strict=True))
    lines.append(f"<polyline fill=none stroke='{_COLORS[i % len(_COLORS)]}' points='{points}'/>")
  chart = f"<svg width={_WIDTH} height={_HEIGHT}>{''.join(lines)}</svg>"
  label = html.escape(f"{caption}: {low:.4g} to {high:.4g}")
  return f"<figure>{chart}<figcaption>{label}</figcaption></figure>"
