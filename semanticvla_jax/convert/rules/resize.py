"""Towers of another image or vocabulary size, made to fit where the user asks: resampled positions, padded rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange

from semanticvla_jax.convert.rules.engine import Array, Rule
from semanticvla_jax.errors import refuse

_POSITIONS = ("dino/pos_embedding", "siglip/pos_embedding")
_ROWS = {"llm/embed/embedding": 0, "llm/lm_head/kernel": 1}  # and the axis of the vocabulary


def resample(x: Array, length: int) -> Array:
  """(1, n, d) position embeddings of a square grid on another one, (1, length, d): bicubic, antialiased, in float32.

  As timm loads checkpoints of another image size (`resample_abs_pos_embed`, whose kernel has a = -0.5 too).

  Raises:
    ValueError: one of the grids is not square.
  """
  old, new = math.isqrt(x.shape[1]), math.isqrt(length)
  if (old * old, new * new) != (x.shape[1], length):
    raise refuse("Positions", f"{x.shape[1]} and {length} places", "squares", "they cannot be resampled")
  grid = x.reshape(1, old, old, -1).astype(jnp.float32)
  small = jax.image.resize(grid, (1, new, new, grid.shape[-1]), "bicubic", antialias=True)
  return small.reshape(1, length, -1).astype(x.dtype)


def pad(x: Array, length: int, axis: int) -> Array:
  """Zeros behind the last row: what OpenVLA's padding of the vocabulary to a multiple of 64 begins as."""
  widths = [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)]
  return jnp.pad(x, widths)


def fitted(
  rules: Sequence[Rule],
  source: Mapping[str, tuple[int, ...]],
  target: Mapping[str, tuple[int, ...]],
  *,
  resample_positions: bool,
  pad_vocabulary: bool,
) -> tuple[list[Rule], dict[str, str]]:
  """Rules that make the target's sizes, and {path: what is done to it} of those that had others.

  Args:
    rules: of one tower, the paths whole.
    source, target: {key or path: shape}.
    resample_positions, pad_vocabulary: what may be done; what may not stays as it is, for `engine.plan` to refuse.
  """
  out, done = [], {}
  for rule in rules:
    change = None
    if rule.target in (*_POSITIONS, *_ROWS) and rule.target in target and all(key in source for key in rule.sources):
      have = jax.eval_shape(_plain(rule), *(jax.ShapeDtypeStruct(source[key], jnp.float32) for key in rule.sources))
      change = _change(rule.target, have.shape, target[rule.target], resample_positions, pad_vocabulary)
    if change is not None:
      function, done[rule.target] = change
      make = _plain(rule)
      rule = dataclasses.replace(rule, pattern="", combine=lambda *xs, f=function, make=make: f(make(*xs)))
    out.append(rule)
  return out, done


def _plain(rule: Rule) -> Callable[..., Array]:
  if rule.combine is not None:
    return rule.combine
  return (lambda x: rearrange(x, rule.pattern)) if rule.pattern and "(" not in rule.pattern else lambda x, *_: x


def _change(
  path: str, have: tuple[int, ...], want: tuple[int, ...], may_resample: bool, may_pad: bool
) -> tuple[Callable[[Array], Array], str] | None:
  """What makes one shape the other, and in words; None where nothing is to be done, or nothing may."""
  if may_resample and path in _POSITIONS and have[1:2] != want[1:2]:
    text = f"resampled from {have[1]} to {want[1]} places, bicubic with antialiasing"
    return (lambda x: resample(x, want[1])), text
  axis = _ROWS.get(path)
  if may_pad and axis is not None and len(have) == len(want) and have[axis] < want[axis]:
    text = f"{want[axis] - have[axis]} rows of zeros behind {have[axis]}"
    return (lambda x: pad(x, want[axis], axis)), text
  return None
