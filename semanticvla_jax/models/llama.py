"""Llama-2 decoder: RMSNorm, rotary attention, SwiGLU; one block, scanned or unrolled, over any attention mask.

Parameters lie either stacked (`layers/…` with a leading axis over depth: one compiled body, for training) or apart
(`layers_{i}/…`: no copies out of a stack, for inference). `stack_layers` and `unstack_layers` convert, bit for bit.
With `fused`, projections of one input are one product (`qkv_proj`, `gate_up_proj`): see `models/serving.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.models import masks
from semanticvla_jax.models.pruner import top_indices
from semanticvla_jax.models.routed import Router, Routing

REMAT = {
  None: None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rope(x: Float[Array, "b l h c"], positions: Int[Array, "b l"], theta: float) -> Float[Array, "b l h c"]:
  """Rotary embedding, Hugging Face's half-split convention; angles in float32 (Su et al. 2021)."""
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions.astype(jnp.float32)[..., None, None] * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def take(x: Array, at: Int[Array, "b w"]) -> Array:
  """The positions `at` of x [b l …]: [b w …]."""
  return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)


def attention_weights(
  q: Float[Array, "b r h c"], k: Float[Array, "b s h c"], mask: Bool[Array, "b r s"]
) -> Float[Array, "b r s"]:
  """Softmax attention in float32, mean over heads; padding that asks looks nowhere in particular."""
  logits = jnp.einsum("brhc,bshc->bhrs", q.astype(jnp.float32), k.astype(jnp.float32)) / q.shape[-1] ** 0.5
  return jax.nn.softmax(jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min), axis=-1).mean(axis=1)


class Attention(nn.Module):
  """Rotary multi-head attention; with a cache, new keys and values are written at `write_at`.

  With `queries` i32[b w], only these positions ask: the output is f[b w d]. The third result is None, or with `rows`
  i32[b r] where these look, f32[b r s], mean over heads.
  """

  num_heads: int
  theta: float
  fused: bool = False
  kernel: str = "xla"  # with `fused`, without a cache: 'triton', models/attention_kernel.py
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b l d"], positions, mask: Bool[Array, "b l s"], cache, write_at, queries=None, rows=None
  ):
    d = x.shape[-1]
    dense = dict(use_bias=False, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype)
    heads = (self.num_heads, d // self.num_heads)
    if self.fused:
      qkv = nn.DenseGeneral((3, *heads), name="qkv_proj", **dense)(x)
      q, k, v = (qkv[:, :, i] for i in range(3))
      q, at = (q, positions) if queries is None else (take(q, queries), take(positions, queries))
    else:
      asking, at = (x, positions) if queries is None else (take(x, queries), take(positions, queries))
      inputs = (("q_proj", asking), ("k_proj", x), ("v_proj", x))
      q, k, v = (nn.DenseGeneral(heads, name=name, **dense)(y) for name, y in inputs)
    mask = mask if queries is None else take(mask, queries)
    q, k = rope(q, at, self.theta), rope(k, positions, self.theta)
    if cache is not None:
      k, v = (
        jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), write_at, axis=1)
        for old, new in zip(cache, (k, v))
      )
      cache = (k, v)
    weights = None if rows is None else attention_weights(take(q, rows), k, take(mask, rows))
    if self.kernel == "triton" and cache is None:
      from semanticvla_jax.models.attention_kernel import Heads, attention  # Pallas, which nothing else needs

      out = attention(Heads(q[:, :, None]), Heads(k[:, :, None]), Heads(qkv, 2), mask)
    else:
      out = jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask[:, None])
    return nn.DenseGeneral(d, axis=(-2, -1), name="o_proj", **dense)(out), cache, weights


class MLP(nn.Module):
  """SwiGLU (Shazeer 2020)."""

  mlp_dim: int
  fused: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    dense = dict(use_bias=False, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype)
    if self.fused:
      both = nn.DenseGeneral((2, self.mlp_dim), name="gate_up_proj", **dense)(x)
      gate, up = both[..., 0, :], both[..., 1, :]
    else:
      gate = nn.Dense(self.mlp_dim, name="gate_proj", **dense)(x)
      up = nn.Dense(self.mlp_dim, name="up_proj", **dense)(x)
    return nn.Dense(x.shape[-1], name="down_proj", **dense)(nn.silu(gate) * up)


class Block(nn.Module):
  """One decoder layer; the carry is the residual stream, all of it or that of the positions `queries` i32[b w].

  With `rows`, what Attention says of them comes with the cache.
  """

  num_heads: int
  mlp_dim: int
  eps: float
  theta: float
  fused: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"], positions, mask, cache, write_at, queries=None, rows=None):
    norm = dict(epsilon=self.eps, dtype=self.dtype)
    y, cache, weights = Attention(self.num_heads, self.theta, self.fused, self.kernel, self.dtype, name="attn")(
      nn.RMSNorm(name="input_norm", **norm)(x), positions, mask, cache, write_at, queries, rows
    )
    x = y + (x if queries is None else take(x, queries))
    x = x + MLP(self.mlp_dim, self.fused, self.dtype, name="mlp")(nn.RMSNorm(name="post_attention_norm", **norm)(x))
    x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
    self.sow("intermediates", "hidden", x)
    return x, cache if rows is None else (cache, weights)


class RoutedBlock(Block):
  """A decoder layer that sees `share` of the visual tokens.

  Positions are renumbered inside it, as in CogVLA's code, and what the MLP adds to a token is multiplied by its weight,
  what attention adds is not.
  """

  share: float = 1.0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b l D"],
    mask: Bool[Array, "b l l"],
    valid: Bool[Array, "b l"],
    words: Bool[Array, "b l"],
    visual: int,
  ) -> Float[Array, "b l D"]:
    """The residual stream → the same behind this layer; `words` and `visual` as for `Router`."""
    (b, length, _), norm = x.shape, dict(epsilon=self.eps, dtype=self.dtype)
    h = nn.RMSNorm(name="input_norm", **norm)(x)
    weights = Router(name="router")(h, visual, words)
    kept = top_indices(weights[:, 1 : 1 + visual], max(int(visual * self.share), 1), "visual tokens of a routed layer")
    rest = jnp.broadcast_to(jnp.arange(1 + visual, length), (b, length - 1 - visual))
    on = jnp.concatenate([jnp.zeros((b, 1), kept.dtype), 1 + kept, rest.astype(kept.dtype)], axis=1)
    inside = jnp.take_along_axis(take(mask, on), on[:, None], axis=2)
    how = (self.num_heads, self.theta, self.fused, self.kernel, self.dtype)
    y, _, _ = Attention(*how, name="attn")(take(h, on), masks.positions(take(valid, on)), inside, None, 0)
    some = take(x, on) + y
    y = MLP(self.mlp_dim, self.fused, self.dtype, name="mlp")(nn.RMSNorm(name="post_attention_norm", **norm)(some))
    some = some + (take(weights, on)[..., None] * y).astype(y.dtype)
    x = x.at[jnp.arange(b)[:, None], on].set(some.astype(x.dtype))
    x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
    self.sow("intermediates", "hidden", x)
    self.sow("intermediates", "kept_visual", kept)
    return x


class Llama(nn.Module):
  """The decoder between its embeddings and its logits.

  Attributes:
    vocab, width, depth, num_heads, mlp_dim: sizes. eps: of RMSNorm (1e-6 in OpenVLA's config, not Llama-2's 1e-5).
    theta: rotary base. scan: stacked layers (True) or layers apart (False). remat: None, 'full' or 'dots', what the
    backward pass recomputes of each layer: nothing, all, all but matrix products. fused, kernel: see models/serving.py.
    skip: numbers of layers that are left out, separate ones; they have parameters all the same. routing: of separate
    layers that see some of the visual tokens, for `routed_states_at` alone; None for none.
  """

  vocab: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  eps: float = 1e-6
  theta: float = 10000.0
  scan: bool = True
  remat: str | None = None
  fused: bool = False
  kernel: str = "xla"
  skip: tuple[int, ...] = ()
  routing: Routing | None = None
  dtype: Any = jnp.float32

  def setup(self):
    if self.remat not in REMAT:
      raise ValueError(f"llama: got remat {self.remat!r}, expected one of {list(REMAT)}; set model.remat.")
    self.embed = nn.Embed(self.vocab, self.width, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype)
    sizes = dict(num_heads=self.num_heads, mlp_dim=self.mlp_dim, eps=self.eps, theta=self.theta)
    sizes |= dict(fused=self.fused, kernel=self.kernel, dtype=self.dtype)
    block = Block
    if self.remat:
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
    if self.scan:
      self.layers = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
        length=self.depth,
      )(**sizes)
    else:
      shares = [None] * self.depth if self.routing is None else self.routing.shares(self.depth)
      routed = RoutedBlock
      if self.remat:
        routed = nn.remat(RoutedBlock, policy=REMAT[self.remat], static_argnums=(5,))
      self.layers = [block(**sizes) if share is None else routed(**sizes, share=share) for share in shares]
    self.norm = nn.RMSNorm(epsilon=self.eps, dtype=self.dtype)
    self.lm_head = nn.Dense(self.vocab, use_bias=False, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype)

  def __call__(
    self,
    x: Float[Array, "b l d"],
    positions: Int[Array, "b l"],
    mask: Bool[Array, "b l s"],
    cache: tuple[Float[Array, "L b s h c"], Float[Array, "L b s h c"]] | None = None,
    write_at: Int[Array, ""] | int = 0,
  ):
    """Embeddings → (states after the final norm f[b l d], cache). Key axis `s` is `l` without a cache."""
    if self.scan:
      x, cache = self.layers(x, positions, mask, cache, write_at)
    else:
      caches = []
      for i, layer in enumerate(self.layers):
        layer_cache = cache and (cache[0][i], cache[1][i])
        if self._runs(i):
          x, layer_cache = layer(x, positions, mask, layer_cache, write_at)
        caches.append(layer_cache)
      cache = cache and tuple(jnp.stack(part) for part in zip(*caches))
    return self.norm(x), cache

  def _runs(self, i: int) -> bool:
    """Whether layer i runs: all do where parameters are made."""
    return i not in self.skip or self.is_initializing()

  def begin(
    self,
    x: Float[Array, "b l d"],
    positions: Int[Array, "b l"],
    mask: Bool[Array, "b l l"],
    layers: int,
    rows: Int[Array, "b r"] | None = None,
    start: int = 0,
  ) -> tuple[Float[Array, "b l d"], Float[Array, "b r l"] | None]:
    """Embeddings → (the residual stream behind the first `layers`, where `rows` look in the last of them).

    With separate layers alone. The second is float32, the mean over heads; None without `rows` or layers. With `start`,
    x is the residual stream behind the first `start` layers.
    """
    weights = None
    for i, layer in enumerate(self.layers[start:layers], start):
      if not self._runs(i):
        continue
      asked = rows if i == layers - 1 else None
      x, found = layer(x, positions, mask, None, 0, None, asked)
      weights = None if asked is None else found[1]
    return x, weights

  def states_at(
    self,
    x: Float[Array, "b l d"],
    positions: Int[Array, "b l"],
    mask: Bool[Array, "b l l"],
    at: Int[Array, "b w"],
    start: int = 0,
  ) -> tuple[Float[Array, "b l d"], Float[Array, "b w d"]]:
    """Embeddings → (states after the final norm, those of the positions `at`).

    With `start`, x is the residual stream behind the first `start` layers, which have to be separate. With separate
    layers the second are computed separately, so that the last layer's queries and MLP of all other positions are never
    run where nothing reads the first (under jit).
    """
    if self.scan:
      states, _ = self(x, positions, mask)
      return states, take(states, at)
    *before, last = (layer for i, layer in enumerate(self.layers) if i >= start and self._runs(i))
    for layer in before:
      x, _ = layer(x, positions, mask, None, 0)
    states, _ = last(x, positions, mask, None, 0)
    some, _ = last(x, positions, mask, None, 0, at)
    return self.norm(states), self.norm(some)

  def routed_states_at(
    self,
    x: Float[Array, "b l d"],
    positions: Int[Array, "b l"],
    mask: Bool[Array, "b l l"],
    at: Int[Array, "b w"],
    valid: Bool[Array, "b l"],
    words: Bool[Array, "b l"],
    visual: int,
  ) -> tuple[Float[Array, "b l d"], Float[Array, "b w d"]]:
    """As `states_at`, with routed layers; see RoutedBlock for the last three."""
    for i, (layer, share) in enumerate(zip(self.layers, self.routing.shares(self.depth))):
      if self._runs(i):
        x = layer(x, positions, mask, None, 0)[0] if share is None else layer(x, mask, valid, words, visual)
    states = self.norm(x)
    return states, take(states, at)

  @nn.nowrap
  def empty_cache(self, batch: Any, length: int) -> tuple[Float[Array, "L b s h c"], Float[Array, "L b s h c"]]:
    """A key/value cache for `length` positions, zeros in the compute type; `batch` may be symbolic (jax.export)."""
    shape = (self.depth, batch, length, self.num_heads, self.width // self.num_heads)
    return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

  def embed_tokens(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    return self.embed(ids)

  def logits(self, states: Float[Array, "b l d"]) -> Float[Array, "b l vocab"]:
    """Logits over the whole vocabulary, float32. Only models that speak in tokens have this matrix."""
    return self.lm_head(states).astype(jnp.float32)


def from_config(c: Mapping[str, Any], dtype: Any) -> Llama:
  """The decoder of a resolved model config."""
  how = dict(scan=c["scan"], remat=c["remat"], fused=c["fused"], kernel=c["attention"], skip=tuple(c["skip_layers"]))
  how |= dict(routing=None if c["routing"] is None else Routing(**c["routing"]))
  return Llama(**c["variant"]["llm"], **how, dtype=dtype)


def unstack_layers(params: dict) -> dict:
  """`layers/…` with a leading depth axis → `layers_{i}/…` (for `scan=False`)."""
  out = {}
  for path, leaf in flatten_dict(params).items():
    if "layers" not in path:
      out[path] = leaf
      continue
    at = path.index("layers")
    for i in range(leaf.shape[0]):
      out[*path[:at], f"layers_{i}", *path[at + 1 :]] = leaf[i]
  return unflatten_dict(out)


def stack_layers(params: dict) -> dict:
  """`layers_{i}/…` → `layers/…` with a leading depth axis (for `scan=True`)."""
  out, apart = {}, {}
  for path, leaf in flatten_dict(params).items():
    at = next((j for j, name in enumerate(path) if re.fullmatch(r"layers_\d+", name)), None)
    if at is None:
      out[path] = leaf
    else:
      apart.setdefault((*path[:at], "layers", *path[at + 1 :]), {})[int(path[at][len("layers_") :])] = leaf
  out |= {path: jnp.stack([leaves[i] for i in range(len(leaves))]) for path, leaves in apart.items()}
  return unflatten_dict(out)
