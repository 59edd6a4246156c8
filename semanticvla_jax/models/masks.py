"""Who may attend to whom, and positions, both read off one validity mask (SemanticVLA Eq. 1)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from semanticvla_jax.errors import refuse

KINDS = ("block", "full", "causal")


def seen(images: Any, optional: tuple[int, ...], visual: int, length: int) -> Bool[Array, "b l"]:
  """Which of the `length` tokens [ <s> | visual … ] before a prompt are not those of a missing view.

  Args:
    images: u8[b v h w 3]; a black one of an optional view is padding.
    optional: numbers of the views that may be missing.
    visual: how many of the tokens are of images, view after view.
  """
  n, there = visual // images.shape[1], jnp.ones((images.shape[0], length), bool)
  for view in optional:
    shown = jnp.any(images[:, view] != 0, axis=(1, 2, 3))
    there = there.at[:, 1 + view * n : 1 + (view + 1) * n].set(shown[:, None])
  return there


def positions(valid: Bool[Array, "b l"]) -> Int[Array, "b l"]:
  """Rotary positions: real tokens count 0, 1, 2, …; padding, wherever it stands, takes no number."""
  return jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0)


def attention_mask(valid: Bool[Array, "b l"], block: Bool[Array, " l"], kind: str) -> Bool[Array, "b l l"]:
  """allowed[b, query, key].

  Sequence (`.` is padding):  [ s | v v q | p p . | O O O e ]    s: <s>, v: visual, q: proprioception, p: prompt,
                                                                O: action placeholders, e: </s>; block = O and e
      kind='block' (SemanticVLA)     kind='full' (OpenVLA-OFT)     kind='causal' (OpenVLA)

        key  s v v q p p . O O O e    s v v q p p . O O O e         s v v q p p . a a a
      query
        s    1 . . . . . . . . . .    1 1 1 1 1 1 . 1 1 1 1         1 . . . . . . . . .
        v    1 1 . . . . . . . . .    1 1 1 1 1 1 . 1 1 1 1         1 1 . . . . . . . .
        v    1 1 1 . . . . . . . .    1 1 1 1 1 1 . 1 1 1 1         1 1 1 . . . . . . .
        q    1 1 1 1 . . . . . . .    1 1 1 1 1 1 . 1 1 1 1         1 1 1 1 . . . . . .
        p    1 1 1 1 1 . . . . . .    1 1 1 1 1 1 . 1 1 1 1         1 1 1 1 1 . . . . .
        p    1 1 1 1 1 1 . . . . .    1 1 1 1 1 1 . 1 1 1 1         1 1 1 1 1 1 . . . .
        .    (don't care)
        O    1 1 1 1 1 1 . 1 1 1 1    1 1 1 1 1 1 . 1 1 1 1         1 1 1 1 1 1 . 1 . .
        O    1 1 1 1 1 1 . 1 1 1 1    1 1 1 1 1 1 . 1 1 1 1         1 1 1 1 1 1 . 1 1 .
        O    1 1 1 1 1 1 . 1 1 1 1    1 1 1 1 1 1 . 1 1 1 1         1 1 1 1 1 1 . 1 1 1
        e    1 1 1 1 1 1 . 1 1 1 1    1 1 1 1 1 1 . 1 1 1 1

  In `block` the prefix is causal and never sees the actions; the action block sees the prefix and all of itself.
  Differs from the paper: "bidirectional" there, bidirectional inside the action block only in the released code.

  Args:
    valid: which positions are real tokens. block: which positions are the action block. kind: one of KINDS.
  """
  causal = jnp.tri(valid.shape[-1], dtype=bool)
  rules = {"block": causal | (block[:, None] & block[None, :]), "full": jnp.ones_like(causal), "causal": causal}
  if kind not in rules:
    raise refuse("attention mask", f"{kind!r}", f"one of {KINDS}", "set model.mask to one of them")
  return rules[kind][None] & valid[:, None, :]
