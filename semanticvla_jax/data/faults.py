"""Episodes that training cannot use, and why: what `rlds.load` refuses or skips, and what `data inspect` counts."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from semanticvla_jax.data import images, tfrecord_index
from semanticvla_jax.data.spec import DatasetSpec
from semanticvla_jax.errors import refuse

RECORDS = "unreadable records"  # a kind of Fault
_TOGETHER = 256  # images decoded between two looks at what was found


class Fault(NamedTuple):
  """One reason why an episode cannot be used.

  Attributes:
    kind: what is wrong, in the plural: "non-finite numbers".
    episode: of the index; None where the record is not in it.
    error: the message, with its place and remedy.
  """

  kind: str
  episode: int | None
  error: ValueError


def of_numbers(name: str, spec: DatasetSpec, index: tfrecord_index.Index) -> Iterator[Fault]:
  """Non-finite numbers, time that does not increase, and empty images of views that are not optional.

  One fault an episode and column, at its first frame.
  """
  reader, owner = tfrecord_index.Reader(index), np.repeat(np.arange(len(index.lengths)), index.lengths)
  for key, column in index.columns.items():
    for frame in _first(owner, ~np.isfinite(column).all(axis=1)):
      dimension = int(np.flatnonzero(~np.isfinite(column[frame]))[0])
      error = refuse(
        f"Dataset {name!r}, {key!r}",
        f"{column[frame, dimension]} in dimension {dimension} of {reader.where(frame)}",
        "finite numbers",
        "repair the episode or write the dataset without it",
      )
      yield Fault("non-finite numbers", int(owner[frame]), error)
  for view, column in zip(spec.views, index.image_bytes.T, strict=True):
    for frame in _first(owner, (column == 0) & (view not in spec.optional)):
      error = refuse(
        f"Dataset {name!r}, {view!r}",
        f"an empty image in {reader.where(frame)}",
        "an image in every frame",
        f"write the dataset without the episode, or set optional=({view!r},) in its DatasetSpec",
      )
      yield Fault("empty images", int(owner[frame]), error)
  if spec.time is not None:
    seconds = index.columns[spec.time][:, 0]
    back = np.append(False, (np.diff(seconds) <= 0) & (np.diff(owner) == 0))
    for frame in _first(owner, back):
      error = refuse(
        f"Dataset {name!r}, {spec.time!r}",
        f"{seconds[frame]:g} s after {seconds[frame - 1]:g} s in {reader.where(frame)}",
        "time that increases",
        "sort the frames, or write the dataset without the episode",
      )
      yield Fault("frames out of time", int(owner[frame]), error)


def of_images(
  name: str, spec: DatasetSpec, index: tfrecord_index.Index, sizes: dict[str, collections.Counter] | None = None
) -> Iterator[Fault]:
  """Images that cannot be decoded: one fault an episode and view. Decodes all of them, on every core.

  Args:
    sizes: takes how many images of each (height, width) a view has.
  """
  reader, owner = tfrecord_index.Reader(index), np.repeat(np.arange(len(index.lengths)), index.lengths)

  def look(frame: int, view: int) -> tuple[int, int] | ValueError:
    try:
      return images.decode(reader.image(frame, view)).shape[:2]
    except ValueError as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
    for view, camera in enumerate(spec.views):
      there, broken = np.flatnonzero(index.image_bytes[:, view]).tolist(), set()
      for first in range(0, len(there), _TOGETHER):
        frames = there[first : first + _TOGETHER]
        for frame, found in zip(frames, pool.map(look, frames, [view] * len(frames)), strict=True):
          if not isinstance(found, ValueError):
            if sizes is not None:
              sizes.setdefault(camera, collections.Counter())[found] += 1
          elif owner[frame] not in broken:
            broken.add(owner[frame])
            error = ValueError(f"Dataset {name!r}, {camera!r} of {reader.where(frame)}: {found}")
            yield Fault("images that cannot be decoded", int(owner[frame]), error)


def remembered_of_images(name: str, spec: DatasetSpec, index: tfrecord_index.Index, memory: Path | None) -> list[Fault]:
  """`of_images`, kept in a file from one run to the next, since it decodes every image.

  Args:
    memory: the file, of this content of the dataset alone (see tfrecord_index.kept_at); None keeps nothing. What
      cannot be read in it is found anew.
  """
  kind = "images that cannot be decoded"
  if memory is None:
    return [*of_images(name, spec, index)]
  with contextlib.suppress(OSError, ValueError, TypeError):  # missing or damaged
    known = json.loads(memory.read_text(encoding="utf-8"))
    return [Fault(kind, int(episode), ValueError(message)) for episode, message in known]
  found = [*of_images(name, spec, index)]
  tfrecord_index.replace(memory, json.dumps([(fault.episode, str(fault.error)) for fault in found]).encode())
  return found


def summary(faults: Sequence[Fault]) -> str:
  """A line a kind: how many, and the first of them."""
  kinds = collections.Counter(fault.kind for fault in faults)
  first = {fault.kind: fault.error for fault in reversed(faults)}
  return "\n".join(f"  {count} x {kind}; the first: {first[kind]}" for kind, count in kinds.items())


def _first(owner: np.ndarray, bad: np.ndarray) -> list[int]:
  """The first bad frame of each episode that has one."""
  frames = np.flatnonzero(bad)
  _, where = np.unique(owner[frames], return_index=True)
  return frames[where].tolist()
