"""What training minimises, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

GROUPS = {"translation": slice(0, 3), "rotation": slice(3, 6), "gripper": slice(6, 7)}


def l1(
  predicted: Float[Array, "b k a"], actions: Float[Array, "b k a"], mask: Bool[Array, "b k"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Mean |predicted − actions| over unmasked steps (the released loss), and the same per action group of the arms."""
  error = jnp.abs(predicted.astype(jnp.float32) - actions.astype(jnp.float32))
  weight = mask.astype(jnp.float32)[..., None]
  total = jnp.maximum(weight.sum(), 1.0)
  per_dim = (error * weight).sum(axis=(0, 1)) / total
  groups = {}
  if per_dim.shape[0] % 7 == 0:
    arms = per_dim.reshape(-1, 7)
    groups = {f"l1_{name}": arms[:, dims].mean() for name, dims in GROUPS.items()}
  return per_dim.mean(), groups


def next_token(logits: Float[Array, "b t vocab"], ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, ""]:
  """Mean cross entropy of ids[:, j + 1] under logits[:, j] where mask[:, j + 1] (OpenVLA: action tokens and </s>)."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:])
  weight = mask[:, 1:].astype(jnp.float32)
  return (losses * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def append(
  prompt: Int[Array, "b t"], prompt_mask: Bool[Array, "b t"], tokens: Int[Array, "b n"]
) -> tuple[Int[Array, "b t+n"], Bool[Array, "b t+n"], Int[Array, "b t+n"]]:
  """Prompts with `tokens` behind their last real token: ids, which are real, and the number of each among `tokens`.

  Numbers below 0 are the prompt's, those from n on padding.
  """
  n = tokens.shape[1]
  number = jnp.arange(prompt.shape[1] + n) - prompt_mask.sum(axis=-1, dtype=jnp.int32)[:, None]
  behind = jnp.take_along_axis(tokens, jnp.clip(number, 0, n - 1), axis=1)
  ids = jnp.where((number >= 0) & (number < n), behind, jnp.pad(prompt, ((0, 0), (0, n))))
  return ids, number < n, number


def alignment(
  similarity: Float[Array, "bv n m"], focus: Float[Array, "b v n"], temperature: float = 0.05
) -> Float[Array, ""]:
  """Pulls the ID-Pruner's patch scores (SemanticVLA Eq. 5) towards the patches of the objects the instruction names.

  Stands in for the contrastive pre-training that a from-scratch SigLIP lacks: cross entropy between a softmax over a
  view's patch scores and `focus`, a distribution over its patches. Views whose focus is empty (sums to 0) carry none.
  """
  scores = similarity.astype(jnp.float32).mean(axis=2) * (similarity.shape[2] / 8)  # padding adds a constant
  log_p = jax.nn.log_softmax(scores / temperature, axis=-1)
  focus = focus.reshape(log_p.shape)
  return -(focus * log_p).sum() / jnp.maximum(focus.sum(), 1.0)
