"""The folder of a report: checked before anything is measured, written by one run at a time, resumed by the next.

What is measured is written first, to results.json after every row. Films, pictures and the page follow; if one of them
fails, that is a warning.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import pathlib
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8

from semanticvla_jax import cli, files
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import fingerprint, report, results, visualize
from semanticvla_jax.evaluate.results import Row
from semanticvla_jax.evaluate.rollout import Episodes, Progress

T = TypeVar("T")
Key = tuple[str, str, str]  # of a row: suite, kind, name
_PROBE = 1 << 16  # bytes
# In these, episodes of one row may differ: they say how many there are, or decide nothing.
MAY_DIFFER = (*fingerprint.NOTED, *fingerprint.COUNTED, "policy.folder")


@contextlib.contextmanager
def alone(out: pathlib.Path) -> Iterator[None]:
  """Makes a report's folder and keeps other runs from writing it while the block runs.

  Raises:
    ValueError: it is a file, cannot be written, or another run is at work in it.
  """
  there = next((path for path in (out, *out.parents) if path.exists()), out)
  if there.exists() and not there.is_dir():
    raise refuse("Report's folder", f"{there}, which is a file", "a folder", "choose another --out")
  with contextlib.ExitStack() as stack:
    try:
      out.mkdir(parents=True, exist_ok=True)
      stack.enter_context(files.alone(out, inside=True))
      files.write(out / ".probe", b"\0" * _PROBE)
      (out / ".probe").unlink()
    except OSError as error:
      raise refuse(
        "Report's folder cannot be written",
        f"{out} ({cli.first_line(error)})",
        "one that may be written, with room",
        "choose another --out",
      ) from error
    yield


def default(policy: str, suite: str) -> str:
  """The report's folder unless --out names one: `runs/<policy>_<suite>`.

  A policy folder called "policy" has its parent's name; a server's address has ":" as "_".
  """
  path = pathlib.PurePath(policy)
  name = path.parent.name if path.name == "policy" and path.parent.name else path.name.replace(":", "_")
  return f"runs/{name}_{suite.replace(',', '_')}"


def metrics(path: str | None) -> list[dict]:
  """The lines of a training's metrics.jsonl; none without a path.

  Raises:
    ValueError: it cannot be read.
  """
  try:
    return report.read_metrics(path) if path else []
  except (OSError, UnicodeError) as error:
    raise refuse(
      "Metrics cannot be read",
      f"{path} ({cli.first_line(error)})",
      "a metrics.jsonl",
      "leave --metrics out",
    ) from error


def warn_without_ffmpeg() -> None:
  """Says so, before anything is measured, where films cannot be made."""
  try:
    program = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([program, "-version"], check=True, capture_output=True, stdin=subprocess.DEVNULL)
  except Exception as error:  # of any kind: only films depend on it
    logging.warning("No ffmpeg that works (%s): there will be results, but no films (--films=0)", cli.first_line(error))


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a file that cannot be used to the first free of NAME.damaged, NAME.damaged_1, … and returns that."""
  names = itertools.chain([f"{path.name}.damaged"], (f"{path.name}.damaged_{i}" for i in itertools.count(1)))
  return path.rename(next(free for name in names if not (free := path.with_name(name)).exists()))


def read_json(path: pathlib.Path, read: Callable[[Any], T], default: T, consequence: str) -> T:
  """What `read` makes of a JSON file; `default` if it is missing, or damaged: then it is renamed and reported."""
  if not path.exists():
    return default
  try:
    return read(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError) as error:
    aside = set_aside(path)
    logging.warning("%s is damaged (%s): kept as %s; %s", path, cli.first_line(error), aside.name, consequence)
    return default


def merged(before: Mapping, now: Mapping, out: pathlib.Path) -> dict:
  """The fingerprint of an earlier run's episodes together with this one's.

  The number of episodes and the policy's path may differ; if the sources differ, all are listed.

  Raises:
    ValueError: they were measured differently; names the fields.
  """
  now = json.loads(json.dumps(now))
  if lines := fingerprint.unlike(before, now, MAY_DIFFER):
    raise refuse(
      f"{out} holds episodes that were measured differently",
      "; ".join(lines),
      "the same",
      "choose another --out",
    )
  return now | {"sources": all_sources([before, now])}


def all_sources(marks: Sequence[Mapping]) -> str:
  """The sources of several fingerprints, each once."""
  return " ".join(dict.fromkeys(part for mark in marks for part in mark.get("sources", "").split()))


def read_rows(out: pathlib.Path) -> tuple[dict[Key, Row], dict[str, float], bool]:
  """The rows of a folder's results.json, the seconds that they took by stage, and whether nothing is missing.

  Raises:
    ValueError: it is missing or damaged.
  """
  path = out / "results.json"
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
    return (*_held(value), bool(value["finished"]))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise refuse(f"{path}", cli.first_line(error), "results of evaluate run", "measure it again") from error


class ResultsFile:
  """Measured rows, in results.json whenever there is another; those of an earlier run stay in it until replaced.

  Args:
    out: the folder.
    command: how to get the results again.
    damaged: what becomes of rows in a results.json that cannot be read, for its warning.
    more: what else the file holds, asked for at each writing.

  Attributes:
    found: rows of an earlier run that this one has not measured (again).
    rows: of this run.
    seconds: spent by stage, by all runs together.
  """

  def __init__(self, out: pathlib.Path, command: str, damaged: str, more: Callable[[], dict] = dict):
    self.out, self.command, self._more = out, command, more
    self.rows: list[Row] = []
    self.found, seconds = read_json(out / "results.json", _held, ({}, {}), damaged)
    self.seconds = report.Stages(seconds)

  def check(self, marks: Mapping[Key, dict], seeds: Sequence[int]) -> None:
    """Raises ValueError unless what is found may stay, and is not all, and more than, what is to be measured.

    Args:
      marks: the fingerprint of each row to be measured.
      seeds: of its episodes.
    """
    for key, mark in marks.items():
      if key in self.found:
        merged(self.found[key].fingerprint, mark, self.out)
        if lost := sorted({*self.found[key].episodes.seeds.tolist()} - {*seeds}):
          raise refuse(
            f"{self.out} holds other episodes",
            f"seed {lost[0]} and {len(lost) - 1} more of {key[0]}, {key[2]!r}, which are not asked for",
            "all of them",
            "widen --seed and --episodes, or choose another --out",
          )
    whole = [key for key in marks if key in self.found and _has(self.found[key].episodes, seeds)]
    others = [f"{suite}, {name!r}" for suite, _, name in self.found if (suite, _, name) not in marks]
    if others and len(whole) == len(marks):
      raise refuse(
        "Report exists",
        f"{self.out}, which holds all of this and {'; '.join(others)}",
        "something to measure",
        "ask for those too, or choose another --out",
      )

  def before(self, key: Key) -> Episodes | None:
    """Episodes of an earlier run's row."""
    return self.found[key].episodes if key in self.found else None

  def add(self, row: Row) -> Row:
    """Prints a row and writes it, with all others."""
    key = (row.suite, row.kind, row.name)
    self.found.pop(key, None)
    self.rows.append(row)
    print(f"{row.suite:14} {row.name:42} {results.rate_text(row.summary)}", flush=True)  # first: a disk may be full
    self.write()
    return row

  def write(self, finished: bool = False) -> None:
    """Writes results.json; `finished` notes that nothing is missing, the page included."""
    found = results.to_json(self.all, self.command, self.seconds)
    files.write_json(self.out / "results.json", found | self._more() | {"finished": finished})

  @property
  def all(self) -> list[Row]:
    """The rows of this run, then those of earlier ones."""
    return [*self.rows, *self.found.values()]

  def no_rates(self) -> list[str]:
    """What to say of rows of this run in which no episode is left to count."""
    return [
      f"{row.suite}, {row.name}: {results.rate_text(row.summary)}" for row in self.rows if not row.summary["episodes"]
    ]


def _held(value: Mapping) -> tuple[dict[Key, Row], dict[str, float]]:
  """Rows and seconds of a results.json, this version's or an earlier one's."""
  rows = [_row(one) for one in value["results"]]
  return {(row.suite, row.kind, row.name): row for row in rows}, {**value["seconds"]}


def _row(one: Mapping) -> Row:
  names = ("name", "kind", "suite", "fingerprint", "per_episode")
  summary = {"nonfinite": 0} | {key: value for key, value in one.items() if key not in names}
  if missing := {"successes", "episodes", "errors", "rate", "interval", "mean_steps_to_success"} - summary.keys():
    raise KeyError(*missing)
  episodes = results.episodes_of(one["per_episode"])
  return Row(one["name"], one["kind"], one["suite"], summary, {**one["fingerprint"]}, episodes)


def _has(episodes: Episodes, seeds: Sequence[int]) -> bool:
  return {*seeds} <= {*episodes.seeds[~episodes.error].tolist()}


class Resumed:
  """A runner that runs only missing episodes: it keeps those that did not break and had the same instruction.

  Args:
    runner: an OnDevice or OnHost.
    before: the earlier run's episodes, where there was one.
    name: of the row, for messages.
  """

  def __init__(self, runner: Any, before: Episodes | None, name: str):
    self.runner, self.name = runner, name
    self._before = {} if before is None else {one["seed"]: one for one in results.per_episode(before)}

  def run(
    self, seeds: Sequence[int] | np.ndarray, told: Sequence[str] | None = None, progress: Progress | None = None
  ) -> Episodes:
    """As the runner's own."""
    seeds = [int(seed) for seed in seeds]
    say = dict(zip(seeds, told or [None] * len(seeds)))
    kept = {seed: self._before[seed] for seed in seeds if self._is_this(seed, say[seed])}
    if not kept:
      return self.runner.run(seeds, told, progress)
    print(f"{self.name}: {len(kept)} of {len(seeds)} episodes were measured before, kept", flush=True)
    missing = [seed for seed in seeds if seed not in kept]
    if missing:
      successes = sum(one["success"] for one in kept.values())
      show = None if progress is None else lambda done, ok: progress(done + len(kept), ok + successes)
      new = self.runner.run(missing, None if told is None else [say[seed] for seed in missing], show)
      kept |= {one["seed"]: one for one in results.per_episode(new)}
    return results.episodes_of([kept[seed] for seed in seeds])

  def _is_this(self, seed: int, told: str | None) -> bool:
    one = self._before.get(seed)
    return one is not None and not one["error"] and told in (None, one["told"])


def afterwards(what: str, work: Callable[[], T], default: T) -> T:
  """What `work` returns, or `default` and a warning if it fails; what was measured is already on disk."""
  try:
    return work()
  except Exception as error:  # of any kind: it must not cost a result
    logging.warning("%s failed: %s; the measured results are kept", what, cli.first_line(error))
    return default


def write_film(path: pathlib.Path, frames: UInt8[np.ndarray, "t h w 3"], fps: int = visualize.FRAMES_A_SECOND) -> None:
  """Writes an mp4 under a temporary name and renames it.

  Raises:
    OSError: ffmpeg failed, or the disk is full.
    RuntimeError: ffmpeg is not installed.
  """
  partial = path.with_name(f".{path.stem}.partial{path.suffix}")
  try:
    visualize.write_mp4(partial, frames, fps)
    if not partial.exists() or b"moov" not in partial.read_bytes():  # the index, which comes last
      raise OSError(f"ffmpeg did not finish {path.name}")
    files.fsync(partial)
    partial.replace(path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
  files.fsync(path.parent)


def grounding_picture(out: pathlib.Path, suite: str) -> pathlib.Path:
  """The file of a suite's picture of kept patches and named objects."""
  return out / f"{suite}_grounding.png"


def write_grounding_picture(out: pathlib.Path, suite: str, tiles: Sequence[visualize.Tile]) -> None:
  """Writes that picture; none without tiles."""
  if tiles:
    files.write(grounding_picture(out, suite), visualize.png(visualize.sheet([tiles])))


def write_page(out: pathlib.Path, stored: ResultsFile, *, finished: bool = True, **fields: Any) -> bool:
  """Writes report.html and records in results.json whether anything is missing; returns whether it could.

  Args:
    out: the folder.
    stored: its rows.
    finished: whether all rows were measured.
    **fields: other fields of `report.Page`.
  """

  def work() -> bool:
    page = out / "report.html"
    pictures = [grounding_picture(out, suite) for suite in dict.fromkeys(row.suite for row in stored.all)]
    facts = {"command": stored.command, "seconds": stored.seconds, "grounding": pictures}
    shown = report.Page(rows=stored.all, **facts, **fields)
    report.write(page, shown)
    stored.write(finished)
    print(f"report: {page.resolve()}")
    return True

  return afterwards("report.html", work, False)
