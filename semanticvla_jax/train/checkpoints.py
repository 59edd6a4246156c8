"""Checkpoints of a running training: saved asynchronously, restored onto any number of devices."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from semanticvla_jax import cli, policy_folder
from semanticvla_jax.errors import refuse

_JSON = "json"  # the item of a checkpoint that holds its JSON
_READ, _DAMAGED, _UNREACHED = range(3)  # what became of a checkpoint, the worst last
_PAUSES = (0.5, 2.0)  # seconds before the second and third try
# How errors name what may pass: the status of a storage service, or of the operating system.
_PASSING = re.compile(
  "UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|"
  "Input/output error|Stale file handle|Connection|[Tt]imed out"
)
Path = str | os.PathLike


class Restored(NamedTuple):
  """A training checkpoint: the step it was saved at, its trees and its JSON."""

  step: int
  trees: dict[str, Any]
  json: dict[str, Any]


class Checkpointer:
  """Training state under `<workdir>/checkpoints/<step>/<name>`, each named tree a separate item.

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
      raise refuse(
        "Checkpointer",
        f"keep_last={keep_last}, save_every={save_every}, keep_every={keep_every}",
        "1 or more",
        "fix config.train",
      )
    self.folder = policy_folder.absolute(workdir) / "checkpoints"
    self._save_every = save_every
    options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every, cleanup_tmp_directories=True)
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
      raise refuse("Checkpointer.save", f"a tree named {_JSON!r}", "another name", "rename it")
    if step in self.steps:
      return False
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items[_JSON] = ocp.args.JsonSave({name: json_values(name, value) for name, value in (json or {}).items()})
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
      raise refuse(
        f"No checkpoint of step {step}",
        f"steps {self.steps} in {self.folder}",
        "one of them",
        "ask for one of them",
      )
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
      problems[candidate] = "damaged on another process" if error is None else cli.first_line(error)
      logging.error("CORRUPT CHECKPOINT %s: %s", self.folder / str(candidate), problems[candidate])
    if not steps:
      return None
    raise refuse(
      f"No checkpoint in {self.folder} can be read",
      f"{problems}",
      "Orbax checkpoints",
      "restore the folder from a copy, or start in a new workdir",
    )

  def _attempt(self, step: int, abstract: Mapping[str, Any]) -> tuple[Restored | None, Exception | None]:
    """(the checkpoint, None), or (None, why it could not be read the third time)."""
    for pause in (*_PAUSES, None):
      try:
        return self._read(step, abstract), None
      except Exception as error:  # Orbax may raise a bare Exception
        problem = error
      if pause is None or isinstance(problem, _OtherConfig):
        return None, problem
      logging.warning("checkpoint %s: %s; trying again", self.folder / str(step), cli.first_line(problem))
      time.sleep(pause)
    return None, problem

  def _unreached(self, step: int, error: Exception | None) -> ValueError:
    if isinstance(error, _OtherConfig):
      return error
    what = "another process could not read it (its log says why)" if error is None else cli.first_line(error)
    return refuse(
      f"Checkpoint {self.folder / str(step)} cannot be read",
      f"{what}",
      "access to undamaged data",
      "nothing was moved: look at disk, network, permissions and memory, and run again",
    )

  def _read(self, step: int, abstract: Mapping[str, Any]) -> Restored:
    """One checkpoint; raises _OtherConfig where its trees do not match, anything else where it cannot be read.

    Without the manager, whose barriers would keep the other processes waiting for one that fails.
    """
    folder, lines = self.folder / str(step), []
    for name, tree in abstract.items():
      stored = policy_folder.stored_shapes(folder / name) if (folder / name).exists() else {}
      lines += _differences(f"{name}/", tree, stored)
    if lines:
      raise _OtherConfig(_mismatch(folder, lines))
    handler = ocp.StandardCheckpointHandler()
    found = {
      name: handler.restore(folder / name, args=ocp.args.StandardRestore(policy_folder.placed(tree, None)))
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
    policy_folder.barrier("corrupt checkpoints set aside")
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
    except Exception as error:  # Orbax may raise a bare Exception
      whole = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
      left = f"from step {whole[-1]}, the newest whole one" if whole else "at step 0, for none is whole yet"
      raise refuse(
        f"Checkpoint cannot be written to {self.folder}",
        f"{policy_folder.cause(error)}",
        "room and access there",
        f"make room and run the same command again: it goes on {left}",
      ) from error


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
  refusal = refuse(
    f"Checkpoint {folder} is of another config",
    "the arrays marked -",
    "those marked +",
    "use the config of that run, or a new workdir",
  )
  return f"{refusal}\n  {listing}{more}"


def json_values(name: str, value: Any) -> Any:
  """A value as it comes back from JSON."""
  return json.loads(policy_folder.to_json(name, value))
