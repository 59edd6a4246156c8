"""Recognizes a PyTorch checkpoint from its files, and lists its tensors under one set of names.

It distinguishes openvla-7b and its fine-tunes, OpenVLA-OFT, SemanticVLA (merged, or base and adapter apart), and
single towers (SigLIP of Hugging Face, timm and big_vision; DINOv2 of Hugging Face and timm; Llama of Hugging Face).
Nothing is guessed: files that do not make one of these, or could make two, are an error that lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semanticvla_jax.convert.io import source_files, torch_files
from semanticvla_jax.convert.io.source_files import SETTINGS, Found, read_object
from semanticvla_jax.convert.io.torch_files import Tensor
from semanticvla_jax.convert.rules import layouts, semanticvla
from semanticvla_jax.convert.rules.layouts import LAYOUTS, Layout
from semanticvla_jax.errors import refuse

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
    statistics: {dataset: {"action": …}}, or None without any; `statistics_file` is the file that they are from. The
      norm_stats in the config.json of a fine-tune are its base's, and do not count.
    adapter: adapter_config.json in the folder of the adapter's weights, or None.
    folded: True where the adapter's language part is in the shards already (they are in one folder with it, as the
      release's merge writes them, or only the vision file has adapters), so that its tensors are not listed.
    mark: what to_torch wrote into the config.json of the folder whose shards are read, whichever config.json is the
      newest; {} for the shards of others.
    ignored: training state next to the weights (optimizer.pt and the like), not opened.
    adapter_file, adapter_weights: where `adapter` was read, and the file of its tensors where they have a separate one.
    settings: the files named in SETTINGS, in reading order; `beside` are those in the folders of files that were named
      alone, which may belong to another model.
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


def recognize(paths: Sequence[str | Path], merged: bool | None = None) -> Source:
  """Lists what `paths` hold, without reading a weight.

  Args:
    paths: folders and files; of two tensors with one name, that of the later path counts (a base, then its fine-tune).
    merged: whether a lora_adapter/ is folded into the shards already; None: yes where it is in their folder, as the
      release's merge writes them, no where the base comes from another path or to_torch kept them apart.

  Raises:
    ValueError: a path is missing or may not be read, or the files are damaged, incomplete, ambiguous, or of no known
      kind.
  """
  try:
    return _recognize([Path(path).expanduser() for path in paths], merged)
  except PermissionError as error:
    raise refuse(
      "Source cannot be read",
      f"{error}",
      "files that this user may read",
      "change their permissions",
    ) from error


def _recognize(paths: list[Path], merged: bool | None) -> Source:
  found = source_files.find(paths)
  if len(found.adapters) > 1:
    raise refuse(
      "Ambiguous source",
      f"{len(found.adapters)} adapters ({', '.join(map(str, found.adapters))})",
      "one",
      "name the folders of one checkpoint",
    )
  folded = source_files.is_folded(found, merged)
  groups = source_files.reading_order(found, folded)
  tensors, superseded = _tensors(groups, found.placeholders)
  if not tensors:
    raise refuse(
      "Empty source",
      f"no tensor in {', '.join(map(str, paths))}",
      f"weights ({', '.join(torch_files.SUFFIXES)})",
      "name the folder that holds them",
    )
  if not found.adapters and any(".lora_" in key for key in tensors):
    folded = True  # FiLM's vision file alone has adapters: the merge left those out
  adapter_file = _adapter_file(found, tensors)
  adapter = None if adapter_file is None else read_object(adapter_file)
  config = source_files.newest_json(found, "config.json") or {}
  statistics, where = _statistics(found, config)
  layout = _layout(tensors, found, where)
  if layout.fine_tune and where is not None and where.name == "config.json":
    statistics, where = None, None
  mark = next((mark for shard in found.shards if (mark := source_files.mark_of(shard.parent))), {})
  read = tuple(p for p, _ in groups)
  tensors = {layout.canonical(key): x for key, x in tensors.items()}
  source = Source(layout.name, read, tensors, superseded, config, statistics, where, adapter, folded, mark)
  more = dict(ignored=(*found.ignored,), adapter_file=adapter_file, adapter_weights=next(iter(found.adapters), None))
  return dataclasses.replace(source, **more, **_settings(paths, found))


def _adapter_file(found: Found, tensors: Mapping[str, Tensor]) -> Path | None:
  """Returns the adapter_config.json of the adapter, or of matrices among other weights; None without an adapter.

  Raises:
    ValueError: an adapter without that file, whose rank and kind are unknown.
  """
  if found.adapters:
    path = found.adapters[0].parent / "adapter_config.json"
    if not path.exists():
      raise refuse(
        "Incomplete source",
        f"{found.adapters[0]} without adapter_config.json",
        "that file, which has its rank, alpha and kind",
        "fetch it too",
      )
    return path
  folders = dict.fromkeys(x.file.parent for key, x in tensors.items() if ".lora_" in key)
  there = [path for folder in folders if (path := folder / "adapter_config.json").exists()]
  return there[-1] if there else None


def _settings(paths: Sequence[Path], found: Found) -> dict[str, tuple[Path, ...]]:
  own = [path for name in SETTINGS for path in found.jsons.get(name, ())]
  folders = dict.fromkeys(path.parent for path in paths if path.is_file())
  beside = [folder / name for folder in folders for name in SETTINGS if (folder / name).is_file()]
  return {"settings": (*own,), "beside": (*(path for path in beside if path not in own),)}


def _tensors(groups: list[tuple[Path, str]], placeholders: set[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
  tensors: dict[str, Tensor] = {}
  superseded: dict[str, str] = {}
  for path, prefix in groups:
    for tensor in source_files.open_weights(path):
      key = semanticvla.canonical(prefix + tensor.name)
      if ".lora_" in key and path.parent in placeholders:
        continue
      before = tensors.get(key)
      if before is not None and before.file == path:
        raise refuse(
          f"{path} has a weight twice",
          f"{before.name} and {tensor.name}, both {key}",
          "one",
          "remove the other",
        )
      if before is not None:
        superseded[f"{before.file.name}: {before.name}"] = path.name
      tensors[key] = tensor
  return tensors, superseded


def _layout(tensors: Mapping[str, Tensor], found: Found, statistics_file: Path | None) -> Layout:
  parts = [part for part in layouts.PARTS if any(key.startswith(part) for key in tensors)]
  towers = layouts.single_towers(tensors)
  if len(parts) == len(layouts.PARTS) and not towers:
    own = statistics_file is not None and statistics_file.name != "config.json"
    return layouts.whole_model(tensors, fine_tuned=own or bool(found.adapters))
  if len(towers) == 1 and not parts:
    return towers[0]
  what = "Incomplete" if parts and not towers else "Ambiguous" if len(towers) + bool(parts) > 1 else "Unknown"
  seen = [*(f"{part}*" for part in parts), *(layout.name for layout in towers)]
  raise refuse(
    f"{what} source",
    f"{found.listing()} with {', '.join(seen) or f'keys such as {sorted(tensors)[:4]}'}",
    f"{', '.join(layouts.PARTS)} together (a whole model), or one tower",
    "name the files of one checkpoint, a base first",
  )


def _statistics(found: Found, config: dict) -> tuple[dict | None, Path | None]:
  """Of dataset_statistics.json, which replaces the norm_stats that config.json still has from its base."""
  own = source_files.newest_json(found, "dataset_statistics.json")
  content, name = (own, "dataset_statistics.json") if own else (config.get("norm_stats"), "config.json")
  if not content:
    return None, None
  where = found.jsons[name][-1]
  if not isinstance(content, dict):
    raise refuse(f"{where}", f"norm_stats of {type(content).__name__}", "an object per dataset", "fix it")
  for dataset, entry in content.items():
    _check_entry(f"{where}: {dataset}", entry)
  return content, where


def _check_entry(where: str, entry: Any) -> None:
  """Raises ValueError unless a dataset's statistics are objects of lists; what is in them is looked at later."""
  parts = [entry.get(kind) or {} for kind in ("action", "proprio")] if isinstance(entry, dict) else [entry]
  wrong = [x for x in parts if not isinstance(x, dict)]
  wrong += [x for part in parts if isinstance(part, dict) for x in map(part.get, _MOMENTS) if not _is_list(x)]
  if wrong:
    raise refuse(
      f"{where} does not hold statistics",
      f"{str(wrong[0])[:60]}",
      f"action and proprio with lists {', '.join(_MOMENTS)}",
      "copy the file again",
    )


def _is_list(x: Any) -> bool:
  return x is None or isinstance(x, list)


def describe(source: Source) -> list[str]:
  """Returns lines that describe what was recognized."""
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
