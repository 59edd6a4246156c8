"""What a base's own config.json says of the parameters that are taken from it.

Names and shapes (init.match_base) do not tell what a parameter means: an adapter's update counts by alpha, a tower's
kernels go with its GELU, a head's outputs with the normalisation it was trained for. What would be read in another
sense is refused; what merely differs is listed once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from semanticvla_jax.data import text
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.pruner import SAPruner
from semanticvla_jax.models.semanticvla import SemanticVLA, build, resolve
from semanticvla_jax.train.partition import LORA

# Attributes of a part of the model that change no parameter's meaning: how it computes, how it is initialized, how many
# tokens it keeps, what is added in training.
FREE = (
  "dtype",
  "remat",
  "scan",
  "kernel_init",
  "position_init",
  "layer_scale",
  "queries",
  "anchors",
  "cues",
  "noise",
  "anchor_rule",
  "skip",
  "routing",
  "cue_temperature",
  "cue_pool",
  "parent",
  "name",
)
# Fields of the model itself, with the parameters that are made for their value.
WHOLE = {
  "film": r"(dino|siglip)/.*/film/.*",
  "film_pool": r"(dino|siglip)/.*/film/.*",
  "vision_layer": r"(sparse_fuser|dense_fuser)/.*",
  "mask": r"coupler/.*",
  "shift": r"coupler/.*",
}
MEMORY = ("model.remat", "model.scan", "model.scan_encoders", "model.dtype")  # not worth a line
LISTED = (
  "normalisation",
  "augment",
  "crop_area",
  "dct",
  "jpeg_quality",
  "pruner_text",
  "pruner_text_eval",
  "trajectory_end",
  "tokenizers",
)  # of config.data
HEADS = r"(coupler|proprio_projector)/.*"  # whose numbers are normalized
WORDS = {"tokenizer.model": r"llm/(embed|lm_head)/.*", "spiece.model": r"text/.*"}  # whose rows are a tokenizer's ids


def check(source: str, base: Mapping, config: Any, paths: Sequence[str], matching: bool = False) -> None:
  """Compares a base's settings with those of the config that takes some of its parameters, and lists what differs.

  Args:
    source: the base's folder, for messages.
    base: its config.json: {"model": …, "lora": …, "data": …}; fields it lacks have their defaults.
    config: of the run.
    paths: the parameters that are taken.
    matching: whether parameters may mean something else here, because they are only initial values (init.MATCHING).

  Raises:
    ValueError: a parameter would mean something else here; names each such setting, its two values and a remedy.
  """
  if not base.get("model"):
    logging.warning("init_from %s: its config.json says nothing of the model, so that nothing can be compared", source)
    return
  problems, changed = _adapters(base, config, paths), _parts(base, config, paths) + _numbers(base, config, paths)
  if matching and changed:
    logging.info("init_from %s: trained for other settings (there → here): %s", source, "; ".join(changed))
  problems += [] if matching else changed
  if problems:
    raise refuse(
      f"init_from {source}: its parameters were trained for other settings",
      f"{'; '.join(problems)} (there → here)",
      "the same, for its numbers mean something else otherwise",
      "set them as the base has them, or train from another base",
    )
  if lines := _listing(base, config):
    logging.info("init_from %s: settings differ (there → here), those here are taken: %s", source, "; ".join(lines))


def check_tokenizers(source: str, here: Mapping[str, epath.Path], paths: Sequence[str]) -> None:
  """Compares a base's tokenizers with the run's, file by file, where rows of its embeddings are taken.

  Args:
    source: the base's folder.
    here: {name: path} of the run's.
    paths: of the parameters that are taken.

  Raises:
    ValueError: another file under the same name: ids would pick the rows of other pieces.
  """
  folder = epath.Path(source).expanduser() / "tokenizers"
  there = text.files(folder)
  for name, pattern in WORDS.items():
    if name not in there or name not in here or not _some(pattern, paths):
      continue
    hashes = [hashlib.sha256(files[name].read_bytes()).hexdigest()[:12] for files in (there, here)]
    if hashes[0] != hashes[1]:
      raise refuse(
        f"init_from {source}",
        f"{name} of hash {hashes[1]} ({here[name]})",
        f"{hashes[0]}, the base's: its embeddings have a row for each piece",
        f"set config.data.tokenizers={folder}",
      )


def _some(pattern: str, paths: Iterable[str]) -> bool:
  return any(re.fullmatch(pattern, path) for path in paths)


def _adapters(base: Mapping, config: Any, paths: Sequence[str]) -> list[str]:
  """Adapters count by alpha / rank. The rank is in their shapes."""
  if not _some(LORA, paths):
    return []
  there, here = dict(base.get("lora") or {}), config.lora
  if there.get("alpha") == here.alpha and there.get("rank", here.rank) == here.rank:
    return []
  fold = "its config.json says how its adapters count; or fold them in: python -m semanticvla_jax.convert fold"
  return [f"lora.alpha: {there.get('alpha', 'not said')} → {here.alpha} ({fold})"]


def _parts(base: Mapping, config: Any, paths: Sequence[str]) -> list[str]:
  """Settings of the parts of the model, and of the model as a whole, that some of the parameters are made for."""
  there, here = _bare(base["model"]), build(config.model)
  found = []
  theirs = there.parts()
  for name, part in here.parts().items():
    if name in theirs and _some(rf"{name}/.*", paths):
      found += [f"model, {name}: {line}" for line in _attributes(theirs[name], part)]
  for name, pattern in WHOLE.items():
    a, b = getattr(there, name), getattr(here, name)
    if a != b and _some(pattern, paths):
      found.append(f"model.{name}: {a} → {b}")
  return found


def _bare(model: Mapping) -> SemanticVLA:
  return build({name: value for name, value in model.items() if name in resolve({})})


def _attributes(there: Any, here: Any) -> list[str]:
  """ "gelu erf → tanh" for each attribute of a part that changes what its parameters mean."""
  free = (*FREE, "std") if isinstance(here, SAPruner) else FREE  # of the aggregation tokens' initial values
  names = [x.name for x in dataclasses.fields(here) if x.name not in free]
  pairs = {name: (getattr(there, name, None), getattr(here, name)) for name in names}
  return [f"{name} {a} → {b}" for name, (a, b) in pairs.items() if a != b]


def _numbers(base: Mapping, config: Any, paths: Sequence[str]) -> list[str]:
  """Which bounds -1 and 1 stand for in the heads' outputs and the proprioception."""
  there, here = (
    {"q99": "bounds_q99"}.get(mode, mode)
    for mode in ((base.get("data") or {}).get("normalisation", "bounds_q99"), config.data.normalisation)
  )
  return [f"data.normalisation: {there} → {here}"] if there != here and _some(HEADS, paths) else []


def _listing(base: Mapping, config: Any) -> list[str]:
  """Every other field that differs, as "model.keep 16 → 8"."""
  known = resolve({})
  there = {f"model.{name}": base["model"].get(name, value) for name, value in known.items()}
  here = {f"model.{name}": config.model.get(name, value) for name, value in known.items()}
  data = base.get("data") or {}
  there |= {f"data.{name}": data[name] for name in LISTED if name in data and name in config.data}
  here |= {f"data.{name}": config.data[name] for name in LISTED if f"data.{name}" in there}
  pairs = {name: (_plain(a), _plain(here[name])) for name, a in there.items() if name not in MEMORY}
  return [f"{name} {a} → {b}" for name, (a, b) in pairs.items() if a != b]


def _plain(value: Any) -> Any:
  """Lists as tuples, as JSON and configs differ in that."""
  return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
