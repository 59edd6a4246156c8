"""Recorded episodes of a dataset that is not complete: a file each, so that an interruption costs one episode.

A part is an .npz with state f32[t 8], joint_state f32[t 7], action f32[t 7], and of both views the JPEG files one after
the other (u8) with their sizes and the pictures' shape; an empty one is an episode that failed.
"""

from __future__ import annotations

import io
import json
import logging
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from semanticvla_jax import cli, files
from semanticvla_jax.data import writer
from semanticvla_jax.errors import refuse

VIEWS = ("observation/image", "observation/wrist_image")


def check_new(out: str | pathlib.Path, name: str) -> pathlib.Path:
  """The folder of a dataset's version, for a dataset that is to be written.

  Raises:
    ValueError: it exists, or the name would be read as that of another kind of dataset.
  """
  folder = version(out, name)
  if folder.exists():
    raise refuse("Dataset exists", f"{folder}", "a new folder", "remove it or choose another name")
  return folder


def version(out: str | pathlib.Path, name: str) -> pathlib.Path:
  """The folder of a dataset's version. Raises ValueError for a name that is read as another kind of dataset."""
  if not name.startswith("libero"):
    raise refuse(
      "Dataset name",
      f"{name!r}, which would be read as another dataset",
      "one that starts with 'libero'",
      "choose another --name",
    )
  return pathlib.Path(out) / name / "1.0.0"


def path(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Where episode `number` is stored."""
  return folder / f"{number:05d}.npz"


def store(path: pathlib.Path, rows: Sequence[dict], actions: Float[np.ndarray, "t 7"]) -> None:
  """Stores an episode: what was seen before each action, as the simulator returns it; no rows where it failed."""
  names = ("state", "joint_state")
  columns = {name: np.stack([row[f"observation/{name}"] for row in rows]) for name in names if rows}
  columns["action"] = actions.astype(np.float32)
  views = [[writer.jpeg(row[view]) for row in rows] for view in VIEWS]
  store_encoded(path, columns, views, rows[0][VIEWS[0]].shape if rows else ())


def store_encoded(
  path: pathlib.Path, columns: Mapping[str, np.ndarray], views: Sequence[Sequence[bytes]], shape: tuple[int, ...]
) -> None:
  """Stores an episode whose pictures are JPEG files already, those of a view after those of the other.

  Args:
    path: see `path`.
    columns: state, joint_state and action, as they are stored.
    views: the files of each of VIEWS; none where the episode failed.
    shape: of the pictures.
  """
  arrays = {}
  if views[0]:
    arrays = dict(columns) | {"shape": np.array(shape)}
    for view, frames in zip(VIEWS, views, strict=True):
      name = view.split("/")[1]
      arrays[name] = np.frombuffer(b"".join(frames), np.uint8)
      arrays[f"{name}_sizes"] = np.array([*map(len, frames)])
  contents = io.BytesIO()
  np.savez(contents, **arrays)
  files.write(path, contents.getvalue())


def is_sound(path: pathlib.Path) -> bool:
  """Whether an episode is stored and can be read; a damaged one is reported and has to be made again."""
  try:
    if path.exists():
      read(path)
    return path.exists()
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    logging.warning("%s is damaged (%s): recorded again", path, cli.first_line(error))
    return False


def read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """One episode as stored; None for a failed one."""
  with np.load(path) as file:
    return {name: file[name] for name in file.files} or None


def episode(part: dict[str, np.ndarray], instruction: str, source: str) -> writer.Episode:
  """A stored episode as the dataset takes it; `source` becomes its file_path."""
  pictures = (_frames(part, "image"), _frames(part, "wrist_image"))
  return writer.Episode(*pictures, part["state"], part["action"], instruction, part["joint_state"], source)


def claim(folder: pathlib.Path, facts: dict) -> dict:
  """Makes the folder of parts, or checks that those in it were made alike; returns the facts of all.

  More or fewer tasks and episodes are no difference: of `facts["files"]`, hashes by name where the source has files,
  only those that both know are compared.

  Raises:
    ValueError: the parts were made with other facts, or what they were made with cannot be read.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "facts.json"
  try:
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else facts
  except ValueError as error:
    raise refuse(
      f"{path} is damaged",
      f"{cli.first_line(error)}",
      f"what the episodes in {folder} were made with",
      "remove that folder to start again",
    ) from error
  known, found = before.get("files", {}), facts.get("files", {})
  unlike = [(key, before.get(key), facts[key]) for key in facts if key != "files" and before.get(key) != facts[key]]
  unlike += [(name, known[name], value) for name, value in found.items() if known.get(name, value) != value]
  if unlike:
    raise refuse(
      f"Episodes in {folder} were made differently",
      f"(what, then, now) {unlike}",
      "the same",
      "remove that folder to start again",
    )
  if "files" in facts:
    facts = facts | {"files": known | found}
  files.write_json(path, facts)
  return facts


def _frames(part: dict[str, np.ndarray], name: str) -> writer.Encoded:
  ends = np.cumsum(part[f"{name}_sizes"])
  whole = part[name].tobytes()
  frames = [whole[end - size : end] for end, size in zip(ends.tolist(), part[f"{name}_sizes"].tolist())]
  return writer.Encoded(frames, *part["shape"][:2].tolist())
