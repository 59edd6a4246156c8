"""Two results of one verb side by side; refused where they were not measured alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from semanticvla_jax.benchmark.record import shown, table
from semanticvla_jax.errors import refuse

# Parts of a record that may differ: what is compared is often a version or a commit. They are listed.
NOTED = ("versions", "package", "commit", "dirty", "command", "time", "load", "settings.calls", "settings.seed")
_UNLISTED = ("command", "time")  # of these, since they always differ
DEVICES = ("device", "cpu")  # which may differ with --across-devices, and with them how a model is padded


def load(path: str) -> dict[str, Any]:
  """A result that a verb wrote with --out. Raises ValueError for another file."""
  try:
    with open(path, encoding="utf-8") as file:
      found = json.load(file)
  except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
    raise refuse("benchmark compare", f"{path} ({error})", "a file that a verb wrote with --out", "name it") from error
  if not isinstance(found, Mapping) or not {"verb", "figures", "record"} <= found.keys():
    raise refuse("benchmark compare", path, "a file that a verb wrote with --out", "name another")
  return dict(found)


def differences(first: Any, second: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
  """{"settings.batch": (1, 8)}: the leaves in which two records differ; a field that one lacks is None there."""
  if not isinstance(first, Mapping) or not isinstance(second, Mapping):
    return {} if first == second else {at: (first, second)}
  found: dict[str, tuple[Any, Any]] = {}
  for name in sorted({*first} | {*second}):
    found |= differences(first.get(name), second.get(name), f"{at}.{name}" if at else name)
  return found


def require_alike(first: Mapping, second: Mapping, across: Sequence[str] = ()) -> list[str]:
  """What differs and may, "versions.jax: 0.10.2 against 0.11.0".

  Args:
    first, second: results. across: parts of the record that may differ besides NOTED.

  Raises:
    ValueError: anything else differs; the message names it.
  """
  unlike = differences({"verb": first["verb"], **first["record"]}, {"verb": second["verb"], **second["record"]})
  filled = [name for name in unlike if name.endswith(".token_multiple")] if {*DEVICES} <= {*across} else []
  allowed = {name: pair for name, pair in unlike.items() if _within(name, (*NOTED, *across, *filled))}
  if refused := [f"{name} {a!r} and {b!r}" for name, (a, b) in unlike.items() if name not in allowed]:
    raise refuse(
      "Results were not measured alike",
      ", ".join(refused),
      "the same in both",
      "measure both alike (--across-devices compares devices, --across=FIELD another field)",
    )
  return [f"{name}: {a} against {b}" for name, (a, b) in allowed.items() if not _within(name, _UNLISTED)]


def compare(paths: Sequence[str], across: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
  """Prints the figures of two files and second / first; returns {"ratios": {name: …}, "differs": […]}.

  Raises:
    ValueError: a file is not a result, or the two were not measured alike.
  """
  first, second = (load(path) for path in paths)
  differs = require_alike(first, second, across)
  lines, ratios = [], {}
  for name in [*first["figures"], *(name for name in second["figures"] if name not in first["figures"])]:
    pair = [result["figures"].get(name) for result in (first, second)]
    unit = next(one["unit"] for one in pair if one is not None)
    cells = ["-" if one is None else shown(one["value"], unit) for one in pair]
    ratios[name] = _ratio(pair)
    lines.append((name, *cells, unit, "-" if ratios[name] is None else f"{ratios[name]:.3f}"))
  table(("", "A", "B", "unit", "B / A"), lines, say)
  for label, path, result in zip("AB", paths, (first, second)):
    say(f"{label}: {path}, {result['record'].get('time')}, commit {str(result['record'].get('commit'))[:12]}")
  for line in differs:
    say(f"  differs: {line}")
  return {"ratios": ratios, "differs": differs}


def _ratio(pair: Sequence[Mapping | None]) -> float | None:
  values = [None if one is None else one["value"] for one in pair]
  numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
  return values[1] / values[0] if numbers and values[0] else None


def _within(name: str, fields: Sequence[str]) -> bool:
  return any(name == field or name.startswith(f"{field}.") for field in fields)
