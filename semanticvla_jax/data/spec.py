"""A dataset described as data: `DatasetSpec`, which a user writes in a file and names as `my_robot.py:SPEC`.

    from semanticvla_jax.data.spec import DatasetSpec, Gripper

    SPEC = DatasetSpec(
      name="my_robot",
      columns={"action": 7, "observation/state": 7},
      views=("front", "side", "hand"),
      absolute=(False,) * 6 + (True,),
      groups={"trans": (0, 1, 2), "rot": (3, 4, 5), "grip": (6,)},
      gripper=Gripper(6, open=0.08, closed=0.0, kind="continuous"),
    )

Every field is checked when the spec is made (`spec_checks`). The specs of the datasets that this package knows are in
datasets.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from semanticvla_jax import cli
from semanticvla_jax.data import spec_checks
from semanticvla_jax.errors import refuse

Columns = Mapping[str, np.ndarray]


class Trajectory(NamedTuple):
  """One episode in raw units.

  Attributes:
    actions: f32[t a].
    proprio: f32[t p].
    frames: which frames of the stored episode these are, ascending.
  """

  actions: Float32[np.ndarray, "t a"]
  proprio: Float32[np.ndarray, "t p"]
  frames: Int[np.ndarray, " t"]


class Gripper(NamedTuple):
  """A gripper among the action dimensions.

  A dimension that the spec does not normalize is an opening to the model: 1 open, 0 closed.

  Attributes:
    dimension: of the action.
    open, closed: values as stored.
    kind: "binary" (a policy answers one of the two values) or "continuous" (anything between).
    command: (open, closed) as a policy answers them; None for the stored values.
  """

  dimension: int
  open: float
  closed: float
  kind: str = "binary"
  command: tuple[float, float] | None = None

  @property
  def answers(self) -> tuple[float, float]:
    """(open, closed) as a policy answers them."""
    return (self.open, self.closed) if self.command is None else self.command


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSpec:
  """How the columns of one kind of dataset are read, and what its robot is.

  Attributes:
    columns: step features to read, with their widths.
    views: one to four image features below `observation/`, in the model's order. Sizes may differ.
    absolute: per action dimension, True for a target, False for a displacement (decides what padding repeats).
    normalized: per action dimension, False passes it through; None normalizes all but binary grippers.
    groups: {name: action dimensions}, each dimension in one group. The grouped coupler has a head and an action token a
      step for each. None: translation, rotation and gripper of arms of seven dimensions.
    gripper: one or several; None without.
    action: columns that form the action, one after the other. proprio: likewise, () for none.
    standardize: columns of an episode to a Trajectory, where columns do not suffice. Openings of grippers are then its
      part. proprio_dim: the width that it returns; None for the sum of the proprio columns.
    optional: views whose images may be empty: such an image is padding, black, and hidden from the model. An empty
      image of another view is refused.
    mode: "bounds_q99" or "bounds", see statistics.normalize.
    chunk: actions predicted at a time.
    name: of the dataset's folder; None for any.
    split: which part is read, in tfds' notation.
    control_hz: actions a second.
    units: {group or "proprio": unit}, for people and clients.
    ranges: (low, high) of each action dimension that this robot can plausibly reach, in raw units.
    time: the column of seconds, of width 1, that must increase within an episode.
    aliases: {view: other names under which a policy finds it in an observation}.
  """

  columns: Mapping[str, int]
  views: Sequence[str]
  absolute: Sequence[bool]
  normalized: Sequence[bool] | None = None
  groups: Mapping[str, Sequence[int]] | None = None
  gripper: Gripper | Sequence[Gripper] | None = None
  action: Sequence[str] = ("action",)
  proprio: Sequence[str] = ("observation/state",)
  standardize: Callable[[Columns], Trajectory] | None = None
  proprio_dim: int | None = None
  optional: Sequence[str] = ()
  mode: str = "bounds_q99"
  chunk: int = 8
  name: str | None = None
  split: str = "train"
  control_hz: float | None = None
  units: Mapping[str, str] = dataclasses.field(default_factory=dict)
  ranges: Sequence[tuple[float, float]] | None = None
  time: str | None = None
  aliases: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    spec_checks.check(self)
    openings = {one.dimension for one in self.grippers if one.kind == "binary"}
    filled = {name: tuple(getattr(self, name)) for name in ("views", "absolute", "action", "proprio", "optional")}
    if self.normalized is None:
      filled["normalized"] = tuple(i not in openings for i in range(len(self.absolute)))
    else:
      filled["normalized"] = tuple(self.normalized)
    if self.groups is not None:
      filled["groups"] = {name: tuple(dims) for name, dims in self.groups.items()}
    if self.proprio_dim is None:
      filled["proprio_dim"] = sum(self.columns[key] for key in self.proprio)
    for name, value in filled.items():
      object.__setattr__(self, name, value)

  def _replace(self, **fields: Any) -> DatasetSpec:
    """A copy with other values, checked anew; what was filled in for None stays."""
    return dataclasses.replace(self, **fields)

  @property
  def grippers(self) -> tuple[Gripper, ...]:
    """Its grippers, () without."""
    if self.gripper is None:
      return ()
    return (self.gripper,) if isinstance(self.gripper, Gripper) else tuple(self.gripper)

  @property
  def openings(self) -> tuple[int, ...]:
    """Action dimensions that are openings, 1 open and 0 closed: of grippers that are not normalized."""
    return tuple(one.dimension for one in self.grippers if not self.normalized[one.dimension])

  def read(self, columns: Columns) -> Trajectory:
    """The columns of an episode as a Trajectory."""
    if self.standardize is not None:
      return self.standardize(columns)
    length = len(next(iter(columns.values())))
    join = lambda keys: np.concatenate([np.zeros((length, 0), np.float32), *(columns[key] for key in keys)], axis=1)  # noqa: E731
    actions, proprio = join(self.action), join(self.proprio)
    for one in self.grippers:
      if one.dimension in self.openings:
        opening = (actions[:, one.dimension] - one.closed) / (one.open - one.closed)
        actions[:, one.dimension] = np.clip(opening, 0, 1)
    return Trajectory(actions, proprio, np.arange(length))


def load(place: str) -> DatasetSpec:
  """The spec that "FILE.py:NAME" names; the file may import from its own folder.

  Raises:
    ValueError: no such file or name, a file that cannot be run, or a spec that is wrong.
  """
  path, _, name = place.rpartition(":")
  if not path.endswith(".py") or not name.isidentifier():
    raise refuse(
      "Spec", f"{place!r}", "FILE.py:NAME, such as my_robot.py:SPEC", "name the file and the DatasetSpec in it"
    )
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise refuse(f"Spec {place}", "no such file", "a Python file", "correct the path")
  contents = _run(place, file)
  found = contents.get(name)
  if not isinstance(found, DatasetSpec):
    have = sorted(key for key, value in contents.items() if isinstance(value, DatasetSpec))
    raise refuse(
      f"Spec {place}",
      "no such name" if found is None else type(found).__name__,
      f"one of {have}" if have else "a DatasetSpec",
      f"name {have[0]!r}" if have else f"write {name} = DatasetSpec(…) in the file",
    )
  return found


def _run(place: str, file: pathlib.Path) -> dict[str, Any]:
  """The names that the file defines."""
  spec = importlib.util.spec_from_file_location(f"dataset_spec_{file.stem}", file)
  module = importlib.util.module_from_spec(spec)
  sys.path.append(str(file.resolve().parent))
  try:
    spec.loader.exec_module(module)
  except ValueError as error:
    raise ValueError(f"{place}: {error}") from error
  except Exception as error:  # of any kind: it is the user's program
    raise refuse(f"Spec {place}", cli.first_line(error), "a file that runs", f"run `python {file}`") from error
  finally:
    sys.path.remove(str(file.resolve().parent))
  return vars(module)
