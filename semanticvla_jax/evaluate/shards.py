"""A share of an evaluation's episodes, for one of several machines: which episodes, and what its folder notes of it.

`run --shard=3/16` measures share 3 of 16, counted from 0, into a separate folder. Every shard knows all episodes of
the evaluation: its rows have the fingerprint of the whole, and the shuffled instructions are those that the episodes
have in the whole. `merge` puts the shards together.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from semanticvla_jax import cli, files
from semanticvla_jax.errors import refuse

FILE = "shard.json"  # of a shard's folder


class Shard(NamedTuple):
  """Share `index` of `count`, counted from 0; as text "3/16"."""

  index: int
  count: int

  def __str__(self) -> str:
    return f"{self.index}/{self.count}"

  def share(self, numbers: Sequence[int], tasks: Sequence[Any] | None = None) -> list[int]:
    """The episodes of this share, in the order of `numbers`; a function of the arguments alone.

    The episodes, sorted by task and number, are dealt out in turn. So the shares of a task differ by at most one
    episode, as do the shares of all episodes together.

    Args:
      numbers: of all episodes of the evaluation.
      tasks: of each of them, anything that sorts; None for one task.

    Raises:
      ValueError: there are more shares than episodes.
    """
    if self.count > len(numbers):
      raise refuse(
        "--shard",
        f"{self} of {len(numbers)} episodes",
        f"at most {len(numbers)} shards, one episode each",
        "use fewer shards",
      )
    order = sorted(zip([0] * len(numbers) if tasks is None else tasks, numbers))
    own = {number for _, number in order[self.index :: self.count]}
    return [number for number in numbers if number in own]


def parse(words: str | None) -> Shard | None:
  """A shard from "3/16"; None from None.

  Raises:
    ValueError: it is something else, or the share does not exist.
  """
  if words is None:
    return None
  match = re.fullmatch(r"(\d+)/(\d+)", words)
  shard = Shard(*map(int, match.groups())) if match else None
  if shard is None or shard.index >= shard.count:
    n = shard.count if shard else 0
    known = f"0/{n} to {n - 1}/{n}" if n else "K/N with K from 0 to N-1, such as 3/16"
    raise refuse("--shard", f"{words!r}", f"{known}; shards are counted from 0", "choose one of them")
  return shard


class Episodes(NamedTuple):
  """Numbers of all episodes of an evaluation of one suite, and those of a share of them."""

  whole: list[int]
  share: list[int]


def claim(out: pathlib.Path, shard: Shard | None) -> None:
  """Notes in a report's folder which shard it is, before anything is measured.

  Raises:
    ValueError: it is another shard's, or holds results of another kind (shard or not).
  """
  noted, mine = read(out), "no shard" if shard is None else f"shard {shard}"
  if noted is None and shard is not None and (out / "results.json").exists():
    raise refuse(f"{out}", "results of no shard", f"none, or those of {mine}", "choose another --out")
  if noted is not None and noted[0] != shard:
    raise refuse(f"{out}", f"results of shard {noted[0]}", mine, "choose another --out, or leave --shard as it was")
  if noted is None and shard is not None:
    _write(out, shard, {})


def note(out: pathlib.Path, shard: Shard, suite: str, whole: Sequence[int], share: Sequence[int]) -> None:
  """Notes all episodes of the evaluation of a suite, and the share of them that is measured in this folder.

  Raises:
    ValueError: an earlier command noted others.
  """
  noted, now = read(out), Episodes([*map(int, whole)], [*map(int, share)])
  suites = {} if noted is None else {**noted[1]}
  if (before := suites.setdefault(suite, now)) != now:
    raise refuse(
      f"{out} holds shard {shard} of another evaluation",
      f"{len(now.whole)} episodes of {suite}, {_range(now.whole)}",
      f"the {len(before.whole)} that it was a share of, {_range(before.whole)}",
      "ask for those, or choose another --out",
    )
  _write(out, shard, suites)


def read(out: pathlib.Path) -> tuple[Shard, dict[str, Episodes]] | None:
  """The shard of a folder, and the episodes by suite; None for a folder of no shard.

  Raises:
    ValueError: the file is damaged.
  """
  path = out / FILE
  if not path.exists():
    return None
  try:
    return _read(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise refuse(
      f"{path} is damaged",
      cli.first_line(error),
      "what evaluate run --shard wrote",
      "measure the shard again in another folder",
    ) from error


def _read(value: Mapping) -> tuple[Shard, dict[str, Episodes]]:
  shard = parse(value["shard"])
  if shard is None:
    raise KeyError("shard")
  return shard, {
    suite: Episodes(*([int(number) for number in one[name]] for name in Episodes._fields))
    for suite, one in value["episodes"].items()
  }


def _write(out: pathlib.Path, shard: Shard, suites: Mapping[str, Episodes]) -> None:
  found = {suite: one._asdict() for suite, one in suites.items()}
  files.write_json(out / FILE, {"shard": str(shard), "episodes": found})


def _range(numbers: Sequence[int]) -> str:
  return f"{min(numbers)} to {max(numbers)}"
