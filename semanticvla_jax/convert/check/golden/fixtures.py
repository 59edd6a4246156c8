"""What every golden comparison needs: weights under canonical keys, sizes out of config.json, tensors in our layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from semanticvla_jax.convert.rules import engine, semanticvla
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.semanticvla import STOP

ENCODERS = ("dino", "siglip")
# Switches of the released LIBERO script, for a folder that names none (reference: featurizer is DINOv2).
RELEASED = {
  "featurizer_cfg": dict(use_film=True, use_reg=True, use_mm_sampler=False),
  "fused_featurizer_cfg": dict(use_film=False, use_reg=False, use_mm_sampler=True),
}
Pair = tuple[str, Any, Any]  # name, ours, theirs


class Ids(NamedTuple):
  """Token ids that a prompt is made with: the released ones, unless config.json's `constants` name others.

  Attributes:
    empty: the token that ends a prompt. pad: of the language model. text_pad: of the text tower.
    first_action: the lowest id of an action.
  """

  empty: int = 29871
  pad: int = 32000
  text_pad: int = 1
  first_action: int = 31744


def ids_of(config: dict) -> Ids:
  """The ids of a whole-model folder. Raises ValueError for an end-of-sentence id that is not the model's."""
  constants = config.get("constants", {})
  expect("STOP_INDEX", constants.get("STOP_INDEX", STOP), STOP)
  named = {"empty": "empty_token", "pad": "pad_token_llm", "text_pad": "pad_token_text"}
  found = {field: constants[key] for field, key in named.items() if key in constants}
  if "ACTION_TOKEN_BEGIN_IDX" in constants:  # the last id that is not an action
    found["first_action"] = constants["ACTION_TOKEN_BEGIN_IDX"] + 1
  return Ids(**found)


def expect(what: str, got: Any, expected: Any) -> None:
  """Raises ValueError for a value of config.json that this model has no field for."""
  if got != expected:
    raise refuse(
      "verify-golden",
      f"{what} = {got!r} in config.json",
      f"{expected!r}, which is built into this model",
      "compare a folder that was made with it",
    )


def read_json(path: str | Path) -> dict:
  """A JSON object. Raises ValueError where the file is missing or holds anything else."""
  path = Path(path)
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise refuse("verify-golden", f"{path} ({error.strerror})", "a JSON file", "check the path") from None
  except ValueError as error:
    raise refuse("verify-golden", f"{path}, which is not JSON ({error})", "an object", "copy it again") from None
  if not isinstance(found, dict):
    raise refuse("verify-golden", f"a {type(found).__name__} in {path}", "an object", "copy it again")
  return found


def tensors(path: Path) -> dict[str, np.ndarray]:
  """The tensors of a safetensors file. Raises ValueError where it is missing or broken."""
  try:
    return load_file(path)
  except (OSError, SafetensorError) as error:
    raise refuse(
      "verify-golden",
      f"{path}, which cannot be read ({error})",
      "a safetensors file",
      "copy the folder whole",
    ) from None


def arrays(path: Path) -> dict[str, jax.Array]:
  """The tensors of a safetensors file on the device."""
  return {key: jnp.asarray(x) for key, x in tensors(path).items()}


def stored(prefix: str, ours: Mapping[str, Any], outputs: Mapping[str, Any]) -> Iterator[Pair]:
  """Pairs of what was computed and what a file stores, under `prefix`; names on one side only are left out."""
  yield from ((f"{prefix}{key}", ours[key], x) for key, x in outputs.items() if key in ours)


def load(folder: Path, *names: str, prefix: str = "") -> dict[str, np.ndarray]:
  """Weights of several files under canonical keys; a later file replaces what an earlier one has too."""
  out: dict[str, np.ndarray] = {}
  for name in names:
    out |= {semanticvla.canonical(prefix + key): x for key, x in tensors(folder / name).items()}
  return out


def fit(rules, unused, source: dict[str, Any], init: Callable) -> dict:
  """The parameters that `init` would make, read from `source`."""
  shapes = jax.eval_shape(init)["params"]
  target = {path: tuple(x.shape) for path, x in flatten_dict(shapes, sep="/").items()}
  return unflatten_dict({k: jnp.asarray(x) for k, x in engine.convert(rules, unused, source, target).items()}, sep="/")


def vit_sizes(c: dict, weights: Mapping[str, Any], prefix: str = "") -> dict:
  """Sizes of an encoder: config.json's, and what only the weights tell (MLP width, registers, LayerScale)."""
  sizes = dict(width=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"])
  sizes["mlp_dim"] = weights[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0]
  if f"{prefix}reg_token" in weights:
    sizes["registers"] = weights[f"{prefix}reg_token"].shape[1]
  return sizes | (dict(layer_scale=1.0) if f"{prefix}blocks.0.ls1.gamma" in weights else {})


def text_sizes(c: dict) -> dict:
  """Sizes of the text tower, from transformers' names."""
  expect("layer_norm_eps of the text tower", c.get("layer_norm_eps", 1e-6), 1e-6)
  expect("hidden_act of the text tower", c.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
  return dict(
    vocab=c["vocab_size"],
    positions=c["max_position_embeddings"],
    width=c["hidden_size"],
    depth=c["num_hidden_layers"],
    num_heads=c["num_attention_heads"],
    mlp_dim=c["intermediate_size"],
  )


def llama_sizes(c: dict, more: dict) -> dict:
  """Sizes of the decoder, from transformers' names; `more` holds epsilon and rotary base if given apart."""
  expect("num_key_value_heads", c.get("num_key_value_heads", c["num_attention_heads"]), c["num_attention_heads"])
  both = c | more
  return dict(
    vocab=c["vocab_size"],
    width=c["hidden_size"],
    depth=c["num_hidden_layers"],
    num_heads=c["num_attention_heads"],
    mlp_dim=c["intermediate_size"],
    eps=both.get("rms_norm_eps", 1e-6),
    theta=both.get("rope_theta", 1e4),
  )


def variant_of(config: dict, weights: Mapping[str, Any]) -> dict:
  """The row of sizes that a whole-model folder describes; `weights` under canonical keys, or their headers alone."""
  c = config["config"]
  return dict(
    image=c["img"],
    patch=c["patch"],
    pairs=pairs_of(c),
    dino=vit_sizes(c["dino"], weights, "featurizer."),
    siglip=vit_sizes(c["siglip"], weights, "fused_featurizer."),
    text=text_sizes(c["text"]) if "text" in c else None,
    llm=llama_sizes(c["llama"], config.get("llama", {})),
  )


def pairs_of(c: dict) -> tuple[tuple[int, int], ...]:
  """The Dense-Fuser's pairs of blocks; none where there is no Dense-Fuser."""
  return tuple(map(tuple, c.get("pairs") or ()))


def encoder_fields(switches: dict, sizes: dict, fuses: bool) -> dict:
  """Model fields for the release's switches of each encoder: FiLM, pruners, tokens kept, which layer.

  Args:
    switches: holds `featurizer_cfg` and `fused_featurizer_cfg`; where one is missing, RELEASED.
    sizes: `queries`, `vision_topk`, `text_topk`, for switches that leave them out (or at -1).
    fuses: whether a Dense-Fuser steps in between; without one the second-to-last block is read.
  """
  flags = {name: switches.get(key, RELEASED[key]) for name, key in zip(ENCODERS, RELEASED)}
  expect("use_mm_sampler of featurizer_cfg", bool(flags["dino"].get("use_mm_sampler")), False)
  aggregates = {name: bool(one.get("use_reg")) for name, one in flags.items()}
  sampler = flags["siglip"] if flags["siglip"].get("use_mm_sampler") else None
  if sampler and aggregates["siglip"]:
    expect("use_reg of fused_featurizer_cfg, beside use_mm_sampler,", True, False)

  fields = dict(
    film=tuple(name for name, one in flags.items() if one.get("use_film")),
    dino_pruner="sa" if aggregates["dino"] else None,
    siglip_pruner="id" if sampler else "sa" if aggregates["siglip"] else None,
    dense_fuser="variant" if fuses else None,
    vision_layer="last" if fuses else "second_to_last",
  )
  kept = {_count(flags[name], "num_vision_queries", sizes, "queries") for name in ENCODERS if aggregates[name]}
  if sampler:
    kept.add(_count(sampler, "vision_topk", sizes, "vision_topk"))
    fields |= dict(cues=_count(sampler, "text_topk", sizes, "text_topk"), temperature=sampler.get("temp", 1.0))
  if len(kept) > 1:
    raise refuse(
      "verify-golden",
      f"{sorted(kept)} queries and kept patches in config.json",
      "as many of each (they are fused one by one)",
      "compare a folder where they agree",
    )
  return fields | ({"keep": kept.pop()} if kept else {})


def _count(switches: dict, name: str, sizes: dict, default: str) -> int:
  given = switches.get(name)
  return sizes[default] if given is None or given < 0 else given


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
