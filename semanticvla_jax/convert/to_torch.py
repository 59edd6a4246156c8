"""Policy folder → the layout of OpenVLA on Hugging Face: shards with an index, config.json, companions.

The conversion rules are applied in reverse: einops patterns are turned around and the parts of a fused matrix stacked.
Adapters are folded in, or written apart as peft does; config.json records which. Tensors are streamed: the safetensors
header is written first, since all sizes are known, then one tensor after another.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange

import semanticvla_jax
from semanticvla_jax.convert import openvla_layout as release
from semanticvla_jax.convert import settings
from semanticvla_jax.convert.detect import Source, recognize
from semanticvla_jax.convert.io import transpose
from semanticvla_jax.convert.io.orbax_reader import PolicyFolder
from semanticvla_jax.convert.io.progress import Progress
from semanticvla_jax.convert.io.target import check_target, peak_rss, sha256, whole
from semanticvla_jax.convert.io.torch_writer import Out, save
from semanticvla_jax.convert.plan import unused
from semanticvla_jax.convert.rules import engine, semanticvla
from semanticvla_jax.errors import refuse
from semanticvla_jax.files import write_json
from semanticvla_jax.models.semanticvla import SemanticVLA, build

SHARD = 5 * 10**9  # bytes, Hugging Face's "5GB"
ADAPTER = "lora_adapter/adapter_model.safetensors"
_WRAPPED = re.compile(
  r"vision_queries.*|cross_vit_model\..*|fused_featurizer_mm_sampler\..*|.*blocks\.\d+\.(scale|shift)\..*"
)
_VISION = ("featurizer.", "fused_featurizer.")


class Options(NamedTuple):
  """How a policy is written.

  Attributes:
    companions: "safetensors", or "pt" for files that the release's own loaders read (see openvla_layout.py); "pt" needs
      torch, and a base where there is a vision_backbone file.
    lora: "merge" folds adapters in; "keep" writes them as lora_adapter/ next to the weights that they were trained on,
      and into the vision_backbone file where there is one.
    shard: largest shard in bytes; a single larger tensor gets its own shard.
    check: whether the parameters are read once more, and refused where their hash is not that of metadata.json.
  """

  companions: str = "safetensors"
  lora: str = "merge"
  shard: int = SHARD
  check: bool = True


DEFAULTS = Options()


def to_torch(
  policy: str | Path,
  target: str | Path,
  options: Options = DEFAULTS,
  *,
  base: str | Path | Sequence[str | Path] = (),
  say: Callable[[str], None] = logging.info,
) -> dict:
  """Writes a policy as PyTorch files; returns the report that is written as conversion.json.

  Args:
    policy: a policy folder of a whole model.
    target: folder to make; must not exist.
    options: see `Options`.
    base: checkpoint that the policy came from, folders and files; what our model does not have (last blocks, pooling
      head, lm_head) and the processor files are taken from it. None or empty: they are left out.
    say: is given lines of progress.

  Raises:
    ValueError: the target exists, the folder is damaged or not a policy of a whole model, its coupler has groups that
      the released code lacks, its action tokens are FAST's, the base is of another model, something is missing for
      `companions`, or adapters cannot be kept: there are none, or the parts of a fused matrix have separate adapters.
      Nothing is left then.
  """
  began = time.monotonic()
  base = [] if base is None else [base] if isinstance(base, (str, Path)) else list(base)
  target = Path(target).expanduser().absolute()
  _check_arguments(target, options)
  folder = PolicyFolder(policy)
  _check_policy(folder, options.lora)
  origin = recognize(base) if base else None
  content = _content(folder, origin, options)
  with whole(target, content.nbytes, say) as partial:
    progress, hashes = _write_tensors(partial, content, folder, options, say)
    _write_index(partial, content.groups)
    report = _facts(folder, content.groups, options.companions) | {
      "lora": options.lora,
      "merged_adapters": sum(path.endswith("/lora_a") for path in folder.leaves) if options.lora == "merge" else 0,
      "sha256": hashes,
      "from_base": content.from_base,
      "bytes": progress.done,
      "bytes_per_second": round(progress.rate),
      "seconds": round(time.monotonic() - began, 2),
      "peak_rss_bytes": peak_rss(),
    }
    _write_json(partial, folder, origin, report, placeholders=content.wrapped and options.lora == "merge")
    _copy_small_files(partial, folder, base)
  return report


class _Content(NamedTuple):
  """Everything that is to be written.

  Attributes:
    groups: {file: {real name: tensor}}.
    from_base: {canonical key: reason why the policy lacks it} of what the base gives.
    adapter_config: of lora_adapter/, or None without one.
    wrapped: whether the vision_backbone file has the names of the release's wrapper.
  """

  groups: dict[str, dict[str, Out]]
  from_base: dict[str, str]
  adapter_config: dict | None
  wrapped: bool

  @property
  def nbytes(self) -> int:
    return sum(x.nbytes for tensors in self.groups.values() for x in tensors.values())


def _content(folder: PolicyFolder, origin: Source | None, options: Options) -> _Content:
  tensors = outputs(folder, keep=options.lora == "keep")
  from_base = _from_base(origin, tensors, build(folder.config["model"]))
  complete = tensors | {key: x for key, (x, _) in from_base.items()}
  groups = _groups(complete, folder.metadata.get("step"), options.shard)
  lora = release.loader_lora(folder.config.get("lora") or folder.metadata.get("lora"), tensors)
  vision = next((name for name in groups if name.startswith("vision_backbone")), None)
  wrapped = vision is not None and options.companions == "pt"
  if wrapped:
    groups[vision] = _wrapped(complete, lora)
  has_adapter = options.lora == "keep" or (wrapped and lora["targets"] == "release")
  adapter_config = release.adapter_config(complete, lora) if has_adapter else None
  return _Content(groups, {key: why for key, (_, why) in sorted(from_base.items())}, adapter_config, wrapped)


def _write_tensors(
  partial: Path, content: _Content, folder: PolicyFolder, options: Options, say: Callable[[str], None]
) -> tuple[Progress, dict[str, str]]:
  """Writes every file of tensors, and adapter_config.json, while the policy's hash is checked in a thread.

  Returns:
    (how much was written, {file: SHA-256}).
  """
  progress, hashes = Progress(content.nbytes, say), {}
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    if options.check:
      say("comparing the parameters' hash with metadata.json meanwhile (--no-check leaves this out)")
    checked = pool.submit(folder.check_hash if options.check else lambda: None)
    for name, tensors in content.groups.items():
      say(f"{name}: {len(tensors)} tensors, {sum(x.nbytes for x in tensors.values()):,} bytes")
      hashes |= _write(partial / name, tensors, options.companions, progress.add)
      if checked.done():
        checked.result()  # no need to write the rest of what is damaged
    checked.result()
  if content.adapter_config is not None:
    (partial / ADAPTER).parent.mkdir(exist_ok=True)
    write_json((partial / ADAPTER).with_name("adapter_config.json"), content.adapter_config)
  return progress, hashes


def _check_arguments(target: Path, options: Options) -> None:
  if options.companions not in ("safetensors", "pt"):
    raise refuse("companions", f"{options.companions!r}", "'safetensors' or 'pt'", "name one of them")
  if options.lora not in ("keep", "merge"):
    raise refuse("lora", f"{options.lora!r}", "'keep' or 'merge'", "name one of them")
  if options.companions == "pt":
    release.need_torch()
  check_target(target)


def _check_policy(folder: PolicyFolder, lora: str) -> None:
  if folder.metadata.get("parts"):
    raise refuse(
      f"Policy {folder.folder} is a single tower",
      f"{folder.metadata['parts']}",
      "a whole model",
      "convert one",
    )
  heads = {path.split("/")[1] for path in folder.leaves if path.startswith("coupler/")}
  if other := sorted(heads - set(semanticvla.HEADS)):
    raise refuse(
      f"Policy {folder.folder}: groups of its coupler",
      ", ".join(other),
      f"some of {', '.join(semanticvla.HEADS)}, which the released PyTorch code has heads for",
      "use it in JAX, or as one file (Policy.export)",
    )
  if folder.config["model"].get("codec", "bins") != "bins":
    raise refuse(
      f"Policy {folder.folder}: its action tokens",
      "FAST's (model.codec='fast')",
      "OpenVLA's bins, by which the released PyTorch code would read them",
      "use it in JAX, or as one file (Policy.export)",
    )
  if lora == "keep" and not folder.adapted:
    raise refuse(
      "Adapters cannot be kept",
      f"{folder.folder} without any (none were trained, or they are folded in)",
      "a policy with adapters",
      "leave --lora out",
    )


def _facts(folder: PolicyFolder, groups: Mapping[str, Mapping[str, Out]], companions: str) -> dict:
  """Returns what conversion.json records of the policy and of the files."""
  return {
    "converter_version": semanticvla_jax.__version__,
    "policy_sha256": folder.metadata["params_sha256"],
    "files": {_file(name, companions): len(content) for name, content in groups.items()},
    "dtypes": dict(Counter(str(x.dtype) for content in groups.values() for x in content.values())),
    "statistics": sorted(folder.statistics),
  }


def outputs(folder: PolicyFolder, keep: bool = False) -> dict[str, Out]:
  """Returns {canonical key: tensor} of a policy, with adapters folded in, or as separate tensors if `keep`.

  Raises:
    ValueError: a parameter that no rule reads, or adapters that cannot be kept.
  """
  rules = semanticvla.rules_for(build(folder.config["model"]), lora=keep)
  shapes = {path: shape for path, shape in folder.shapes.items() if keep or not path.endswith(("/lora_a", "/lora_b"))}
  entries = [entry for rule in rules for entry in engine.expand(rule, shapes)]
  if lost := sorted(set(shapes) - {entry.target for entry in entries}):
    raise refuse(
      "Policy has parameters without a rule",
      f"{lost[:6]}",
      "those of its config",
      "use the config it was trained with",
    )
  readers: dict[str, list[tuple[engine.Entry, int | None]]] = {}
  for entry in entries:
    for i, keys in enumerate(entry.keys):
      readers.setdefault(keys[0], []).append((entry, i if entry.stacked else None))
  for key, parts in readers.items():
    _check_shared(folder, key, [entry for entry, _ in parts])
  return {key: _output(folder, parts, keep) for key, parts in readers.items()}


def _check_shared(folder: PolicyFolder, key: str, entries: list[engine.Entry]) -> None:
  """Raises ValueError where parameters that share one tensor of the release differ."""
  if len(entries) > 1 and entries[0].rule.shared:
    first, *others = (folder.read(entry.target) for entry in entries)
    if any(other.tobytes() != first.tobytes() for other in others):
      raise refuse(
        "Adapters cannot be kept",
        f"{', '.join(entry.target for entry in entries)}, which differ (they were trained apart here)",
        f"one matrix for all, for the release adapts the fused layer with one ({key})",
        "fold them in with --lora merge",
      )


def _output(folder: PolicyFolder, parts: list[tuple[engine.Entry, int | None]], keep: bool) -> Out:
  (entry, layer), rule = parts[0], parts[0][0].rule
  shape = entry.shape if layer is None else entry.shape[1:]
  if rule.pattern:
    shape = rule.combine.source_shape()
  parts = sorted(parts, key=lambda part: part[0].rule.part or (0, 1))

  def make() -> np.ndarray:
    read = folder.read if keep else folder.merged
    values = (read(entry.target, layer) for entry, layer in parts)
    if not rule.pattern:
      return next(values)
    left, right = (re.sub(r"[()]", "", side) for side in rule.pattern.split("->"))
    lead = "t " if rule.part else ""  # the parts of a fused matrix, one after the other
    axes = right.strip().removeprefix(lead), left.strip().removeprefix(lead)
    arrays = [transpose.contiguous(rearrange(value, " -> ".join(axes))) for value in values]
    return (np.concatenate(arrays) if rule.part else arrays[0]).reshape(shape)

  return Out(tuple(shape), folder.leaves[entry.target].dtype, make)


def _from_base(origin: Source | None, tensors: Mapping[str, Out], model: SemanticVLA) -> dict[str, tuple[Out, str]]:
  """{canonical key: (tensor, reason why the policy lacks it)} of what the model does not read of its base.

  Raises:
    Mismatch: the base is of another model: both have a tensor in different shapes, the base has one that this model
      knows nothing of, or it lacks one of the language model.
  """
  if origin is None:
    return {}
  spare = unused(model)
  own = {key: x for key, x in origin.tensors.items() if ".lora_" not in key}
  problems = [
    f"! {key}: got shape {x.shape} in the base, expected {tensors[key].shape}"
    for key, x in own.items()
    if key in tensors and x.shape != tensors[key].shape
  ]
  rest = {key: (x, engine.reason(spare, key)) for key, x in own.items() if key not in tensors}
  problems += [f"- {key} {x.shape}: the policy's model has none" for key, (x, why) in rest.items() if why is None]
  problems += [
    f"+ {key} {x.shape}: not in the base"
    for key, x in tensors.items()
    if key.startswith("language_model.") and key not in own and not release.is_adapter(key)
  ]
  if problems:
    raise engine.Mismatch(
      f"--base is not the checkpoint that this policy came from ({engine.counts(problems)}; + missing in the base, "
      "- not of the policy's model, ! wrong). Nothing was written. Name the base that it was converted or trained "
      "from.\n" + "\n".join(engine.shown(problems))
    )
  return {key: (Out(x.shape, x.dtype, x.read), why) for key, (x, why) in rest.items()}


def _groups(tensors: Mapping[str, Out], step: int | None, shard: int) -> dict[str, dict[str, Out]]:
  """{file: {real name: tensor}}: companions first, then the shards."""
  end = f"--{0 if step is None else step}_checkpoint.safetensors"
  groups: dict[str, dict[str, Out]] = {}
  main, wrapped = {}, any(_WRAPPED.fullmatch(key) for key in tensors)
  adapted = release.adapted_layers(tensors)
  for key, x in sorted(tensors.items()):
    role, vision = key.split(".")[0], key.startswith(_VISION)
    if role in ("action_head", "proprio_projector"):
      groups.setdefault(role + end, {})["module." + key.removeprefix(role + ".")] = x
      continue
    if wrapped and (vision or _WRAPPED.fullmatch(key)):
      groups.setdefault("vision_backbone" + end, {})[release.wrapped_name(key, adapted)] = x
    if release.is_adapter(key):
      groups.setdefault(ADAPTER, {})[release.adapter_name(key, wrapped)] = x
    elif not _WRAPPED.fullmatch(key):
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
  return name if name.startswith("model-") or name == ADAPTER else name.replace(".safetensors", f".{companions}")


def _write(path: Path, content: Mapping[str, Out], companions: str, written: Callable[[int, str], None]) -> dict:
  """Writes one file in the format that it is wanted in: {its name: SHA-256}."""
  name = ADAPTER if path.match(ADAPTER) else path.name
  path.parent.mkdir(exist_ok=True)
  digest = save(path, content, written)
  if (wanted := _file(name, companions)) == name:
    return {name: digest}
  release.to_pt(path, path.with_name(wanted))
  path.unlink()
  return {wanted: sha256(path.with_name(wanted))}


def _wrapped(tensors: Mapping[str, Out], lora_config: Mapping) -> dict[str, Out]:
  """The vision backbone under the names of the release's wrapper."""
  own = {key: x for key, x in tensors.items() if key.startswith(_VISION) or _WRAPPED.fullmatch(key)}
  dtype = next(x.dtype for key, x in own.items() if key.startswith(_VISION))
  names = release.backbone({key: x.shape for key, x in own.items()}, lora_config)
  zeros = lambda shape: Out(shape, dtype, lambda: np.zeros(shape, dtype))  # noqa: E731
  return {name: zeros(x.shape) if isinstance(x, release.Zeros) else own[x] for name, x in sorted(names.items())}


def _write_index(partial: Path, groups: Mapping[str, Mapping[str, Out]]) -> None:
  shards = {name: content for name, content in groups.items() if name.startswith("model-")}
  size = sum(x.nbytes for content in shards.values() for x in content.values())
  weight_map = {key: name for name, content in shards.items() for key in content}
  content = {"metadata": {"total_size": size}, "weight_map": weight_map}
  write_json(partial / "model.safetensors.index.json", content)


def _write_json(partial: Path, folder: PolicyFolder, origin: Source | None, report: dict, placeholders: bool) -> None:
  """config.json (of the base, else of the conversion, else minimal), dataset_statistics.json, conversion.json."""
  path = folder.folder / "conversion.json"
  known = json.loads(path.read_text(encoding="utf-8")).get("source_config") if path.exists() else None
  config = (origin.config if origin is not None else None) or known
  config = dict(config or {"model_type": "openvla", "architectures": ["OpenVLAForActionPrediction"]})
  config = settings.written(config, build(folder.config["model"]))
  adapters = folder.config["lora"] if folder.adapted else folder.metadata.get("lora")
  config["norm_stats"] = folder.statistics
  merged = report["lora"] == "merge"
  config["semanticvla_jax"] = {"merged": merged, "lora": adapters, "version": semanticvla_jax.__version__}
  if placeholders:
    config["semanticvla_jax"]["placeholder_adapters"] = True  # zeros, for the release's loader
  contents = {"config.json": config, "dataset_statistics.json": folder.statistics, "conversion.json": report}
  for name, content in contents.items():
    write_json(partial / name, content)


def _copy_small_files(partial: Path, folder: PolicyFolder, base: Sequence[str | Path]) -> None:
  """Tokenizers and processor files of the policy, then those of the base; of two with one name the first."""
  small = [*(folder.folder / "tokenizers").glob("*.model"), *release.processor_files([folder.folder / "source_files"])]
  for path in map(Path, reversed(base)):
    files_there = sorted(path.iterdir()) if path.is_dir() else []
    small += [p for p in files_there if p.suffix in (".json", ".py", ".model", ".txt") and "index" not in p.name]
  release.copy_missing(small, partial)


def lines(report: Mapping) -> list[str]:
  """The report for the screen."""
  return [
    *(f"  {n:5d} tensors in {name}, sha256 {report['sha256'][name]}" for name, n in report["files"].items()),
    f"  {report['merged_adapters']} adapters folded in, {len(report['from_base'])} tensors from the base",
    f"  {report['seconds']} s, {report['bytes_per_second'] / 1e6:.1f} MB/s, peak memory "
    f"{report['peak_rss_bytes'] / 2**30:.2f} GiB",
  ]
