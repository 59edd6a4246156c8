"""Puts the shards of an evaluation together into one result, equal to that of the evaluation in one piece.

    python -m semanticvla_jax.evaluate run --policy=DIR --suite=place --shard=0/2 --out=runs/place/0
    python -m semanticvla_jax.evaluate run --policy=DIR --suite=place --shard=1/2 --out=runs/place/1
    python -m semanticvla_jax.evaluate merge runs/place/0 runs/place/1 --out=runs/place_merged

writes results.json, report.html and all films into a separate folder; the shards are not changed. Every shard of the
evaluation has to be there, with all of its episodes, measured in the same way. The result can be resumed, extended and
compared as any other.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from semanticvla_jax import cli
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import fingerprint, folder, report, results, shards
from semanticvla_jax.evaluate.benchmarks import BENCHMARKS, of_suites
from semanticvla_jax.evaluate.evaluation import Benchmark
from semanticvla_jax.evaluate.results import Row
from semanticvla_jax.evaluate.shards import Shard
from semanticvla_jax.evaluate.tabletop_films import choose

_PROGRAM = "python -m semanticvla_jax.evaluate merge"
_MAY_DIFFER = (*fingerprint.NOTED, "policy.folder")  # between the fingerprints of shards
_NAMED = 5  # shards, episodes or rows that a message lists


class Part(NamedTuple):
  """The folder of one shard.

  Attributes:
    path: of the folder.
    shard: which share it is.
    episodes: of the evaluation and of the share, by suite.
    rows: of results.json.
    seconds: spent by stage.
    finished: whether its command came to its end.
  """

  path: pathlib.Path
  shard: Shard
  episodes: dict[str, shards.Episodes]
  rows: dict[folder.Key, Row]
  seconds: dict[str, float]
  finished: bool


def read(paths: Sequence[pathlib.Path]) -> list[Part]:
  """The shards of one evaluation, all of them, in their order.

  Raises:
    ValueError: a folder is of no shard, or of another evaluation; a shard is missing or there twice.
  """
  parts = []
  for path in paths:
    if (noted := shards.read(path)) is None:
      raise refuse(f"{path}", f"no {shards.FILE}", "a folder that evaluate run --shard wrote", "leave it out")
    parts.append(Part(path, *noted, *folder.read_rows(path)))
  first = parts[0]
  for part in parts:
    if part.shard.count != first.shard.count:
      got = f"shard {part.shard} ({first.path}: {first.shard})"
      raise refuse(f"{part.path}", got, f"one of {first.shard.count}", "merge shards of one evaluation")
  _check_each_once(parts)
  return sorted(parts, key=lambda part: part.shard)


def _check_each_once(parts: Sequence[Part]) -> None:
  count, by_index = parts[0].shard.count, {}
  for part in parts:
    if (other := by_index.setdefault(part.shard.index, part)) is not part:
      both = f"shard {part.shard} in both {other.path} and {part.path}"
      raise refuse("Shards", both, "each once", "leave one of the two out")
  if missing := [f"{i}/{count}" for i in range(count) if i not in by_index]:
    got = f"{len(by_index)} of {count}, without {_listed(missing)}"
    raise refuse("Shards", got, "all of them", f"measure the others with --shard={missing[0]} and so on")


def merged(parts: Sequence[Part], benchmark: Benchmark) -> list[Row]:
  """The rows of the evaluation, in the order of the first shard.

  Raises:
    ValueError: shards were measured differently, or rows or episodes are missing or there twice.
  """
  keys = {key: None for part in parts for key in part.rows}
  for part in parts:
    _check_alike(parts[0], part)
    if lost := [f"{suite}, {name!r}" for suite, kind, name in keys if (suite, kind, name) not in part.rows]:
      got = f"no row of {_listed(lost, '; ')}"
      raise refuse(f"{part.path}", got, "the rows of all shards", f"run shard {part.shard} again with the same flags")
    without = [suite for suite in part.episodes if suite not in {suite for suite, _, _ in part.rows}]
    if without or not part.finished:
      got = f"no results of {_listed(without)}" if without else "results that are not finished"
      raise refuse(f"{part.path}", got, "all of them", f"run shard {part.shard} again, which goes on")
  return [_row(parts, key, benchmark) for key in keys]


def _check_alike(first: Part, part: Part) -> None:
  """Raises ValueError unless two shards are shares of the same episodes."""
  a, b = ({suite: one.whole for suite, one in each.episodes.items()} for each in (first, part))
  if unlike := [suite for suite in a | b if a.get(suite) != b.get(suite)]:
    got = f"a share of other episodes of {_listed(unlike)} than in {first.path}"
    raise refuse(f"{part.path}", got, "the same", "run all shards with the same suites and episodes")


def _row(parts: Sequence[Part], key: folder.Key, benchmark: Benchmark) -> Row:
  """One row, its episodes in the order of the evaluation."""
  suite, rows = key[0], [part.rows[key] for part in parts]
  found: dict[int, tuple[dict, Part]] = {}
  for part, row in zip(parts, rows):
    if lines := fingerprint.unlike(rows[0].fingerprint, row.fingerprint, _MAY_DIFFER):
      got = f"{suite}, {key[2]!r}, measured differently than in {parts[0].path}: {'; '.join(lines)}"
      raise refuse(f"{part.path}", got, "the same", "measure all shards in the same way")
    if (row.episodes.grounding is None) != (rows[0].episodes.grounding is None):
      got = f"{suite}, {key[2]!r}, with --grounding in one of it and {parts[0].path}"
      raise refuse(f"{part.path}", got, "in both or none", "run the other again with --grounding, which goes on")
    for one in results.per_episode(row.episodes):
      if one["seed"] in found:
        other = found[one["seed"]][1].path
        where = f"twice in {part.path}" if other == part.path else f"in both {other} and {part.path}"
        got = f"episode {one['seed']} {where}"
        raise refuse(f"{suite}, {key[2]!r}", got, "each episode once", f"measure shard {part.shard} again")
      found[one["seed"]] = one, part
    _check_all(part, key)
  whole = parts[0].episodes[suite].whole
  if lost := [number for number in whole if number not in found]:
    got = f"no episode {_listed(lost)} in any of them"
    raise refuse(f"Shards of {suite}", got, "every episode in a share", "measure all shards again, in one way")
  episodes = results.episodes_of([found[seed][0] for seed in whole])
  mark = rows[0].fingerprint | {"sources": folder.all_sources([row.fingerprint for row in rows])}
  return Row(key[2], key[1], suite, results.summary(episodes, benchmark.task), mark, episodes)


def _check_all(part: Part, key: folder.Key) -> None:
  """Raises ValueError unless a shard's row has the episodes of its share and no others."""
  suite, _, name = key
  share, there = part.episodes[suite].share, part.rows[key].episodes.seeds.tolist()
  if lost := [number for number in share if number not in there]:
    got, remedy = f"no episode {_listed(lost)} of {suite}, {name!r}", f"run shard {part.shard} again, which goes on"
    raise refuse(f"{part.path}", got, f"all {len(share)} episodes of its share", remedy)
  if other := [number for number in there if number not in share]:
    got = f"episode {_listed(other)} of {suite}, {name!r}"
    raise refuse(f"{part.path}", got, f"the {len(share)} episodes of its share", "measure it in another folder")


def copy_files(parts: Sequence[Part], out: pathlib.Path) -> None:
  """Copies films and pictures; a name that several shards have is the first one's, the others' end with the shard."""
  for part in parts:
    for path in sorted([*part.path.glob("*.mp4"), *part.path.glob("*.png"), *part.path.glob("*.npz")]):
      target = out / path.name
      if any((other.path / path.name).exists() for other in parts[: part.shard.index]):
        target = out / f"{path.stem}_shard_{part.shard.index}{path.suffix}"
      shutil.copyfile(path, target)


def films(rows: Sequence[Row], out: pathlib.Path, count: int) -> list[report.Film]:
  """Films in a folder to show, at most `count` of each suite, half of them failures if there are as many."""
  shown = []
  for row in (row for row in rows if row.kind == "policy"):
    there = []
    for i, (seed, success) in enumerate(zip(row.episodes.seeds.tolist(), row.episodes.success.tolist())):
      path = out / f"{row.suite}_{seed}_{'done' if success else 'not_done'}.mp4"
      if path.exists():
        there.append(report.Film(path, row.episodes.told[i], success, int(row.episodes.steps[i]), seed))
    shown += [there[i] for i in choose(np.array([film.success for film in there], bool), count)]
  return shown


def write(parts: Sequence[Part], out: pathlib.Path, command: str, title: str, count: int) -> list[str]:
  """Writes the result of all shards; returns what to print of rows without a rate.

  Raises:
    ValueError: the shards do not make a whole, see `read` and `merged`, or the folder holds results.
  """
  name, _ = of_suites(",".join(parts[0].episodes))
  benchmark = BENCHMARKS[name]
  rows = merged(parts, benchmark)
  stored = folder.ResultsFile(out, command, benchmark.damaged, lambda: benchmark.more(out))
  stored.found = {}  # of a merge that was interrupted
  stored.seconds.clear()
  for part in parts:
    for stage, seconds in part.seconds.items():
      stored.seconds[stage] = stored.seconds.get(stage, 0.0) + seconds
  copy_files(parts, out)
  benchmark.merge([part.path for part in parts], out)
  for row in rows:
    stored.add(row)
  shown = films(rows, out, count)
  sections = benchmark.sections(rows)
  folder.write_page(out, stored, title=title, films=shown, film_note=benchmark.film_note, sections=sections)
  return stored.no_rates()


def _listed(names: Sequence, separator: str = ", ") -> str:
  """Names, the first few of many."""
  some = separator.join(map(str, names[:_NAMED]))
  return some if len(names) <= _NAMED else f"{some} and {len(names) - _NAMED} more"


def _check_out(out: pathlib.Path, paths: Sequence[pathlib.Path]) -> None:
  if out.resolve() in [path.resolve() for path in paths]:
    raise refuse("--out", f"{out}, which is one of the shards", "another folder", "choose another --out")
  finished = folder.read_json(out / "results.json", lambda value: value["finished"], False, "written again")
  if finished or (out / shards.FILE).exists():
    raise refuse("--out", f"{out}, which holds results", "a new folder", "choose another --out")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
  """The flags; `shards` are the folders."""
  parser = cli.ArgumentParser(_PROGRAM, __doc__)
  parser.add_argument("shards", nargs="+", metavar="SHARD", help="folder that evaluate run --shard wrote; all of them")
  parser.add_argument("--out", required=True, help="folder for the result, a new one")
  parser.add_argument("--films", type=int, default=6, help="films per suite in the report (default: 6); all are copied")
  parser.add_argument("--title", default="Closed-loop evaluation", help="title of the report")
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  """Writes the merged result and prints where; problems end the program with their message."""
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  args = arguments(argv)
  paths, out = [pathlib.Path(path) for path in args.shards], pathlib.Path(args.out)
  try:
    if args.films < 0:
      raise refuse("--films", f"{args.films}", "at least 0", "raise it")
    _check_out(out, paths)
    parts = read(paths)
    with folder.alone(out):
      missing = write(parts, out, f"{_PROGRAM} {shlex.join(argv)}", args.title, args.films)
  except ValueError as error:
    sys.exit(f"error: {error}")
  if missing:
    sys.exit("\n".join(missing))
