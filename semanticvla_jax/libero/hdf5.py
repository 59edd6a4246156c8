"""LIBERO's demonstrations as they are published: one HDF5 file a task, `data/demo_i/{actions, states, …}`."""

from __future__ import annotations

import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from semanticvla_jax.data import trajectories
from semanticvla_jax.errors import refuse


class Demonstration(NamedTuple):
  """One recorded episode.

  Attributes:
    name: "demo_3".
    actions: of all steps, 3 translation, 3 rotation, gripper -1 open, +1 close.
    first: the simulator's state before the first action: time, positions, velocities.
    path: of the file.
    seed: of the reset that it was recorded after, which decides where fixtures are; None if the file has none
      (LIBERO's own do not).
  """

  name: str
  actions: Float[np.ndarray, "t 7"]
  first: Float[np.ndarray, " s"]
  path: pathlib.Path
  seed: int | None = None

  @property
  def moving(self) -> Float[np.ndarray, "u 7"]:
    """The actions that are not no-ops, by the release's rule."""
    return self.actions[trajectories.kept(self.actions)]


def folder(given: str | os.PathLike, suite: str) -> pathlib.Path:
  """The folder with a suite's files: `given`, or its subfolder of that name.

  Raises:
    ValueError: there is no HDF5 file in either.
  """
  places = (pathlib.Path(given) / suite, pathlib.Path(given))
  for place in places:
    if any(place.glob("*_demo.hdf5")):
      return place
  raise refuse(
    "Demonstrations",
    f"no *_demo.hdf5 in {[str(place) for place in places]}",
    f"a file a task of {suite}",
    "download LIBERO's datasets, or name the folder that holds them",
  )


def read(path: str | os.PathLike) -> list[Demonstration]:
  """All demonstrations of one file in the order of their numbers.

  Raises:
    ValueError: h5py or the file is missing, or the file is damaged.
  """
  path = pathlib.Path(path)
  try:
    import h5py
  except ImportError as error:
    raise refuse("Demonstrations", "no h5py", "it to read HDF5", "pip install h5py") from error
  try:
    with h5py.File(path) as file:
      names = sorted(file["data"], key=lambda name: int(name.removeprefix("demo_")))
      return [_demonstration(name, file["data"][name], path) for name in names]
  except (OSError, KeyError) as error:
    raise refuse(
      "Demonstrations",
      f"{path} ({error})",
      "data/demo_i with actions and states",
      "download it again",
    ) from error


def digest(path: str | os.PathLike) -> str:
  """SHA-256 of a whole file, 16 hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _demonstration(name: str, group, path: pathlib.Path) -> Demonstration:
  actions, states = group["actions"][:], group["states"][:1]
  if actions.ndim != 2 or actions.shape[1] != 7 or not len(states) or not np.isfinite(actions).all():
    raise refuse(
      "Demonstrations",
      f"actions {actions.shape} and {len(states)} states in {name} of {path}",
      "finite [t 7] and at least one",
      "remove it or download the file again",
    )
  return Demonstration(name, actions, states[0], path, _seed(name, group, path))


def _seed(name: str, group, path: pathlib.Path) -> int | None:
  """The recorded seed, one that numpy takes; None if there is none."""
  seed = group.attrs.get("seed")
  if seed is None:
    return None
  if not (np.ndim(seed) == 0 and np.issubdtype(np.asarray(seed).dtype, np.integer) and 0 <= seed < 2**32):
    raise refuse(
      "Demonstrations",
      f"seed={seed!r} in the attributes of {name} in {path}",
      "a whole number from 0 to 2**32 - 1, numpy's before its reset",
      "correct or remove the attribute",
    )
  return int(seed)
