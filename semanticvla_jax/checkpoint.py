"""Checkpoints: Orbax behind one module.

A *policy folder* is what is trained, converted, evaluated and served:

    params/            Orbax, one array a parameter, dtypes kept
    config.json        the resolved config: {"model": …, "lora": …, "data": …}
    statistics.json    {dataset: {"action": …, "proprio": …}}, OpenVLA's dataset_statistics.json
    metadata.json      package version, step, created, merged, params_sha256, and what the caller adds
    tokenizers/        tokenizer.model, spiece.model (where there are any)

so that parameters cannot be paired with the wrong statistics. *Training state* is what a run resumes from
(`Checkpointer`): named trees and JSON, saved asynchronously, restored onto any number of devices.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

import semanticvla_jax

FILES = ("config.json", "statistics.json", "metadata.json")
_JSON = "json"  # the item of a training checkpoint that holds its JSON
_READ, _DAMAGED, _UNREACHED = range(3)  # what became of a checkpoint, the worst last
_PAUSES = (0.5, 2.0)  # seconds before the second and third try
# How errors name what may pass: the status of a storage service, or of the operating system.
_PASSING = re.compile(
  "UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|"
  "Input/output error|Stale file handle|Connection|[Tt]imed out"
)
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
    """The folder of the tokenisers, or None where the policy carries none."""
    folder = self.folder / "tokenizers"
    return folder if folder.exists() else None


def save_policy(
  folder: Path,
  params: Mapping,
  *,
  config: Mapping,
  statistics: Mapping,
  metadata: Mapping | None = None,
  tokenizers: Path | None = None,
  replace: bool = False,
) -> epath.Path:
  """Writes a policy folder beside its place and renames it when complete: a reader never sees half a policy.

  Every process of a multi-host run calls this; the first one writes the small files.

  Args:
    folder: the place, local or gs://; must not exist, unless `replace`.
    params: nested dict of arrays of any sharding.
    config, statistics: JSON values; tuples become lists.
    metadata: added to (and may override) package_version, created, step (None) and merged: True if the tree holds no
      LoRA adapters.
    tokenizers: folder whose `*.model` files are copied.
    replace: whether a folder that is there goes, once the new one is complete.

  Returns:
    The folder.

  Raises:
    ValueError: the folder exists, something is no JSON, or it cannot be written (a full disk); what was there stays.
  """
  folder = _absolute(folder)
  if folder.exists() and not replace:
    raise ValueError(f"Policy folder exists: got {folder}; expected a new one; remove it or choose another name.")
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
  contents = [_dumps(name, value) for name, value in zip(FILES, (config, statistics, facts))]
  partial = folder.parent / f".{folder.name}.partial"
  try:
    if jax.process_index() == 0:
      partial.rmtree(missing_ok=True)
      partial.mkdir(parents=True)
    _meet(f"begin {folder}")
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(partial / "params", params)
    if jax.process_index() == 0:
      _complete(partial, contents, tokenizers)
      folder.rmtree(missing_ok=True)
      partial.rename(folder)
  except Exception as error:  # Orbax raises what it likes, bare Exceptions among it
    with contextlib.suppress(OSError):
      partial.rmtree(missing_ok=True)
    raise ValueError(
      f"Policy {folder} cannot be written: got {_cause(error)}; expected room and access in {folder.parent}; make room "
      "or choose another place, and run again."
    ) from error
  _meet(f"end {folder}")
  logging.info("wrote %s: %s parameters", folder, f"{facts['parameters']:,}")
  return folder


def _complete(partial: epath.Path, contents: list[str], tokenizers: Path | None) -> None:
  """Writes a policy's small files next to its parameters."""
  for name, text in zip(FILES, contents):
    (partial / name).write_bytes(text.encode())
  for path in [] if tokenizers is None else sorted(_absolute(tokenizers).glob("*.model")):
    (partial / "tokenizers").mkdir(exist_ok=True)
    path.copy(partial / "tokenizers" / path.name)


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
  folder = _absolute(folder)
  config, statistics, metadata = read_policy_json(folder)
  try:
    abstract = _placed(_shapes(folder / "params"), sharding)
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore(folder / "params", abstract)
  except Exception as error:  # Orbax raises what it likes, bare Exceptions among it
    raise _unreadable(folder, error) from error
  if verify and (got := params_hash(params)) != metadata["params_sha256"]:
    raise ValueError(
      f"Policy {folder} is not what was saved: got parameters of hash {got[:12]}…, expected "
      f"{metadata['params_sha256'][:12]}… (metadata.json); copy the folder again from where it was made."
    )
  if dtype is not None:
    params = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
  return PolicyFiles(params, config, statistics, metadata, folder)


def read_policy_shapes(folder: Path) -> dict:
  """The parameters of a policy folder as ShapeDtypeStructs, without reading any; errors as in `load_policy`."""
  folder = _absolute(folder)
  read_policy_json(folder)
  try:
    return _shapes(folder / "params")
  except Exception as error:  # as above
    raise _unreadable(folder, error) from error


def _unreadable(folder: epath.Path, error: Exception) -> ValueError:
  return ValueError(
    f"Policy {folder} cannot be read: got {_first_line(error)}; expected Orbax parameters in params/; copy the "
    "folder again from where it was made."
  )


def read_policy_json(folder: Path) -> tuple[dict, dict, dict]:
  """The config, statistics and metadata of a policy folder, without its parameters; errors as in `load_policy`."""
  folder = _absolute(folder)
  if not folder.exists():
    near = sorted(str(path.parent) for path in folder.parent.glob("*/metadata.json")) if folder.parent.exists() else []
    raise ValueError(
      f"No policy: got {folder}, which does not exist; expected a policy folder; "
      + (f"nearby are {', '.join(near[:5])}." if near else "train, convert or fetch one first.")
    )
  missing = [name for name in ("params", *FILES) if not (folder / name).exists()]
  if missing:
    have = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else "a file"
    inside = sorted(str(path.parent) for path in folder.glob("*/metadata.json"))
    raise ValueError(
      f"Policy {folder} is not complete: got {have}; expected {', '.join(missing)} too; "
      + (f"did you mean {inside[-1]}?" if inside else "copy the folder again from where it was made.")
    )
  contents = []
  for name in FILES:
    try:
      contents.append(json.loads((folder / name).read_bytes()))
    except ValueError as error:  # no JSON, or no text at all
      raise ValueError(
        f"Policy file {folder / name} is corrupt: got {_first_line(error)}; expected JSON; copy the folder again from "
        "where it was made."
      ) from error
  if "params_sha256" not in contents[-1]:
    raise ValueError(f"{folder / 'metadata.json'} lacks params_sha256: got {sorted(contents[-1])}; save it again.")
  return tuple(contents)


def policy_hash(folder: Path) -> str:
  """Sixteen hex digits that name a policy: its parameters, its config and its statistics; the same for a copy."""
  config, statistics, metadata = read_policy_json(folder)
  parts = [metadata["params_sha256"], *(json.dumps(part, sort_keys=True) for part in (config, statistics))]
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


class Restored(NamedTuple):
  """A training checkpoint: the step it was saved at, its trees and its JSON."""

  step: int
  trees: dict[str, Any]
  json: dict[str, Any]


class Checkpointer:
  """Training state under `<workdir>/checkpoints/<step>/<name>`, each named tree an item of its own.

  Saves are asynchronous: `save` returns once the arrays are copied off the devices, so they may be donated at once. A
  checkpoint appears under its step only when complete; a run that is killed while saving resumes from the one before.

  Args:
    workdir: of the run, local or gs://.
    keep_last: how many checkpoints stay.
    save_every: steps between those that are `due`.
    keep_every: checkpoints at multiples of it stay besides; None for no others.
  """

  def __init__(self, workdir: Path, keep_last: int = 3, save_every: int = 1000, keep_every: int | None = None):
    if keep_last < 1 or save_every < 1 or (keep_every is not None and keep_every < 1):
      raise ValueError(
        f"Checkpointer: got keep_last={keep_last}, save_every={save_every}, keep_every={keep_every}; expected 1 or "
        "more; fix config.train."
      )
    self.folder = _absolute(workdir) / "checkpoints"
    self._save_every = save_every
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep_last, keep_period=keep_every, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    try:
      self.close()
    except ValueError as error:
      if kind is None:
        raise
      logging.error("%s", error)  # the other one is what ended the run

  @property
  def steps(self) -> list[int]:
    """The steps of the checkpoints there are, ascending."""
    return sorted(self._manager.all_steps())

  def due(self, step: int) -> bool:
    """Whether `step` is one to save at."""
    return step > 0 and step % self._save_every == 0

  def save(self, step: int, trees: Mapping[str, Any], json: Mapping[str, Any] | None = None) -> bool:
    """Saves at `step`, whether due or not; False if that step is there already.

    Args:
      step: number of updates done.
      trees: pytrees of arrays by name, e.g. {"params": …, "train": …}; inference reads "params" only.
      json: JSON values by name, e.g. {"config": …, "statistics": …}.

    Raises:
      ValueError: this save, or the one before it, cannot be written.
    """
    if _JSON in trees:
      raise ValueError(f"Checkpointer.save: got a tree named {_JSON!r}; expected another name; rename it.")
    if step in self.steps:
      return False
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items[_JSON] = ocp.args.JsonSave({name: _plain(name, value) for name, value in (json or {}).items()})
    with self._telling():
      return self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def restore(self, abstract: Mapping[str, Any], step: int | None = None) -> Restored | None:
    """Restores the newest checkpoint that can be read, or that of `step`; None if there is none.

    A checkpoint whose data are damaged is reported with its error, moved to `<workdir>/checkpoints_corrupt/` and the
    one before it is taken, unless a `step` was asked for. What is damaged on one process is passed over by all. Every
    read is tried three times; what fails for another reason (access, network, memory) ends here, and nothing is moved.

    Args:
      abstract: pytrees of ShapeDtypeStruct by name, with the shardings wanted now (any number of devices); trees that
        are not named are not read.
      step: which one, or None for the newest.

    Raises:
      ValueError: no such step; its trees have other names or shapes than `abstract` (another config); every checkpoint
        is corrupt; or one cannot be reached.
    """
    self.wait()
    if step is not None and step not in self.steps:
      raise ValueError(f"No checkpoint of step {step}: got steps {self.steps} in {self.folder}; ask for one of them.")
    steps = [step] if step is not None else self.steps[::-1]
    problems = {}
    for candidate in steps:
      found, error = self._attempt(candidate, abstract)
      worst = _worst_of_all(error)
      if worst == _READ:
        self._set_aside([*problems])
        return found
      if worst == _UNREACHED:
        raise self._unreached(candidate, error)
      problems[candidate] = "damaged on another process" if error is None else _first_line(error)
      logging.error("CORRUPT CHECKPOINT %s: %s", self.folder / str(candidate), problems[candidate])
    if not steps:
      return None
    raise ValueError(
      f"No checkpoint in {self.folder} can be read: got {problems}; expected Orbax checkpoints; restore the folder "
      "from a copy, or start in a new workdir."
    )

  def _attempt(self, step: int, abstract: Mapping[str, Any]) -> tuple[Restored | None, Exception | None]:
    """(the checkpoint, None), or (None, why it could not be read the third time)."""
    for pause in (*_PAUSES, None):
      try:
        return self._read(step, abstract), None
      except Exception as error:  # Orbax raises what it likes, bare Exceptions among it
        problem = error
      if pause is None or isinstance(problem, _OtherConfig):
        return None, problem
      logging.warning("checkpoint %s: %s; trying again", self.folder / str(step), _first_line(problem))
      time.sleep(pause)
    return None, problem

  def _unreached(self, step: int, error: Exception | None) -> ValueError:
    if isinstance(error, _OtherConfig):
      return error
    what = "another process could not read it (its log says why)" if error is None else _first_line(error)
    return ValueError(
      f"Checkpoint {self.folder / str(step)} cannot be read: got {what}; expected access to undamaged data; nothing "
      "was moved: look at disk, network, permissions and memory, and run again."
    )

  def _read(self, step: int, abstract: Mapping[str, Any]) -> Restored:
    """One checkpoint; raises _OtherConfig where its trees do not match, anything else where it cannot be read.

    Without the manager, whose barriers would keep the other processes waiting for one that fails.
    """
    folder, lines = self.folder / str(step), []
    for name, tree in abstract.items():
      lines += _differences(f"{name}/", tree, _shapes(folder / name) if (folder / name).exists() else {})
    if lines:
      raise _OtherConfig(_mismatch(folder, lines))
    handler = ocp.StandardCheckpointHandler()
    found = {
      name: handler.restore(folder / name, args=ocp.args.StandardRestore(_placed(tree, None)))
      for name, tree in abstract.items()
    }
    return Restored(step, found, ocp.JsonCheckpointHandler().restore(folder / _JSON))

  def _set_aside(self, steps: list[int]) -> None:
    """Moves corrupt checkpoints away, so that their steps can be saved again."""
    if not steps:
      return
    away = self.folder.parent / "checkpoints_corrupt"
    if jax.process_index() == 0:
      away.mkdir(exist_ok=True)
      for step in steps:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
        (self.folder / str(step)).rename(away / f"{step}-{stamp}")
    _meet("corrupt checkpoints set aside")
    self._manager.reload()
    logging.error("moved the corrupt checkpoints of steps %s to %s; going on from the one before", steps, away)

  def wait(self) -> None:
    """Returns when the save in progress is on disk. Raises ValueError for what went wrong in it."""
    with self._telling():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the threads; raises as `wait` does."""
    with self._telling():
      self._manager.close()

  @contextlib.contextmanager
  def _telling(self) -> Iterator[None]:
    """Turns whatever Orbax raises while it writes into one line that says from where the run goes on."""
    try:
      yield
    except Exception as error:  # Orbax raises what it likes, bare Exceptions among it
      whole = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
      left = f"from step {whole[-1]}, the newest whole one" if whole else "at step 0, for none is whole yet"
      raise ValueError(
        f"Checkpoint cannot be written to {self.folder}: got {_cause(error)}; expected room and access there; make "
        f"room and run the same command again: it goes on {left}."
      ) from error


def _shapes(item: epath.Path) -> dict:
  """The tree of ShapeDtypeStructs that an Orbax item holds."""
  saved = ocp.StandardCheckpointHandler().metadata(item).tree
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)


def _differences(prefix: str, wanted: Any, saved: Any) -> list[str]:
  """Lines '+ name shape' wanted and not saved, '- name shape' saved and not wanted."""

  def lines(tree):
    flat = ocp.tree.to_flat_dict(tree, sep="/")
    return {f"{prefix}{name} {_stored_shape(x)}" for name, x in flat.items() if hasattr(x, "shape")}

  wanted, saved = lines(wanted), lines(saved)
  return [f"+ {line}" for line in sorted(wanted - saved)] + [f"- {line}" for line in sorted(saved - wanted)]


def _stored_shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
  """Random keys are stored as their words."""
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return tuple(jax.eval_shape(jax.random.key_data, x).shape if is_key else x.shape)


def _worst_of_all(error: Exception | None) -> int:
  """What became of a read, on the process that fared worst: _READ, _DAMAGED or _UNREACHED, the same answer on all."""
  outcome = _READ if error is None else _DAMAGED if _is_damage(error) else _UNREACHED
  if jax.process_count() > 1:
    outcome = int(multihost_utils.process_allgather(np.int32(outcome)).max())
  return outcome


def _is_damage(error: Exception) -> bool:
  """Whether a read failed for what is stored, rather than for how it was reached."""
  kinds = (ValueError, KeyError, EOFError, FileNotFoundError)
  data = isinstance(error, kinds) or type(error) is Exception
  return data and not isinstance(error, _OtherConfig) and not _PASSING.search(str(error))


class _OtherConfig(ValueError):
  """A checkpoint that can be read, but is not what was asked for."""


def _mismatch(folder: epath.Path, lines: list[str]) -> str:
  more = f"\n  … and {len(lines) - 12} more" if len(lines) > 12 else ""
  listing = "\n  ".join(lines[:12])
  return (
    f"Checkpoint {folder} is of another config: got the arrays marked -, expected those marked +; use the config of "
    f"that run, or a new workdir.\n  {listing}{more}"
  )


def _placed(abstract: Any, sharding: Any) -> Any:
  """Gives every ShapeDtypeStruct a sharding: its own, the one passed, that of a function, or the first device."""
  default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  if callable(sharding):
    shardings = sharding(abstract)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)

  def place(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or sharding or default)

  return jax.tree.map(place, abstract)


def _plain(name: str, value: Any) -> Any:
  return json.loads(_dumps(name, value))


def _dumps(name: str, value: Any) -> str:
  try:
    return json.dumps(value, indent=2) + "\n"
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{name} is no JSON: got {error}; expected dicts, lists, strings and numbers; convert it (ConfigDict.to_dict)."
    ) from error


def _absolute(path: Path) -> epath.Path:
  return epath.Path(path).expanduser().resolve()


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _cause(error: Exception) -> str:
  """Why something was not written: a full disk by that name, whichever library said it."""
  full = {os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)}
  said = next((words for words in full if words in str(error)), None)
  return f"a full disk ({said})" if said else _first_line(error)


def _meet(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
