"""Where parameters come from: a fresh draw, or a policy folder whose parts the model takes over."""

from __future__ import annotations

import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax.models.lora import TARGETS, LoRA
from semanticvla_jax.models.semanticvla import GREEDY_TOKENS, SemanticVLA, abstract_params, build, dummy_observation
from semanticvla_jax.train.grounding import Grounded
from semanticvla_jax.train.partition import combine, partition


def make_model(config: Any) -> tuple[nn.Module, SemanticVLA]:
  """(the module to train, the bare model): wrapped in LoRA when config.lora is there, Grounded if hints come along.

  Raises:
    ValueError: unknown LoRA targets, action tokens for a chunk or for two arms, or hints that cannot be used.
  """
  bare = build(config.model)
  spoken = (config.model.chunk, config.model.action_dim)
  if bare.coupler is None and (spoken != (1, GREEDY_TOKENS) or config.train.grounding is not None):
    raise ValueError(
      f"config.model.coupler: got None (OpenVLA's action tokens) with chunk, action_dim = {spoken}, grounding = "
      f"{config.train.grounding}; expected (1, {GREEDY_TOKENS}) and none: one token for each dimension of one action. "
      "See configs/openvla.py, or set model.coupler='single' (configs/openvla_oft.py)."
    )
  if config.train.grounding is not None and (config.lora is not None or config.data.mixture != "expert"):
    raise ValueError(
      f"config.train.grounding: got weights beside lora={config.lora is not None}, mixture={config.data.mixture!r}; "
      "expected training from scratch on the expert's own states (configs/pretrain.py); set it to None."
    )
  if config.train.grounding is not None:
    return Grounded(bare.clone()), bare
  if config.lora is None:
    return bare, bare
  if config.lora.targets not in TARGETS:
    raise ValueError(f"config.lora.targets: got {config.lora.targets!r}, expected one of {sorted(TARGETS)}.")
  return LoRA(bare.clone(), config.lora.rank, config.lora.alpha, TARGETS[config.lora.targets]), bare


def shapes(model: nn.Module, bare: SemanticVLA, trainable: str | None, frozen_dtype: str | None) -> dict:
  """The parameters as ShapeDtypeStructs: trainable ones float32, frozen floating-point ones `frozen_dtype` if given."""
  tree = abstract_params(model, dummy_observation(bare))
  kept, frozen = partition(tree, trainable)
  if frozen_dtype is not None:
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(frozen_dtype)), frozen)
  return combine(kept, frozen)


def draw(model: nn.Module, bare: SemanticVLA, seed: int, wanted: dict, where: Any) -> dict:
  """Initial values of the parameters `wanted`, a function of the seed, made where they lie.

  Args:
    wanted: shapes and types, all of the model's parameters or some.
    where: their shardings, or one for all.
  """
  names = set(flatten_dict(wanted))

  def make():
    rngs = {"params": jax.random.key(seed), "noise": jax.random.key(seed)}
    params = flatten_dict(model.init(rngs, dummy_observation(bare))["params"])
    return cast(unflatten_dict({path: x for path, x in params.items() if path in names}), wanted)

  return jax.jit(make, out_shardings=where)()


def cast(params: dict, like: dict) -> dict:
  """Every parameter in the type that `like` has for it."""
  return jax.tree.map(lambda x, y: x.astype(y.dtype), params, like)


def take_over(wanted: dict, base: dict, source: str) -> tuple[dict, dict]:
  """Splits the parameters `wanted` (shapes or arrays) into those that `base` has, as it has them, and those it lacks.

  Raises:
    ValueError: a shape that differs, or a parameter of `base` that the model does not have.
  """
  ours, theirs = flatten_dict(wanted, sep="/"), flatten_dict(base, sep="/")
  extra = sorted(set(theirs) - set(ours))
  both = [k for k in theirs if k in ours]
  wrong = [f"{k}: {theirs[k].shape} there, {ours[k].shape} here" for k in both if theirs[k].shape != ours[k].shape]
  if extra or wrong:
    raise ValueError(
      f"init_from {source}: got {len(extra)} parameters the model does not have ({extra[:4]}) and {len(wrong)} of "
      f"another shape ({wrong[:4]}), expected a base of this config; pass the config it was trained with."
    )
  new = sorted(set(ours) - set(theirs))
  logging.info("took %d parameters from %s; %d are new (%s …)", len(theirs), source, len(new), ", ".join(new[:2]))
  return base, unflatten_dict({k: ours[k] for k in new}, sep="/")
