"""What every golden comparison needs: weights under canonical keys, sizes out of config.json, tensors in our layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.flax import load_file

from semanticvla_jax.convert import semanticvla, table

REGISTERS = 4
Pair = tuple[str, Any, Any]  # name, ours, theirs


def load(folder: Path, *names: str, prefix: str = "") -> dict[str, Any]:
  """Weights of several files under canonical keys; a later file replaces what an earlier one has too."""
  out: dict[str, Any] = {}
  for name in names:
    out |= {semanticvla.canonical(prefix + key): x for key, x in load_file(folder / name).items()}
  return out


def fit(rules, unused, source: dict[str, Any], init: Callable) -> dict:
  """The parameters that `init` would make, read from `source`."""
  shapes = jax.eval_shape(init)["params"]
  target = {path: tuple(x.shape) for path, x in flatten_dict(shapes, sep="/").items()}
  return unflatten_dict({k: jnp.asarray(x) for k, x in table.convert(rules, unused, source, target).items()}, sep="/")


def vit_sizes(c: dict, dino: bool) -> dict:
  width = c["embed_dim"]
  mlp_dim = 4 * width if dino else int(width * 3.7362)
  sizes = dict(width=width, depth=c["depth"], num_heads=c["num_heads"], mlp_dim=mlp_dim)
  return sizes | (dict(registers=REGISTERS, layer_scale=1.0) if dino else {})


def text_sizes(c: dict) -> dict:
  return dict(
    vocab=c["vocab_size"],
    positions=c["max_position_embeddings"],
    width=c["hidden_size"],
    depth=c["num_hidden_layers"],
    num_heads=c["num_attention_heads"],
    mlp_dim=c["intermediate_size"],
  )


def llama_sizes(c: dict, llama_config: dict) -> dict:
  return dict(
    vocab=c["vocab_size"],
    width=c["hidden_size"],
    depth=c["num_hidden_layers"],
    num_heads=c["num_attention_heads"],
    mlp_dim=c["intermediate_size"],
    eps=llama_config.get("rms_norm_eps", 1e-6),
    theta=llama_config.get("rope_theta", 1e4),
  )


def variant_of(config: dict) -> dict:
  c = config["config"]
  return dict(
    image=c["img"],
    patch=c["patch"],
    pairs=tuple(map(tuple, c.get("pairs", ()))),
    dino=vit_sizes(c["dino"], True),
    siglip=vit_sizes(c["siglip"], False),
    text=text_sizes(c["text"]) if "text" in c else None,
    llm=llama_sizes(c["llama"], config.get("llama", {})),
  )


def pixels_of(pixel_values: Any) -> dict[str, Any]:
  """(b, 6·v, h, w), per view DINOv2's three channels then SigLIP's → each encoder's pixels."""
  x = rearrange(pixel_values, "b (v e c) h w -> e b v h w c", e=2, c=3)
  return {"dino": x[0], "siglip": x[1]}


def hidden_states(x, hidden, sown: dict, scan: bool = True) -> Any:
  """[embeddings, layer outputs …, last one after the final norm], as transformers returns them."""
  layers = (
    sown["layers"]["hidden"][0] if scan else jnp.stack([sown[f"layers_{i}"]["hidden"][0] for i in range(len(sown))])
  )
  return jnp.concatenate([x[None], layers[:-1], hidden[None]])
