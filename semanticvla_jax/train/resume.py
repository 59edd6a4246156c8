"""Resuming a run: only with the config, base, tokenizers and data that it started with, under any path."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics
from semanticvla_jax.errors import refuse
from semanticvla_jax.train import checkpoints, init, inputs

# Config fields that runs of earlier versions did not store, with the value they had.
FIELD_DEFAULTS_BEFORE = {
  "frozen_dtype": None,
  "optim.ema": None,
  "data.starts": 0.0,
  "data.diagonal_crop": False,
  "data.dct": "accurate",
  "data.pruner_text_eval": None,
  "data.cache_dir": None,
  "data.jitter": [0.0, 0.0],
  "data.askew": 0.0,
  "data.specs": [],
  "data.skip_bad": False,
  "data.processes": 0,
  "data.servers": [],
  "model.optional_views": [],
  "model.groups": None,
  "model.decoder_pruner": None,
  "model.compressor": None,
  "model.skip_layers": [],
  "model.routing": None,
  "model.keep_least": None,
  "model.decoding": "greedy",
  "model.codec": "bins",
  "data.action_tokens": None,
  "model.cue_temperature": None,
  "model.cue_pool": "mean",
  "model.cue_stop": [],
}

# Config fields that may change when a run is resumed, each with all fields below it: how long and where it runs, not
# what it computes. Base, tokenizers and data are known by what they hold (`origin`), wherever they lie.
MUTABLE_FIELDS = (
  "mesh",
  "model.remat",
  "model.scan_encoders",
  "init_from",
  "data.dir",
  "data.cache_dir",
  "data.specs",
  "data.processes",
  "data.servers",
  "data.tokenizers",
  "data.action_tokens",
  "train.steps",
  "train.save_every",
  "train.keep_last",
  "train.keep_every",
  "train.log_every",
  "train.spike",
  "train.wandb",
  "optim.accumulate",
)


def plain(config: Any) -> dict:
  """A ConfigDict as JSON values."""
  return json.loads(config.to_json_best_effort())


def restore(checkpointer: checkpoints.Checkpointer, state: Any, config: dict) -> tuple[Any, int, dict]:
  """(state, step, its JSON) of the workdir's newest checkpoint, or (the state as it is, 0, {}).

  Raises:
    ValueError: in the workdir of another config.
  """
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  restored = checkpointer.restore({"train": abstract})
  if restored is None:
    return state, 0, {}
  if lines := differences(restored.json["config"], config):
    raise refuse(
      f"workdir {checkpointer.folder.parent}: its run had another config",
      f"{'; '.join(lines)} (before → now)",
      "the same",
      "use a new --workdir, or the config it began with",
    )
  logging.info("resumed from step %d", restored.step)
  return restored.trees["train"], restored.step, restored.json


def differences(saved: dict, config: dict) -> list[str]:
  """ "optim.lr: 0.001 → 0.0005" for each field that differs, but MUTABLE_FIELDS.

  `saved` may lack the fields of FIELD_DEFAULTS_BEFORE.
  """
  before, now = FIELD_DEFAULTS_BEFORE | flatten_dict(saved, sep="."), flatten_dict(config, sep=".")
  fixed = [name for name in now if not any(name == free or name.startswith(f"{free}.") for free in MUTABLE_FIELDS)]
  missing = object()
  return [
    f"{name}: {before.get(name, 'not there')} → {now[name]}"
    for name in sorted(fixed)
    if before.get(name, missing) != now[name]
  ]


def origin(config: Any, source: inputs.Source, robots: Mapping[str, dict]) -> dict:
  """What a run depends on besides its config, as JSON: hashes of its bases, tokenizers and data, and its statistics.

  And a hash of `robots` (as JSON, by dataset) where they are of the config's own DatasetSpecs, whose files may change.
  """
  folders, _ = init.bases(config.init_from)
  files = inputs.tokenizer_files(config)
  words = hashlib.sha256(b"".join(files[name].read_bytes() for name in sorted(files)))
  described = json.dumps(robots, sort_keys=True).encode()
  return {
    "base": [policy_folder.policy_hash(folder) for folder in folders],
    "tokenizers": words.hexdigest()[:16],
    "data": source.digests,
    "statistics": {name: statistics.to_openvla(entry) for name, entry in source.statistics.items()},
    **({"robot": hashlib.sha256(described).hexdigest()[:16]} if config.data.get("specs") else {}),
  }


def check_origin(saved: dict, now: dict, workdir: Path) -> None:
  """Compares `origin` now with that of the checkpoint to resume; one without this record is accepted with a warning.

  Raises:
    ValueError: another base, other tokenizers or other data.
  """
  if unknown := sorted(set(now) - set(saved)):
    logging.warning("the checkpoint is of an earlier version: its %s cannot be compared", ", ".join(unknown))
  known = [name for name in now if name in saved and name != "config"]
  differing = [name for name in known if not (same if name == "statistics" else operator.eq)(saved[name], now[name])]
  if differing:
    changes = "; ".join(f"{name} {describe(saved[name])} → {describe(now[name])}" for name in differing)
    raise refuse(
      f"workdir {workdir}: its run had another {' and '.join(differing)}",
      f"{changes} (before → now)",
      "the same under any path",
      "pass the base (config.init_from), tokenizers and data it began with, or a new --workdir",
    )


def same(a: Any, b: Any) -> bool:
  """Whether statistics are equal up to the rounding of another machine."""
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
  return np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-4, atol=1e-6)


def describe(value: Any) -> str:
  """Hashes as they are; of statistics the datasets and how many frames they have."""
  if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
    return str(value)
  return ", ".join(f"{name} ({entry.get('num_transitions')} frames)" for name, entry in value.items())
