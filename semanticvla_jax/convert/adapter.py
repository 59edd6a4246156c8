"""Which of peft's adapters are plain LoRA, W + (α/r)·B·A on the weights as they are stored: every field of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from semanticvla_jax.convert.detect import Source
from semanticvla_jax.convert.rules import semanticvla
from semanticvla_jax.errors import refuse

# Where adapters are (the tensors show it), how they were trained, where they came from: no weight depends on these.
HARMLESS = frozenset(
  {
    "r",
    "lora_alpha",  # read
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "inference_mode",
    "task_type",
    "merge_weights",
    "eva_config",
    "qalora_group_size",
    "megatron_core",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "runtime_config",
  }
)
# Initializations that leave the base weights alone; of the others (pissa, olora, corda, loftq, lora_ga) peft changes
# the base before it trains, so that the adapter belongs to weights that are in no file.
INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica")
DEFAULTS = {"r": 8, "lora_alpha": 8}  # peft's own, for a file that leaves them out

_off: Callable[[Any], bool] = lambda x: x is None or x is False  # noqa: E731
_empty: Callable[[Any], bool] = lambda x: x is None or (isinstance(x, (dict, list)) and not x)  # noqa: E731


def _keeps_the_base(x: Any) -> bool:
  return x is None or isinstance(x, bool) or (isinstance(x, str) and x.lower() in INITIALIZATIONS)


# Fields of peft's LoraConfig that must have the value of plain LoRA: what it is, and how that is seen.
PLAIN: dict[str, tuple[str, Callable[[Any], bool]]] = {
  "peft_type": ("'LORA'", lambda x: x is None or x == "LORA"),
  "init_lora_weights": (f"true, false or one of {INITIALIZATIONS}, which leave the base alone", _keeps_the_base),
  "bias": ("'none'", lambda x: x is None or x == "none"),
  **dict.fromkeys(
    ("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying", "use_bdlora"),
    ("false", _off),
  ),
  **dict.fromkeys(("rank_pattern", "alpha_pattern", "loftq_config"), ("{}", _empty)),
  **dict.fromkeys(
    ("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "enable_lora"),
    ("null", _empty),
  ),
  **dict.fromkeys(
    (
      "megatron_config",
      "corda_config",
      "lora_ga_config",
      "velora_config",
      "monteclora_config",
      "arrow_config",
      "kasa_config",
    ),
    ("null", _empty),
  ),
}


def check(source: Source) -> None:
  """Raises ValueError where adapters that are read are not plain LoRA, or where this cannot be decided.

  Adapters that are in the shards already were folded by peft, which knows its own kinds: nothing of them is read.
  """
  if source.adapter is None or not source.has_adapters:
    return
  problems = problems_of(source.adapter) + _lost(source)
  if problems:
    got, expected = zip(*problems)
    raise refuse(
      "Adapter of another kind",
      f"{', '.join(got)} in {source.adapter_file}",
      f"{', '.join(expected)} (plain LoRA)",
      "fold it into its base with peft's merge_and_unload, and convert the result",
    )


def problems_of(stored: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns (value in adapter_config.json, value of plain LoRA) of every field in which the two differ."""
  problems = []
  for name, value in stored.items():
    if name in PLAIN:
      expected, is_plain = PLAIN[name]
      if not is_plain(value):
        problems.append((f"{name}={value!r}", expected))
    elif name not in HARMLESS and name != "modules_to_save" and value is not None:
      problems.append((f"{name}={value!r}", f"no field {name}, which is unknown here,"))
  return problems


def _lost(source: Source) -> list[tuple[str, str]]:
  """Modules trained in full of which the adapter's file has no tensor; those that it has replace the base's."""
  names = source.adapter.get("modules_to_save") or []
  if source.folded or _empty(names):
    return []
  if not isinstance(names, list):
    return [(f"modules_to_save={names!r}", "null or a list of names")]
  stored = [x for x in source.tensors.items() if x[1].file == source.adapter_weights and ".lora_" not in x[0]]
  wanted = {name: "." + semanticvla.canonical(f"{name}.") for name in map(str, names)}
  lost = [name for name, part in wanted.items() if not any(part in f".{key}" for key, _ in stored)]
  return [(f"modules_to_save={lost!r} and none of their tensors", "those in the adapter's file")] if lost else []
