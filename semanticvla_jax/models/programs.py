"""The two programs of a policy, as functions of arrays: a sentence alone, and actions from images and sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from semanticvla_jax.types import Array, Observation, Sentence


def bare(model: nn.Module) -> nn.Module:
  """The model without its wrapper."""
  return getattr(model, "model", model)


def named(model: nn.Module, method: str) -> dict[str, str]:
  """Keyword of `model.apply` that runs a method of the model, through its wrapper if it has one."""
  return {"method": method} if bare(model) is model else {"call": method}


def positions_besides_prompt(model: nn.Module, params: Mapping, observation: Observation) -> int:
  """How many positions the sequence of a model has besides those of an observation's prompt.

  Args:
    params, observation: may be shapes alone.
  """
  read = lambda p, o: model.apply({"params": p}, o, **named(model, "read"))[0]  # noqa: E731
  own = bare(model)
  actions = 0 if own.coupler is None else own.chunk * own.coupler.tokens + 1
  return jax.eval_shape(read, params, observation).shape[1] + actions - observation.prompt.shape[1]


def sentence(model: nn.Module) -> Callable[..., Sentence]:
  """(params, [prompt i32[b t], mask bool[b t], instruction i32[b m], mask bool[b m]]) → what they alone decide.

  Args:
    model: of `build`, or that in a wrapper (`lora.LoRA`, `serving.Quantized`).
  """
  method = named(model, "sentence")

  def run(params: Mapping, words: Sequence[Array | None]) -> Sentence:
    return model.apply({"params": params}, Observation(None, None, *words), True, **method)

  return run


def actions(model: nn.Module) -> Callable[..., Any]:
  """(params, sentences, images u8[b v h w 3], proprioception f32[b p]) → normalized actions f32[b k a].

  Of a model that remembers: (…, proprioception, memory) → (actions, memory).
  """

  def run(params: Mapping, sentences: Sentence, images: Array, proprio: Array | None) -> Array:
    return model.apply({"params": params}, Observation(images, proprio, None, None), sentence=sentences).actions

  def remember(params: Mapping, sentences: Sentence, images: Array, proprio: Array | None, memory: Mapping) -> tuple:
    seen = Observation(images, proprio, None, None)
    out = model.apply({"params": params}, seen, sentence=sentences, memory=memory)
    return out.actions, out.memory

  return remember if bare(model).remembers else run


def empty_memory(model: nn.Module, params: Mapping, observation: Observation) -> dict[str, np.ndarray] | None:
  """What a model remembers before the first query of each of an observation's rows: zeros; None for most models."""
  if not bare(model).remembers:
    return None
  run = lambda params, observation: model.apply({"params": params}, observation).memory  # noqa: E731
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(run, params, observation))
