"""Normalization statistics: compute, check, save, load; and `normalize`, `unnormalize`, which serve numpy and jax.

Two JSON families are read and written: OpenVLA's `dataset_statistics.json` (also the `norm_stats` of its config.json)
and openpi's `norm_stats.json`.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from semanticvla_jax import files
from semanticvla_jax.errors import refuse
from semanticvla_jax.types import Statistics

MODES = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max")}
_MOMENTS = ("mean", "std", "min", "max", "q01", "q99")


class DatasetStatistics(NamedTuple):
  """Statistics of one dataset.

  Attributes:
    action: of the actions, a dimensions, raw units.
    proprio: of the proprioception, p dimensions, raw units; None for a dataset without.
    num_transitions: number of frames, or None where the file does not say (openpi).
    num_trajectories: number of episodes, or None likewise.
  """

  action: Statistics
  proprio: Statistics | None
  num_transitions: int | None = None
  num_trajectories: int | None = None


def compute(
  values: Float32[np.ndarray, "n d"], mask: Sequence[bool] | Bool[np.ndarray, " d"] | None = None
) -> Statistics:
  """Computes mean, std, min, max and the 1 % and 99 % quantiles (linear interpolation) of each dimension.

  Args:
    values: all frames of a dataset in raw units.
    mask: which dimensions are normalized; None for all.

  Raises:
    ValueError: no frames, non-finite values, or a mask of another width.
  """
  n, d = values.shape
  mask = np.ones(d, bool) if mask is None else np.asarray(mask, bool)
  if n == 0:
    raise refuse("No data to compute statistics of", f"shape {values.shape}", "frames", "check the split")
  if mask.shape != (d,):
    raise refuse("Wrong mask", f"{mask.shape[0]} entries", f"{d}, one a dimension", "fix the spec")
  if not np.isfinite(values).all():
    frame, dimension = np.argwhere(~np.isfinite(values))[0]
    raise refuse(
      "Non-finite value",
      f"{values[frame, dimension]} in frame {frame}, dimension {dimension}",
      "finite numbers",
      "repair or drop the episode",
    )
  exact = values.astype(np.float64)
  q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
  moments = (exact.mean(0), exact.std(0), values.min(0), values.max(0), q01, q99)
  return Statistics(*(np.asarray(moment, np.float32) for moment in moments), mask)


def normalize(
  values: Float[Any, "*b d"], statistics: Statistics, *, mode: str = "bounds_q99", eps: float = 1e-8
) -> Float32[Any, "*b d"]:
  """Maps raw units to [-1, 1]: clip(2 (x - low) / (high - low + eps) - 1, -1, 1) where the mask is True.

  Dimensions that never change (min equals max) become 0 whether masked or not. In the release training does so but
  its evaluation of the proprioception does not (`openvla_utils.py:694`, a constant dimension becomes -1 there); here
  both call this function. Released code: `data_utils.py:52-92`.

  Args:
    values: raw units; of numpy, or of jax, in jit too (where the statistics may be traced as well).
    statistics: of width d.
    mode: "bounds_q99" takes low and high from the 1 % and 99 % quantiles, "bounds" from the extremes (ALOHA).
    eps: added to the range.

  Raises:
    ValueError: unknown mode, another width, or statistics that lack the bounds of that mode.
  """
  xp, low, high = _bounds(values, statistics, mode)
  scaled = xp.clip(2 * (values - low) / (high - low + np.float32(eps)) - 1, -1, 1)
  scaled = xp.where(statistics.mask, scaled, values)
  return xp.where(statistics.min == statistics.max, 0, scaled).astype(np.float32)


def unnormalize(
  values: Float[Any, "*b d"], statistics: Statistics, *, mode: str = "bounds_q99", eps: float = 1e-8
) -> Float32[Any, "*b d"]:
  """Maps [-1, 1] to raw units: 0.5 (x + 1) (high - low + eps) + low where the mask is True, the rest unchanged.

  Of numpy or jax, as `normalize`. Nothing is clipped. Original OpenVLA has `eps=0`; its successors, this release among
  them, 1e-8 (`modeling_prismatic.py:901-920`).

  Raises:
    ValueError: as in `normalize`.
  """
  xp, low, high = _bounds(values, statistics, mode)
  raw = 0.5 * (values + 1) * (high - low + np.float32(eps)) + low
  return xp.where(statistics.mask, raw, values).astype(np.float32)


def _bounds(values: Any, statistics: Statistics, mode: str) -> tuple[Any, Any, Any]:
  """The array module of `values`, and low and high as its arrays of float32."""
  xp, given = values.__array_namespace__(), [getattr(statistics, name) for name in _ends(mode)]
  low, high = (xp.asarray(bound, np.float32) for bound in given)
  if values.shape[-1:] != low.shape:
    raise refuse(
      "Widths differ",
      f"values of width {values.shape[-1]}",
      f"{low.shape[0]} as in the statistics",
      "use the statistics of this dataset",
    )
  known = (low, high) if xp is np else given  # traced bounds have no values yet; whoever compiles checks them
  if any(isinstance(bound, np.ndarray) and np.isnan(bound).any() for bound in known):
    raise refuse(
      f"Statistics lack {' and '.join(MODES[mode])}",
      "NaN",
      f"finite bounds for mode {mode!r}",
      "openpi files have no extremes, use 'bounds_q99' or recompute",
    )
  return xp, low, high


def _ends(mode: str) -> tuple[str, str]:
  if mode not in MODES:
    raise refuse("Unknown normalisation", f"{mode!r}", f"one of {tuple(MODES)}", "fix the config")
  return MODES[mode]


def check(
  name: str,
  statistics: DatasetStatistics,
  *,
  action_dim: int,
  proprio_dim: int | None,
  mode: str = "bounds_q99",
  openings: Sequence[int] | None = None,
) -> None:
  """Refuses statistics that would make training diverge or a robot move wrongly.

  Reported per dimension: a wrong width; non-finite numbers; low above high; a range that is tiny against the extremes
  (such a dimension sits at one value and jumps: everything else is blown up to -1 and 1); an action dimension outside
  the mask that leaves [0, 1], where it is the opening of a gripper, or [-1, 1]. A dimension that never changes is
  allowed, becomes 0 and is logged. `openings` are the dimensions of grippers; None takes all outside the mask for them.
  `proprio_dim` None is a model without proprioception (OpenVLA), whose datasets may well have its statistics: not read.

  Raises:
    ValueError: naming dataset, dimension, value and remedy for every problem found.
  """
  problems = _problems("action", statistics.action, action_dim, mode) + _unscaled_problems(statistics.action, openings)
  if proprio_dim is not None and statistics.proprio is None:
    problems.append(refuse("proprio", "no statistics", f"width {proprio_dim}", "use the statistics of this dataset"))
  elif proprio_dim is not None:
    problems += _problems("proprio", statistics.proprio, proprio_dim, mode)
  if problems:
    raise ValueError(f"Statistics of dataset {name!r} cannot be used:\n  " + "\n  ".join(map(str, problems)))
  for kind in ("action", "proprio"):
    if (part := getattr(statistics, kind)) is not None and (constant := np.flatnonzero(part.min == part.max)).size:
      logging.info("%s: %s dimensions %s never change and are normalized to 0", name, kind, constant.tolist())


def _problems(kind: str, statistics: Statistics, width: int, mode: str) -> list[ValueError]:
  low_name, high_name = _ends(mode)
  low, high = getattr(statistics, low_name), getattr(statistics, high_name)
  if len(low) != width:
    return [refuse(kind, f"width {len(low)}", width, "use the statistics of this dataset, or fix the config")]
  problems = []
  for i in np.flatnonzero(statistics.mask):
    where, extent = f"{kind} dimension {i}", float(statistics.max[i] - statistics.min[i])
    span = float(high[i] - low[i])
    if not np.isfinite([low[i], high[i], statistics.mean[i], statistics.std[i]]).all():
      problems.append(refuse(where, f"{low_name}={low[i]}, {high_name}={high[i]}", "finite", "recompute them"))
    elif span < 0:
      problems.append(refuse(where, f"{low_name}={low[i]} above {high_name}={high[i]}", "below", "recompute them"))
    elif extent != 0 and (span < 1e-6 or span < 1e-3 * extent):
      problems.append(
        refuse(
          where,
          f"a range {high_name} - {low_name} = {span:.3g} while values span {extent:.3g}",
          "at least 1e-3 of the span and 1e-6",
          "drop outliers, normalize by 'bounds', or take the dimension out of the mask",
        )
      )
  return problems


def _unscaled_problems(statistics: Statistics, openings: Sequence[int] | None) -> list[ValueError]:
  """Dimensions outside the mask, which the model answers as they are."""
  problems = []
  for i in np.flatnonzero(~np.asarray(statistics.mask)):
    low, high = float(statistics.min[i]), float(statistics.max[i])
    opening = openings is None or i in openings
    if not (low >= (0 if opening else -1) - 1e-6 and high <= 1 + 1e-6):
      problems.append(
        refuse(
          f"action dimension {i}",
          f"gripper commands in [{low:.4g}, {high:.4g}]" if opening else f"values in [{low:.4g}, {high:.4g}]",
          "[0, 1] with 1 open and 0 closed" if opening else "[-1, 1] in a dimension that is not normalized",
          "map them in the standardizing function (LIBERO: 1 - clip(g, 0, 1))"
          if opening
          else "normalize it, or scale it in the standardizing function",
        )
      )
  return problems


def to_openvla(statistics: DatasetStatistics) -> dict:
  """Renders one dataset's entry of `dataset_statistics.json`: the mask is written for actions only."""
  entry = {"action": _lists(statistics.action, _MOMENTS) | {"mask": np.asarray(statistics.action.mask).tolist()}}
  if statistics.proprio is not None:
    entry["proprio"] = _lists(statistics.proprio, _MOMENTS)
  counts = {"num_transitions": statistics.num_transitions, "num_trajectories": statistics.num_trajectories}
  return entry | {key: count for key, count in counts.items() if count is not None}


def from_openvla(entry: Mapping, where: str = "dataset_statistics.json") -> DatasetStatistics:
  """Reads one dataset's entry of `dataset_statistics.json` or of the `norm_stats` of a Hugging Face config.

  Raises:
    ValueError: a field is missing or has another width than the rest.
  """
  proprio = entry.get("proprio")
  return DatasetStatistics(
    _read(_field(entry, "action", where), f"{where}: action"),
    None if proprio is None else _read(proprio, f"{where}: proprio"),
    entry.get("num_transitions"),
    entry.get("num_trajectories"),
  )


def save_openvla(path: str | pathlib.Path, statistics: Mapping[str, DatasetStatistics]) -> None:
  """Writes `dataset_statistics.json`: one entry a dataset."""
  _write(path, {name: to_openvla(one) for name, one in statistics.items()})


def save_openpi(path: str | pathlib.Path, statistics: DatasetStatistics) -> None:
  """Writes openpi's `norm_stats.json`: mean, std, q01, q99 of "state" and "actions"; it has no mask and no extremes."""
  parts = {"actions": statistics.action}
  if statistics.proprio is not None:
    parts = {"state": statistics.proprio} | parts
  fields = ("mean", "std", "q01", "q99")
  _write(path, {"norm_stats": {key: _lists(part, fields) for key, part in parts.items()}})


def load(path: str | pathlib.Path) -> dict[str, DatasetStatistics]:
  """Reads either JSON family, distinguished by the top-level key "norm_stats" with "actions" below it.

  An openpi file holds one dataset, returned under the name of its folder (openpi's asset id). It has no extremes (NaN
  here, so that mode "bounds" is refused) and normalizes every dimension, the gripper too (mask all True).

  Raises:
    ValueError: not JSON, or neither family.
  """
  path = pathlib.Path(path)
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise refuse(f"{path} is not JSON", f"{error}", "statistics", "write the file again") from error
  if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
    raise refuse(
      f"{path} holds no statistics",
      type(content).__name__,
      "one object a dataset",
      "name a dataset_statistics.json",
    )
  norm_stats = content.get("norm_stats", {})
  if "actions" not in norm_stats:
    return {name: from_openvla(entry, f"{path}: {name}") for name, entry in (norm_stats or content).items()}
  proprio = norm_stats.get("state")
  return {
    path.parent.name: DatasetStatistics(
      _read(norm_stats["actions"], f"{path}: actions", extremes=False),
      None if proprio is None else _read(proprio, f"{path}: state", extremes=False),
    )
  }


def select(statistics: Mapping[str, DatasetStatistics], name: str) -> DatasetStatistics:
  """Picks a dataset's statistics by `name` or `name` + "_no_noops" (the release's rule for LIBERO suites).

  Raises:
    ValueError: neither is there.
  """
  for key in (name, f"{name}_no_noops"):
    if key in statistics:
      return statistics[key]
  raise refuse(
    f"No statistics of {name!r}",
    f"entries {sorted(statistics)}",
    f"{name!r} or '{name}_no_noops'",
    "name one of them",
  )


def _lists(statistics: Statistics, fields: Sequence[str]) -> dict[str, list[float]]:
  return {field: np.asarray(getattr(statistics, field)).tolist() for field in fields}


def _field(entry: Mapping, key: str, where: str):
  if entry.get(key) is None:
    raise refuse(f"{where} lacks {key!r}", f"{sorted(entry)}", "it", "recompute the statistics")
  return entry[key]


def _read(entry: Mapping, where: str, extremes: bool = True) -> Statistics:
  width = len(_field(entry, "q01", where))
  absent = () if extremes else ("min", "max")
  arrays = {
    field: np.full(width, np.nan, np.float32)
    if field in absent and entry.get(field) is None
    else np.asarray(_field(entry, field, where), np.float32)
    for field in _MOMENTS
  }
  arrays["mask"] = np.asarray(entry.get("mask", [True] * width), bool)
  for field, array in arrays.items():
    if array.shape != (width,):
      raise refuse(
        f"{where} is inconsistent",
        f"{field} of shape {array.shape}",
        f"({width},) like q01",
        "recompute it",
      )
  return Statistics(**arrays)


def _write(path: str | pathlib.Path, content: dict) -> None:
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_json(path, content)
