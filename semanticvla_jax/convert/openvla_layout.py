"""The layout of OpenVLA's checkpoint folders: tensor names in the files next to the shards, and the small files.

The release loads the companion files with torch.load and strict names. Before it loads
`vision_backbone--N_checkpoint.pt`, it wraps every linear layer of the backbone in LoRA, so the file must have
`base_layer`, `lora_A.default` and `lora_B.default`. Where the adapters are folded in already, zeros are written, which
the loader's own merge adds to the weights.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semanticvla_jax.convert.detect import Source
from semanticvla_jax.convert.io import torch_files
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.semanticvla import SemanticVLA

Shape = tuple[int, ...]
_LINEAR = r"(fused_)?featurizer\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|attn_pool\.(q|kv|proj|mlp\.fc[12])"
_LAYER = {
  "release": re.compile(_LINEAR + r")\.(weight|bias)"),
  "all_linear": re.compile(_LINEAR + r"|patch_embed\.proj)\.(weight|bias)"),  # peft's name; convolutions too
}
_SEMANTICVLA = re.compile(r"vision_queries.*|cross_vit_model\..*|fused_featurizer_mm_sampler\..*")
DEFAULTS = {  # of the released recipes
  "release": {"rank": 64, "alpha": 128, "targets": "release"},
  "all_linear": {"rank": 32, "alpha": 16, "targets": "all_linear"},
}
# What Hugging Face's AutoProcessor and AutoModel read apart from config.json, which is written by to_torch.
_PROCESSOR = re.compile(
  r"(tokenizer|tokenizer_config|preprocessor_config|processor_config|added_tokens|special_tokens_map|"
  r"generation_config)\.json|\w+\.py"
)


class Zeros(NamedTuple):
  """A tensor that the loader wants and the model does not have."""

  shape: Shape


def loader_lora(lora: Mapping | None, keys: Iterable[str]) -> dict[str, Any]:
  """Rank, alpha and targets of the adapters that the loader will make: the policy's own, else the released recipe's."""
  kind = "release" if any(map(_SEMANTICVLA.fullmatch, keys)) else "all_linear"
  return DEFAULTS[kind] | {name: x for name, x in (lora or {}).items() if name in ("rank", "alpha")}


def backbone(shapes: Mapping[str, Shape], lora: Mapping[str, Any]) -> dict[str, str | Zeros]:
  """{name in vision_backbone--N_checkpoint.pt: canonical key that holds it, or zeros}.

  Args:
    shapes: {canonical key: shape} of everything that belongs to the backbone; all of both encoders, the blocks and
      pooling heads that the model does not run included (FiLM of those and the text tower's head become zeros).
    lora: see `loader_lora`.

  Raises:
    ValueError: a part of an encoder is missing.
  """
  _check(shapes)
  dead = _dead(shapes)
  out: dict[str, str | Zeros] = {backbone_name(key): Zeros(shape) for key, shape in dead.items()}
  for key, shape in shapes.items():
    if is_adapter(key):
      continue
    name = backbone_name(key)
    if not _LAYER[lora["targets"]].fullmatch(key):
      out[name] = key
      continue
    layer, which = name.rsplit(".", 1)
    out[f"{layer}.base_layer.{which}"] = key
    if which == "weight":
      ones = (1,) * (len(shape) - 2)
      out[f"{layer}.lora_A.default.weight"] = Zeros((lora["rank"], *shape[1:]))
      out[f"{layer}.lora_B.default.weight"] = Zeros((shape[0], lora["rank"], *ones))
  return out | {backbone_name(key): key for key in shapes if is_adapter(key)}


def is_adapter(key: str) -> bool:
  """Whether a canonical key is one of peft's matrices."""
  return key.endswith((".lora_A.weight", ".lora_B.weight"))


def backbone_name(key: str) -> str:
  """The wrapper's name of a canonical key: FiLM is a sibling of the block that it wraps."""
  name = re.sub(r"(\.blocks\.\d+)\.(?!scale\.|shift\.)", r"\1.block.", hub_name(key))
  return re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name)


def adapter_name(key: str, wrapped: bool) -> str:
  """The name in adapter_model.safetensors of a canonical key; where the backbone is wrapped, its wrapper's."""
  vision = key.startswith(("featurizer.", "fused_featurizer."))
  name = "vision_backbone." + backbone_name(key).replace(".default.", ".") if wrapped and vision else hub_name(key)
  return "base_model.model." + name


def wrapped_name(key: str, adapted: Container[str]) -> str:
  """`backbone_name`, with peft's name of a weight or bias whose layer (a canonical key without its end) is adapted."""
  name = backbone_name(key)
  layer, _, which = name.rpartition(".")
  return f"{layer}.base_layer.{which}" if key.rpartition(".")[0] in adapted and not is_adapter(key) else name


def adapted_layers(keys: Iterable[str]) -> set[str]:
  """Canonical keys, without their ends, of the layers that have adapters."""
  return {key.removesuffix(".lora_A.weight") for key in keys if key.endswith(".lora_A.weight")}


def hub_name(key: str) -> str:
  """openvla-7b's own name of a canonical key."""
  if key.startswith(("featurizer.", "fused_featurizer.")):
    key = "vision_backbone." + key
  return re.sub(r"\.(ls[12])\.gamma$", r".\1.scale_factor", key)


def _check(shapes: Mapping[str, Shape]) -> None:
  missing = [key for tower in ("featurizer.", "fused_featurizer.") for key in _missing(shapes, tower)]
  if missing:
    raise refuse(
      "The release loads a whole vision backbone",
      f"none of {', '.join(missing[:4])}",
      "every block, the final norm and the pooling head, which this model does not run",
      "pass the checkpoint it came from as --base",
    )


def _missing(shapes: Mapping[str, Shape], tower: str) -> list[str]:
  number = re.compile(re.escape(tower) + r"blocks\.(\d+)\.(?!scale\.|shift\.)(.+)")
  blocks: dict[int, set[str]] = {}
  for key in shapes:
    if match := number.fullmatch(key):
      blocks.setdefault(int(match[1]), set()).add(match[2])
  names = set().union(*blocks.values())
  wanted = [f"{tower}blocks.{i}.{name}" for i in range(max(blocks, default=0) + 1) for name in sorted(names)]
  wanted += [f"{tower}norm.weight"] + ([f"{tower}attn_pool.latent"] if tower.startswith("fused") else [])
  return [key for key in wanted if key not in shapes]


def _dead(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
  """What fine-tuning makes and nothing reads: FiLM of blocks that are not run, the text tower's pooling head."""
  out = {}
  for key in shapes:
    if match := re.fullmatch(r"((?:fused_)?featurizer\.blocks\.)(\d+)\.norm1\.weight", key):
      for name in ("scale.weight", "scale.bias", "shift.weight", "shift.bias"):
        like = shapes.get(f"{match[1]}0.{name}")
        if like is not None and f"{match[1]}{match[2]}.{name}" not in shapes:
          out[f"{match[1]}{match[2]}.{name}"] = like
    elif match := re.fullmatch(r"(.*text_encoder\.text_model\.)final_layer_norm\.weight", key):
      (width,) = shapes[key]
      heads = {f"{match[1]}head.weight": (width, width), f"{match[1]}head.bias": (width,)}
      out |= {name: shape for name, shape in heads.items() if name not in shapes}
  return out


def adapter_config(keys: Iterable[str], lora: Mapping[str, Any]) -> dict[str, Any]:
  """peft's adapter_config.json, where SemanticVLA's loader finds rank and alpha.

  Args:
    keys: of the whole checkpoint; its target modules are the layers that have adapters there, else those the release
      adapts. lora: rank and alpha.
  """
  keys = list(keys)
  linear = re.compile(_LAYER["release"].pattern + r"|language_model\.(lm_head|.*_proj)\.weight")
  adapted = adapted_layers(keys) or {key.rpartition(".")[0] for key in keys if linear.fullmatch(key)}
  layers = {hub_name(layer) for layer in adapted}
  return {
    "peft_type": "LORA",
    "base_model_name_or_path": "",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": "gaussian",
    "lora_alpha": lora["alpha"],
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "r": lora["rank"],
    "target_modules": sorted(layers),
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
  }


def to_pt(path: Path, target: Path) -> None:
  """Rewrites a safetensors file for torch.load(weights_only=True); its numbers stay in the page cache, not in memory.

  Raises:
    ValueError: PyTorch is missing.
  """
  torch = need_torch()
  state = {}
  for tensor in torch_files.open_file(path):
    half, count = tensor.dtype == torch_files.DTYPES["BF16"], math.prod(tensor.shape)
    kind = np.dtype(np.int16) if half else tensor.dtype
    values = np.memmap(path, kind, "c", tensor.offset, (count,)) if count else np.zeros(0, kind)
    x = torch.from_numpy(values.reshape(tensor.shape))
    state[tensor.name] = x.view(torch.bfloat16) if half else x
  torch.save(state, target)


def need_torch() -> Any:
  """The module torch. Raises ValueError where there is none."""
  try:
    import torch
  except ImportError as error:
    raise refuse(
      "--companions=pt needs PyTorch",
      "no module torch",
      "it for .pt files",
      "`pip install torch` (the CPU build will do), or leave the companions as safetensors",
    ) from error
  return torch


def tokenizers(given: str | Path | None, sources: Sequence[str | Path]) -> list[Path]:
  """The `*.model` files of the sources' folders and of `given`; of two with one name the later, `given` the last.

  Raises:
    ValueError: `given` has none.
  """
  own = [] if given is None else sorted(Path(given).expanduser().glob("*.model"))
  if given is not None and not own:
    raise refuse("No tokenizers", f"{given} without a .model file", "tokenizer.model", "name its folder")
  models = {path.name: path for folder in _folders(sources) for path in sorted(folder.glob("*.model"))}
  return list((models | {path.name: path for path in own}).values())


def missing_tokenizers(models: Iterable[Path], source: Source, model: SemanticVLA) -> list[str]:
  """Returns why the policy of a whole model will not load with these tokenizers, one line each."""
  wanted = {"tokenizer.model": "the prompt"} if source.layout.whole else {}
  if wanted and model.text is not None:
    wanted["spiece.model"] = "the ID-Pruner's instruction"
  have = {path.name for path in models}
  return [
    f"no {name}: the policy cannot be loaded without, it reads {what}; pass its folder as --tokenizers, or copy it "
    "into tokenizers/ of the policy"
    for name, what in wanted.items()
    if name not in have
  ]


def processor_files(folders: Sequence[str | Path]) -> list[Path]:
  """Configs of the processor and the model's own code in folders; of two with one name the later."""
  found = {p.name: p for folder in _folders(folders) for p in sorted(folder.iterdir()) if _PROCESSOR.fullmatch(p.name)}
  return list(found.values())


def copy_missing(paths: Iterable[Path], folder: Path) -> None:
  """Copies files into a folder, which is made where there are any; what is there under a name stays."""
  for path in paths:
    folder.mkdir(exist_ok=True)
    if not (folder / path.name).exists():
      shutil.copyfile(path, folder / path.name)


def _folders(paths: Sequence[str | Path]) -> list[Path]:
  return [path for path in (Path(p).expanduser() for p in paths) if path.is_dir()]
