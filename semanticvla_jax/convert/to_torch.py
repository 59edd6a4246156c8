"""Policy folder → the layout of OpenVLA on Hugging Face: shards with an index, config.json, companions.

The rules are those of the way in, read backwards: the einops pattern reversed, the parts of a fused matrix stacked
again. Adapters are folded in on the way, and config.json says so. Tensor by tensor: a safetensors header is written
first, for every size is known, then the numbers of one tensor after another.
"""

from __future__ import annotations

import json
import logging
import math
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange

import semanticvla_jax
from semanticvla_jax.convert import carried, files, mapping, semanticvla, table, uncached, work
from semanticvla_jax.convert import companions as release
from semanticvla_jax.convert.folder import PolicyFolder
from semanticvla_jax.convert.source import Source, recognise
from semanticvla_jax.convert.to_orbax import check_target, peak_rss, whole
from semanticvla_jax.models import lora
from semanticvla_jax.models.semanticvla import SemanticVLA, build

SHARD = 5 * 10**9  # bytes, Hugging Face's "5GB"
_NAMES = {dtype: name for name, dtype in files.DTYPES.items()}
_WRAPPED = re.compile(
  r"vision_queries.*|cross_vit_model\..*|fused_featurizer_mm_sampler\..*|.*blocks\.\d+\.(scale|shift)\..*"
)
_VISION = ("featurizer.", "fused_featurizer.")


class Out(NamedTuple):
  """One tensor to be written."""

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def to_torch(
  policy: str | Path,
  target: str | Path,
  *,
  base: str | Path | Sequence[str | Path] = (),
  companions: str = "safetensors",
  shard: int = SHARD,
  check: bool = True,
  say: Callable[[str], None] = logging.info,
) -> dict:
  """Writes a policy as PyTorch files; returns the report that is written as conversion.json.

  Args:
    policy: a policy folder of a whole model.
    target: folder to make; must not exist.
    base: checkpoint that the policy came from, folders and files; what our model does not have (last blocks, pooling
      head, lm_head) and the processor files are taken from it. None or empty: they are left out.
    companions: "safetensors", or "pt" for files that the release's own loaders read (see companions.py); needs torch,
      and `base` where there is a vision_backbone file.
    shard: largest shard in bytes; a single larger tensor gets a shard of its own.
    check: reads the parameters once before, and refuses them where their hash is not that of metadata.json.
    say: is given lines of progress.

  Raises:
    ValueError: the target exists, the folder is damaged or no policy of a whole model, the base is of another model,
      or something is missing for `companions`.
  """
  began = time.monotonic()
  if companions not in ("safetensors", "pt"):
    raise ValueError(f"companions: got {companions!r}, expected 'safetensors' or 'pt'; name one of them.")
  if companions == "pt":
    release.need_torch()
  base = [] if base is None else [base] if isinstance(base, (str, Path)) else list(base)
  folder, target = PolicyFolder(policy), Path(target).expanduser().absolute()
  check_target(target)
  if folder.metadata.get("parts"):
    raise ValueError(
      f"Policy {policy} is a single tower: got {folder.metadata['parts']}; expected a whole model; convert one."
    )
  origin = recognise(base) if base else None
  tensors = outputs(folder)
  from_base = _from_base(origin, tensors, build(folder.config["model"]))
  added = {key: x for key, (x, _) in from_base.items()}
  groups = _groups(tensors | added, folder.metadata.get("step"), shard)
  lora_config = release.settings(folder.config.get("lora") or folder.metadata.get("lora"), tensors)
  vision = next((name for name in groups if name.startswith("vision_backbone")), None)
  wrapped = vision is not None and companions == "pt"
  if wrapped:
    groups[vision] = _wrapped(tensors | added, lora_config)
  if check:
    say("reading the parameters once, to compare their hash with metadata.json (--no-check leaves this out)")
    folder.check_hash()
  progress = work.Progress(sum(x.nbytes for content in groups.values() for x in content.values()), say)
  with whole(target, progress.total, say) as partial:
    for name, content in groups.items():
      say(f"{name}: {len(content)} tensors, {sum(x.nbytes for x in content.values()):,} bytes")
      save(partial / name, content, progress.add)
      if companions == "pt" and not name.startswith("model-"):
        release.to_pt(partial / name, (partial / name).with_suffix(".pt"))
        (partial / name).unlink()
    if wrapped and lora_config["targets"] == "release":
      (partial / "lora_adapter").mkdir()
      adapter = release.adapter_config(tensors | added, lora_config)
      (partial / "lora_adapter" / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")
    _write_index(partial, groups)
    report = {
      "converter_version": semanticvla_jax.__version__,
      "policy_sha256": folder.metadata["params_sha256"],
      "files": {_file(name, companions): len(content) for name, content in groups.items()},
      "from_base": {key: why for key, (_, why) in sorted(from_base.items())},
      "dtypes": dict(Counter(str(x.dtype) for content in groups.values() for x in content.values())),
      "statistics": sorted(folder.statistics),
      "merged_adapters": sum(path.endswith("/lora_a") for path in folder.leaves),
      "bytes": progress.done,
      "bytes_per_second": round(progress.rate),
      "seconds": round(time.monotonic() - began, 2),
      "peak_rss_bytes": peak_rss(),
    }
    _write_json(partial, folder, origin, report, wrapped)
    _copy_small_files(partial, folder, base)
  return report


def outputs(folder: PolicyFolder) -> dict[str, Out]:
  """{canonical key: tensor} that a policy makes, adapters folded in.

  Raises:
    ValueError: a parameter that no rule reads.
  """
  rules = semanticvla.rules_for(build(folder.config["model"]))
  shapes = {path: shape for path, shape in folder.shapes.items() if not path.endswith(("/lora_a", "/lora_b"))}
  entries = [entry for rule in rules for entry in table.expand(rule, shapes)]
  if lost := sorted(set(shapes) - {entry.target for entry in entries}):
    raise ValueError(
      f"Policy has parameters without a rule: got {lost[:6]}; expected those of its config; use the config it was "
      "trained with."
    )
  readers: dict[str, list[tuple[table.Entry, int | None]]] = {}
  for entry in entries:
    for i, keys in enumerate(entry.keys):
      readers.setdefault(keys[0], []).append((entry, i if entry.stacked else None))
  return {key: _output(folder, parts) for key, parts in readers.items()}


def _output(folder: PolicyFolder, parts: list[tuple[table.Entry, int | None]]) -> Out:
  (entry, layer), rule = parts[0], parts[0][0].rule
  shape = entry.shape if layer is None else entry.shape[1:]
  if rule.pattern:
    shape = rule.combine.source_shape()
  parts = sorted(parts, key=lambda part: part[0].rule.part or (0, 1))

  def make() -> np.ndarray:
    values = (_value(folder, entry.target, layer) for entry, layer in parts)
    if not rule.pattern:
      return next(values)
    left, right = (re.sub(r"[()]", "", side) for side in rule.pattern.split("->"))
    lead = "t " if rule.part else ""  # the parts of a fused matrix, which lie one after the other in it
    axes = right.strip().removeprefix(lead), left.strip().removeprefix(lead)
    arrays = [work.contiguous(rearrange(value, " -> ".join(axes))) for value in values]
    return (np.concatenate(arrays) if rule.part else arrays[0]).reshape(shape)

  return Out(tuple(shape), folder.leaves[entry.target].dtype, make)


def _value(folder: PolicyFolder, path: str, layer: int | None) -> np.ndarray:
  value = folder.read(path, layer)
  a, b = (path.removesuffix("kernel") + name for name in ("lora_a", "lora_b"))
  if not path.endswith("/kernel") or a not in folder.leaves:
    return value
  settings = folder.config["lora"]
  tree = {"x": {"kernel": value, "lora_a": folder.read(a, layer), "lora_b": folder.read(b, layer)}}
  return np.asarray(lora.merge(tree, settings["rank"], settings["alpha"])["x"]["kernel"])


def _from_base(origin: Source | None, tensors: Mapping[str, Out], model: SemanticVLA) -> dict[str, tuple[Out, str]]:
  """{canonical key: (tensor, reason why the policy lacks it)} of what the model does not read of its base.

  Raises:
    Mismatch: the base is of another model: both have a tensor in different shapes, the base has one that this model
      knows nothing of, or it lacks one of the language model.
  """
  if origin is None:
    return {}
  spare = mapping.unused(model)
  own = {key: x for key, x in origin.tensors.items() if ".lora_" not in key}
  problems = [
    f"! {key}: got shape {x.shape} in the base, expected {tensors[key].shape}"
    for key, x in own.items()
    if key in tensors and x.shape != tensors[key].shape
  ]
  rest = {key: (x, table.reason(spare, key)) for key, x in own.items() if key not in tensors}
  problems += [f"- {key} {x.shape}: the policy's model has none" for key, (x, why) in rest.items() if why is None]
  problems += [
    f"+ {key} {x.shape}: not in the base"
    for key, x in tensors.items()
    if key.startswith("language_model.") and key not in own
  ]
  if problems:
    raise table.Mismatch(
      f"--base is no checkpoint that this policy came from ({table.counts(problems)}; + missing in the base, - not of "
      "the policy's model, ! wrong). Nothing was written. Name the base that it was converted or trained from.\n"
      + "\n".join(table.shown(problems))
    )
  return {key: (Out(x.shape, x.dtype, x.read), why) for key, (x, why) in rest.items()}


def _groups(tensors: Mapping[str, Out], step: int | None, shard: int) -> dict[str, dict[str, Out]]:
  """{file: {real name: tensor}}: companions first, then the shards."""
  end = f"--{0 if step is None else step}_checkpoint.safetensors"
  groups: dict[str, dict[str, Out]] = {}
  main, wrapped = {}, any(_WRAPPED.fullmatch(key) for key in tensors)
  for key, x in sorted(tensors.items()):
    role, vision = key.split(".")[0], key.startswith(_VISION)
    if role in ("action_head", "proprio_projector"):
      groups.setdefault(role + end, {})["module." + key.removeprefix(role + ".")] = x
      continue
    if wrapped and (vision or _WRAPPED.fullmatch(key)):
      groups.setdefault("vision_backbone" + end, {})[release.backbone_name(key)] = x
    if not _WRAPPED.fullmatch(key):
      main[release.hub_name(key)] = x
  parts: list[dict[str, Out]] = [{}]
  room = shard
  for name, x in main.items():
    if parts[-1] and x.nbytes > room:
      parts.append({})
      room = shard
    parts[-1][name] = x
    room -= x.nbytes
  return groups | {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def _file(name: str, companions: str) -> str:
  return name if name.startswith("model-") else name.replace(".safetensors", f".{companions}")


def _wrapped(tensors: Mapping[str, Out], lora_config: Mapping) -> dict[str, Out]:
  """The vision backbone under the names of the release's wrapper."""
  own = {key: x for key, x in tensors.items() if key.startswith(_VISION) or _WRAPPED.fullmatch(key)}
  dtype = next(x.dtype for key, x in own.items() if key.startswith(_VISION))
  names = release.backbone({key: x.shape for key, x in own.items()}, lora_config)
  zeros = lambda shape: Out(shape, dtype, lambda: np.zeros(shape, dtype))  # noqa: E731
  return {name: zeros(x.shape) if isinstance(x, release.Zeros) else own[x] for name, x in sorted(names.items())}


def save(path: Path, tensors: Mapping[str, Out], written: Callable[[int, str], None]) -> None:
  """Writes a safetensors file, a few tensors in memory at a time; tells `written` the bytes and name of each."""
  header, at = {"__metadata__": {"format": "pt"}}, 0
  for name, x in tensors.items():
    header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
    at += x.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    writer = uncached.Writer(file)
    writer.write(struct.pack("<Q", len(text)) + text)
    made = work.in_turn(x.make for x in tensors.values())
    for (name, x), value in zip(tensors.items(), made, strict=True):
      value = np.asarray(value, order="C")
      if (value.shape, value.dtype) != (x.shape, x.dtype):
        raise ValueError(f"{name}: got {value.dtype}{list(value.shape)}, expected {x.dtype}{list(x.shape)}.")
      writer.write(value.reshape(-1).view(np.uint8))
      written(x.nbytes, name)


def _write_index(partial: Path, groups: Mapping[str, Mapping[str, Out]]) -> None:
  shards = {name: content for name, content in groups.items() if name.startswith("model-")}
  size = sum(x.nbytes for content in shards.values() for x in content.values())
  weight_map = {key: name for name, content in shards.items() for key in content}
  content = {"metadata": {"total_size": size}, "weight_map": weight_map}
  (partial / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _write_json(partial: Path, folder: PolicyFolder, origin: Source | None, report: dict, placeholders: bool) -> None:
  """config.json (of the base, else of the conversion, else minimal), dataset_statistics.json, conversion.json."""
  path = folder.folder / "conversion.json"
  known = json.loads(path.read_text()).get("source_config") if path.exists() else None
  config = (origin.config if origin is not None else None) or known
  config = dict(config or {"model_type": "openvla", "architectures": ["OpenVLAForActionPrediction"]})
  settings = folder.config["lora"] if folder.adapted else folder.metadata.get("lora")
  config["norm_stats"] = folder.statistics
  config["semanticvla_jax"] = {"merged": True, "lora": settings, "version": semanticvla_jax.__version__}
  if placeholders:
    config["semanticvla_jax"]["placeholder_adapters"] = True  # zeros, for the release's loader
  contents = {"config.json": config, "dataset_statistics.json": folder.statistics, "conversion.json": report}
  for name, content in contents.items():
    (partial / name).write_text(json.dumps(content, indent=2) + "\n")


def _copy_small_files(partial: Path, folder: PolicyFolder, base: Sequence[str | Path]) -> None:
  """Tokenisers and processor files of the policy, then those of the base; of two with one name the first."""
  small = [*(folder.folder / "tokenizers").glob("*.model"), *carried.processor_files([folder.folder / "source_files"])]
  for path in map(Path, reversed(base)):
    files_there = sorted(path.iterdir()) if path.is_dir() else []
    small += [p for p in files_there if p.suffix in (".json", ".py", ".model", ".txt") and "index" not in p.name]
  carried.copy(small, partial)


def lines(report: Mapping) -> list[str]:
  """The report for the screen."""
  return [
    *(f"  {n:5d} tensors in {name}" for name, n in report["files"].items()),
    f"  {report['merged_adapters']} adapters folded in, {len(report['from_base'])} tensors from the base",
    f"  {report['seconds']} s, {report['bytes_per_second'] / 1e6:.1f} MB/s, peak memory "
    f"{report['peak_rss_bytes'] / 2**30:.2f} GiB",
  ]
