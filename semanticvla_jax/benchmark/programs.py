"""Models of the rows as shapes, the programs that run them, and values for their parameters made on the device."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax.benchmark import rows
from semanticvla_jax.models import lora
from semanticvla_jax.models.semanticvla import SemanticVLA, abstract_params, build, dummy_observation
from semanticvla_jax.train import step as stepping
from semanticvla_jax.train.partition import combine, partition
from semanticvla_jax.types import Batch, Observation

_ON_DEVICE = 1 << 20  # numbers; smaller parameters are drawn on the host


class Inference(NamedTuple):
  """apply(params, observation) → actions f32[b k a], with the memory of a model that has one; both arguments as
  ShapeDtypeStructs."""

  apply: Callable
  params: dict
  observation: Observation


class Training(NamedTuple):
  """loss(trainable, frozen, batch, key) → f32[]; the arguments as ShapeDtypeStructs but the key."""

  model: nn.Module
  loss: Callable
  trainable: dict
  frozen: dict
  batch: Batch
  key: jax.Array


def inference(config: Mapping[str, Any], prompt: int, batch: int = 1) -> Inference:
  """The forward pass of a model config, `prompt` tokens long."""
  model = build(config)
  observation = observation_shapes(model, prompt, batch)
  params = param_shapes(model)

  def apply(params, observation):
    out = model.apply({"params": params}, observation)
    return out.actions if out.memory is None else (out.actions, out.memory)

  return Inference(apply, params, observation)


def training(
  name: str, config: Mapping[str, Any], prompt: int, batch: int = 1, frozen_dtype: str | None = None
) -> Training:
  """What a row's recipe trains of a model config: LoRA, and its own parts in full.

  Args:
    frozen_dtype: of frozen parameters; None for float32. Trainable ones are float32.
  """
  recipe, bare = rows.RECIPES[rows.row(name).recipe], build(config)
  model = lora.LoRA(bare.clone(), recipe.rank, recipe.alpha, lora.TARGETS[recipe.targets])
  trainable, frozen = partition(param_shapes(model), recipe.trainable)
  if frozen_dtype is not None:
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(frozen_dtype)), frozen)

  def loss(trainable, frozen, batch, key):
    return stepping.loss_fn(model, combine(trainable, frozen), batch, key)[0]

  return Training(model, loss, trainable, frozen, batch_shapes(bare, config, prompt, batch), jax.random.key(0))


@functools.lru_cache(maxsize=4)
def param_shapes(model: nn.Module) -> dict:
  """The parameters of a model, or of one in LoRA, as shapes; remembered, for a large one takes seconds to trace."""
  bare = model.model if isinstance(model, lora.LoRA) else model
  return abstract_params(model, dummy_observation(bare))


def observation_shapes(model: SemanticVLA, prompt: int, batch: int) -> Observation:
  """What a model reads, as shapes; the instruction as long as the text tower allows."""
  return jax.eval_shape(functools.partial(dummy_observation, model, batch, prompt))


def batch_shapes(model: SemanticVLA, config: Mapping[str, Any], prompt: int, batch: int) -> Batch:
  """A training batch, as shapes."""
  actions = (batch, model.chunk, config.get("action_dim", 7))
  return Batch(
    observation_shapes(model, prompt, batch),
    jax.ShapeDtypeStruct(actions, jnp.float32),
    jax.ShapeDtypeStruct(actions[:2], jnp.bool_),
  )


def random_batch(shapes: Batch, vocab: int, seed: int = 0) -> Batch:
  """Values for a training batch: random pictures and numbers, no padding; numpy arrays."""
  rng = np.random.default_rng(seed)

  def value(x):
    if x.dtype == jnp.uint8:
      return rng.integers(0, 256, x.shape, dtype=np.uint8)
    if x.dtype == jnp.bool_:
      return np.ones(x.shape, bool)
    if x.dtype == jnp.int32:
      return rng.integers(3, vocab, x.shape).astype(np.int32)
    return rng.uniform(-1, 1, x.shape).astype(np.float32)

  return jax.tree.map(value, shapes)


def random_params(shapes: dict, dtype: Any = None, seed: int = 0) -> dict:
  """Values for parameters, on the device: kernels ~ N(0, 1/inputs), norms about one, nothing zero.

  Large ones are drawn there, small ones on the host, for each shape drawn on the device is a program to compile.

  Args:
    shapes: as ShapeDtypeStructs. dtype: of all of them; None for their own.
  """
  key = jax.random.key(seed, impl="rbg")  # cheap to compile and to run, for billions of numbers
  rng, made = np.random.default_rng(seed), {}
  for path, x in flatten_dict(shapes).items():
    kind = jnp.dtype(dtype or x.dtype)
    mean, std = _moments(path, x.shape)
    if x.size < _ON_DEVICE:
      values = rng.standard_normal(x.shape, np.float32) * std + mean
      made[path] = jax.device_put(values.astype(kind))
    else:
      leaf = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
      made[path] = _normal(leaf, mean, std, x.shape, kind.name)
  return unflatten_dict(made)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _normal(key: jax.Array, mean: float, std: float, shape: tuple[int, ...], dtype: str) -> jax.Array:
  return jax.random.normal(key, shape, jnp.dtype(dtype)) * std + mean


def _moments(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[float, float]:
  """Mean and standard deviation of a parameter, by its name."""
  name = path[-1]
  if name in ("scale", "ls1", "ls2"):
    return 1.0, 0.1
  if name in ("bias", "cls", "reg", "pos_embedding", "lora_b"):
    return 0.0, 0.02
  if name in ("embedding", "queries", "probe"):
    return 0.0, 0.5
  shape = shape[1:] if "layers" in path else shape  # a leading axis of layers
  inputs = shape[:-1] if name == "lora_a" or path[-2] in ("out", "o_proj") or len(shape) in (2, 4) else shape[:1]
  return 0.0, float(np.prod(inputs)) ** -0.5
