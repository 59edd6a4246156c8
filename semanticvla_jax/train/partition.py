"""Freezing as a split tree: gradients and optimizer state exist for the trainable half only."""

from __future__ import annotations

import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax.errors import refuse

LORA = r".*/lora_[ab]"


def partition(params: dict, trainable: str | None) -> tuple[dict, dict]:
  """Splits a parameter tree into (trainable, frozen).

  Args:
    params: nested dict of arrays, shapes or shardings.
    trainable: regular expression over whole paths ("coupler/trans/out/kernel"); adapters are trainable always. None
      trains the adapters alone.

  Raises:
    ValueError: when nothing would be trained.
  """
  pattern = re.compile(LORA if trainable is None else f"{LORA}|{trainable}")
  flat = flatten_dict(params)
  chosen = {path: x for path, x in flat.items() if pattern.fullmatch("/".join(path))}
  if not chosen:
    raise refuse(
      "partition",
      f"config.trainable={trainable!r}, which matches no parameter",
      f"at least one of {sorted({path[0] for path in flat})}",
      "widen the expression, or add adapters with config.lora",
    )
  return unflatten_dict(chosen), unflatten_dict({path: x for path, x in flat.items() if path not in chosen})


def combine(trainable: dict, frozen: dict) -> dict:
  """The whole tree again."""
  return unflatten_dict({**flatten_dict(frozen), **flatten_dict(trainable)})


def count(tree: Any) -> int:
  """How many numbers a tree of arrays or shapes holds."""
  return sum(x.size for x in flatten_dict(tree).values())
