"""The benchmarks that the command knows. Adding one: a folder, an adapter in evaluate/, and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate.evaluation import Benchmark
from semanticvla_jax.evaluate.libero import Libero
from semanticvla_jax.evaluate.tabletop import Tabletop

BENCHMARKS: dict[str, Benchmark] = {"tabletop": Tabletop(), "libero": Libero()}


def of_suites(words: str, benchmarks: Mapping[str, Benchmark] = BENCHMARKS) -> tuple[str, list[str]]:
  """The name of the benchmark that has the suites of a flag such as "pick,place", and those suites.

  Raises:
    ValueError: a suite does not exist, is named twice, or belongs to another benchmark than the first.
  """
  owner = {suite: name for name, benchmark in benchmarks.items() for suite in benchmark.suites}
  names = [word.strip() for word in words.split(",")]
  for name in names:
    if name not in owner:
      raise refuse(
        "--suite",
        f"{name!r}",
        f"one of {', '.join(owner)}",
        f"choose one of them (did you mean {_nearest(name, [*owner])}?)",
      )
  if len(set(names)) < len(names):
    raise refuse("--suite", f"{words!r}", "each suite once", "name none twice")
  parts = {key: [name for name in names if owner[name] == key] for key in dict.fromkeys(map(owner.get, names))}
  if len(parts) > 1:
    listing = " and ".join(f"{some} of {benchmarks[key].title}" for key, some in parts.items())
    raise refuse("--suite", f"{listing}", "suites of one benchmark", "evaluate them in turn")
  return owner[names[0]], names


def _nearest(name: str, known: list[str]) -> str:
  """Names most like one that does not exist: the shortest that contain it, those spelled alike, else the nearest."""
  containing = [one for one in known if name and name in one]
  containing = [one for one in containing if len(one) == min(map(len, containing))]
  alike = difflib.get_close_matches(name, known, 2, 0.6)
  found = dict.fromkeys([*containing, *alike]) or difflib.get_close_matches(name, known, 1, 0.0)
  return " or ".join(map(repr, found))
