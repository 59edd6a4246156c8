"""A policy's adapters folded into its kernels: a policy folder without adapters, in a new folder or in place."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from semanticvla_jax import files, policy_folder
from semanticvla_jax.convert.io import orbax_writer, swap
from semanticvla_jax.convert.io.orbax_reader import PolicyFolder
from semanticvla_jax.convert.io.orbax_writer import ArraySpec, Piece
from semanticvla_jax.convert.io.progress import Progress
from semanticvla_jax.convert.io.target import check_target, whole
from semanticvla_jax.errors import refuse

_WRITTEN = ("params", "config.json", "metadata.json")  # the rest is copied
_STACK = "llm/layers/"


def fold(
  policy: str | Path, target: str | Path | None = None, *, say: Callable[[str], None] = logging.info
) -> dict | None:
  """Folds the adapters of a policy in, as `Policy.load` does; returns the new metadata, None where it has none.

  Args:
    policy: a policy folder. target: the folder to make; None replaces `policy`, which stays whole until then.
    say: is given lines of progress.

  Raises:
    ValueError: no policy, it is damaged, its adapters are not those of its config, the target exists, another run is
      writing there, or the disk is full.
  """
  place = Path(policy).expanduser().resolve()
  _bring_back(place, say)
  folder = PolicyFolder(place)
  target = place if target is None else Path(target).expanduser().absolute()
  if target != place:
    check_target(target)
  if not folder.adapted:
    say(f"{place} has no adapters: nothing to fold, nothing was written")
    return None
  settings = _settings(folder)
  arrays = {
    path: ArraySpec(leaf.shape, leaf.dtype, stacked=path.startswith(_STACK))
    for path, leaf in folder.leaves.items()
    if not path.endswith(("/lora_a", "/lora_b"))
  }
  progress = Progress(sum(x.nbytes for x in arrays.values()), say)
  with whole(target, progress.total, say, replace=target == place) as partial:
    _check_still_there(folder)
    folder.check_hash()
    written = lambda path, piece: progress.add(piece.nbytes, path)  # noqa: E731
    digest = orbax_writer.write(partial / "params", arrays, _pieces(folder, arrays), written)
    facts = {"merged": True, "parameters": sum(x.size for x in arrays.values()), "params_sha256": digest}
    metadata = folder.metadata | facts | {"lora": settings}
    files.write_json(partial / "config.json", {**folder.config, "lora": None})
    files.write_json(partial / "metadata.json", metadata)
    _copy_rest(place, partial)
  count = len(folder.leaves) - len(arrays)
  say(f"{target}: {count // 2} adapters of rank {settings['rank']}, alpha {settings['alpha']} folded in")
  return metadata


def _settings(folder: PolicyFolder) -> dict[str, Any]:
  """Rank, alpha and targets as the converter records them."""
  lora = folder.config.get("lora")
  if not lora:
    raise refuse(
      f"Policy {folder.folder}",
      "adapters and no `lora` in config.json",
      "their rank, alpha and targets",
      "copy the folder again from where it was made",
    )
  return {"rank": int(lora["rank"]), "alpha": float(lora["alpha"]), "targets": lora.get("targets", "release")}


def _pieces(folder: PolicyFolder, arrays: Mapping[str, ArraySpec]) -> Iterator[Piece]:
  for path in sorted(arrays):
    for layer in arrays[path].layers:
      yield Piece(path, layer, functools.partial(folder.merged, path, layer))


def _check_still_there(folder: PolicyFolder) -> None:
  """Raises ValueError where another run replaced the policy before this one was alone with it."""
  if policy_folder.read_policy_json(folder.folder).metadata != folder.metadata:
    raise refuse(
      f"Policy {folder.folder} changed meanwhile",
      "another metadata.json than at first",
      "one run at a time",
      "run it again",
    )


def _bring_back(place: Path, say: Callable[[str], None]) -> None:
  """Restores the name of a policy that a killed run had moved aside."""
  if not place.exists() and swap.aside(place).exists():
    say(f"{place} is restored from {swap.aside(place)}, where a run that did not finish had moved it")
    swap.aside(place).rename(place)


def _copy_rest(place: Path, partial: Path) -> None:
  """Copies statistics, tokenizers, the conversion's report and all other files."""
  for path in sorted(place.iterdir()):
    if path.name in _WRITTEN or path.name == ".lock":
      continue
    if path.is_dir():
      shutil.copytree(path, partial / path.name)
    else:
      shutil.copy2(path, partial / path.name)
