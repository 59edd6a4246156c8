"""PyTorch's classes in the sizes of our modules, with the source's own configuration, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from semanticvla_jax.convert.rules.settings_fields import ACTIVATIONS, NAMES
from semanticvla_jax.errors import refuse
from semanticvla_jax.models import llama
from semanticvla_jax.models.text import TextEncoder
from semanticvla_jax.models.vit import ViT

State = dict[str, Any]  # tensors of PyTorch by name
_EPSILONS = ("layer_norm_eps", "rms_norm_eps")
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "max_position_embeddings")


def libraries() -> tuple[Any, Any]:
  try:
    import torch
    import transformers
  except ImportError as error:
    raise refuse(
      "verify needs PyTorch's side",
      f"no module {error.name}",
      "torch and transformers",
      "`pip install -r requirements-parity.txt` (or `make parity`)",
    ) from error
  return torch, transformers


def siglip_config(vit: ViT, depth: int, **more: Any) -> Any:
  """transformers' configuration of an image tower of our sizes; without its pooling head unless asked for."""
  _, transformers = libraries()
  act = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}[vit.gelu]
  fields = dict(**_encoder_sizes(vit, depth), image_size=vit.image, patch_size=vit.patch, hidden_act=act)
  return transformers.SiglipVisionConfig(**fields | dict(vision_use_head=False) | more)


def dinov2_config(vit: ViT, depth: int) -> Any:
  """transformers' configuration of a DINOv2 with registers of our sizes."""
  _, transformers = libraries()
  sizes = _encoder_sizes(vit, depth)
  ratio = sizes.pop("intermediate_size") // vit.width
  fields = dict(image_size=vit.image, patch_size=vit.patch, mlp_ratio=ratio, num_register_tokens=vit.registers)
  return transformers.Dinov2WithRegistersConfig(**sizes, **fields)


def siglip_text_config(tower: TextEncoder) -> Any:
  """transformers' configuration of a text tower of our sizes."""
  _, transformers = libraries()
  ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
  fields = dict(vocab_size=tower.vocab, max_position_embeddings=tower.positions, projection_size=tower.width)
  return transformers.SiglipTextConfig(**_encoder_sizes(tower, tower.depth), **fields, **ids)


def llama_config(sizes: llama.Llama, depth: int, vocab: int) -> Any:
  """transformers' configuration of a decoder of our sizes."""
  _, transformers = libraries()
  rope = dict(rope_parameters=dict(rope_type="default", rope_theta=sizes.theta))
  return transformers.LlamaConfig(**_encoder_sizes(sizes, depth), vocab_size=vocab, rms_norm_eps=sizes.eps, **rope)


def built(cls: Any, config: Any, fields: Mapping[str, Any] | None) -> Any:
  """Returns PyTorch's class in our sizes, with the settings of the source's own files (None: it has none).

  Raises:
    ValueError: the class does not accept them.
  """
  try:
    return cls(config if fields is None else _own(config, fields)).eval()
  except (ValueError, TypeError, KeyError) as error:
    text = (str(error).strip().splitlines() or [""])[-1][:160]
    raise refuse(
      f"{cls.__name__} refuses the source's own configuration",
      f"{type(error).__name__}: {text}",
      "a config.json that transformers reads",
      "correct it",
    ) from error


def _own(config: Any, fields: Mapping[str, Any]) -> Any:
  """A configuration with the source's own fields; those that change shapes stay, or the tensors could not be loaded."""
  _, transformers = libraries()
  default, kept = type(config)(), config.to_dict()
  own = {name: fields.get(name, getattr(default, name)) for name in _EPSILONS if hasattr(default, name)}
  act = fields.get("hidden_act", default.hidden_act)
  act = NAMES.get(ACTIVATIONS.get(act, act), act)
  own |= {"hidden_act": act} if act in transformers.activations.ACT2FN else {}  # else `differences` reports it
  same_width = fields.get("hidden_size", default.hidden_size) == config.hidden_size
  heads = fields.get("num_attention_heads", default.num_attention_heads if same_width else 0)
  if heads and config.hidden_size % heads == 0:
    own["num_attention_heads"] = heads
    kept = {name: x for name, x in kept.items() if name not in ("num_key_value_heads", "head_dim")}
  if "rope_parameters" in kept:
    own |= {"rope_parameters": None} | {name: fields[name] for name in _ROPE if fields.get(name)}
  return type(config)(**{name: x for name, x in kept.items() if name != "model_type"} | own)


def _encoder_sizes(x: Any, depth: int) -> dict:
  return dict(
    hidden_size=x.width, intermediate_size=x.mlp_dim, num_hidden_layers=depth, num_attention_heads=x.num_heads
  )


def load_state(module: Any, state: State, what: str) -> None:
  """Loads what the module has; raises ValueError where the source lacks some of it."""
  own = module.state_dict()
  if missing := sorted(set(own) - set(state)):
    raise refuse(
      f"Source lacks weights of {what}",
      f"no {', '.join(missing[:4])}",
      f"{len(own)} tensors",
      "name all files",
    )
  if wrong := [key for key, x in own.items() if x.shape != state[key].shape]:
    key = wrong[0]
    raise refuse(what, f"{key} {tuple(state[key].shape)}", tuple(own[key].shape), "verify a policy of this source")
  module.load_state_dict({key: state[key] for key in own})
