"""PyTorch checkpoint → policy folder, parameter by parameter.

Wrong names, shapes and statistics are found before a byte is written. The folder is written as `.<name>.partial` and
renamed when it is complete; what a killed run leaves is removed by the next one.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import semanticvla_jax
from semanticvla_jax import files
from semanticvla_jax.convert import adapter, openvla_layout, settings
from semanticvla_jax.convert.detect import Source, describe, recognize
from semanticvla_jax.convert.io import orbax_writer
from semanticvla_jax.convert.io.orbax_writer import ArraySpec
from semanticvla_jax.convert.io.progress import Progress
from semanticvla_jax.convert.io.target import check_target, peak_rss, sha256, whole
from semanticvla_jax.convert.plan import DEFAULTS, Options, Plan, make_plan
from semanticvla_jax.data import statistics
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.semanticvla import build

DTYPES = {"keep": None, "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_BLOCK = 1 << 20  # numbers looked at together when NaN and Inf are counted
_EXPONENTS = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}


def to_orbax(
  sources: Sequence[str | Path],
  target: str | Path,
  config: Mapping,
  options: Options = DEFAULTS,
  *,
  say: Callable[[str], None] = logging.info,
) -> dict:
  """Converts a checkpoint and returns the report that is written as conversion.json.

  Args:
    sources: folders and files, a base before its fine-tune (see detect.recognize).
    target: the policy folder; must not exist.
    config: {"model": …, "lora": …, "data": …}; `model` may have explicit sizes as its variant.
    options: see plan.Options.
    say: is given lines of progress.

  Raises:
    ValueError: the target exists, or the source is damaged, incomplete, does not fit the config, or has settings that
      the model cannot compute. Nothing is written.
  """
  began = time.monotonic()
  target = Path(target).expanduser().absolute()
  _check_arguments(target, options)
  dtype = DTYPES[options.dtype]
  source = recognize(sources, options.merged)
  for line in describe(source):
    say(line)
  _refuse_second_adapter(source)
  _say_of_folded(source, say)
  config, changed = settings.carry(source, config, options.only, say)
  hashes = _hashes(source.paths)
  plan = make_plan(source, config["model"], config.get("lora"), options)
  stats = _statistics(source, config, options.need_statistics, say)
  arrays = plan.arrays(source, dtype)
  models = openvla_layout.tokenizers(options.tokenizers, sources)
  warnings = openvla_layout.missing_tokenizers(models, source, build(config["model"]))
  for warning in warnings:
    say(f"WARNING: {warning}")
  watch = _Watch(sum(x.nbytes for x in arrays.values()), say)
  with whole(target, watch.progress.total, say) as partial:
    params_sha256 = orbax_writer.write(partial / "params", arrays, plan.pieces(source, dtype), watch.seen)
    report = _report(source, plan, arrays, watch) | {"sources": hashes.result()}
    report |= {"lora": options.lora, "dtype": options.dtype, "carried": changed, "warnings": warnings}
    seconds = round(time.monotonic() - began, 2)
    report |= {"params_sha256": params_sha256, "seconds": seconds, "peak_rss_bytes": peak_rss()}
    contents = {
      "config.json": _config(config, plan),
      "statistics.json": stats,
      "metadata.json": _metadata(source, plan, arrays, params_sha256),
      "conversion.json": report,
    }
    for name, content in contents.items():
      files.write_json(partial / name, content)
    openvla_layout.copy_missing(models, partial / "tokenizers")
    openvla_layout.copy_missing(openvla_layout.processor_files(sources), partial / "source_files")
  return report


def _check_arguments(target: Path, options: Options) -> None:
  if options.dtype not in DTYPES:
    raise refuse("dtype", f"{options.dtype!r}", f"one of {tuple(DTYPES)}", "name one of them")
  if options.lora not in ("keep", "merge"):
    raise refuse("lora", f"{options.lora!r}", "'keep' or 'merge'", "name one of them")
  check_target(target)


def _refuse_second_adapter(source: Source) -> None:
  """Raises ValueError where adapters would be added to shards into which others were folded, as their mark records."""
  mark = source.mark
  if mark.get("merged") and mark.get("lora") and (source.adapter is not None or source.has_adapters):
    raise refuse(
      "Adapter on a merged base",
      f"{source.paths[0].parent}, into which adapters {mark['lora']} were folded, and an adapter",
      "the base that the adapter was trained on",
      "pass that base, or leave the adapter out",
    )


def _say_of_folded(source: Source, say: Callable[[str], None]) -> None:
  """Reports an adapter other than plain LoRA whose tensors are not read, since the shards must hold it already."""
  if source.adapter is not None and not source.has_adapters:
    for got, expected in adapter.problems_of(source.adapter):
      say(f"adapter: {got}, not {expected}; it is in the shards already and is not read")


def _statistics(source: Source, config: Mapping, need: bool, say: Callable[[str], None]) -> dict:
  """Returns the source's entries unchanged; warns about those of a fine-tune that do not fit the model.

  Raises:
    ValueError: they cannot be read; or, if `need`, there are none, or none of a fine-tune's fits the model.
  """
  if source.statistics is None:
    if need and source.layout.whole:
      raise _no_statistics(source)
    return {}
  where = source.statistics_file
  entries = {name: statistics.from_openvla(x, f"{where}: {name}") for name, x in source.statistics.items()}
  problems = _unusable(entries, config) if source.layout.fine_tune else []
  if need and problems and len(problems) == len(entries):
    raise refuse(
      f"{where}",
      " ".join(problems[0].split()),
      "statistics of the fine-tune's own data",
      "copy them from where it was trained, use the config of its training, or pass --no-statistics",
    )
  for problem in problems:
    say(f"WARNING: {problem}")
  return source.statistics


def _no_statistics(source: Source) -> ValueError:
  wanted = "dataset_statistics.json" if source.layout.fine_tune else "that or norm_stats in config.json"
  others = " (the norm_stats in its config.json are its base's)" if source.config.get("norm_stats") else ""
  return refuse(
    "No statistics",
    f"{source.kind} without dataset_statistics.json{others}",
    f"{wanted}, without which actions cannot be un-normalized",
    "copy it next to the weights, or pass --no-statistics",
  )


def _unusable(entries: Mapping[str, statistics.DatasetStatistics], config: Mapping) -> list[str]:
  """Returns why datasets' statistics do not fit the model, one text each."""
  model, mode = build(config["model"]), (config.get("data") or {}).get("normalisation", "bounds_q99")
  mode = {"q99": "bounds_q99"}.get(mode, mode)
  problems = []
  for name, entry in entries.items():
    width = config["model"].get("action_dim", len(entry.action.mask))
    try:
      statistics.check(name, entry, action_dim=width, proprio_dim=model.proprio_dim, mode=mode)
    except ValueError as error:
      problems.append(str(error))
  return problems


class _Watch:
  """Follows what is written: reports progress, counts NaN and Inf in each array."""

  def __init__(self, total: int, say: Callable[[str], None]):
    self.progress, self.bad = Progress(total, say), Counter()

  def seen(self, path: str, piece: np.ndarray) -> None:
    if n := not_finite(piece):
      self.bad[path] += n
    self.progress.add(piece.nbytes, path)


def not_finite(x: np.ndarray) -> int:
  """Counts NaN and Inf in an array."""
  flat = x.reshape(-1)
  if flat.dtype.kind in "iub":
    return 0
  exponent = _EXPONENTS.get(str(flat.dtype))
  if exponent is None:
    return sum(int((~np.isfinite(flat[i : i + _BLOCK])).sum()) for i in range(0, flat.size, _BLOCK))
  bits, count = flat.view(np.uint16), 0
  for i in range(0, bits.size, _BLOCK):  # all exponent bits set: Inf or NaN
    block = bits[i : i + _BLOCK] & exponent
    count += int((block == exponent).sum()) if block.max() == exponent else 0
  return count


def _report(source: Source, plan: Plan, arrays: Mapping[str, ArraySpec], watch: _Watch) -> dict:
  changes: Counter[str] = Counter()
  for path, x in arrays.items():
    before = sorted({str(source.tensors[k].dtype) for keys in plan.entries[path].keys for k in keys})
    if before != [str(x.dtype)]:
      changes[f"{'+'.join(before)} → {x.dtype}"] += 1
  return {
    "kind": source.kind,
    "converter_version": semanticvla_jax.__version__,
    "parameters": sum(x.size for x in arrays.values()),
    "arrays": len(arrays),
    "bytes": watch.progress.done,
    "bytes_per_second": round(watch.progress.rate),
    "mapped": {path: [source.tensors[key].name for key in _keys(plan, path)] for path in arrays},
    "merged_adapters": len(plan.adapters),
    "unused": plan.skipped | _folded_away(source),
    "fitted": plan.fitted,
    "superseded": source.superseded,
    "dtype_changes": dict(changes),
    "not_finite": dict(watch.bad),
    "statistics": sorted(source.statistics or {}),
    "statistics_file": None if source.statistics_file is None else source.statistics_file.name,
    "source_config": {key: value for key, value in source.config.items() if key != "norm_stats"},
    "tensors": {key: [x.file.name, x.name] for key, x in source.tensors.items()},
  }


def _keys(plan: Plan, path: str) -> list[str]:
  """Returns the keys that a parameter is made from, those of adapters that are folded in included."""
  entries = (plan.entries[path], *plan.adapters.get(path, ()))
  return [key for entry in entries for keys in entry.keys for key in keys]


def _folded_away(source: Source) -> dict[str, str]:
  return {"lora_adapter/*": "folded into the shards already"} if source.folded else {}


def _config(config: Mapping, plan: Plan) -> dict:
  kept = any(path.endswith("/lora_a") for path in plan.entries)
  return {**config, "lora": config.get("lora") if kept else None}


def _metadata(source: Source, plan: Plan, arrays: Mapping[str, ArraySpec], params_sha256: str) -> dict:
  facts: dict[str, Any] = {
    "package_version": semanticvla_jax.__version__,
    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "step": _step(source),
    "merged": not any(path.endswith("/lora_a") for path in arrays),
    "parameters": sum(x.size for x in arrays.values()),
    "origin": source.kind,
    "params_sha256": params_sha256,
  }
  if not source.layout.whole:
    facts["parts"] = sorted({path.split("/")[0] for path in arrays})
  if plan.adapter is not None:
    facts["lora"] = dataclasses.asdict(plan.adapter)
  elif source.folded:
    facts["lora"] = {"rank": source.adapter.get("r"), "alpha": source.adapter.get("lora_alpha")}
  return facts


def _step(source: Source) -> int | None:
  """Of the companions' names, `action_head--150000_checkpoint.pt`."""
  steps = {path.name.split("--")[1].split("_")[0] for path in source.paths if "--" in path.name}
  return int(step) if len(steps) == 1 and (step := steps.pop()).isdigit() else None


def _hashes(paths: Sequence[Path]) -> concurrent.futures.Future:
  """{path: SHA-256} of the source, made from now on in a thread that does not outlive the process."""
  future: concurrent.futures.Future = concurrent.futures.Future()

  def hash_all() -> None:
    try:
      future.set_result({str(path): sha256(path) for path in paths})
    except BaseException as error:  # any kind, or the caller would wait for ever
      future.set_exception(error)

  threading.Thread(target=hash_all, daemon=True).start()
  return future


def table(report: Mapping, most: int = 8) -> list[str]:
  """Formats the report for the screen."""
  reasons = Counter(report["unused"].values())
  lines = [
    f"{report['kind']}: {report['arrays']} arrays, {report['parameters']:,} parameters, {report['bytes']:,} bytes",
    f"  {sum(key not in report['unused'] for key in report['tensors'])} tensors mapped, "
    f"{report['merged_adapters']} adapters folded in",
    *(f"  {n:5d} unused: {why}" for why, n in reasons.items()),
    *(f"  {path}: {what}" for path, what in report["fitted"].items()),
    *(f"  {line}" for line in report["carried"]),
    f"  {len(report['superseded'])} superseded by a later file",
    *(f"  {n:5d} arrays {change}" for change, n in report["dtype_changes"].items()),
    f"  statistics: {', '.join(report['statistics']) or 'none'}",
    f"  {report['seconds']} s, {report['bytes_per_second'] / 1e6:.1f} MB/s, peak memory "
    f"{report['peak_rss_bytes'] / 2**30:.2f} GiB",
  ]
  bad = list(report["not_finite"].items())
  lines += [f"  WARNING: {warning}" for warning in report["warnings"]]
  lines += [f"  NOT FINITE: {path}: {n} NaN or Inf" for path, n in bad[:most]]
  return lines + ([f"  … and {len(bad) - most} more arrays with NaN or Inf"] if len(bad) > most else [])
