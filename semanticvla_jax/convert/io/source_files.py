"""The files of a PyTorch checkpoint by their role: shards, companions, adapter, JSON; none of their tensors."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from semanticvla_jax.convert.io import torch_files
from semanticvla_jax.convert.io.torch_files import Tensor
from semanticvla_jax.errors import refuse

# The files next to the shards; tensors of a later one replace those of an earlier one.
COMPANIONS = ("non_lora_trainables", "vision_backbone", "action_head", "proprio_projector")
PREFIXED = ("action_head", "proprio_projector")  # whose keys need the name of the file as a prefix
_COMPANION = re.compile(rf"({'|'.join(COMPANIONS)}|noise_predictor)(?:--(.+)_checkpoint)?\.(pt|safetensors)")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")
# Training state that transformers' Trainer saves next to the weights.
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.(bin|pt|pth)")
_ADAPTER = re.compile(r"adapter_model\.(safetensors|bin|pt)")  # peft's, of any release
SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json")  # how the weights are computed with
_LFS = b"version https://git-lfs"  # first bytes of the pointer that Git LFS leaves in place of a large file


@dataclasses.dataclass
class Found:
  """Files by role while a source is being put together."""

  shards: list[Path] = dataclasses.field(default_factory=list)
  companions: dict[str, list[Path]] = dataclasses.field(default_factory=dict)
  adapters: list[Path] = dataclasses.field(default_factory=list)
  jsons: dict[str, list[Path]] = dataclasses.field(default_factory=dict)
  placeholders: set[Path] = dataclasses.field(default_factory=set)  # folders whose adapters are zeros, by their mark
  ignored: list[Path] = dataclasses.field(default_factory=list)  # the state of training

  def listing(self) -> str:
    paths = [*self.shards, *(p for ps in self.companions.values() for p in ps), *self.adapters]
    return ", ".join(sorted(p.name for p in paths)) or "no weights"


def find(paths: Iterable[Path]) -> Found:
  """The files of folders and files by their role.

  Raises:
    ValueError: a path is missing, or a folder's weights are incomplete or of several models.
  """
  found = Found()
  for path in paths:
    _collect(path, found)
  return found


def _collect(path: Path, found: Found) -> None:
  if not path.exists():
    raise refuse("No source", f"{path}, which does not exist", "a file or folder", "check the path")
  if path.is_file():
    _sort_file(path, found)
    return
  if (path / "metadata.json").exists() and (path / "params").exists():
    raise refuse("Source", f"{path}, which is a policy folder already", "a PyTorch checkpoint", "load it as it is")
  names = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
  found.ignored += [p for p in names if _TRAINING.fullmatch(p.name)]
  names = [p for p in names if p not in found.ignored]
  index = [p for p in names if p.name.endswith((".safetensors.index.json", ".bin.index.json"))]
  weights = [p for p in names if p.suffix in torch_files.SUFFIXES]
  shards = [p for p in weights if not _COMPANION.fullmatch(p.name) and not _ADAPTER.fullmatch(p.name)]
  formats = {p.suffix for p in shards}
  if len(index) > 1 or len(formats) > 1:
    raise refuse(
      f"Ambiguous source {path}",
      f"{', '.join(p.name for p in (*index, *shards))}",
      "one set of weights",
      "name the files instead of the folder, or remove one set",
    )
  if index:
    shards = _indexed(index[0], shards)
  else:
    _check_unindexed(path, shards)
  found.shards += shards
  for p in names:
    if p not in shards:
      _sort_file(p, found)
  _collect_adapter(path, found)


def _collect_adapter(folder: Path, found: Found) -> None:
  """Adds the adapter of lora_adapter/, or the one in the folder itself."""
  inside = folder / "lora_adapter"
  weights = sorted(p for p in inside.iterdir() if _ADAPTER.fullmatch(p.name)) if inside.is_dir() else []
  if mark_of(folder).get("placeholder_adapters"):
    found.placeholders.add(folder)
  elif weights:
    found.adapters += weights
  elif inside.exists():
    names = sorted(p.name for p in inside.iterdir())
    raise refuse("Incomplete source", f"{inside} with {names}", "adapter_model.safetensors", "fetch it too")


def mark_of(folder: Path) -> dict:
  """Returns to_torch's record in a folder's config.json: whether adapters are folded in, and which; {} without one."""
  path = folder / "config.json"
  return (read_object(path).get("semanticvla_jax") if path.exists() else None) or {}


def _sort_file(path: Path, found: Found) -> None:
  if match := _COMPANION.fullmatch(path.name):
    found.companions.setdefault(match[1], []).append(path)
  elif _ADAPTER.fullmatch(path.name):
    found.adapters.append(path)
  elif path.suffix in torch_files.SUFFIXES:
    found.shards.append(path)
  elif path.suffix == ".json":
    found.jsons.setdefault(path.name, []).append(path)


def _indexed(index: Path, shards: list[Path]) -> list[Path]:
  """The shards that the index names, which must be the ones there are."""
  content = _json(index)
  named = content.get("weight_map") if isinstance(content, dict) else None
  if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
    raise refuse(f"{index} is not an index", "no weight_map of names", "{tensor: file}", "download it again")
  wanted, have = set(named.values()), {p.name for p in shards}
  if missing := sorted(wanted - have):
    raise refuse(
      f"Incomplete source {index.parent}",
      f"{sorted(have)}",
      f"{', '.join(missing)} too, which {index.name} names",
      "download what is missing",
    )
  if more := sorted(have - wanted):
    raise refuse(
      f"Ambiguous source {index.parent}",
      f"{', '.join(more)}",
      f"only what {index.name} names",
      "name the files instead of the folder, or remove them",
    )
  for name in sorted(wanted):
    inside = {tensor.name for tensor in open_weights(index.parent / name)}
    if lost := sorted(key for key, file in named.items() if file == name and key not in inside):
      raise refuse(
        f"{index} does not match its shards",
        f"no {lost[0]} in {name} ({len(lost)} missing)",
        "it there",
        "download both again",
      )
  return sorted(index.parent / name for name in wanted)


def _check_unindexed(folder: Path, shards: list[Path]) -> None:
  parts = [match for p in shards if (match := _SHARD.fullmatch(p.name))]
  if parts:
    missing = sorted(set(range(1, int(parts[0][3]) + 1)) - {int(m[2]) for m in parts})
    if missing or len({m[1] for m in parts}) > 1:
      raise refuse(
        f"Incomplete source {folder}",
        f"{', '.join(p.name for p in shards)} and no index",
        f"shards 1 to {int(parts[0][3])} of one model (missing: {missing})",
        "download the rest",
      )
  if len(shards) - len(parts) > (0 if parts else 1):
    raise refuse(
      f"Ambiguous source {folder}",
      f"{', '.join(p.name for p in shards)}",
      "one file of weights, or shards with an index",
      "name the files that belong together",
    )


def is_folded(found: Found, merged: bool | None) -> bool:
  """Whether the adapter is in the shards already; `merged`: what the user states of it, None for nothing."""
  if not found.adapters:
    return False
  if not found.shards:
    raise refuse(
      "Incomplete source",
      f"{found.listing()}",
      "the base model too",
      "pass its folder first, then this one",
    )
  if merged is not None:
    return merged
  adapter = found.adapters[0].parent
  beside = [p.parent for p in found.shards if p.parent in (adapter.parent, adapter)]
  return bool(beside) and mark_of(beside[0]).get("merged", True)  # to_torch records that it kept them apart


def reading_order(found: Found, folded: bool) -> list[tuple[Path, str]]:
  """Every file with the prefix of its keys."""
  for role, several in found.companions.items():
    if len(several) > 1:
      raise refuse(
        "Ambiguous source",
        f"{', '.join(p.name for p in several)}",
        f"one {role} file",
        "name the files of one step",
      )
  _check_steps([path for paths in found.companions.values() for path in paths])
  if "noise_predictor" in found.companions:
    raise refuse(
      "Diffusion head",
      f"{found.companions['noise_predictor'][0].name}",
      "an L1 regression head (action_head--…)",
      "this package has no diffusion head",
    )
  order = [(p, "") for p in found.shards]
  order += [(p, "") for p in found.companions.get("non_lora_trainables", ())]
  order += [] if folded else [(p, "") for p in found.adapters]
  order += [(p, "") for p in found.companions.get("vision_backbone", ())]
  return order + [(p, f"{role}.") for role in PREFIXED for p in found.companions.get(role, ())]


def _check_steps(companions: list[Path]) -> None:
  steps = {match[2] for path in companions if (match := _COMPANION.fullmatch(path.name)) and match[2]}
  if len(steps) > 1:
    raise refuse(
      "Ambiguous source",
      f"{', '.join(sorted(p.name for p in companions))}",
      f"companions of one step, not of {' and '.join(sorted(steps))}",
      "name the files of one step",
    )


def open_weights(path: Path) -> list[Tensor]:
  """Opens a file as `torch_files.open_file` does; a pointer of Git LFS is refused as such."""
  with path.open("rb") as file:
    if file.read(len(_LFS)) == _LFS:
      raise refuse(
        f"{path} is not fetched",
        f"the pointer of Git LFS ({path.stat().st_size} bytes)",
        "the weights",
        "run `git lfs pull` in that folder",
      )
  return torch_files.open_file(path)


def newest_json(found: Found, name: str) -> dict | None:
  """The last JSON file of a name, read; None where there are none."""
  several = found.jsons.get(name)
  return read_object(several[-1]) if several else None


def read_object(path: Path) -> dict:
  """A JSON file that holds an object. Raises ValueError where it is damaged or holds anything else."""
  content = _json(path)
  if not isinstance(content, dict):
    raise refuse(f"{path} is damaged", f"{type(content).__name__}", "a JSON object", "download it again")
  return content


def _json(path: Path) -> Any:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise refuse(
      f"{path} cannot be read",
      f"{type(error).__name__}: {str(error)[:120]}",
      "JSON",
      "download it again",
    ) from error
