"""Looks at a dataset: `python -m semanticvla_jax.data VERB --data-dir DIR --name NAME`.

inspect        sizes, instructions and ranges; everything that training would stop at, with counts; what looks odd
statistics     writes dataset_statistics.json (--format openvla) or norm_stats.json (--format openpi)
preview        writes an HTML sheet: frames as stored, evaluated and trained on, with instruction, state and actions
fit-tokenizer  writes action_tokens.json: FAST's tokens of the dataset's chunks, for model.codec="fast"

A dataset that the package does not know is read by --spec=FILE.py:NAME, a DatasetSpec (docs/your_robot.md), whose name
is then that of the dataset. `inspect` reads every image, and ends with status 1 where training would stop.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import logging
import pathlib
import sys

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from semanticvla_jax import action_tokens, cli, files
from semanticvla_jax.data import datasets as specs
from semanticvla_jax.data import (
  fit_action_tokens,
  images,
  inspection,
  mixtures,
  rlds,
  sheet,
  statistics,
  text,
  tfrecord_index,
  trajectories,
)
from semanticvla_jax.data import spec as spec_files
from semanticvla_jax.errors import refuse

_TEXT_WIDTH, _NUMBER_WIDTH, _MARGIN, _LINE = 640, 40, 8, 12  # pixels


def inspect(datasets: list[rlds.Dataset]) -> str:
  """Describes datasets in plain text: counts, lengths, instructions, and the range of every dimension."""
  lines = []
  for dataset in datasets:
    lengths, chunk = np.bincount(dataset.episodes), dataset.spec.chunk
    cut = np.maximum(lengths - chunk + 1, 0).sum()
    lines += [
      f"{dataset.name}: {len(lengths)} episodes, {len(dataset.actions)} frames, {len(dataset.index.files)} shards",
      f"  frames an episode: {lengths.min()} to {lengths.max()}, median {np.median(lengths):g}",
      f"  examples of {chunk} actions: {cut} when cut at the end, {len(dataset.actions)} when padded",
      f"  views, first image: {', '.join(_first_sizes(dataset))}",
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


def _first_sizes(dataset: rlds.Dataset) -> list[str]:
  """Each view with the size of its first image."""
  reader, sizes = tfrecord_index.Reader(dataset.index), []
  for view, name in enumerate(dataset.spec.views):
    there = dataset.frames[dataset.index.image_bytes[dataset.frames, view] > 0]
    shape = images.decode(reader.image(int(there[0]), view)).shape if len(there) else None
    sizes.append(f"{name} ({shape[0]} x {shape[1]})" if shape else f"{name} (always empty)")
  return sizes


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
      encoded = reader.image(int(dataset.frames[frame]), view)
      image = images.decode(encoded) if encoded else np.zeros((size, size, 3), np.uint8)
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
  verbs = "inspect: print sizes and ranges; statistics: write them as JSON; preview: draw frames; "
  verbs += "fit-tokenizer: fit FAST's action tokens"
  parser.add_argument("verb", choices=("inspect", "statistics", "preview", "fit-tokenizer"), help=verbs)
  parser.add_argument("--data-dir", required=True, help="folder of datasets, <name>/<version>/; local or gs://")
  parser.add_argument(
    "--name", help=f"name of a dataset, several with commas, or of a mixture: {', '.join(mixtures.MIXTURES)}"
  )
  parser.add_argument("--spec", action="append", default=[], help="FILE.py:NAME of the dataset's DatasetSpec")
  parser.add_argument("--split", help="split of the dataset (default: the spec's, train)")
  parser.add_argument("--skip-bad", action="store_true", help="leave out episodes that cannot be used, and count them")
  parser.add_argument(
    "--cache-dir", help=f"folder where the dataset's index is kept; '' keeps none (default: {tfrecord_index.CACHE})"
  )
  parser.add_argument(
    "--out",
    help="file to write (default: dataset_statistics.json or norm_stats.json, <name>.html for a preview, "
    f"{action_tokens.NAME})",
  )
  parser.add_argument(
    "--format", choices=("openvla", "openpi"), default="openvla", help="layout of the statistics (default: openvla)"
  )
  parser.add_argument("--count", type=int, default=6, help="number of frames of a preview (default: 6)")
  parser.add_argument("--size", type=int, default=224, help="height and width of a preview's frames (default: 224)")
  most = "most tokens of the %s, as in the config (default: 64)"
  parser.add_argument("--prompt-length", type=int, default=64, help=most % "prompt")
  parser.add_argument("--instruction-length", type=int, default=64, help=most % "ID-Pruner's text")
  parser.add_argument("--tokenizers", default=text.EMBEDDED, help="folder of tokenizers (default: the embedded pair)")
  _add_fit_flags(parser)
  return parser.parse_args(argv)


def _add_fit_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of fit-tokenizer."""
  own, default = fit_action_tokens, "(default: %(default)s)"
  parser.add_argument("--chunk", type=int, help="actions of an example, as config.model.chunk (default: the spec's)")
  parser.add_argument("--vocab", type=int, default=own.VOCAB, help=f"number of action tokens, at most {default}")
  parser.add_argument("--examples", type=int, default=own.EXAMPLES, help=f"chunks to fit to, at most {default}")
  parser.add_argument("--trajectory-end", choices=trajectories.ENDS, default="cut", help=f"as in the config {default}")


def main(argv: list[str]) -> None:
  """Runs one verb; problems with the data end the program with their message."""
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  args = _arguments(argv)
  try:
    own = [spec_files.load(place) for place in args.spec]
    named = [(name, specs.spec(name, own)) for name, _ in mixtures.mixture(_name(args.name, own))]
    if args.verb == "inspect" and not args.skip_bad:
      stops = [line for name, spec in named for line in _inspect(args, name, spec)]
      if stops:
        raise ValueError(f"training would stop at {len(stops)} kinds of faults; the first: {stops[0]}")
      return
    how = dict(split=args.split, cache_dir=args.cache_dir, skip_bad=args.skip_bad)
    datasets = [rlds.load(args.data_dir, name, spec=spec, **how) for name, spec in named]
    if args.verb == "inspect":
      print(inspect(datasets))
    elif args.verb == "statistics":
      _write_statistics(datasets, args.out, args.format)
    elif args.verb == "fit-tokenizer":
      _fit_tokenizer(datasets, args)
    else:
      _write_preview(datasets, pathlib.Path(args.out or f"{datasets[0].name.replace('/', '_')}.html"), args)
  except ValueError as error:
    sys.exit(f"error: {error}")


def _name(name: str | None, own: list[spec_files.DatasetSpec]) -> str:
  """The dataset that a command is about: --name, or that of its only --spec."""
  if name is None and (len(own) != 1 or own[0].name is None):
    raise refuse("--name", "nothing", "the dataset's name, or one --spec whose DatasetSpec has a name", "pass --name")
  return own[0].name if name is None else name


def _inspect(args: argparse.Namespace, name: str, spec: spec_files.DatasetSpec) -> list[str]:
  """Prints a dataset and what was found in it; returns what training would stop at."""
  limits = inspection.Limits(args.prompt_length, args.instruction_length, args.tokenizers)
  how = dict(split=args.split, cache_dir=args.cache_dir, limits=limits)
  dataset, findings = inspection.inspect(args.data_dir, name, spec, **how)
  if dataset is not None:
    print(inspect([dataset]))
  print(inspection.describe(findings))
  return [one.line for one in findings if one.stops]


def _write_preview(datasets: list[rlds.Dataset], out: pathlib.Path, args: argparse.Namespace) -> None:
  """Writes an HTML sheet, or a contact sheet where the file is to be a PNG."""
  if out.suffix == ".png":
    contents = io.BytesIO()
    sheets = [preview(dataset, count=args.count, size=args.size) for dataset in datasets]
    Image.fromarray(np.concatenate(sheets)).save(contents, "PNG")
    files.write(out, contents.getvalue())
  else:
    files.write(out, sheet.page(datasets, [inspect([one]) for one in datasets], count=args.count, size=args.size))
  logging.info("wrote %s", out)


def _fit_tokenizer(datasets: list[rlds.Dataset], args: argparse.Namespace) -> None:
  """Fits FAST's action tokens, writes them and prints what they make of the chunks that they were fitted to."""
  chunk = datasets[0].spec.chunk if args.chunk is None else args.chunk
  actions = fit_action_tokens.chunks(datasets, chunk, args.trajectory_end, args.examples)
  tokenizer = fit_action_tokens.fit(actions, datasets[0].spec.mode, args.vocab)
  found = fit_action_tokens.summary(tokenizer, actions)
  path = pathlib.Path(args.out or action_tokens.NAME)
  facts = {"datasets": [one.name for one in datasets], "fit": found}
  files.write(path, json.dumps(tokenizer.to_json() | facts) + "\n")
  print(fit_action_tokens.describe(found))
  logging.info("wrote %s", path)


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
