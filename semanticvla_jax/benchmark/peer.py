"""The same architecture assembled from transformers' classes in PyTorch, random weights, to be timed next to ours.

SiglipVisionModel and Dinov2WithRegistersModel on all views, SiglipTextModel on the instruction, one linear layer from
the encoders' tokens to the decoder's width, LlamaModel on a sequence as long as our row's (for OpenVLA-OFT all the
patches). Sizes, token counts, type and threads are ours. It leaves out the pruners and their aggregation tokens, FiLM,
the fusers and the action heads, and its decoder's mask is causal: the peer has less to do.

A LoRA step trains adapters of the recipe's rank on the linear layers of the encoders' and the decoder's blocks, AdamW,
and nothing else: ours trains FiLM, fusers, pruners and heads as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import torch
import transformers
from torch import nn

from semanticvla_jax.benchmark import record, rows
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.semanticvla import SemanticVLA, build

LEAVES_OUT = "PyTorch leaves out pruners, FiLM, fusers and heads: it has less to do"
transformers.logging.set_verbosity_error()  # of token ids that a model without a tokenizer does not use


class Peer:
  """One row in PyTorch, on jax's kind of device.

  Args:
    row, size, dtype, prompt, batch: as ours.

  Raises:
    ValueError: PyTorch cannot use the device that jax uses.
  """

  def __init__(self, row: str, size: str, dtype: str, prompt: int, batch: int):
    self.device, self.dtype = _device(), getattr(torch, dtype)
    torch.set_num_threads(record.cores())
    torch.manual_seed(0)
    model = build(rows.model(row, size))
    self.recipe = rows.RECIPES[rows.ROWS[row].recipe]
    with _building(self.device, self.dtype):
      self.network = Network(model, rows.SIZES[size], sequence_length(model, prompt)).eval()
      self.inputs = _inputs(model, batch, self.dtype)

  def forward(self, kind: str) -> tuple[Callable[[], Any], float]:
    """A forward pass that returns when it is done, and the seconds that the first one took (its compilation).

    Args:
      kind: "eager" or "compile" (torch.compile).
    """
    network = torch.compile(self.network) if kind == "compile" else self.network

    def call():
      with torch.no_grad():
        network(*self.inputs)
      self._wait()

    return call, _seconds(call)

  def lora_step(self, kind: str) -> tuple[Callable[[], Any], float]:
    """A training step that returns when it is done, and the seconds that the first one took.

    The network is given its adapters by the first call of this, and keeps them.
    """
    if not any(isinstance(layer, LoRALinear) for layer in self.network.modules()):
      self.network.requires_grad_(False)
      for part in (self.network.siglip, self.network.dino, self.network.decoder):
        adapt(part, self.recipe.rank, self.recipe.alpha)
    optimizer = torch.optim.AdamW([p for p in self.network.parameters() if p.requires_grad], lr=5e-4)
    network = torch.compile(self.network) if kind == "compile" else self.network

    def step():
      optimizer.zero_grad()
      network(*self.inputs).float().abs().mean().backward()
      optimizer.step()
      self._wait()

    return step, _seconds(step)

  def _wait(self) -> None:
    if self.device == "cuda":
      torch.cuda.synchronize()


class Network(nn.Module):
  """Encoders, text tower and decoder of a row; see the module's docstring for what is left out."""

  def __init__(self, model: SemanticVLA, sizes: dict, length: int):
    super().__init__()
    last = 0 if model.vision_layer == "last" else 1  # blocks that the row does not run
    picture = dict(image_size=sizes["image"], patch_size=sizes["patch"])
    self.siglip = transformers.SiglipVisionModel(
      transformers.SiglipVisionConfig(**_encoder(sizes["siglip"], last), **picture, vision_use_head=False)
    )
    dino = sizes["dino"]
    self.dino = transformers.Dinov2WithRegistersModel(
      transformers.Dinov2WithRegistersConfig(
        **_encoder(dino, last),
        **picture,
        mlp_ratio=dino["mlp_dim"] // dino["width"],
        num_register_tokens=dino["registers"],
      )
    )
    self.text = None
    if model.text is not None:
      text = sizes["text"]
      shape = dict(vocab_size=text["vocab"], max_position_embeddings=text["positions"])
      self.text = transformers.SiglipTextModel(transformers.SiglipTextConfig(**_encoder(text, 0), **shape))
    llm = sizes["llm"]
    self.decoder = transformers.LlamaModel(
      transformers.LlamaConfig(**_encoder(llm, 0), vocab_size=llm["vocab"], rms_norm_eps=1e-6, use_cache=False)
    )
    self.projector = nn.Linear(sizes["siglip"]["width"] + sizes["dino"]["width"], llm["width"])
    self.views, self.visual, self.prefix = model.num_views, visual_tokens(model), 1 + dino["registers"]
    self.register_buffer("others", torch.randn(1, length - self.views * self.visual, llm["width"]) * 0.02)

  def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """pixels f[(b v) 3 h w], ids i64[b m] → states of the decoder f[b l D]."""
    siglip = self.siglip(pixel_values=pixels).last_hidden_state
    dino = self.dino(pixel_values=pixels).last_hidden_state[:, self.prefix :]
    tokens = torch.cat([dino, siglip], dim=-1)[:, : self.visual]
    b = pixels.shape[0] // self.views
    x = [self.projector(tokens).reshape(b, self.views * self.visual, -1), self.others.expand(b, -1, -1)]
    x = torch.cat(x, dim=1)
    if self.text is not None:
      words = self.text(input_ids=ids).last_hidden_state
      x = x + 0 * words.mean(dim=(1, 2), keepdim=True)  # read, so that no compiler leaves the tower out
    return self.decoder(inputs_embeds=x).last_hidden_state


class LoRALinear(nn.Module):
  """A frozen linear layer and its adapter, α/r · x·A·B, float32 as ours (Hu et al. 2021)."""

  def __init__(self, base: nn.Linear, rank: int, alpha: float):
    super().__init__()
    self.base, self.scale = base, alpha / rank
    new = dict(dtype=torch.float32, device=base.weight.device)
    self.a = nn.Parameter(torch.randn(base.in_features, rank, **new) / rank)
    self.b = nn.Parameter(torch.zeros(rank, base.out_features, **new))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.base(x) + self.scale * ((x @ self.a.to(x.dtype)) @ self.b.to(x.dtype))


def adapt(module: nn.Module, rank: int, alpha: float) -> None:
  """Puts an adapter on every linear layer of a module, in place."""
  for name, child in [*module.named_children()]:
    if isinstance(child, nn.Linear):
      setattr(module, name, LoRALinear(child, rank, alpha))
    else:
      adapt(child, rank, alpha)


def visual_tokens(model: SemanticVLA) -> int:
  """The tokens of a view that our decoder reads: cues and kept patches, or all patches."""
  pruner = model.pruner("siglip", "id")
  if pruner is not None:
    return pruner.anchors + pruner.cues
  sa = model.pruner("siglip", "sa")
  return model.siglip.num_patches if sa is None else sa.tokens


def sequence_length(model: SemanticVLA, prompt: int) -> int:
  """The length of our decoder's sequence: visual tokens, proprioception, prompt, action tokens, </s>."""
  actions = 0 if model.coupler is None else model.chunk * model.coupler.tokens + 1
  return model.num_views * visual_tokens(model) + (model.proprio_dim is not None) + prompt + actions


def _encoder(sizes: dict, without: int) -> dict:
  found = dict(hidden_size=sizes["width"], num_hidden_layers=sizes["depth"] - without)
  found |= dict(num_attention_heads=sizes["num_heads"], intermediate_size=sizes["mlp_dim"])
  return found | dict(attn_implementation="sdpa")


def _inputs(model: SemanticVLA, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
  side = model.siglip.image
  words = 1 if model.text is None else model.text.positions
  return torch.randn(batch * model.num_views, 3, side, side, dtype=dtype), torch.randint(3, 400, (batch, words))


def _device() -> str:
  platform = jax.default_backend()
  if platform == "cpu":
    return "cpu"
  if platform not in ("gpu", "cuda") or not torch.cuda.is_available():
    raise refuse("--peer", f"jax on {platform}, PyTorch without it", "the same device for both", "leave --peer out")
  return "cuda"


class _building:
  """New modules and tensors on a device in a type."""

  def __init__(self, device: str, dtype: torch.dtype):
    self.device, self.dtype, self.before = torch.device(device), dtype, torch.get_default_dtype()

  def __enter__(self) -> None:
    torch.set_default_dtype(self.dtype)
    self.device.__enter__()

  def __exit__(self, *raised: Any) -> None:
    self.device.__exit__(*raised)
    torch.set_default_dtype(self.before)


def _seconds(call: Callable[[], Any]) -> float:
  begin = time.perf_counter()
  call()
  return time.perf_counter() - begin
