"""Wrong values of a DatasetSpec, each refused in one line: the only place where specs are checked."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from semanticvla_jax.data.statistics import MODES
from semanticvla_jax.errors import refuse

MOST_VIEWS = 4
KINDS = ("binary", "continuous")
_GROUP = re.compile(r"[a-z][a-z0-9_]*")  # names a parameter


def check(spec: Any) -> None:
  """Raises ValueError at the first field of a spec that cannot be used."""
  what = "DatasetSpec" if spec.name is None else f"DatasetSpec {spec.name!r}"
  _check_columns(what, spec)
  _check_views(what, spec)
  _check_dimensions(what, spec)
  if spec.groups is not None:
    _check_groups(what, spec.groups, len(spec.absolute))
  _check_grippers(what, spec)
  _check_choices(what, spec)


def _check_columns(what: str, spec: Any) -> None:
  for key, width in spec.columns.items():
    if not _is_whole(width) or width < 1:
      raise refuse(f"{what}, columns", f"{key!r} of width {width!r}", "a whole number from 1", "correct the width")
  asked = {"action": spec.action, "proprio": spec.proprio, "time": () if spec.time is None else (spec.time,)}
  for field, keys in asked.items() if spec.standardize is None else [("time", asked["time"])]:
    if isinstance(keys, str):
      raise refuse(f"{what}, {field}", f"{keys!r}", "a tuple of columns", f"write ({keys!r},)")
    for key in keys:
      if key not in spec.columns:
        raise refuse(f"{what}, {field}", f"{key!r}", f"one of its columns {[*spec.columns]}", _near(key, spec.columns))
  if spec.time is not None and spec.columns[spec.time] != 1:
    raise refuse(f"{what}, time", f"{spec.time!r} of width {spec.columns[spec.time]}", "width 1", "name another column")


def _check_views(what: str, spec: Any) -> None:
  views = spec.views
  bad = isinstance(views, str) or any(not isinstance(view, str) or not view.strip() for view in views)
  if bad or not 1 <= len(views) <= MOST_VIEWS or len(set(views)) < len(views):
    raise refuse(
      f"{what}, views", f"{views!r}", f"1 to {MOST_VIEWS} different names of image features", 'write ("front", "hand")'
    )
  for field in ("optional", "aliases"):
    for view in getattr(spec, field):
      if view not in views:
        raise refuse(f"{what}, {field}", f"the view {view!r}", f"some of {[*views]}", _near(view, views))
  if [*spec.optional] == [*views]:
    raise refuse(f"{what}, optional", "every view", "at least one that is always there", "take one out")


def _check_dimensions(what: str, spec: Any) -> None:
  dims = len(spec.absolute)
  if not dims:
    raise refuse(f"{what}, absolute", "no dimensions", "True or False for each action dimension", "write them")
  widths = {"normalized": spec.normalized, "ranges": spec.ranges}
  for field, values in widths.items():
    if values is not None and len(values) != dims:
      raise refuse(f"{what}, {field}", f"{len(values)} entries", f"{dims}, as in `absolute`", "make them equally many")
  for low, high in spec.ranges or ():
    if not low < high:
      raise refuse(f"{what}, ranges", f"({low}, {high})", "low below high", "correct it")
  if spec.standardize is None:
    width = sum(spec.columns[key] for key in spec.action)
    if width != dims:
      raise refuse(
        f"{what}, action",
        f"columns {[*spec.action]} of width {width}",
        f"{dims}, as in `absolute`",
        "correct columns or `absolute`, or write a `standardize`",
      )
    own = sum(spec.columns[key] for key in spec.proprio)
    if spec.proprio_dim not in (None, own):
      raise refuse(f"{what}, proprio_dim", spec.proprio_dim, f"{own}, the width of {[*spec.proprio]}", "leave it out")


def _check_groups(what: str, groups: Mapping[str, Sequence[int]], dims: int) -> None:
  seen: dict[int, str] = {}
  for name, own in groups.items():
    if not isinstance(name, str) or not _GROUP.fullmatch(name):
      raise refuse(f"{what}, groups", f"the name {name!r}", "lower-case letters, digits and _", "rename it")
    if not own:
      raise refuse(f"{what}, groups", f"{name!r} without dimensions", "at least one", "take it out")
    for dim in own:
      if not _is_whole(dim) or not 0 <= dim < dims:
        raise refuse(f"{what}, groups", f"dimension {dim!r} in {name!r}", f"0 to {dims - 1}", "correct it")
      if dim in seen:
        raise refuse(
          f"{what}, groups", f"dimension {dim} in {seen[dim]!r} and {name!r}", "each in one group", "take it out of one"
        )
      seen[dim] = name
  if missing := sorted(set(range(dims)) - set(seen)):
    raise refuse(f"{what}, groups", f"no group for dimensions {missing}", "each in one group", "add them to a group")


def _check_grippers(what: str, spec: Any) -> None:
  dims, seen = len(spec.absolute), set()
  for one in spec.grippers:
    where = f"{what}, gripper"
    if not _is_whole(one.dimension) or not 0 <= one.dimension < dims or one.dimension in seen:
      raise refuse(where, f"dimension {one.dimension!r}", f"0 to {dims - 1}, one gripper each", "correct it")
    seen.add(one.dimension)
    if one.kind not in KINDS:
      raise refuse(where, f"kind={one.kind!r}", f"one of {KINDS}", "choose one")
    for pair in ((one.open, one.closed), one.command):
      if pair is not None and (not all(map(math.isfinite, pair)) or pair[0] == pair[1]):
        raise refuse(where, f"open and closed {pair}", "two different numbers", "give both values")
    if one.kind == "binary" and spec.normalized is not None and spec.normalized[one.dimension]:
      raise refuse(
        where,
        f"a binary gripper in dimension {one.dimension}, which is normalized",
        "normalized False there",
        "pass it through, or set kind='continuous'",
      )


def _check_choices(what: str, spec: Any) -> None:
  if spec.mode not in MODES:
    raise refuse(f"{what}, mode", f"{spec.mode!r}", f"one of {(*MODES,)}", "choose one")
  if not _is_whole(spec.chunk) or spec.chunk < 1:
    raise refuse(f"{what}, chunk", f"{spec.chunk!r}", "a whole number from 1", "correct it")
  if spec.control_hz is not None and not (math.isfinite(spec.control_hz) and spec.control_hz > 0):
    raise refuse(f"{what}, control_hz", spec.control_hz, "actions a second, above 0", "correct it")
  if spec.standardize is not None and spec.proprio_dim is None and not set(spec.proprio) <= set(spec.columns):
    raise refuse(f"{what}, proprio_dim", "None", "the width that `standardize` returns", "set it")
  named = {*(spec.groups or ()), "proprio"}
  for key in spec.units if spec.groups is not None else ():
    if key not in named:
      raise refuse(f"{what}, units", f"{key!r}", f"some of {sorted(named)}", _near(key, named))


def _is_whole(value: Any) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _near(name: Any, known: Any) -> str:
  """A remedy that proposes the nearest of the known names."""
  near = difflib.get_close_matches(str(name), [*known], 1, 0.0)
  return f"correct it (did you mean {near[0]!r}?)" if near else "correct it"
