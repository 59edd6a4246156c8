"""The training step as shapes: what `--explain`, the pre-flight and MFU look at without allocating anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from semanticvla_jax.models.semanticvla import SemanticVLA
from semanticvla_jax.train import config_checks, flops, init, optimizer
from semanticvla_jax.train import step as stepping
from semanticvla_jax.train.partition import combine, partition
from semanticvla_jax.types import Batch, Observation


class Program(NamedTuple):
  """A step and its arguments: step(state, frozen, batch). All leaves are ShapeDtypeStructs."""

  step: Callable
  state: stepping.State
  frozen: dict
  batch: Batch


def from_config(config: Any, aux_loss: stepping.AuxLoss | None = None) -> Program:
  """The step that a config trains with. Raises ValueError for a config that does not fit together."""
  config_checks.check(config)
  model, bare = init.make_model(config, aux_loss)
  wanted = init.shapes(model, bare, config.trainable, config.frozen_dtype)
  trainable, frozen = partition(wanted, config.trainable)
  tx = optimizer.transform(config.optim)
  state = jax.eval_shape(lambda trainable: stepping.new_state(tx, trainable), trainable)
  schedule = optimizer.schedule(config.optim)
  step = stepping.make_step(model, tx, schedule, config.seed, aux_loss, config.optim.accumulate)
  return Program(step, state, frozen, abstract_batch(config, bare, aux_loss))


def abstract_observation(config: Any, bare: SemanticVLA, size: int) -> Observation:
  """What the policy of a config sees, as shapes."""

  def shape(dtype, *dims):
    return jax.ShapeDtypeStruct((size, *dims), dtype)

  pixels, words = (bare.siglip or bare.dino).image, config.data.instruction_length
  return Observation(
    images=shape(jnp.uint8, bare.num_views, pixels, pixels, 3),
    proprio=None if bare.proprio_dim is None else shape(jnp.float32, bare.proprio_dim),
    prompt=shape(jnp.int32, config.data.prompt_length),
    prompt_mask=shape(jnp.bool_, config.data.prompt_length),
    instruction=None if bare.text is None else shape(jnp.int32, words),
    instruction_mask=None if bare.text is None else shape(jnp.bool_, words),
  )


def abstract_batch(config: Any, bare: SemanticVLA, aux_loss: stepping.AuxLoss | None = None) -> Batch:
  """A global batch as shapes."""
  size, chunk = config.data.batch_size, config.model.chunk
  spoken = None if bare.codec is None else jax.ShapeDtypeStruct((size, bare.codec.numbers + 1), jnp.int32)
  return Batch(
    abstract_observation(config, bare, size),
    jax.ShapeDtypeStruct((size, chunk, config.model.action_dim), jnp.float32),
    jax.ShapeDtypeStruct((size, chunk), jnp.bool_),
    None if aux_loss is None else aux_loss.shapes(config, bare),
    spoken,
  )


def changed(config: Any, **values: Any) -> Any:
  """A copy of a config with flattened fields replaced ("data.batch_size")."""
  copy = config.copy_and_resolve_references()
  with copy.unlocked():
    for path, value in values.items():
      *folders, name = path.split(".")
      node = copy
      for folder in folders:
        node = node[folder]
      node[name] = value
  return copy


def example_flops(config: Any, aux_loss: stepping.AuxLoss | None = None) -> int:
  """FLOPs of one example, forward and backward, as the mathematics asks for them: nothing recomputed, no optimizer.

  The backward pass computes gradients of activations everywhere they are needed, of weights for trainable ones only, so
  with a frozen base it is about as much again as the forward pass, not twice as much.
  """
  one = changed(config, **{"data.batch_size": 1, "model.remat": None, "optim.accumulate": 1})
  model, _ = init.make_model(one, aux_loss)
  program = from_config(one, aux_loss)

  def loss(trainable, frozen, batch):
    return stepping.loss_fn(model, combine(trainable, frozen), batch, jax.random.key(0), aux_loss)[0]

  return flops.count(jax.value_and_grad(loss), program.state.trainable, program.frozen, program.batch)


def rates(config: Any, aux_loss: stepping.AuxLoss | None = None) -> dict:
  """What MFU needs, for `log.Metrics`: FLOPs of an example and the peak of all devices; {} where that is not known."""
  peak = flops.peak(jax.devices()[0].device_kind)
  return {} if peak is None else {"flops": example_flops(config, aux_loss), "peak": peak * jax.device_count()}
