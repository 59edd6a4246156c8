"""Every layout that is recognized: one entry for each way in which released files name and arrange weights.

To add a source, write its rules (a function like those of vit.py, text.py and llama.py) and add one `Layout` here. The
rest of the converter asks the entry: detect.py recognizes it, plan.py converts it, settings.py reads its config.json,
and check/against_torch.py runs PyTorch's class on its weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from semanticvla_jax.convert.check import torch_names
from semanticvla_jax.convert.rules import llama, text, vit
from semanticvla_jax.convert.rules.engine import Rule, prefixed

State = dict[str, Any]
CONTRASTIVE = "contrastive loss only"
COMPUTED = "computed, not learned"
POOLED = "pooling head: tokens are used, not the pooled vector"
LAST = "final norm or pooling head: states are taken before it"


@dataclasses.dataclass(frozen=True)
class Tower:
  """Where a layout keeps one of our subtrees.

  Attributes:
    ours: beginning of our paths, "siglip/".
    theirs: beginning of the source's keys, "vision_model."; "" where the tower is alone in its files.
    rules: returns the tower's rules, without either beginning. None: the keys are our own paths, or the layout is a
      whole model, whose rules are in semanticvla.py.
    block: beginning of the keys of block `{i}`, after `theirs`; where the model stops before the last block, that one's
      keys are unused.
    unused: {regular expression over keys, after `theirs`: why our model does not read them}.
    optional: whether a model may lack this tower; its weights are unused then.
    torch_names: {key after `theirs`: tensor} → the same under the names of transformers' class. Written apart from the
      rules, so that a wrong rule is not checked against itself.
  """

  ours: str
  theirs: str
  rules: Callable[[], list[Rule]] | None = None
  block: str = ""
  unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
  optional: bool = False
  torch_names: Callable[[State], State] = lambda state: state

  @property
  def name(self) -> str:
    return self.ours.rstrip("/")

  @property
  def keys(self) -> str:
    """Regular expression of all of the tower's keys."""
    return re.escape(self.theirs) + ".*"


@dataclasses.dataclass(frozen=True)
class Layout:
  """One way in which released files name and arrange weights.

  Attributes:
    name: as it is printed and stored in conversion.json and metadata.json.
    mark: regular expression; files with a key that matches it have this layout. "" where tensor names cannot tell.
    towers: the subtrees that it can hold.
    whole: whether it is a whole model rather than single towers.
    fine_tune: whether the norm_stats of its config.json are those of its base, and do not count.
    unused: {regular expression over whole keys: why our model does not read them}.
    canonical: a stored key → the key that the rules use.
    config: how its config.json is written, a key of settings_files.CONFIGS; "" where it has none.
    fixed: {tower's name: {field: value}} that holds for all its models, whether a file states it or not.
    model_types: the `model_type` of a config.json that describes these weights.
  """

  name: str
  mark: str
  towers: tuple[Tower, ...]
  whole: bool = False
  fine_tune: bool = False
  unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
  canonical: Callable[[str], str] = lambda key: key
  config: str = ""
  fixed: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  model_types: tuple[str, ...] = ()

  def recognizes(self, keys: Iterable[str]) -> bool:
    return bool(self.mark) and any(re.fullmatch(self.mark, key) for key in keys)

  def prefixes(self, keys: Iterable[str]) -> tuple[str, ...]:
    """Returns the beginnings of our paths that a source with these keys fills; ("",) for a whole model."""
    if self.whole:
      return ("",)
    keys = [*keys]
    return tuple(tower.ours for tower in self.towers if any(key.startswith(tower.theirs) for key in keys))

  def tower_rules(self, target: Iterable[str]) -> list[Rule]:
    """Returns the rules of all towers with whole paths and keys; `target`: our paths, for layouts that share them."""
    return [
      rule
      for tower in self.towers
      for rule in (
        [Rule(path, tower.theirs + path.removeprefix(tower.ours)) for path in target if path.startswith(tower.ours)]
        if tower.rules is None
        else prefixed(tower.rules(), tower.ours, tower.theirs)
      )
    ]

  def tower_unused(self, target: Iterable[str]) -> dict[str, str]:
    """Returns {regular expression over whole keys: reason} of what a model with the paths `target` does not read."""
    out = dict(self.unused)
    for tower in self.towers:
      out |= {f"{re.escape(tower.theirs)}(?:{pattern})": why for pattern, why in tower.unused.items()}
    absent = [t for t in self.towers if t.optional and not any(path.startswith(t.ours) for path in target)]
    return out | {tower.keys: f"{tower.name} tower: this model has none" for tower in absent}

  def last_blocks(self, depths: Mapping[str, int]) -> dict[str, str]:
    """Returns the same of the last blocks, for a model that stops before them; `depths`: {tower's name: blocks}."""
    return {
      re.escape(tower.theirs + tower.block.replace("{i}", str(depths[tower.name] - 1))) + ".*": (
        "last block: states come before it"
      )
      for tower in self.towers
      if tower.block and tower.name in depths
    }


_HF_LAST = {r"(head|post_layernorm)\..*": LAST}
_TIMM_LAST = {r"(norm|fc_norm|attn_pool|head)\..*": LAST}
_BIG_VISION_LAST = {r"(Transformer/encoder_norm|MAPHead_0|head)/.*": LAST}
_WHOLE = (  # where every whole model keeps its towers
  Tower("dino/", "featurizer.", torch_names=torch_names.dinov2_from_timm),
  Tower("siglip/", "fused_featurizer.", torch_names=torch_names.siglip_from_timm),
  Tower("text/", "fused_featurizer_mm_sampler.text_encoder.text_model."),
  Tower("llm/", "language_model."),
)
PARTS = ("featurizer.", "fused_featurizer.", "language_model.")  # beginnings of keys that every whole model has

OPENVLA = Layout(
  "openvla-7b", r"language_model\..*", _WHOLE, whole=True, config="openvla", model_types=("openvla", "prismatic")
)
OPENVLA_FINE_TUNE = dataclasses.replace(OPENVLA, name="OpenVLA fine-tune", mark="", fine_tune=True)

LAYOUTS: dict[str, Layout] = {
  layout.name: layout
  for layout in (
    dataclasses.replace(
      OPENVLA, name="SemanticVLA", mark=r"(action_head\.model_|cross_vit_model\.|vision_queries).*", fine_tune=True
    ),
    dataclasses.replace(OPENVLA, name="OpenVLA-OFT", mark=r"action_head\..*", fine_tune=True),
    OPENVLA_FINE_TUNE,
    OPENVLA,
    Layout(
      "SigLIP, big_vision",
      mark=r"(siglip|text)/.*",
      towers=(
        Tower(
          "siglip/",
          "siglip/",
          None,
          "Transformer/encoderblock_{i}/",
          _BIG_VISION_LAST,
          torch_names=torch_names.from_big_vision,
        ),
        Tower(
          "text/",
          "text/",
          unused={r"(head|MAPHead_0)/.*": POOLED},
          optional=True,
          torch_names=torch_names.from_big_vision,
        ),
      ),
      fixed={name: {"hidden_act": "gelu_pytorch_tanh"} for name in ("siglip", "text")},
    ),
    Layout(
      "SigLIP, Hugging Face",
      mark=r"(vision_model\.embeddings|text_model\.embeddings)\..*",
      towers=(
        Tower("siglip/", "vision_model.", vit.hf_siglip, "encoder.layers.{i}.", _HF_LAST),
        Tower("text/", "text_model.", text.hf_siglip_text, unused={r"head\..*": POOLED}, optional=True),
      ),
      unused={r"logit_(scale|bias)": CONTRASTIVE, r".*\.position_ids": COMPUTED},
      config="siglip",
      model_types=("siglip", "siglip_vision_model", "siglip_text_model"),
    ),
    Layout(
      "DINOv2, Hugging Face",
      mark=r"embeddings\.register_tokens",
      towers=(
        Tower("dino/", "", vit.hf_dinov2, "encoder.layer.{i}.", vit.HF_DINOV2_UNUSED | {r"layernorm\..*": LAST}),
      ),
      canonical=vit.canonical_dinov2,
      config="tower",
      model_types=("dinov2_with_registers",),
    ),
    Layout(
      "DINOv2, timm",
      mark=r"reg_token",
      towers=(Tower("dino/", "", vit.timm, "blocks.{i}.", _TIMM_LAST, torch_names=torch_names.dinov2_from_timm),),
      config="timm",
      model_types=("timm_wrapper",),
    ),
    Layout(
      "SigLIP, timm",
      mark=r"attn_pool\.latent",
      towers=(Tower("siglip/", "", vit.timm, "blocks.{i}.", _TIMM_LAST, torch_names=torch_names.siglip_from_timm),),
      config="timm",
      model_types=("timm_wrapper",),
    ),
    Layout(
      "Llama, Hugging Face",
      mark=r"model\.embed_tokens\.weight",
      towers=(
        Tower("llm/", "", llama.hf_llama, unused=llama.UNUSED | {r"lm_head\.weight": "actions come from the coupler"}),
      ),
      config="tower",
      model_types=("llama",),
    ),
  )
}


def whole_model(keys: Iterable[str], fine_tuned: bool) -> Layout:
  """Returns the layout of a whole model.

  Args:
    keys: of its tensors.
    fine_tuned: whether other files show a fine-tune; tensor names do not distinguish one from openvla-7b.
  """
  keys = [*keys]
  found = next(layout for layout in LAYOUTS.values() if layout.whole and layout.recognizes(keys))
  return OPENVLA_FINE_TUNE if found is OPENVLA and fine_tuned else found


def single_towers(keys: Iterable[str]) -> list[Layout]:
  """Returns every layout of single towers that matches the keys."""
  keys = [*keys]
  return [layout for layout in LAYOUTS.values() if not layout.whole and layout.recognizes(keys)]
