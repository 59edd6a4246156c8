"""AdamW (the released recipe) or Muon, and the released schedules."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from optax.contrib import MuonDimensionNumbers

from semanticvla_jax.errors import refuse


def schedule(c: Any) -> optax.Schedule:
  """Learning rate over steps from config.optim.

  Warm-up from 0 in `warmup_steps`, then cosine to `end_lr` over `decay_steps` (released SemanticVLA: 2000, 80 000,
  1e-5; the first update has rate 0), or constant when decay_steps is None, times `drop_to` from step `drop_at`
  (OpenVLA-OFT).
  """
  if c.decay_steps is None:
    after = optax.constant_schedule(c.lr)
  else:
    after = optax.cosine_decay_schedule(c.lr, c.decay_steps, alpha=c.end_lr / c.lr)
  warm = optax.linear_schedule(0.0, c.lr, c.warmup_steps)
  rate = optax.join_schedules([warm, after], [c.warmup_steps]) if c.warmup_steps else after
  if c.drop_at is None:
    return rate
  return lambda step: rate(step) * optax.piecewise_constant_schedule(1.0, {c.drop_at: c.drop_to})(step)


def transform(c: Any) -> optax.GradientTransformation:
  """The optimizer of config.optim, with optional clipping by global norm and averaging.

  'adamw' treats every trainable parameter alike (the released recipe). 'muon' (Jordan et al. 2024) orthogonalises the
  updates of all matrices, scaled to AdamW's size so that one `lr` serves both, and leaves the rest to AdamW: for
  training from scratch.

  Raises:
    ValueError: an optimizer of another name.
  """
  if c.name == "adamw":
    update = optax.adamw(schedule(c), b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay)
  elif c.name == "muon":
    update = optax.contrib.muon(
      schedule(c),
      weight_decay=c.weight_decay,
      adam_b1=c.b1,
      adam_b2=c.b2,
      eps=c.eps,
      adam_weight_decay=c.weight_decay,
      muon_weight_dimension_numbers=matrices,
      consistent_rms=0.2,
    )
  else:
    raise refuse("config.optim.name", f"{c.name!r}", "'adamw' or 'muon'", "choose one of them")
  steps = [] if c.clip_norm is None else [optax.clip_by_global_norm(c.clip_norm)]
  steps += [update] if c.get("ema") is None else [update, averaged(c.ema)]
  return optax.chain(*steps)


class Average(NamedTuple):
  """State of `averaged`: the mean of the parameters, shaped like them."""

  average: Any


def averaged(decay: float) -> optax.GradientTransformation:
  """Keeps an exponential moving average of the parameters after each update, average ← d·average + (1−d)·parameters.

  The update itself passes unchanged. Last in a chain; `average_of` finds the result. Raises ValueError unless
  0 < decay < 1.
  """
  if not 0 < decay < 1:
    raise refuse("config.optim.ema", decay, "a decay between 0 and 1 (0.999, say), or None", "change it")

  def update(updates, state, params):
    after = optax.apply_updates(params, updates)
    return updates, Average(jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, after))

  return optax.GradientTransformation(lambda params: Average(jax.tree.map(jnp.copy, params)), update)


def average_of(state: Any, trainable: Any) -> Any:
  """The averaged parameters that an optimizer state holds; `trainable` itself where none are kept."""
  found = [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, Average)) if isinstance(s, Average)]
  return found[0].average if found else trainable


def matrices(params: Any) -> Any:
  """Which parameters are matrices to Muon, and which of their axes are inputs and outputs; None for the others.

  An attention kernel is one matrix over all its heads; embeddings, the patch embedding and the language model's output
  layer are none: each of its columns is a token's, and Muon would move rare and frequent ones alike.
  """

  def dims(path: tuple[str, ...], x: Any) -> MuonDimensionNumbers | None:
    stacked = path.count("layers")  # a leading axis of layers, each with its own matrix
    axes = tuple(range(stacked, getattr(x, "ndim", 0)))  # optax asks again with the other parameters masked out
    if path[-1] != "kernel" or "lm_head" in path or len(axes) not in (2, 3):
      return None
    inputs = 2 if path[-2] in ("out", "o_proj") and len(axes) == 3 else 1
    return MuonDimensionNumbers(axes[:inputs], axes[inputs:])

  return unflatten_dict({path: dims(path, x) for path, x in flatten_dict(params).items()})
