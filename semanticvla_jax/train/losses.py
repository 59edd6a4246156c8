"""What training minimises, in float32.

A loss is a sum over the examples it is given, divided by a count that may be that of more of them: where a batch is
taken in parts, each is divided by the count of the whole batch, so that the parts' losses and gradients add up to it.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

GROUPS = {"translation": slice(0, 3), "rotation": slice(3, 6), "gripper": slice(6, 7)}


def divided(total: Float[Array, "*d"], count: Float[Array, ""]) -> Float[Array, "*d"]:
  """A sum over a count; where nothing was counted, the sum, which is 0 then."""
  return total / jnp.maximum(count, 1.0)


def steps(mask: Bool[Array, "b k"]) -> Float[Array, ""]:
  """How many actions carry a loss."""
  return mask.sum(dtype=jnp.float32)


def l1(
  predicted: Float[Array, "b k a"],
  actions: Float[Array, "b k a"],
  mask: Bool[Array, "b k"],
  count: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Mean |predicted − actions| over unmasked steps (the released loss), and the same per action group of the arms.

  Args:
    count: `steps` to divide by; None for those of `mask`.
  """
  error = jnp.abs(predicted.astype(jnp.float32) - actions.astype(jnp.float32))
  weight = mask.astype(jnp.float32)[..., None]
  per_dim = divided((error * weight).sum(axis=(0, 1)), steps(mask) if count is None else count)
  groups = {}
  if per_dim.shape[0] % 7 == 0:
    arms = per_dim.reshape(-1, 7)
    groups = {f"l1_{name}": arms[:, dims].mean() for name, dims in GROUPS.items()}
  return per_dim.mean(), groups


def next_token(
  logits: Float[Array, "b t vocab"],
  ids: Int[Array, "b t"],
  mask: Bool[Array, "b t"],
  count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
  """Mean cross entropy of ids[:, j + 1] under logits[:, j] where mask[:, j + 1] (OpenVLA: action tokens and </s>).

  Args:
    count: tokens to divide by; None for those of `mask`.
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:])
  weight = mask[:, 1:].astype(jnp.float32)
  return divided((losses * weight).sum(), weight.sum() if count is None else count)


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
