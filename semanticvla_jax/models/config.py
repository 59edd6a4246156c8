"""The fields of a model config, their defaults, and the sizes a variant names."""

from __future__ import annotations

import difflib
from typing import Any

from semanticvla_jax import action_tokens
from semanticvla_jax.errors import refuse

# Sizes; everything else is the same code. `pairs`: where the Dense-Fuser sits, (dino block, siglip block), 0-based.
VARIANTS = {
  "tiny": dict(
    image=32,
    patch=4,
    pairs=((0, 0), (1, 1), (2, 2)),
    dino=dict(width=16, depth=4, num_heads=2, mlp_dim=32, registers=4, layer_scale=1.0),
    siglip=dict(width=24, depth=4, num_heads=2, mlp_dim=40),
    text=dict(vocab=512, positions=32, width=24, depth=1, num_heads=2, mlp_dim=40),
    llm=dict(vocab=512, width=32, depth=2, num_heads=2, mlp_dim=64),
  ),
  "small": dict(  # heads of 32 and 6x6 patches: what two CPU cores train fastest
    image=48,
    patch=8,
    pairs=((0, 0), (1, 1), (2, 2)),
    dino=dict(width=64, depth=4, num_heads=2, mlp_dim=128, registers=1, layer_scale=1.0, position_init="sincos"),
    siglip=dict(width=64, depth=3, num_heads=2, mlp_dim=128, position_init="sincos"),
    text=dict(vocab=512, positions=24, width=64, depth=1, num_heads=2, mlp_dim=128),
    llm=dict(vocab=512, width=96, depth=4, num_heads=3, mlp_dim=256),
  ),
  "7b": dict(
    image=224,
    patch=14,
    pairs=((2, 3), (11, 13), (20, 23)),
    dino=dict(width=1024, depth=24, num_heads=16, mlp_dim=4096, registers=4, layer_scale=1e-5),
    siglip=dict(width=1152, depth=27, num_heads=16, mlp_dim=4304),
    text=dict(vocab=32000, positions=64, width=1152, depth=27, num_heads=16, mlp_dim=4304),
    llm=dict(vocab=32064, width=4096, depth=32, num_heads=32, mlp_dim=11008),
  ),
}
VARIANTS["small64"] = VARIANTS["small"] | dict(image=64)

# Every field a model config may set, with the released LIBERO value.
DEFAULTS = dict(
  variant="7b",  # a row of VARIANTS, or such a row itself
  encoders=("dino", "siglip"),  # in channel order
  dino_pruner="sa",  # 'id', 'sa', 'sa+id' or None (all patches)
  siglip_pruner="id",
  film=("dino",),  # encoders whose every block is modulated by the pooled prompt
  film_pool="words",  # 'words': mean over real tokens; 'all': over padding too, as the release does in training
  keep=32,  # h, patches kept per view, and q, aggregation tokens
  keep_least=None,  # patches that an ID-Pruner shows at least; how many follows its scores' entropy. None: all `keep`
  cues=5,  # k, instruction tokens kept per view
  temperature=1.0,  # of the cues' softmax
  cue_temperature=None,  # of the cues' softmax alone, where `keep_least` reads `temperature` too; None: that
  cue_pool="mean",  # over patches, of a word's similarities: 'max' chooses words that point somewhere
  cue_stop=(),  # ids of instruction tokens that cannot be cues, see data.text: Tokenizers.stop
  similarity_noise=0.1,  # on similarities, in training
  anchor_rule="similarity",  # or a control: 'random', 'uniform', 'centre'
  aggregation_std=1.0,  # of the aggregation tokens' initial values; 0 in the paper
  dense_fuser="variant",  # the variant's pairs; or pairs ((dino block, siglip block), …); or None
  sparse_fuser="joint",  # 'separate': each token set projected on its own; 'mixture': their weighted sum
  vision_layer="last",  # 'second_to_last': OpenVLA's choice, and the release's without a Dense-Fuser
  siglip_gelu="erf",  # 'tanh' for weights from big_vision or Hugging Face
  num_views=2,
  proprio_dim=8,  # None: no proprioception token
  optional_views=(),  # numbers of views that may be missing: a black image of one is hidden from the language model
  action_dim=7,
  groups=None,  # ((name, action dimensions), …), a head and an action token a step each; None: arms of 7 dimensions
  chunk=8,
  coupler="grouped",  # 'paper' (Eq. 11 literally), 'single' (a token per dimension, one head), None (OpenVLA's tokens)
  codec="bins",  # of coupler=None: 'fast', FAST's tokens, or those themselves, an ActionTokenizer, also as JSON
  decoding="greedy",  # of coupler=None: 'jacobi', 'jacobi_bidirectional', of codec='fast' 'constrained', see speech.py
  mask="block",  # 'full', 'causal': see masks.py
  compressor=None,  # dict(kind, …): fewer visual tokens of projected patches, see compressor.py
  decoder_pruner=None,  # dict(block, keep, score): visual tokens that later layers do without, see decoder_pruner.py
  routing=None,  # dict(least, most): decoder layers that see some of the visual tokens, with scan=False: routed.py
  skip_layers=(),  # numbers of decoder layers that are left out, with scan=False; their parameters stay
  scan=True,  # stacked language-model layers
  scan_encoders=False,  # one loop over an encoder's blocks between two taps: compiles in a fraction of the time
  fused=False,  # projections of one input as one product: how a policy lays its parameters out, see serving.py
  attention="xla",  # 'triton': one kernel on a GPU, with `fused`, see serving.py
  token_multiple=1,  # to which an encoder's sequence is filled up: how a policy runs on a GPU, see serving.py
  remat=None,  # None (or 'none', for the command line), 'full', 'dots'
  dtype="float32",  # compute type
)


def resolve(config: Any) -> dict[str, Any]:
  """A model config with defaults filled in. Raises ValueError at a field that does not exist, naming the nearest."""
  for name in config:
    if name not in DEFAULTS:
      near = difflib.get_close_matches(name, DEFAULTS, n=1)
      remedy = "choose one of them" + (f" (did you mean {near[0]!r}?)" if near else "")
      raise refuse("model config", f"unknown field {name!r}", f"one of {', '.join(DEFAULTS)}", remedy)
  resolved = DEFAULTS | {name: config[name] for name in config}
  if isinstance(resolved["variant"], str):
    if resolved["variant"] not in VARIANTS:
      raise refuse(
        "model config",
        f"variant {resolved['variant']!r}",
        f"one of {sorted(VARIANTS)}",
        "set model.variant to one of them, or to a row of sizes",
      )
    resolved["variant"] = VARIANTS[resolved["variant"]]
  for name in ("compressor", "decoder_pruner", "routing"):
    if hasattr(resolved[name], "keys"):  # such as a ConfigDict, which isinstance does not take for a mapping
      resolved[name] = {key: {**x} if hasattr(x, "keys") else x for key, x in resolved[name].items()}
  if hasattr(resolved["codec"], "keys"):
    resolved["codec"] = action_tokens.from_json({**resolved["codec"]}, "model.codec")
  resolved["remat"] = None if resolved["remat"] == "none" else resolved["remat"]
  return resolved
