"""Policy folders: what is trained, converted, evaluated and served, in one place.

    params/            Orbax, one array for each parameter, dtypes kept
    config.json        the resolved config: {"model": …, "lora": …, "data": …}
    statistics.json    {dataset: {"action": …, "proprio": …}}, OpenVLA's dataset_statistics.json
    metadata.json      package version, step, created, merged, params_sha256, and what the caller adds
    tokenizers/        tokenizer.model, spiece.model, action_tokens.json (where there are any)

so that parameters cannot be combined with the wrong statistics. Checkpoints of a running training are
train/checkpoints.py.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

import semanticvla_jax
from semanticvla_jax import action_tokens, cli
from semanticvla_jax.errors import refuse

FILES = ("config.json", "statistics.json", "metadata.json")
Path = str | os.PathLike


class PolicyFiles(NamedTuple):
  """A policy folder in memory.

  Attributes:
    params: nested dict of arrays, named as in the model.
    config: {"model": …, "lora": …, "data": …} as plain JSON values.
    statistics: {dataset: {"action": …, "proprio": …}}.
    metadata: see the module's docstring.
    folder: where it was read from.
  """

  params: dict
  config: dict
  statistics: dict
  metadata: dict
  folder: epath.Path

  @property
  def tokenizers(self) -> epath.Path | None:
    """The folder of the tokenizers, or None where the policy carries none."""
    folder = self.folder / "tokenizers"
    return folder if folder.exists() else None


def save_policy(
  folder: Path,
  params: Mapping,
  *,
  config: Mapping,
  statistics: Mapping,
  metadata: Mapping | None = None,
  tokenizers: Path | Mapping[str, Path] | None = None,
  replace: bool = False,
) -> epath.Path:
  """Writes a policy folder under a temporary name and renames it when complete: a reader never sees half a policy.

  Every process of a multi-host run calls this; the first one writes the small files.

  Args:
    folder: the place, local or gs://; must not exist, unless `replace`.
    params: nested dict of arrays of any sharding.
    config, statistics: JSON values; tuples become lists.
    metadata: added to (and may override) package_version, created, step (None) and merged: True if the tree holds no
      LoRA adapters.
    tokenizers: folder whose `*.model` files and action tokens are copied, or {name: file}.
    replace: whether the new folder, once complete, replaces one that exists.

  Returns:
    The folder.

  Raises:
    ValueError: the folder exists, something is not JSON, or it cannot be written (a full disk); what was there stays.
  """
  folder = absolute(folder)
  if folder.exists() and not replace:
    raise refuse("Policy folder exists", f"{folder}", "a new one", "remove it or choose another name")
  flat = flatten_dict(params, sep="/")
  facts = {
    "package_version": semanticvla_jax.__version__,
    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "step": None,
    "merged": not any(name.endswith("/lora_a") for name in flat),
    "parameters": sum(int(np.prod(leaf.shape)) for leaf in flat.values()),
    **(metadata or {}),
    "params_sha256": params_hash(params),
  }
  contents = [to_json(name, value) for name, value in zip(FILES, (config, statistics, facts))]
  partial = folder.parent / f".{folder.name}.partial"
  try:
    if jax.process_index() == 0:
      partial.rmtree(missing_ok=True)
      partial.mkdir(parents=True)
    barrier(f"begin {folder}")
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(partial / "params", params)
    if jax.process_index() == 0:
      _complete(partial, contents, tokenizers)
      folder.rmtree(missing_ok=True)
      partial.rename(folder)
  except Exception as error:  # Orbax may raise a bare Exception
    with contextlib.suppress(OSError):
      partial.rmtree(missing_ok=True)
    raise refuse(
      f"Policy {folder} cannot be written",
      f"{cause(error)}",
      f"room and access in {folder.parent}",
      "make room or choose another place, and run again",
    ) from error
  barrier(f"end {folder}")
  logging.info("wrote %s: %s parameters", folder, f"{facts['parameters']:,}")
  return folder


def _complete(partial: epath.Path, contents: list[str], tokenizers: Path | Mapping[str, Path] | None) -> None:
  """Writes a policy's small files next to its parameters."""
  for name, content in zip(FILES, contents):
    (partial / name).write_bytes(content.encode())
  if not isinstance(tokenizers, Mapping | None):
    folder = absolute(tokenizers)
    found = [*sorted(folder.glob("*.model")), *folder.glob(action_tokens.NAME)]
    tokenizers = {path.name: path for path in found}
  for name, path in (tokenizers or {}).items():
    (partial / "tokenizers").mkdir(exist_ok=True)
    path.copy(partial / "tokenizers" / name)


def load_policy(
  folder: Path,
  *,
  sharding: jax.sharding.Sharding | Callable[[dict], dict] | None = None,
  dtype: Any = None,
  verify: bool = True,
) -> PolicyFiles:
  """Reads a policy folder.

  Args:
    folder: a policy folder, local or gs://.
    sharding: of every parameter, or a function from the tree of ShapeDtypeStructs to a tree of shardings; None puts
      all on the first device.
    dtype: floating-point parameters are cast to it; None keeps what was saved.
    verify: recomputes the hash of the parameters (about 1 GB/s); turn it off to start a large server quickly. Orbax
      checks what it reads in any case.

  Raises:
    ValueError: no such folder, a part of it is missing or corrupt, or the parameters are not those of its metadata.
  """
  folder = absolute(folder)
  config, statistics, metadata = read_policy_json(folder)
  try:
    abstract = placed(stored_shapes(folder / "params"), sharding)
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore(folder / "params", abstract)
  except Exception as error:  # Orbax may raise a bare Exception
    raise _unreadable(folder, error) from error
  if verify and (got := params_hash(params)) != metadata["params_sha256"]:
    raise refuse(
      f"Policy {folder} is not what was saved",
      f"parameters of hash {got[:12]}…",
      f"{metadata['params_sha256'][:12]}… (metadata.json)",
      "copy the folder again from where it was made",
    )
  if dtype is not None:
    params = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
  return PolicyFiles(params, config, statistics, metadata, folder)


def read_policy_shapes(folder: Path) -> dict:
  """The parameters of a policy folder as ShapeDtypeStructs, without reading any; errors as in `load_policy`."""
  folder = absolute(folder)
  read_policy_json(folder)
  try:
    return stored_shapes(folder / "params")
  except Exception as error:  # as above
    raise _unreadable(folder, error) from error


def _unreadable(folder: epath.Path, error: Exception) -> ValueError:
  return refuse(
    f"Policy {folder} cannot be read",
    f"{cli.first_line(error)}",
    "Orbax parameters in params/",
    "copy the folder again from where it was made",
  )


class PolicyJson(NamedTuple):
  """The small files of a policy folder; see the module's docstring."""

  config: dict
  statistics: dict
  metadata: dict


def read_policy_json(folder: Path) -> PolicyJson:
  """The config, statistics and metadata of a policy folder, without its parameters; errors as in `load_policy`."""
  folder = absolute(folder)
  if not folder.exists():
    near = sorted(str(path.parent) for path in folder.parent.glob("*/metadata.json")) if folder.parent.exists() else []
    raise refuse(
      "No policy",
      f"{folder}, which does not exist",
      "a policy folder",
      f"name one (nearby are {', '.join(near[:5])})" if near else "train, convert or fetch one first",
    )
  missing = [name for name in ("params", *FILES) if not (folder / name).exists()]
  if missing:
    have = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else "a file"
    inside = sorted(str(path.parent) for path in folder.glob("*/metadata.json"))
    raise refuse(
      f"Policy {folder} is not complete",
      have,
      f"{', '.join(missing)} too",
      f"name a whole one (did you mean {inside[-1]}?)" if inside else "copy the folder again from where it was made",
    )
  contents = []
  for name in FILES:
    try:
      contents.append(json.loads((folder / name).read_bytes()))
    except ValueError as error:  # no JSON, or no text at all
      raise refuse(
        f"Policy file {folder / name} is corrupt",
        f"{cli.first_line(error)}",
        "JSON",
        "copy the folder again from where it was made",
      ) from error
  if "params_sha256" not in contents[-1]:
    raise refuse(f"{folder / 'metadata.json'}", sorted(contents[-1]), "params_sha256 too", "save the policy again")
  return PolicyJson(*contents)


def policy_hash(folder: Path) -> str:
  """Sixteen hex digits of a policy: of its parameters, config, statistics and action tokens; the same for a copy."""
  config, statistics, metadata = read_policy_json(folder)
  parts = [metadata["params_sha256"], *(json.dumps(part, sort_keys=True) for part in (config, statistics))]
  tokens = absolute(folder) / "tokenizers" / action_tokens.NAME
  parts += [tokens.read_text(encoding="utf-8")] if tokens.exists() else []
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def params_hash(params: Mapping) -> str:
  """SHA-256 over names, shapes, dtypes and bytes of a parameter tree of any sharding; leaf by leaf on the host."""
  digest = hashlib.sha256()
  for name, leaf in sorted(flatten_dict(params, sep="/").items()):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.ascontiguousarray(leaf)
    digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def stored_shapes(item: epath.Path) -> dict:
  """The tree of ShapeDtypeStructs that an Orbax item holds."""
  saved = ocp.StandardCheckpointHandler().metadata(item).tree
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)


def placed(abstract: Any, sharding: Any) -> Any:
  """Gives every ShapeDtypeStruct a sharding: its own, the one passed, that of a function, or the first device."""
  default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  if callable(sharding):
    shardings = sharding(abstract)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)

  def place(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or sharding or default)

  return jax.tree.map(place, abstract)


def to_json(name: str, value: Any) -> str:
  try:
    return json.dumps(value, indent=2) + "\n"
  except (TypeError, ValueError) as error:
    raise refuse(
      f"{name} is not JSON",
      f"{error}",
      "dicts, lists, strings and numbers",
      "convert it (ConfigDict.to_dict)",
    ) from error


def absolute(path: Path) -> epath.Path:
  return epath.Path(path).expanduser().resolve()


def cause(error: Exception) -> str:
  """Why something was not written: a full disk by that name, whichever library said it."""
  full = {os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)}
  said = next((words for words in full if words in str(error)), None)
  return f"a full disk ({said})" if said else cli.first_line(error)


def barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
