"""Compares this model, tensor by tensor, with numbers that the official PyTorch classes produced.

A golden folder holds `config.json` (sizes, cases) and safetensors with weights under the official state-dict names,
inputs and every intermediate output. All sizes come from the folder. See `verify`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from semanticvla_jax.convert.check.golden import fixtures, parts, whole
from semanticvla_jax.errors import refuse

TOLERANCE = 5e-5


@dataclasses.dataclass(frozen=True)
class Row:
  """One compared tensor: max |ours − theirs| / max(1, max |theirs|); integer tensors must agree exactly."""

  name: str
  error: float

  @property
  def ok(self) -> bool:
    return self.error <= TOLERANCE


def verify(folder: str | Path) -> list[Row]:
  """Compares every stored output of a golden folder.

  Raises:
    ValueError: no such folder or an unknown kind of folder; a file or an entry of config.json that is missing; an
      output that no comparison covers; or engine.Mismatch when the weights do not fit the model that config.json
      describes.
  """
  folder = Path(folder)
  if not (folder / "config.json").exists():
    raise refuse("verify-golden", folder, "a folder with config.json (or a *_keys*.json file)", "check the path")
  config = fixtures.read_json(folder / "config.json")
  kind = _kind(config)
  try:
    with jax.default_matmul_precision("highest"):
      rows = [Row(name, _error(ours, theirs)) for name, ours, theirs in KINDS[kind](folder, config)]
  except KeyError as error:
    raise refuse(
      "verify-golden",
      f"no {error} in {folder}",
      f"what a folder of kind {kind!r} holds",
      "complete config.json or the tensors",
    ) from error
  missed = _stored_outputs(folder, kind) - {row.name for row in rows}
  if missed or not rows:
    raise refuse(
      "verify-golden",
      f"{len(missed)} stored outputs in {folder} that nothing was compared with ({sorted(missed)[:8]})",
      f"names of a folder of kind {kind!r}",
      "rename them, or let convert/check/golden compute them",
    )
  return rows


def _kind(config: dict) -> str:
  if "parts" in config:
    return "backbones"
  if "adapter_keys" in config:
    return "lora_checkpoint"
  if "openvla_oft" in config.get("sources", {}):
    return "oft"
  if "openvla" in config.get("sources", {}):
    return "openvla"
  if "cases" in config:
    return "dense_fuser" if "pairs" in config.get("config", {}) else "id_pruner"
  if "constants" in config:
    return "full"
  raise refuse(
    "verify-golden",
    f"config.json with keys {sorted(config)}",
    "one that identifies the folder (parts, adapter_keys, sources, cases or constants)",
    "compare a folder of the reference's",
  )


def _error(ours: Any, theirs: Any) -> float:
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  if ours.shape != theirs.shape:
    return float("inf")
  if theirs.dtype.kind in "iub":
    return 0.0 if np.array_equal(ours, theirs) else float("inf")
  error = np.max(np.abs(ours - theirs), initial=0) / max(1.0, float(np.max(np.abs(theirs), initial=0)))
  return float(error) if np.isfinite(error) else float("inf")


def _stored_outputs(folder: Path, kind: str) -> set[str]:
  names = set()
  for path in folder.glob("*outputs.safetensors"):
    prefix = path.name.removesuffix("outputs.safetensors").rstrip("_")
    separator = "/" if kind in ("backbones", "dense_fuser") else ""
    names |= {prefix + separator + key for key in fixtures.tensors(path)}
  return names


KINDS = {
  "backbones": parts.backbones,
  "id_pruner": parts.id_pruner,
  "dense_fuser": parts.dense_fuser,
  "full": whole.full,
  "lora_checkpoint": whole.lora_checkpoint,
  "oft": whole.oft,
  "openvla": whole.openvla,
}
