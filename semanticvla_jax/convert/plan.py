"""Which tensor of a source makes which parameter: the rules of its kind, the target tree of a config, the plan."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from semanticvla_jax.convert import adapter
from semanticvla_jax.convert.detect import Source
from semanticvla_jax.convert.io import transpose
from semanticvla_jax.convert.io.orbax_writer import ArraySpec, Piece
from semanticvla_jax.convert.rules import engine, resize, semanticvla
from semanticvla_jax.convert.rules.engine import Entry, Mismatch
from semanticvla_jax.errors import refuse
from semanticvla_jax.models import lora
from semanticvla_jax.models.semanticvla import SemanticVLA, abstract_params, build, dummy_observation

Shapes = dict[str, tuple[int, ...]]
_NOT_IN_A_TOWER = re.compile(r".*/film/.*")  # made by fine-tuning
_WEIGHTS = ("float32", "bfloat16", "float16", "float64")  # types that a model computes with


class Options(NamedTuple):
  """How a checkpoint is converted to a policy.

  Attributes:
    dtype: "keep" stores every parameter as it was; "bfloat16" or "float32" casts it.
    lora: "keep" leaves adapters apart from their kernels, "merge" folds them in.
    tokenizers: folder of tokenizer.model, spiece.model or both; they replace those of the source.
    need_statistics: whether a whole model without action statistics, or a fine-tune with none of its own, is an error.
    merged: see detect.recognize.
    only: the one tower that is wanted of a source with several, "siglip" or "text"; None for all.
    resample: whether position embeddings of an encoder of another image size are resampled (see rules/resize.py).
    pad_vocabulary: whether a Llama of fewer embedding rows than the model's gets rows of zeros behind them.
  """

  dtype: str = "keep"
  lora: str = "keep"
  tokenizers: str | Path | None = None
  need_statistics: bool = True
  merged: bool | None = None
  only: str | None = None
  resample: bool = False
  pad_vocabulary: bool = False


DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Rank, alpha and targets (a regular expression, or a name of lora.TARGETS) of the adapters to be folded in."""

  rank: int
  alpha: float
  targets: str


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to make, checked.

  Attributes:
    entries: path → how it is made, adapters included where they are kept, sorted by path.
    adapters: path of a kernel → its (lora_a, lora_b), where they are folded in.
    adapter: rank and alpha of those, or None.
    skipped: source key → reason why nothing reads it.
    fitted: path → what was done to make its size the model's (see rules/resize.py).
  """

  entries: dict[str, Entry]
  adapters: dict[str, tuple[Entry, Entry]]
  adapter: Adapter | None
  skipped: dict[str, str]
  fitted: dict[str, str] = dataclasses.field(default_factory=dict)

  def arrays(self, source: Source, dtype: np.dtype | None = None) -> dict[str, ArraySpec]:
    """{path: shape and type of a parameter}; `dtype`: of all of them, None for the types that they are stored in.

    Raises:
      Mismatch, ValueError: see `stored_dtype`.
    """
    return {
      path: ArraySpec(entry.shape, self.stored_dtype(source, path) if dtype is None else dtype, entry.stacked)
      for path, entry in self.entries.items()
    }

  def pieces(self, source: Source, dtype: np.dtype | None = None) -> Iterator[Piece]:
    """Everything that is to be written, in the order of the paths; nothing is read until a piece is made."""
    for path, entry in self.entries.items():
      for layer in entry.layers:
        yield Piece(path, layer, functools.partial(self.piece, source, path, layer, dtype))

  def piece(self, source: Source, path: str, layer: int | None, dtype: np.dtype | None = None) -> np.ndarray:
    """The numbers of one parameter, or of one layer of a stack: read, rearranged, adapters folded in, cast."""
    value = _read(source, self.entries[path], layer)
    if path in self.adapters:
      a, b = (_read(source, entry, layer) for entry in self.adapters[path])
      tree = {"x": {"kernel": value, "lora_a": a, "lora_b": b}}
      value = np.asarray(lora.merge(tree, self.adapter.rank, self.adapter.alpha)["x"]["kernel"])
    return value if dtype is None else value.astype(dtype, copy=False)

  def stored_dtype(self, source: Source, path: str) -> np.dtype:
    """The dtype of a parameter as stored.

    Raises:
      Mismatch: the layers of a stack, or the sources of one parameter, are stored in different types.
      ValueError: they are stored in a type of quantised weights, whose scales are elsewhere.
    """
    entry = self.entries[path]
    dtypes = {source.tensors[key].dtype for keys in entry.keys for key in keys}
    if len(dtypes) > 1:
      stored = f"layers stored as {sorted(map(str, dtypes))}"
      raise Mismatch(str(refuse(path, stored, "one type", "pass --dtype bfloat16 or float32")))
    dtype = dtypes.pop()
    if str(dtype) not in _WEIGHTS:
      raise refuse(
        f"{path} is quantised",
        f"{dtype} ({entry.keys[0][0]})",
        f"{', '.join(_WEIGHTS)}",
        "pass the original weights, or --dtype bfloat16 or float32 where the numbers are the weights as they are",
      )
    return dtype


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: SemanticVLA | lora.LoRA, bare: SemanticVLA) -> Shapes:
  """{path: shape} of a model, wrapped in LoRA or not; not to be changed."""
  flat = flatten_dict(abstract_params(model, dummy_observation(bare)), sep="/")
  return {path: tuple(x.shape) for path, x in flat.items()}


def make_plan(source: Source, model_config: Any, lora_config: Mapping | None, options: Options = DEFAULTS) -> Plan:
  """Matches a source with the model of a config.

  Args:
    source: recognized files.
    model_config: fields of semanticvla.DEFAULTS.
    lora_config: {"rank", "alpha", "targets"} of the config; read where the source has adapters.
    options: `lora`, `only`, `resample` and `pad_vocabulary` are read.

  Raises:
    Mismatch: source and model do not cover each other.
    ValueError: adapters of another rank or alpha than the config's, half folded ones that are to be kept, or a tower
      that the source does not have.
  """
  bare = build(model_config)
  if options.only is not None:
    check_only(source, options.only)
  if not source.layout.whole:
    return _tower_plan(source, bare, options)
  if options.resample or options.pad_vocabulary:
    raise refuse(
      "--resample, --pad-vocabulary",
      f"{source.kind}",
      "a single tower",
      "a whole model is converted as it is",
    )
  if not source.has_adapters:
    entries, skipped = _match(source, bare, parameter_shapes(bare, bare), adapted=False)
    return Plan(entries, {}, None, skipped)
  settings = _adapter(source, lora_config)
  keep = options.lora == "keep"
  if keep and source.folded:
    raise refuse(
      "Adapters cannot be kept",
      f"shards with the language adapters folded in ({source.paths[0].name}), beside vision adapters",
      "all of them apart",
      "use --lora merge, or the unmerged base as the first --source",
    )
  targets = lora.TARGETS.get(settings.targets, settings.targets)
  wrapped = lora.LoRA(bare.clone(), settings.rank, settings.alpha, targets)
  target = parameter_shapes(wrapped, bare)
  if source.folded:
    target = {p: s for p, s in target.items() if not _is_adapter(p) or p.startswith(("dino/", "siglip/"))}
  entries, skipped = _match(source, bare, target, adapted=True)
  if keep:
    return Plan(entries, {}, None, skipped)
  pairs = {
    path.removesuffix("lora_a") + "kernel": (entries[path], entries[path.removesuffix("a") + "b"])
    for path in entries
    if path.endswith("/lora_a")
  }
  return Plan({p: e for p, e in entries.items() if not _is_adapter(p)}, pairs, settings, skipped)


def _is_adapter(path: str) -> bool:
  return path.endswith(("/lora_a", "/lora_b"))


def _match(source: Source, bare: SemanticVLA, target: Shapes, adapted: bool) -> tuple[dict[str, Entry], dict[str, str]]:
  entries, skipped = engine.plan(semanticvla.rules_for(bare, adapted), unused(bare), source.shapes, target)
  return {entry.target: entry for entry in sorted(entries, key=lambda e: e.target)}, skipped


def unused(bare: SemanticVLA) -> dict[str, str]:
  """`semanticvla.unused`, and what a base made ready for SemanticVLA holds beyond the baselines."""
  out = semanticvla.unused(bare)
  if bare.pruner("siglip", "id") is None:
    out[r"fused_featurizer_sampler_proj\..*"] = "cue projector: of SemanticVLA only"
  return out


def _adapter(source: Source, config: Mapping | None) -> Adapter:
  """Rank and alpha: of adapter_config.json, which the config must agree with, else of the config."""
  adapter.check(source)
  if not config:
    raise refuse(
      "Source has LoRA adapters",
      "no `lora` in the config",
      "rank, alpha and targets",
      "use the config of its training",
    )
  ranks = {x.shape[0] for key, x in source.tensors.items() if ".lora_A." in key}
  stored = {} if source.adapter is None else adapter.DEFAULTS | source.adapter
  for field, key in (("rank", "r"), ("alpha", "lora_alpha")):
    if key in stored and stored[key] != config[field]:
      raise refuse(
        "Adapter and config differ",
        f"{key}={stored[key]} in adapter_config.json",
        f"{config[field]} (lora.{field} of the config)",
        f"pass --config.lora.{field}={stored[key]}, or the config of its training",
      )
  if ranks != {config["rank"]}:
    raise refuse(
      "Adapters and config differ",
      f"adapters of rank {sorted(ranks)}",
      f"{config['rank']} (lora.rank of the config)",
      "pass --config.lora.rank=…, or the config of its training",
    )
  return Adapter(int(config["rank"]), float(config["alpha"]), config.get("targets", "release"))


def check_only(source: Source, only: str) -> None:
  """Raises ValueError unless `source` is of single towers and has this one."""
  towers = [] if source.layout.whole else [prefix.rstrip("/") for prefix in source.prefixes]
  if only not in towers:
    expected = f"one of {towers}" if towers else "a source of single towers"
    raise refuse("--only", f"{only!r} of {source.kind}", f"{expected}", "leave --only out, or name another source")


def _tower_plan(source: Source, bare: SemanticVLA, options: Options) -> Plan:
  prefixes = source.prefixes if options.only is None else (f"{options.only}/",)
  target = {
    path: shape
    for path, shape in parameter_shapes(bare, bare).items()
    if path.startswith(prefixes) and not _NOT_IN_A_TOWER.fullmatch(path)
  }
  layout = source.layout
  rules = [rule for rule in layout.tower_rules(target) if rule.target.startswith(prefixes)]
  rules, fitted = resize.fitted(
    rules, source.shapes, target, resample_positions=options.resample, pad_vocabulary=options.pad_vocabulary
  )
  others = [tower for tower in layout.towers if tower.ours in source.prefixes and tower.ours not in prefixes]
  spare = {tower.keys: "another tower than was asked for (--only)" for tower in others} | layout.tower_unused(target)
  entries, skipped = engine.plan(rules, spare | _last_blocks(source, bare), source.shapes, target)
  return Plan({e.target: e for e in sorted(entries, key=lambda e: e.target)}, {}, None, skipped, fitted)


def _last_blocks(source: Source, bare: SemanticVLA) -> dict[str, str]:
  """The keys of the last blocks, where the model takes the states before them."""
  if bare.vision_layer != "second_to_last":
    return {}
  towers = {"dino/": bare.dino, "siglip/": bare.siglip}
  depths = {ours.rstrip("/"): x.depth for ours, x in towers.items() if ours in source.prefixes and x is not None}
  return source.layout.last_blocks(depths)


def _read(source: Source, entry: Entry, layer: int | None) -> np.ndarray:
  """One layer of a parameter (None: the whole), in the stored type and C order."""
  return transpose.contiguous(np.asarray(engine.make_layer(entry, layer, lambda key: source.tensors[key].read())))
