"""Checks of a training config's numbers, before anything is read or compiled."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

from semanticvla_jax.errors import refuse


class Rule(NamedTuple):
  """What a field may be: whether it fits, and the same in words. None passes where a field may be absent."""

  fits: Callable[[Any], bool]
  words: str
  absent: bool = False


def _whole(least: int, absent: bool = False) -> Rule:
  return Rule(lambda x: _is_whole(x) and x >= least, f"an integer of at least {least}", absent)


def _is_whole(x: Any) -> bool:
  return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
  return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)


_ABOVE_0 = Rule(lambda x: _is_number(x) and x > 0, "a finite number above 0")
_RATE = Rule(lambda x: isinstance(x, numbers.Real) and x > 0, "a number above 0")
_FROM_0 = Rule(lambda x: _is_number(x) and x >= 0, "a finite number, 0 or more")
_DECAY = Rule(lambda x: _is_number(x) and 0 <= x < 1, "a number in [0, 1)")

RULES = {
  "seed": Rule(lambda x: _is_whole(x) and 0 <= x < 2**31, "an integer from 0 to 2³¹ − 1"),
  "lora.rank": _whole(1),
  "lora.alpha": _ABOVE_0,
  "optim.lr": _RATE,
  "optim.end_lr": _FROM_0,
  "optim.warmup_steps": _whole(0),
  "optim.decay_steps": _whole(1, absent=True),
  "optim.b1": _DECAY,
  "optim.b2": _DECAY,
  "optim.eps": _ABOVE_0,
  "optim.weight_decay": _FROM_0,
  "optim.drop_at": _whole(0, absent=True),
  "optim.drop_to": _ABOVE_0._replace(absent=True),
  "optim.clip_norm": _ABOVE_0._replace(absent=True),
  "optim.ema": Rule(lambda x: _is_number(x) and 0 < x < 1, "a decay between 0 and 1 (0.999, say), or None", True),
  "optim.accumulate": _whole(1),
  "data.batch_size": _whole(1),
  "data.processes": _whole(0),
  "data.prompt_length": _whole(1),
  "data.instruction_length": _whole(1),
  "train.steps": _whole(0),
  "train.save_every": _whole(1),
  "train.keep_last": _whole(1),
  "train.keep_every": _whole(1, absent=True),
  "train.log_every": _whole(1),
  "train.spike": Rule(lambda x: _is_number(x) and x > 1, "a number above 1, or None", True),
}


def check(config: Any) -> None:
  """Raises ValueError, with a line for each field whose number no run can use."""
  problems = []
  for field, rule in RULES.items():
    folder, _, name = field.rpartition(".")
    node = config.get(folder) if folder else config
    value = None if node is None else node.get(name)
    absent = node is None or name not in node or (value is None and rule.absent)
    if not absent and not rule.fits(value):
      problems.append(refuse(f"config.{field}", f"{value!r}", rule.words, f"set --config.{field}=…"))
  optim = config.get("optim") or {}
  if (optim.get("drop_at") is None) != (optim.get("drop_to") is None):
    problems.append(
      refuse(
        "config.optim",
        f"drop_at={optim.get('drop_at')}, drop_to={optim.get('drop_to')}",
        "both or neither: at that step the learning rate is multiplied by that number",
        "set the other one too",
      )
    )
  if problems:
    raise ValueError("\n  ".join(map(str, problems)))
