"""Recognizes a PyTorch checkpoint from its files, and lists its tensors under one set of names.

What is told apart: openvla-7b and its fine-tunes, OpenVLA-OFT, SemanticVLA (merged, or base and adapter apart), and
single towers (SigLIP of Hugging Face, timm and big_vision; DINOv2 of Hugging Face and timm; Llama of Hugging Face).
Nothing is guessed: files that do not make one of these, or could make two, are an error that lists them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semanticvla_jax.convert.io import torch_files
from semanticvla_jax.convert.io.torch_files import Tensor
from semanticvla_jax.convert.rules import layouts, semanticvla
from semanticvla_jax.convert.rules.layouts import LAYOUTS, Layout

# The files beside the shards, in the order in which a later one replaces tensors of an earlier one.
COMPANIONS = ("non_lora_trainables", "vision_backbone", "action_head", "proprio_projector")
PREFIXED = ("action_head", "proprio_projector")  # whose keys do not say where they belong
_COMPANION = re.compile(rf"({'|'.join(COMPANIONS)}|noise_predictor)(?:--(.+)_checkpoint)?\.(pt|safetensors)")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")
# What transformers' Trainer leaves beside the weights.
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.(bin|pt|pth)")
_ADAPTER = re.compile(r"adapter_model\.(safetensors|bin|pt)")  # peft's, of any release
SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json")  # how the weights are computed with
_LFS = b"version https://git-lfs"  # how the file that Git LFS puts in a large one's place begins
_MOMENTS = ("mean", "std", "min", "max", "q01", "q99", "mask")


@dataclasses.dataclass(frozen=True)
class Source:
  """A recognized checkpoint.

  Attributes:
    kind: name of its layout.
    paths: every file whose tensors are listed, in reading order.
    tensors: canonical key → tensor.
    superseded: "file: key" → the file whose tensor replaces it.
    config: config.json, {} without one.
    statistics: {dataset: {"action": …}}, or None where there are none; `statistics_file` says where they were. The
      norm_stats in the config.json of a fine-tune are its base's, and do not count.
    adapter: adapter_config.json in the folder of the adapter's weights, or None.
    folded: True where the adapter's language part is in the shards already (they lie in one folder with it, as the
      release's merge writes them, or only the vision file has adapters), so that its tensors are not listed.
    mark: what to_torch wrote into the config.json of the folder whose shards are read, whichever config.json is the
      newest; {} for the shards of others.
    ignored: files beside the weights that are the state of training (optimizer.pt and the like), not opened.
    adapter_file, adapter_weights: where `adapter` was read, and the file of its tensors where they have a separate one.
    settings: the files named in SETTINGS, in reading order; `beside` are those that lie beside files that were named
      alone, and may belong to another model.
  """

  kind: str
  paths: tuple[Path, ...]
  tensors: dict[str, Tensor]
  superseded: dict[str, str]
  config: dict
  statistics: dict | None
  statistics_file: Path | None
  adapter: dict | None
  folded: bool
  mark: dict = dataclasses.field(default_factory=dict)
  ignored: tuple[Path, ...] = ()
  adapter_file: Path | None = None
  adapter_weights: Path | None = None
  settings: tuple[Path, ...] = ()
  beside: tuple[Path, ...] = ()

  @property
  def layout(self) -> Layout:
    return LAYOUTS[self.kind]

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in self.tensors.items()}

  @property
  def has_adapters(self) -> bool:
    return any(".lora_" in key for key in self.tensors)

  @property
  def prefixes(self) -> tuple[str, ...]:
    """Beginnings of our paths that this checkpoint fills; ("",) for a whole model."""
    return self.layout.prefixes(self.tensors)


@dataclasses.dataclass
class _Found:
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


def recognize(paths: Sequence[str | Path], merged: bool | None = None) -> Source:
  """Lists what `paths` hold, without reading a weight.

  Args:
    paths: folders and files; of two tensors with one name, that of the later path counts (a base, then its fine-tune).
    merged: whether a lora_adapter/ is folded into the shards already; None: yes where it lies in their folder, as the
      release's merge writes them, no where the base comes from another path or to_torch kept them apart.

  Raises:
    ValueError: a path is missing or may not be read, or the files are damaged, incomplete, ambiguous, or of no known
      kind.
  """
  try:
    return _recognize([Path(path).expanduser() for path in paths], merged)
  except PermissionError as error:
    raise ValueError(
      f"Source cannot be read: got {error}; expected files that this user may read; change their permissions."
    ) from error


def _recognize(paths: list[Path], merged: bool | None) -> Source:
  found = _Found()
  for path in paths:
    _collect(path, found)
  if len(found.adapters) > 1:
    raise ValueError(
      f"Ambiguous source: got {len(found.adapters)} adapters ({', '.join(map(str, found.adapters))}); expected one; "
      "name the folders of one checkpoint."
    )
  folded = _is_folded(found, merged)
  groups = _reading_order(found, folded)
  tensors, superseded = _tensors(groups, found.placeholders)
  if not tensors:
    raise ValueError(
      f"Empty source: got no tensor in {', '.join(map(str, paths))}; expected weights "
      f"({', '.join(torch_files.SUFFIXES)}); name the folder that holds them."
    )
  if not found.adapters and any(".lora_" in key for key in tensors):
    folded = True  # FiLM's vision file alone has adapters: the merge left those out
  adapter_file = _adapter_file(found, tensors)
  adapter = None if adapter_file is None else read_object(adapter_file)
  config = _newest_json(found, "config.json") or {}
  statistics, where = _statistics(found, config)
  layout = _layout(tensors, found, where)
  if layout.fine_tune and where is not None and where.name == "config.json":
    statistics, where = None, None
  mark = next((mark for shard in found.shards if (mark := _mark(shard.parent))), {})
  read = tuple(p for p, _ in groups)
  tensors = {layout.canonical(key): x for key, x in tensors.items()}
  source = Source(layout.name, read, tensors, superseded, config, statistics, where, adapter, folded, mark)
  more = dict(ignored=(*found.ignored,), adapter_file=adapter_file, adapter_weights=next(iter(found.adapters), None))
  return dataclasses.replace(source, **more, **_settings(paths, found))


def _adapter_file(found: _Found, tensors: Mapping[str, Tensor]) -> Path | None:
  """The adapter_config.json of the adapter, or of matrices that lie among other weights; None where there is none.

  Raises:
    ValueError: an adapter without it, whose rank and kind nothing tells.
  """
  if found.adapters:
    path = found.adapters[0].parent / "adapter_config.json"
    if not path.exists():
      raise ValueError(
        f"Incomplete source: got {found.adapters[0]} without adapter_config.json beside it; expected that file, which "
        "has its rank, alpha and kind; fetch it too."
      )
    return path
  folders = dict.fromkeys(x.file.parent for key, x in tensors.items() if ".lora_" in key)
  there = [path for folder in folders if (path := folder / "adapter_config.json").exists()]
  return there[-1] if there else None


def _settings(paths: Sequence[Path], found: _Found) -> dict[str, tuple[Path, ...]]:
  own = [path for name in SETTINGS for path in found.jsons.get(name, ())]
  folders = dict.fromkeys(path.parent for path in paths if path.is_file())
  beside = [folder / name for folder in folders for name in SETTINGS if (folder / name).is_file()]
  return {"settings": (*own,), "beside": (*(path for path in beside if path not in own),)}


def _collect(path: Path, found: _Found) -> None:
  if not path.exists():
    raise ValueError(f"No source: got {path}, which does not exist; expected a file or folder; check the path.")
  if path.is_file():
    _sort_file(path, found)
    return
  if (path / "metadata.json").exists() and (path / "params").exists():
    raise ValueError(f"Source {path} is a policy folder already: expected a PyTorch checkpoint; load it as it is.")
  names = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
  found.ignored += [p for p in names if _TRAINING.fullmatch(p.name)]
  names = [p for p in names if p not in found.ignored]
  index = [p for p in names if p.name.endswith((".safetensors.index.json", ".bin.index.json"))]
  weights = [p for p in names if p.suffix in torch_files.SUFFIXES]
  shards = [p for p in weights if not _COMPANION.fullmatch(p.name) and not _ADAPTER.fullmatch(p.name)]
  formats = {p.suffix for p in shards}
  if len(index) > 1 or len(formats) > 1:
    raise ValueError(
      f"Ambiguous source {path}: got {', '.join(p.name for p in (*index, *shards))}; expected one set of weights; name "
      "the files instead of the folder, or remove one set."
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


def _collect_adapter(folder: Path, found: _Found) -> None:
  """That of lora_adapter/, or the one that lies in the folder itself."""
  inside = folder / "lora_adapter"
  weights = sorted(p for p in inside.iterdir() if _ADAPTER.fullmatch(p.name)) if inside.is_dir() else []
  if _mark(folder).get("placeholder_adapters"):
    found.placeholders.add(folder)
  elif weights:
    found.adapters += weights
  elif inside.exists():
    names = sorted(p.name for p in inside.iterdir())
    raise ValueError(f"Incomplete source: got {inside} with {names}; expected adapter_model.safetensors; fetch it too.")


def _mark(folder: Path) -> dict:
  """What to_torch says in a folder's config.json: whether adapters are folded in, and which; {} where it did not."""
  path = folder / "config.json"
  return (read_object(path).get("semanticvla_jax") if path.exists() else None) or {}


def _sort_file(path: Path, found: _Found) -> None:
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
    raise ValueError(f"{index} is no index: got no weight_map of names; expected {{tensor: file}}; download it again.")
  wanted, have = set(named.values()), {p.name for p in shards}
  if missing := sorted(wanted - have):
    raise ValueError(
      f"Incomplete source {index.parent}: got {sorted(have)}; expected {', '.join(missing)} too, which {index.name} "
      "names; download what is missing."
    )
  if more := sorted(have - wanted):
    raise ValueError(
      f"Ambiguous source {index.parent}: got {', '.join(more)}; expected only what {index.name} names; name the files "
      "instead of the folder, or remove them."
    )
  for name in sorted(wanted):
    inside = {tensor.name for tensor in _opened(index.parent / name)}
    if lost := sorted(key for key, file in named.items() if file == name and key not in inside):
      raise ValueError(
        f"{index} lies: got no {lost[0]} in {name} ({len(lost)} such); expected it there; download both again."
      )
  return sorted(index.parent / name for name in wanted)


def _check_unindexed(folder: Path, shards: list[Path]) -> None:
  parts = [match for p in shards if (match := _SHARD.fullmatch(p.name))]
  if parts:
    missing = sorted(set(range(1, int(parts[0][3]) + 1)) - {int(m[2]) for m in parts})
    if missing or len({m[1] for m in parts}) > 1:
      raise ValueError(
        f"Incomplete source {folder}: got {', '.join(p.name for p in shards)} and no index; expected shards 1 to "
        f"{int(parts[0][3])} of one model (missing: {missing}); download the rest."
      )
  if len(shards) - len(parts) > (0 if parts else 1):
    raise ValueError(
      f"Ambiguous source {folder}: got {', '.join(p.name for p in shards)}; expected one file of weights, or shards "
      "with an index; name the files that belong together."
    )


def _is_folded(found: _Found, merged: bool | None) -> bool:
  if not found.adapters:
    return False
  if not found.shards:
    raise ValueError(
      f"Incomplete source: got {found.listing()}; expected the base model too; pass its folder first, then this one."
    )
  if merged is not None:
    return merged
  adapter = found.adapters[0].parent
  beside = [p.parent for p in found.shards if p.parent in (adapter.parent, adapter)]
  return bool(beside) and _mark(beside[0]).get("merged", True)  # to_torch says where it kept them apart


def _reading_order(found: _Found, folded: bool) -> list[tuple[Path, str]]:
  """Every file with the prefix of its keys."""
  for role, several in found.companions.items():
    if len(several) > 1:
      raise ValueError(
        f"Ambiguous source: got {', '.join(p.name for p in several)}; expected one {role} file; name the files of one "
        "step."
      )
  _check_steps([path for paths in found.companions.values() for path in paths])
  if "noise_predictor" in found.companions:
    raise ValueError(
      f"Diffusion head: got {found.companions['noise_predictor'][0].name}; expected an L1 regression head "
      "(action_head--…); this package has no diffusion head."
    )
  order = [(p, "") for p in found.shards]
  order += [(p, "") for p in found.companions.get("non_lora_trainables", ())]
  order += [] if folded else [(p, "") for p in found.adapters]
  order += [(p, "") for p in found.companions.get("vision_backbone", ())]
  return order + [(p, f"{role}.") for role in PREFIXED for p in found.companions.get(role, ())]


def _check_steps(companions: list[Path]) -> None:
  steps = {match[2] for path in companions if (match := _COMPANION.fullmatch(path.name)) and match[2]}
  if len(steps) > 1:
    raise ValueError(
      f"Ambiguous source: got {', '.join(sorted(p.name for p in companions))}; expected companions of one step, not of "
      f"{' and '.join(sorted(steps))}; name the files of one step."
    )


def _tensors(groups: list[tuple[Path, str]], placeholders: set[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
  tensors: dict[str, Tensor] = {}
  superseded: dict[str, str] = {}
  for path, prefix in groups:
    for tensor in _opened(path):
      key = semanticvla.canonical(prefix + tensor.name)
      if ".lora_" in key and path.parent in placeholders:
        continue
      before = tensors.get(key)
      if before is not None and before.file == path:
        raise ValueError(
          f"{path} has a weight twice: got {before.name} and {tensor.name}, both {key}; expected one; remove the other."
        )
      if before is not None:
        superseded[f"{before.file.name}: {before.name}"] = path.name
      tensors[key] = tensor
  return tensors, superseded


def _opened(path: Path) -> list[Tensor]:
  """`files.open_file`, but for what Git LFS puts in a file's place, which is named for what it is."""
  with path.open("rb") as file:
    if file.read(len(_LFS)) == _LFS:
      raise ValueError(
        f"{path} is not fetched: got the pointer of Git LFS ({path.stat().st_size} bytes); expected the weights; run "
        "`git lfs pull` in that folder."
      )
  return torch_files.open_file(path)


def _layout(tensors: Mapping[str, Tensor], found: _Found, statistics_file: Path | None) -> Layout:
  parts = [part for part in layouts.PARTS if any(key.startswith(part) for key in tensors)]
  towers = layouts.single_towers(tensors)
  if len(parts) == len(layouts.PARTS) and not towers:
    own = statistics_file is not None and statistics_file.name != "config.json"
    return layouts.whole_model(tensors, fine_tuned=own or bool(found.adapters))
  if len(towers) == 1 and not parts:
    return towers[0]
  what = "Incomplete" if parts and not towers else "Ambiguous" if len(towers) + bool(parts) > 1 else "Unknown"
  seen = [*(f"{part}*" for part in parts), *(layout.name for layout in towers)]
  raise ValueError(
    f"{what} source: got {found.listing()} with {', '.join(seen) or f'keys such as {sorted(tensors)[:4]}'}; expected "
    f"{', '.join(layouts.PARTS)} together (a whole model), or one tower; name the files of one checkpoint, a "
    "base first."
  )


def _statistics(found: _Found, config: dict) -> tuple[dict | None, Path | None]:
  """Of dataset_statistics.json, which replaces the norm_stats that config.json still has from its base."""
  own = _newest_json(found, "dataset_statistics.json")
  content, name = (own, "dataset_statistics.json") if own else (config.get("norm_stats"), "config.json")
  if not content:
    return None, None
  where = found.jsons[name][-1]
  if not isinstance(content, dict):
    raise ValueError(f"{where}: got norm_stats of {type(content).__name__}; expected one object a dataset; mend it.")
  for dataset, entry in content.items():
    _check_entry(f"{where}: {dataset}", entry)
  return content, where


def _check_entry(where: str, entry: Any) -> None:
  """Raises ValueError unless a dataset's statistics are objects of lists; what is in them is looked at later."""
  parts = [entry.get(kind) or {} for kind in ("action", "proprio")] if isinstance(entry, dict) else [entry]
  wrong = [x for x in parts if not isinstance(x, dict)]
  wrong += [x for part in parts if isinstance(part, dict) for x in map(part.get, _MOMENTS) if not _is_list(x)]
  if wrong:
    raise ValueError(
      f"{where} holds no statistics: got {str(wrong[0])[:60]}; expected action and proprio with lists "
      f"{', '.join(_MOMENTS)}; copy the file again."
    )


def _is_list(x: Any) -> bool:
  return x is None or isinstance(x, list)


def _newest_json(found: _Found, name: str) -> dict | None:
  several = found.jsons.get(name)
  return read_object(several[-1]) if several else None


def read_object(path: Path) -> dict:
  """A JSON file that holds an object. Raises ValueError where it is damaged or holds anything else."""
  content = _json(path)
  if not isinstance(content, dict):
    raise ValueError(f"{path} is damaged: got {type(content).__name__}; expected a JSON object; download it again.")
  return content


def _json(path: Path) -> Any:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path} cannot be read: got {type(error).__name__}: {str(error)[:120]}; expected JSON; download it again."
    ) from error


def describe(source: Source) -> list[str]:
  """Lines that say what was recognized."""
  lines = [
    f"source: {source.kind}, {len(source.tensors)} tensors, {sum(x.nbytes for x in source.tensors.values()):,} B"
  ]
  for path in source.paths:
    lines.append(f"  {path.name}: {sum(x.file == path for x in source.tensors.values())} tensors")
  if source.ignored:
    lines.append(f"  ignored, the state of training: {', '.join(path.name for path in source.ignored)}")
  if source.adapter is not None:
    folded = "folded into the shards already" if source.folded else "apart from the base"
    lines.append(f"  adapter: rank {source.adapter.get('r')}, alpha {source.adapter.get('lora_alpha')}, {folded}")
  if source.superseded:
    lines.append(f"  {len(source.superseded)} tensors superseded by a later file")
  where = "none" if source.statistics is None else f"{sorted(source.statistics)} ({source.statistics_file.name})"
  return [*lines, f"  statistics: {where}"]
