"""Attention as one GPU kernel, for inference: logits stay on the chip; queries, keys and values are read in place.

XLA writes an encoder's logits in float32 and reads them again, and brings queries, keys and values into place before
that. With this kernel a 7B policy's call has 904 launches on an H100 instead of 1,354 (docs/performance.md). Written in
Pallas, compiled by Triton; `models/serving.py` says where it is used.

    one program a head and 64 queries:  for 64 keys at a time   logits, running maximum and sum, weighted values

For one device: XLA cannot split it over several, and would gather what it reads.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float

QUERIES, KEYS = 64, 64  # of one step; powers of two, as all shapes in the kernel
HIDDEN = -1e30  # logit of a key that may not be read; finite, so that a row without any key gives numbers


@flax.struct.dataclass
class Heads:
  """Queries, keys or values: `array` f[b l n h c] at `slot` of its third axis, so that joined ones need no copy."""

  array: Float[Array, "b l n h c"]
  slot: int = flax.struct.field(pytree_node=False, default=0)


def attention(
  q: Heads, k: Heads, v: Heads, mask: Bool[Array, "b_or_1 l_or_1 s"] | None = None, interpret: bool = False
) -> Float[Array, "b l h c"]:
  """softmax(q k' / √c) v, the softmax in float32; as `jax.nn.dot_product_attention` but for the order of sums.

  Args:
    mask: True where a query may read a key; the same for every query where its second axis is one.
    interpret: runs the kernel's steps as jax operations, on any device.
  """
  (b, length, _, heads, c), s = q.array.shape, k.array.shape[1]
  padded = max(16, pl.next_power_of_2(c))  # the least that a matrix unit takes

  def whole(x: Heads) -> pl.BlockSpec:  # a reference, of which the kernel loads what it needs
    return pl.BlockSpec((None, x.array.shape[1], None, None, padded), lambda b, h, i, slot=x.slot: (b, 0, slot, h, 0))

  operands, specs = [x.array for x in (q, k, v)], [whole(x) for x in (q, k, v)]
  if mask is not None:
    many, each = mask.shape[0] > 1, mask.shape[1] > 1
    shape = (None, length if each else None, s)
    specs.append(pl.BlockSpec(shape, lambda b, h, i: (b if many else 0, 0, 0)))
    operands.append(mask.astype(jnp.int8))
  return pl.pallas_call(
    functools.partial(_kernel, lengths=(length, s), width=c),
    grid=(b, heads, pl.cdiv(length, QUERIES)),
    in_specs=specs,
    out_specs=pl.BlockSpec((None, length, None, padded), lambda b, h, i: (b, 0, h, 0)),
    out_shape=jax.ShapeDtypeStruct((b, length, heads, c), q.array.dtype),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name="attention",
  )(*operands)


def difference(dtype: Any) -> float:
  """The largest difference from XLA's attention on this device, of random numbers with blocks that are not full."""
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v = (jax.random.normal(key, (2, 100, 3, 72), jnp.float32).astype(dtype) for key in keys[:3])
  mask = jax.random.bernoulli(keys[3], 0.6, (2, 100, 100)).at[..., 0].set(True)
  wanted = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
  got = attention(*(Heads(x[:, :, None]) for x in (q, k, v)), mask)
  return float(jnp.abs(got.astype(jnp.float32) - wanted.astype(jnp.float32)).max())


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, lengths: tuple[int, int], width: int) -> None:
  """64 queries of one head: f[64 c], written where they stand."""
  mask_ref, out_ref = refs if len(refs) == 2 else (None, *refs)
  length, s = lengths
  padded = out_ref.shape[-1]
  real = (jnp.arange(padded) < width)[None]
  rows = pl.dslice(pl.program_id(2) * QUERIES, QUERIES)
  asked = pl.program_id(2) * QUERIES + jnp.arange(QUERIES) < length
  q = triton.load(q_ref.at[rows], mask=asked[:, None] & real, other=0.0)

  def step(i, carry):
    out, top, total = carry
    at = pl.dslice(i * KEYS, KEYS)
    there = i * KEYS + jnp.arange(KEYS) < s
    k, v = (triton.load(ref.at[at], mask=there[:, None] & real, other=0.0) for ref in (k_ref, v_ref))
    logits = triton.dot(q, k.T) * width**-0.5
    logits = jnp.where(_readable(mask_ref, rows, at, asked, there), logits, HIDDEN)
    highest = jnp.maximum(top, logits.max(axis=1))
    weights, before = jnp.exp(logits - highest[:, None]), jnp.exp(top - highest)
    out = out * before[:, None] + triton.dot(weights.astype(v.dtype), v)
    return out, highest, total * before + weights.sum(axis=1)

  start = jnp.zeros((QUERIES, padded)), jnp.full(QUERIES, HIDDEN), jnp.zeros(QUERIES)
  out, _, total = jax.lax.fori_loop(0, pl.cdiv(s, KEYS), step, start)
  out = (out / total[:, None]).astype(out_ref.dtype)
  triton.store(out_ref.at[rows], out, mask=asked[:, None] & real)


def _readable(mask_ref: Any, rows: Any, at: Any, asked: Bool[Array, " q"], there: Bool[Array, " k"]) -> Array:
  """bool[q k] or bool[1 k]: the keys of this step that may be read."""
  if mask_ref is None:
    return there[None]
  if len(mask_ref.shape) == 1:
    return (there & (triton.load(mask_ref.at[at], mask=there, other=0) != 0))[None]
  within = asked[:, None] & there[None]
  return within & (triton.load(mask_ref.at[rows, at], mask=within, other=0) != 0)
