"""SigLIP and DINOv2 as one Vision Transformer; what differs between them is a value.

Parameter names are big_vision's (`embedding`, `pos_embedding`, `Transformer/encoderblock_{i}/…`, `MAPHead_0`), so a
released SigLIP `.npz` loads without a rename table. DINOv2 goes beyond them with `cls`, `reg` (prefix tokens), `ls1`,
`ls2` (LayerScale) and, when a condition is given, `film` in each block.

    embed:  [ cls reg | fill | patches + pos_embedding | queries ]        cls, reg: DINOv2;  queries: SA-Pruner
    run:    blocks start … stop-1, so that a Dense-Fuser can step in between
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, UInt8

from semanticvla_jax.models.mlp import gelu, torch_kernel_init

NORM_EPS = 1e-6


def layer_norm(name: str | None = None, dtype: Any = jnp.float32) -> nn.LayerNorm:
  """LayerNorm with the encoders' epsilon; statistics in float32, two-pass variance (exact for tiny variances)."""
  return nn.LayerNorm(epsilon=NORM_EPS, dtype=dtype, use_fast_variance=False, name=name)


def attention_weights(
  q: Float[Array, "b l h c"], k: Float[Array, "b s h c"], mask: Bool[Array, "b_or_1 1 1 s"] | None = None
) -> Float[Array, "b h l s"]:
  """Softmax attention weights in float32, for looking at (Figure 5); costs nothing under jit when unread."""
  logits = jnp.einsum("blhc,bshc->bhls", q, k, preferred_element_type=jnp.float32)
  return jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1, where=mask)


def sincos_2d(side: int, width: int, wavelengths: float = 100.0) -> Float[Array, "1 n d"]:
  """Sines and cosines of row and column at width/4 frequencies, 1 … 1/wavelengths (Chen et al. 2021, MoCo v3).

  Raises:
    ValueError: a width that four does not divide.
  """
  if width % 4:
    raise ValueError(f"sincos_2d: got width {width}, expected a multiple of 4; use position_init='normal'.")
  frequency = wavelengths ** -jnp.linspace(0, 1, width // 4)
  at = jnp.arange(side)[:, None] * frequency
  row, column = jnp.repeat(at, side, axis=0), jnp.tile(at, (side, 1))
  return jnp.concatenate([f(x) for x in (row, column) for f in (jnp.sin, jnp.cos)], axis=1)[None]


class JoinedDense(nn.Module):
  """`nn.DenseGeneral` that adds its bias to one flat row, as a GPU's library does within the product.

  XLA spreads a bias of several axes over all tokens first, where no other operation of its own follows.
  """

  features: tuple[int, ...]
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l *features"]:
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], *self.features))
    bias = self.param("bias", nn.initializers.zeros, self.features)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return (x @ kernel.reshape(x.shape[-1], -1) + bias.reshape(-1)).reshape(*x.shape[:-1], *self.features)


class Attention(nn.Module):
  """Multi-head attention with big_vision's parameter names; returns queries and keys too."""

  num_heads: int
  fused: bool = False  # queries, keys and values of one input as one product: see models/serving.py
  kernel: str = "xla"  # with `fused`: 'triton', models/attention_kernel.py
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b l d"], y: Float[Array, "b s d"], mask: Bool[Array, "b_or_1 1 l_or_1 s"] | None = None
  ) -> tuple[Float[Array, "b l d"], Float[Array, "b l h c"], Float[Array, "b s h c"]]:
    """`x` asks, `y` is asked. When fused, `x` is the last l tokens of `y`."""
    d = x.shape[-1]
    if d % self.num_heads:
      raise ValueError(f"attention: width {d} is not a multiple of {self.num_heads} heads; change one of the two.")
    init = nn.initializers.xavier_uniform()
    heads = (self.num_heads, d // self.num_heads)
    if self.fused:
      joined = JoinedDense if self.kernel == "triton" else nn.DenseGeneral
      qkv = joined((3, *heads), kernel_init=init, dtype=self.dtype, name="qkv")(y)
      q, k, v = qkv[:, y.shape[1] - x.shape[1] :, 0], qkv[:, :, 1], qkv[:, :, 2]
    else:
      inputs = (("query", x), ("key", y), ("value", y))
      q, k, v = (nn.DenseGeneral(heads, kernel_init=init, dtype=self.dtype, name=name)(z) for name, z in inputs)
    if self.kernel == "triton":
      from semanticvla_jax.models.attention_kernel import Heads, attention  # Pallas, which nothing else needs

      asking = qkv if x.shape[1] == y.shape[1] else q[:, :, None]
      out = attention(Heads(asking), Heads(qkv, 1), Heads(qkv, 2), None if mask is None else mask[:, 0])
    else:
      out = jax.nn.dot_product_attention(q, k, v, mask=mask)  # softmax in float32
    out = nn.DenseGeneral(d, axis=(-2, -1), kernel_init=init, dtype=self.dtype, name="out")(out)
    return out, q, k


class MlpBlock(nn.Module):
  """Dense_0, GELU, Dense_1 (big_vision's names)."""

  mlp_dim: int
  gelu: str = "erf"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    inits = dict(kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.normal(1e-6))
    y = nn.Dense(self.mlp_dim, dtype=self.dtype, **inits)(x)
    return nn.Dense(x.shape[-1], dtype=self.dtype, **inits)(gelu(y, self.gelu))


class FiLM(nn.Module):
  """Scales and shifts every token by the pooled instruction (SemanticVLA Eq. 6-7; Perez et al. 2018).

  Differs from the paper: Eq. 7 modulates the attention's output; the released code modulates the residual stream after
  it, on all tokens. The projections start at PyTorch's default, not at zero.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, condition: Float[Array, "b e"], width: int) -> Float[Array, "b 2 d"]:
    """The pooled instruction → scale γ and shift β of one block (`modulate` applies them)."""
    dense = dict(kernel_init=torch_kernel_init, dtype=self.dtype)
    return jnp.stack([nn.Dense(width, name=name, **dense)(condition) for name in ("scale", "shift")], axis=1)


def modulate(x: Float[Array, "b l d"], by: Float[Array, "b 2 d"]) -> Float[Array, "b l d"]:
  """x·(1 + γ) + β, the same for every token."""
  return x * (1 + by[:, :1]) + by[:, 1:]


class Block(nn.Module):
  """Pre-norm transformer block; LayerScale if `layer_scale` (its initial value) is given, FiLM if a condition is."""

  num_heads: int
  mlp_dim: int
  gelu: str = "erf"
  layer_scale: float | None = None
  probe: int = 0  # the attention weights of this many last tokens are returned
  fused: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32

  def setup(self):
    self.LayerNorm_0 = layer_norm(dtype=self.dtype)
    self.MultiHeadDotProductAttention_0 = Attention(self.num_heads, self.fused, self.kernel, self.dtype)
    self.film = FiLM(self.dtype)
    self.LayerNorm_1 = layer_norm(dtype=self.dtype)
    self.MlpBlock_0 = MlpBlock(self.mlp_dim, self.gelu, self.dtype)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b l d"],
    condition: Float[Array, "b e"] | Float[Array, "b 2 d"] | None = None,
    mask: Bool[Array, "b_or_1 1 l_or_1 l"] | None = None,
    tail: int | None = None,
  ) -> tuple[Float[Array, "b l_or_tail d"], Float[Array, "b h q l"]]:
    """Tokens → (tokens, the attention weights of the `probe` last ones).

    Args:
      condition: the pooled instruction, or what `modulation` made of it. mask: True where a key may be read.
      tail: how many last tokens are wanted; the others are only read. None: all of them.
    """
    y = self.LayerNorm_0(x)
    first = 0 if tail is None else x.shape[1] - tail
    y, q, k = self.MultiHeadDotProductAttention_0(y[:, first:], y, mask)
    x = x[:, first:] + self._scaled("ls1", y)
    if condition is not None:
      x = modulate(x, condition if condition.ndim == 3 else self.film(condition, x.shape[-1]))
    y = self.LayerNorm_1(x)
    x = x + self._scaled("ls2", self.MlpBlock_0(y))
    x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
    seen = mask if mask is not None and mask.shape[2] == 1 else None  # the same for every token
    return x, attention_weights(q[:, x.shape[1] - self.probe :], k, seen)

  def modulation(self, condition: Float[Array, "b e"], width: int) -> Float[Array, "b 2 d"]:
    """The pooled instruction → this block's γ and β."""
    return self.film(condition, width)

  def _scaled(self, name: str, y: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    if self.layer_scale is None:
      return y
    return y * self.param(name, nn.initializers.constant(self.layer_scale), (y.shape[-1],)).astype(y.dtype)


class Transformer(nn.Module):
  """`encoderblock_{i}` and `encoder_norm`; run in pieces.

  With `scan`, the blocks of a piece are stacked on the way in and run by one `lax.scan`: compiled once for all of them,
  and the parameters stay those of blocks apart.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  gelu: str = "erf"
  layer_scale: float | None = None
  probe: int = 0
  remat: bool = False
  scan: bool = False
  fused: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32

  def setup(self):
    block = nn.remat(Block, prevent_cse=not self.scan, static_argnums=(4,)) if self.remat else Block
    how = dict(probe=self.probe, fused=self.fused, kernel=self.kernel, dtype=self.dtype)
    self.encoderblock = [
      block(self.num_heads, self.mlp_dim, self.gelu, self.layer_scale, **how) for _ in range(self.depth)
    ]
    self.encoder_norm = layer_norm(dtype=self.dtype)

  def __call__(self, x: Float[Array, "b l d"], start: int, stop: int, condition=None, mask=None):
    """Runs blocks start … stop-1; returns the tokens and the last block's attention weights of the `probe` tokens.

    `condition` is the pooled instruction f[b e], or the `modulations` of all blocks f[b depth 2 d], or None.
    """
    blocks, weights = self.encoderblock[start:stop], None
    each = condition is not None and condition.ndim == 4
    if self.scan and len(blocks) > 1 and not self.is_initializing() and not each:
      return self._scanned(blocks, x, condition, mask)
    for i, block in enumerate(blocks, start):
      x, weights = block(x, condition[:, i] if each else condition, mask, None)
    return x, weights

  def tail(
    self, x: Float[Array, "b l d"], block: int, count: int, condition=None, mask=None
  ) -> Float[Array, "b count d"]:
    """One block's last `count` tokens, without the work for the others."""
    each = condition is not None and condition.ndim == 4
    return self.encoderblock[block](x, condition[:, block] if each else condition, mask, count)[0]

  def modulations(self, condition: Float[Array, "b e"], width: int, stop: int) -> Float[Array, "b depth 2 d"]:
    """The pooled instruction → γ and β of every block before `stop`."""
    return jnp.stack([block.modulation(condition, width) for block in self.encoderblock[:stop]], axis=1)

  def _scanned(self, blocks: Sequence[Block], x: Float[Array, "b l d"], condition, mask):
    """`blocks` one after the other, as a loop over their stacked parameters."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(block.variables["params"] for block in blocks))

    def body(block, carry):
      return block(carry[0], condition, mask, None), None

    def loop(block, carry):
      return nn.scan(body, variable_axes={"params": 0}, split_rngs={}, length=len(blocks))(block, carry)[0]

    b, l, _ = x.shape
    none = jnp.zeros((b, self.num_heads, self.probe, l), jnp.float32)
    return nn.map_variables(loop, "params", lambda _: {"params": stacked})(blocks[0], (x, none))

  def norm(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    return self.encoder_norm(x)


class MAPHead(nn.Module):
  """Attention pooling of SigLIP's image tower. SemanticVLA does not use it; released towers carry it."""

  num_heads: int
  mlp_dim: int
  gelu: str = "erf"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    b, _, d = x.shape
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d))
    probe = jnp.broadcast_to(probe, (b, 1, d)).astype(x.dtype)
    x, _, _ = Attention(self.num_heads, dtype=self.dtype, name="MultiHeadDotProductAttention_0")(probe, x)
    y = layer_norm("LayerNorm_0", self.dtype)(x)
    return (x + MlpBlock(self.mlp_dim, self.gelu, self.dtype, name="MlpBlock_0")(y))[:, 0]


class ViT(nn.Module):
  """A Vision Transformer over square images.

  Attributes:
    image, patch: side lengths in pixels; image must be a multiple of patch.
    width, depth, num_heads, mlp_dim: sizes.
    registers: None for no prefix (SigLIP); r for a class token and r register tokens before the patches (DINOv2).
    layer_scale: initial LayerScale value, or None for none (SigLIP).
    gelu: 'erf' (timm, the released code) or 'tanh' (big_vision's own).
    queries: how many tokens an SA-Pruner appends in `embed`.
    multiple: tokens of zeros, which no token reads, fill the sequence up to a multiple of this: see models/serving.py.
    position_init: how the learned position embedding begins: 'normal' (big_vision's), or 'sincos', from which a model
      that learns from scratch can read where a patch is at once.
    scan: one loop over the blocks between two taps, see Transformer. fused, kernel: see models/serving.py.
    mean, std: normalisation of RGB in [0, 1].
  """

  image: int
  patch: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  registers: int | None = None
  layer_scale: float | None = None
  gelu: str = "erf"
  queries: int = 0
  multiple: int = 1
  position_init: str = "normal"
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  remat: bool = False
  scan: bool = False
  fused: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @property
  def num_patches(self) -> int:
    """n, patches of one image."""
    return (self.image // self.patch) ** 2

  @property
  def num_prefix(self) -> int:
    """Tokens before the patches."""
    return self._num_special + self._num_fill

  @property
  def _num_special(self) -> int:
    return 0 if self.registers is None else 1 + self.registers

  @property
  def _num_fill(self) -> int:
    return -(self._num_special + self.num_patches + self.queries) % self.multiple

  def setup(self):
    if self.image % self.patch:
      raise ValueError(
        f"ViT: image size {self.image} is not a multiple of the patch size {self.patch}; "
        f"use {self.image // self.patch * self.patch} or another patch size."
      )
    p, d = self.patch, self.width
    self.embedding = nn.Conv(d, (p, p), strides=(p, p), padding="VALID", dtype=self.dtype)
    self.pos_embedding = self.param("pos_embedding", self._positions(), (1, self.num_patches, d))
    if self.registers is not None:
      self.cls = self.param("cls", nn.initializers.normal(1e-6), (1, 1, d))
      self.reg = self.param("reg", nn.initializers.normal(1e-6), (1, self.registers, d))
    how = dict(probe=self.queries, remat=self.remat, scan=self.scan, dtype=self.dtype)
    how |= dict(fused=self.fused, kernel=self.kernel)
    self.Transformer = Transformer(self.depth, self.num_heads, self.mlp_dim, self.gelu, self.layer_scale, **how)
    self.MAPHead_0 = MAPHead(self.num_heads, self.mlp_dim, self.gelu, self.dtype)

  @nn.nowrap
  def _positions(self) -> nn.initializers.Initializer:
    if self.position_init == "normal":
      return nn.initializers.normal(self.width**-0.5)
    if self.position_init == "sincos":
      return lambda key, shape: sincos_2d(self.image // self.patch, self.width)
    raise ValueError(
      f"ViT: got position_init={self.position_init!r}, expected 'normal' or 'sincos'; set it so in the variant's row."
    )

  def normalize(self, images: UInt8[Array, "*batch h w 3"]) -> Float[Array, "*batch h w 3"]:
    """RGB bytes → this encoder's normalized float32."""
    x = images.astype(jnp.float32) / 255
    return (x - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)

  def embed(
    self, pixels: Float[Array, "b h w 3"], queries: Float[Array, "1 q d"] | None = None
  ) -> Float[Array, "b l d"]:
    """Normalized pixels → [prefix | fill | patches | queries]. Only patches carry a position embedding."""
    b, h, w, _ = pixels.shape
    if (h, w) != (self.image, self.image):
      raise ValueError(
        f"ViT: got images of {h}×{w} pixels, expected {self.image}×{self.image} (patch {self.patch}); "
        "resize them with semanticvla_jax.data.images."
      )
    x = rearrange(self.embedding(pixels.astype(self.dtype)), "b h w d -> b (h w) d")
    parts = [x + self.pos_embedding.astype(x.dtype)]
    if self._num_fill:
      parts = [jnp.zeros((1, self._num_fill, self.width)), *parts]
    if self.registers is not None:
      parts = [self.cls, self.reg, *parts]
    if queries is not None:
      parts = [*parts, queries]
    return jnp.concatenate([jnp.broadcast_to(part, (b, *part.shape[1:])).astype(x.dtype) for part in parts], axis=1)

  def run(self, x: Float[Array, "b l d"], start: int, stop: int, condition: Array | None = None):
    """Blocks start … stop-1, no final norm; (tokens, attention weights f32[b h q l] of the appended queries).

    `condition`: the pooled instruction f[b e] or the `modulations` made of it.
    """
    return self.Transformer(x, start, stop, condition, self._readable(x))

  def tail(self, x: Float[Array, "b l d"], block: int, condition: Array | None = None) -> Float[Array, "b q d"]:
    """The queries as block `block` leaves them, without the work for the other tokens."""
    return self.Transformer.tail(x, block, self.queries, condition, self._readable(x))

  @nn.nowrap
  def _readable(self, x: Float[Array, "b l d"]) -> Bool[Array, "1 1 1 l"] | None:
    """The attention mask: all tokens but the fill; None where there is none."""
    if not self._num_fill:
      return None
    at = jnp.arange(x.shape[1])
    return ((at < self._num_special) | (at >= self.num_prefix))[None, None, None]

  def modulations(self, condition: Float[Array, "b e"], stop: int) -> Float[Array, "b depth 2 d"]:
    """The pooled instruction → γ and β of every block before `stop` (FiLM); blocks that never run have none."""
    return self.Transformer.modulations(condition, self.width, stop)

  def patches(self, x: Float[Array, "b l d"]) -> Float[Array, "b n d"]:
    """The patch tokens, in raster order."""
    return x[:, self.num_prefix : self.num_prefix + self.num_patches]

  def norm(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """The final LayerNorm. SemanticVLA leaves it out; the towers' own embeddings need it."""
    return self.Transformer.norm(x)

  def __call__(self, pixels: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b l d"], Float[Array, "b d"]]:
    """The tower on its own: (normed tokens, attention-pooled embedding)."""
    x, _ = self.run(self.embed(pixels), 0, self.depth)
    x = self.norm(x)
    return x, self.MAPHead_0(x)
