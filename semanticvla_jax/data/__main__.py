"""Looks at a dataset: `python -m semanticvla_jax.data inspect|statistics|preview --data_dir DIR --name NAME`.

inspect     features, sizes, instructions and ranges
statistics  writes dataset_statistics.json (--format openvla) or norm_stats.json (--format openpi)
preview     writes a contact sheet: frames as stored, evaluated and trained on, with instruction, state and actions
"""

from __future__ import annotations

import argparse
import collections
import io
import logging
import pathlib
import sys

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from semanticvla_jax import cli, files
from semanticvla_jax.data import images, mixtures, rlds, statistics, tfrecord_index, trajectories
from semanticvla_jax.errors import refuse

_TEXT_WIDTH, _NUMBER_WIDTH, _MARGIN, _LINE = 640, 40, 8, 12  # pixels


def inspect(datasets: list[rlds.Dataset]) -> str:
  """Describes datasets in plain text: counts, lengths, instructions, and the range of every dimension."""
  lines = []
  for dataset in datasets:
    lengths, chunk = np.bincount(dataset.episodes), dataset.spec.chunk
    cut = np.maximum(lengths - chunk + 1, 0).sum()
    image = images.decode(tfrecord_index.Reader(dataset.index).image(int(dataset.frames[0]), 0))
    lines += [
      f"{dataset.name}: {len(lengths)} episodes, {len(dataset.actions)} frames, {len(dataset.index.files)} shards",
      f"  frames an episode: {lengths.min()} to {lengths.max()}, median {np.median(lengths):g}",
      f"  examples of {chunk} actions: {cut} when cut at the end, {len(dataset.actions)} when padded",
      f"  views: {', '.join(dataset.spec.views)}; first image {image.shape[0]} x {image.shape[1]}",
    ]
    said = collections.Counter(map(dataset.instruction, np.flatnonzero(np.diff(dataset.episodes, prepend=-1)).tolist()))
    lines += [f"  {count:5d} x {sentence}" for sentence, count in said.most_common(20)]
    if len(said) > 20:
      lines.append(f"  ... and {len(said) - 20} more instructions")
    for kind in ("action", "proprio"):
      part = getattr(dataset.statistics, kind)
      lines.append(f"  {kind:>10}  {'min':>9} {'q01':>9} {'mean':>9} {'q99':>9} {'max':>9}  normalized")
      rows = zip(part.min, part.q01, part.mean, part.q99, part.max, part.mask, strict=True)
      lines += [
        f"  {i:10d}  " + " ".join(f"{x:9.4f}" for x in row[:5]) + f"  {'yes' if row[5] else 'no'}"
        for i, row in enumerate(rows)
      ]
  return "\n".join(lines)


def preview(dataset: rlds.Dataset, *, count: int = 6, size: int = 224, seed: int = 0) -> UInt8[np.ndarray, "h w 3"]:
  """Draws a contact sheet, a row a frame: each view as stored, center cropped (evaluation) and augmented (training).

  The frames are spread evenly over the dataset. Beside them: instruction, state, and the action before and after
  standardizing and normalizing.
  """
  reader = tfrecord_index.Reader(dataset.index)
  rows = []
  for number, frame in enumerate(np.linspace(0, len(dataset.actions) - 1, count).astype(int).tolist()):
    tiles = []
    for view in range(len(dataset.spec.views)):
      image = images.decode(reader.image(int(dataset.frames[frame]), view))
      resized = images.resize(image, size)
      uniform = images.draws(seed, number, view)[None]
      tiles += [
        resized,
        images.prepare(image, size, crop_area=0.9),
        images.augment(resized[None], uniform)[0],
      ]
    parts = [*tiles, _caption(dataset, frame)]
    height = max(part.shape[0] for part in parts)
    parts = [np.pad(part, ((0, height - len(part)), (0, 0), (0, 0)), constant_values=255) for part in parts]
    rows.append(np.concatenate(parts, axis=1))
  return np.concatenate(rows)


def _caption(dataset: rlds.Dataset, frame: int) -> UInt8[np.ndarray, "h w 3"]:
  """The text next to a frame, as high and wide as its lines need."""
  spec, stats = dataset.spec, dataset.statistics
  now = np.array([frame])
  absolute = np.array(spec.absolute)
  chunk, _ = trajectories.windows(dataset.actions, now, dataset.ends[now], spec.chunk, absolute)
  lines = [
    f"{dataset.name}, episode {dataset.episodes[frame]}, frame {frame}: stored | evaluation | training",
    dataset.instruction(frame),
    "stored action  " + _numbers(dataset.index.columns["action"][dataset.frames[frame]]),
    "action         " + _numbers(dataset.actions[frame]),
    "normalized     " + _numbers(statistics.normalize(chunk, stats.action, mode=spec.mode)[0, 0]),
    "state          " + _numbers(dataset.proprio[frame]),
    "normalized     " + _numbers(statistics.normalize(dataset.proprio[now], stats.proprio, mode=spec.mode)[0]),
    f"chunk of {spec.chunk}, normalized:",
    *(_numbers(action) for action in statistics.normalize(chunk, stats.action, mode=spec.mode)[0]),
  ]
  numbers = max(len(spec.normalized), spec.proprio_dim) + 3  # and the word before them
  size = max(_TEXT_WIDTH, numbers * _NUMBER_WIDTH), _MARGIN + len(lines) * _LINE
  page = Image.new("RGB", size, "white")
  draw = ImageDraw.Draw(page)
  for i, line in enumerate(lines):
    draw.text((_MARGIN, _MARGIN // 2 + i * _LINE), line, fill="black")
  return np.array(page)


def _numbers(values: np.ndarray) -> str:
  return " ".join(f"{value:+.3f}" for value in values)


def _arguments(argv: list[str]) -> argparse.Namespace:
  parser = cli.ArgumentParser("python -m semanticvla_jax.data", __doc__)
  verbs = "inspect: print sizes and ranges; statistics: write them as JSON; preview: draw frames"
  parser.add_argument("verb", choices=("inspect", "statistics", "preview"), help=verbs)
  parser.add_argument("--data-dir", required=True, help="folder of datasets, <name>/<version>/; local or gs://")
  parser.add_argument(
    "--name", required=True, help=f"name of a dataset, or of a mixture of them: {', '.join(mixtures.MIXTURES)}"
  )
  parser.add_argument("--split", default="train", help="split of the dataset (default: train)")
  parser.add_argument(
    "--cache-dir", help=f"folder where the dataset's index is kept; '' keeps none (default: {tfrecord_index.CACHE})"
  )
  parser.add_argument(
    "--out", help="file to write (default: dataset_statistics.json or norm_stats.json, <name>.png for a preview)"
  )
  parser.add_argument(
    "--format", choices=("openvla", "openpi"), default="openvla", help="layout of the statistics (default: openvla)"
  )
  parser.add_argument("--count", type=int, default=6, help="number of frames of a preview (default: 6)")
  parser.add_argument("--size", type=int, default=224, help="height and width of a preview's frames (default: 224)")
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  """Runs one verb; problems with the data end the program with their message."""
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  args = _arguments(argv)
  try:
    names = [name for name, _ in mixtures.mixture(args.name)]
    datasets = [rlds.load(args.data_dir, name, split=args.split, cache_dir=args.cache_dir) for name in names]
    if args.verb == "inspect":
      print(inspect(datasets))
    elif args.verb == "statistics":
      _write_statistics(datasets, args.out, args.format)
    else:
      sheet = np.concatenate([preview(dataset, count=args.count, size=args.size) for dataset in datasets])
      out = pathlib.Path(args.out or f"{args.name}.png")
      contents = io.BytesIO()
      Image.fromarray(sheet).save(contents, "PNG")
      files.write(out, contents.getvalue())
      logging.info("wrote %s", out)
  except ValueError as error:
    sys.exit(f"error: {error}")


def _write_statistics(datasets: list[rlds.Dataset], out: str | None, kind: str) -> None:
  if kind == "openpi" and len(datasets) > 1:
    raise refuse("norm_stats.json holds one dataset", f"{len(datasets)}", "1", "name a single dataset")
  if kind == "openpi":
    path = pathlib.Path(out or "norm_stats.json")
    statistics.save_openpi(path, datasets[0].statistics)
  else:
    path = pathlib.Path(out or "dataset_statistics.json")
    statistics.save_openvla(path, {dataset.name: dataset.statistics for dataset in datasets})
  logging.info("wrote %s", path)


if __name__ == "__main__":
  cli.run(main)
