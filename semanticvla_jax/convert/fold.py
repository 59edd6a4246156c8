"""A policy's adapters folded into its kernels: a policy folder without adapters, in a new folder or in place."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semanticvla_jax import checkpoint, files
from semanticvla_jax.convert.io import orbax_writer, swap
from semanticvla_jax.convert.io.orbax_reader import PolicyFolder
from semanticvla_jax.convert.io.progress import Progress
from semanticvla_jax.convert.io.target import check_target, whole

_WRITTEN = ("params", "config.json", "metadata.json")  # anew; the rest is copied
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
  leaves = {p: _lazy(folder, p) for p in folder.leaves if not p.endswith(("/lora_a", "/lora_b"))}
  progress = Progress(sum(leaf.nbytes for leaf in leaves.values()), say)
  with whole(target, progress.total, say, replace=target == place) as partial:
    _check_still_there(folder)
    folder.check_hash()
    digest = orbax_writer.write(partial / "params", leaves, lambda path, piece: progress.add(piece.nbytes, path))
    facts = {"merged": True, "parameters": sum(leaf.size for leaf in leaves.values()), "params_sha256": digest}
    metadata = folder.metadata | facts | {"lora": settings}
    files.write_json(partial / "config.json", {**folder.config, "lora": None})
    files.write_json(partial / "metadata.json", metadata)
    _copy_rest(place, partial)
  count = len(folder.leaves) - len(leaves)
  say(f"{target}: {count // 2} adapters of rank {settings['rank']}, alpha {settings['alpha']} folded in")
  return metadata


def _settings(folder: PolicyFolder) -> dict[str, Any]:
  """Rank, alpha and targets as the converter records them."""
  lora = folder.config.get("lora")
  if not lora:
    raise ValueError(
      f"Policy {folder.folder} has adapters and no `lora` in config.json: expected their rank, alpha and targets; copy "
      "the folder again from where it was made."
    )
  return {"rank": int(lora["rank"]), "alpha": float(lora["alpha"]), "targets": lora.get("targets", "release")}


def _lazy(folder: PolicyFolder, path: str) -> orbax_writer.Lazy:
  leaf, stacked = folder.leaves[path], path.startswith(_STACK)
  layers = range(leaf.shape[0]) if stacked else (None,)
  return orbax_writer.Lazy(leaf.shape, leaf.dtype, stacked, [functools.partial(folder.merged, path, i) for i in layers])


def _check_still_there(folder: PolicyFolder) -> None:
  """Raises ValueError where another run replaced the policy before this one was alone with it."""
  if checkpoint.read_policy_json(folder.folder)[2] != folder.metadata:
    raise ValueError(
      f"Policy {folder.folder} changed meanwhile: got another metadata.json than at first; expected one run at a time; "
      "run it again."
    )


def _bring_back(place: Path, say: Callable[[str], None]) -> None:
  """Gives a policy its name again that a run which was killed had put aside."""
  if not place.exists() and swap.aside(place).exists():
    say(f"{place} comes back from {swap.aside(place)}, where a run that did not finish had put it")
    swap.aside(place).rename(place)


def _copy_rest(place: Path, partial: Path) -> None:
  """Statistics, tokenisers, the conversion's report and whatever else lies there."""
  for path in sorted(place.iterdir()):
    if path.name in _WRITTEN or path.name == ".lock":
      continue
    if path.is_dir():
      shutil.copytree(path, partial / path.name)
    else:
      shutil.copy2(path, partial / path.name)
