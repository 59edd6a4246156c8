"""The small files that travel with a checkpoint: tokenisers into a policy, processor and code files through it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from semanticvla_jax.convert.source import VLA, Source
from semanticvla_jax.models.semanticvla import SemanticVLA

# What Hugging Face's AutoProcessor and AutoModel read beside config.json, which is written anew.
_PROCESSOR = re.compile(
  r"(tokenizer|tokenizer_config|preprocessor_config|processor_config|added_tokens|special_tokens_map|"
  r"generation_config)\.json|\w+\.py"
)


def tokenizers(given: str | Path | None, sources: Sequence[str | Path]) -> list[Path]:
  """The `*.model` files of the sources' folders and of `given`; of two with one name the later, `given` the last.

  Raises:
    ValueError: `given` has none.
  """
  own = [] if given is None else sorted(Path(given).expanduser().glob("*.model"))
  if given is not None and not own:
    raise ValueError(f"No tokenisers: got {given} without a .model file; expected tokenizer.model; name its folder.")
  models = {path.name: path for folder in _folders(sources) for path in sorted(folder.glob("*.model"))}
  return list((models | {path.name: path for path in own}).values())


def lacking(models: Iterable[Path], source: Source, model: SemanticVLA) -> list[str]:
  """Why the policy of a whole model will not load with these tokenisers, one line each."""
  wanted = {"tokenizer.model": "the prompt"} if source.kind in VLA else {}
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


def copy(paths: Iterable[Path], folder: Path) -> None:
  """Copies files into a folder, which is made where there are any; what is there under a name stays."""
  for path in paths:
    folder.mkdir(exist_ok=True)
    if not (folder / path.name).exists():
      shutil.copyfile(path, folder / path.name)


def _folders(paths: Sequence[str | Path]) -> list[Path]:
  return [path for path in (Path(p).expanduser() for p in paths) if path.is_dir()]
