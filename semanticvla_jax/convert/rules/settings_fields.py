"""Which fields of a source's config.json and processor files change numbers, and what our model does in each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from semanticvla_jax.models.coupler import BINS, EXTRA_ROWS
from semanticvla_jax.models.semanticvla import SemanticVLA
from semanticvla_jax.models.vit import NORM_EPS

UNKNOWN = object()  # nothing to compare with
PROMPT = 64  # tokens of a prompt that the tokenizer must not cut
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # which openvla-7b stores through bfloat16
_GELUS = {
  **dict.fromkeys(("gelu", "gelu_python"), "erf"),
  **dict.fromkeys(("gelu_pytorch_tanh", "gelu_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh"), "tanh"),
  "gelu_accurate": "tanh",
}
ACTIVATIONS = _GELUS | dict.fromkeys(("silu", "swish"), "silu")
NAMES = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}  # ours: transformers'


class Field(NamedTuple):
  """A field of a file that changes numbers.

  Attributes:
    ours: returns the model's value, in this package's terms; UNKNOWN if the model does not use it.
    default: the value that the class in transformers takes if the file lacks the field; UNKNOWN: compare nothing then.
    read: converts a value of the file to this package's terms; raises ValueError, TypeError or KeyError for a value of
      another kind.
    carry: the place of the setting in the model's config, () if it has none.
    may: the values that can be carried, () for all.
    alike: whether (theirs, ours) are equivalent.
    words: format of the expected value in messages.
  """

  ours: Callable[[SemanticVLA], Any]
  default: Any = UNKNOWN
  read: Callable[[Any], Any] = lambda x: x
  carry: tuple[str, ...] = ()
  may: tuple = ()
  alike: Callable[[Any, Any], bool] = lambda theirs, ours: theirs == ours
  words: str = "{}"


class Sized(NamedTuple):
  """A default that holds only for the class's default width."""

  value: int
  width: int


def _number(x: Any) -> int | float:
  if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) or x <= 0:
    raise ValueError("expected a number above 0")
  return x


def activation(x: Any) -> Any:
  return ACTIVATIONS.get(x, x)


def _numbers(x: Any) -> tuple[float, ...]:
  return tuple(map(float, [x] * 3 if isinstance(x, (int, float)) else x))


def _size(x: Any) -> tuple[int, ...]:
  """(height, width) of 224, [224, 224], [3, 224, 224] or {"height": …, "width": …}."""
  if isinstance(x, dict):
    x = (x["height"], x["width"])
  return (int(x), int(x)) if isinstance(x, (int, float)) else tuple(map(int, x))[-2:]


def _close(theirs: Sequence[float], ours: Sequence[float]) -> bool:
  return len(theirs) == len(ours) and all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(theirs, ours))


def _gelu(tower: str, default: Any, carry: tuple[str, ...] = ()) -> Field:
  return Field(lambda m: getattr(m, tower).gelu, default, activation, carry, ("erf", "tanh"))


def _heads(tower: str, default: Any) -> Field:
  return Field(lambda m: getattr(m, tower).num_heads, default)


def _norm_eps() -> Field:
  return Field(lambda m: NORM_EPS, NORM_EPS, _number)


_PLAIN = {"quantization_config": Field(lambda m: None)}  # weights that are not what is stored
LLAMA = _PLAIN | {
  "model_type": Field(lambda m: "llama"),
  "rms_norm_eps": Field(lambda m: m.llm.eps, 1e-6, _number, ("variant", "llm", "eps")),
  "rope_theta": Field(lambda m: m.llm.theta, 10000.0, _number, ("variant", "llm", "theta")),
  "rope_type": Field(lambda m: "default", "default"),
  "partial_rotary_factor": Field(lambda m: 1.0, 1.0),
  "hidden_act": Field(lambda m: "silu", "silu", activation),
  "num_attention_heads": _heads("llm", Sized(32, 4096)),
  "num_key_value_heads": _heads("llm", UNKNOWN),
  "head_dim": Field(lambda m: m.llm.width // m.llm.num_heads),
  "attention_bias": Field(lambda m: False, False),
  "mlp_bias": Field(lambda m: False, False),
  "tie_word_embeddings": Field(lambda m: False if m.coupler is None else UNKNOWN, False),
}
SIGLIP = _PLAIN | {
  "hidden_act": _gelu("siglip", "gelu_pytorch_tanh", ("siglip_gelu",)),
  "layer_norm_eps": _norm_eps(),
  "num_attention_heads": _heads("siglip", Sized(12, 768)),
}
TEXT = _PLAIN | {
  "hidden_act": _gelu("text", "gelu_pytorch_tanh", ("variant", "text", "gelu")),
  "layer_norm_eps": _norm_eps(),
  "num_attention_heads": _heads("text", Sized(12, 768)),
}
DINO = _PLAIN | {
  "hidden_act": _gelu("dino", "gelu"),
  "layer_norm_eps": _norm_eps(),
  "num_attention_heads": _heads("dino", Sized(12, 768)),
  "qkv_bias": Field(lambda m: True, True),
  "use_swiglu_ffn": Field(lambda m: False, False),
}
TIMM = {
  name: {"hidden_act": table["hidden_act"]._replace(default=UNKNOWN)}
  for name, table in (("dino", DINO), ("siglip", SIGLIP))
}
OPENVLA = _PLAIN | {
  "arch_specifier": Field(lambda m: "fused-gelu-mlp", read=lambda x: x.split("+")[-1]),
  "use_fused_vision_backbone": Field(lambda m: True),
  "image_resize_strategy": Field(lambda m: "resize-naive"),
  "vision_backbone_id": Field(lambda m: "dinosiglip", read=lambda x: x.split("-")[0]),
  "llm_backbone_id": Field(lambda m: "llama2", read=lambda x: x.split("-")[0].replace("vicuna", "llama2")),
  "timm_model_ids": Field(
    lambda m: ("dinov2", "siglip"),
    read=lambda ids: tuple(next((name for name in ("dinov2", "siglip") if name in x), x) for x in ids),
  ),
  "image_sizes": Field(lambda m: ((m.dino.image,) * 2, (m.siglip.image,) * 2), read=lambda x: tuple(map(_size, x))),
  "n_action_bins": Field(lambda m: BINS),
  "pad_to_multiple_of": Field(lambda m: EXTRA_ROWS),
  "pad_token_id": Field(lambda m: m.spoken_vocab),
  "llm_max_length": Field(lambda m: PROMPT, read=_number, alike=lambda x, y: x >= y, words="{} or more"),
}
PROCESSOR = {  # of OpenVLA's images, whole
  "image_resize_strategy": OPENVLA["image_resize_strategy"],
  "use_fused_vision_backbone": OPENVLA["use_fused_vision_backbone"],
  "tvf_do_letterbox": Field(lambda m: False),
}


def _images(tower: str) -> dict[str, Field]:
  """Of the images of one tower."""

  def constant(name: str, imagenet: Sequence[float]) -> Field:
    accepted = (lambda x, y: _close(x, y) or _close(x, imagenet)) if tower == "dino" else _close
    return Field(lambda m: getattr(getattr(m, tower), name), read=_numbers, alike=accepted)

  return {
    "mean": constant("mean", IMAGENET[0]),
    "std": constant("std", IMAGENET[1]),
    "size": Field(lambda m: (getattr(m, tower).image,) * 2, read=_size),
    "rescale_factor": Field(lambda m: 1 / 255, read=_number, alike=lambda x, y: math.isclose(x, y, rel_tol=1e-5)),
    "do_rescale": Field(lambda m: True),
    "do_normalize": Field(lambda m: True),
  }


IMAGES = {"dino": _images("dino"), "siglip": _images("siglip")}
