"""Episodes of a LeRobot dataset on disk, v2.1 and v3.0: one at a time, in order, from any episode on.

v2.1 has a parquet file and an mp4 of each camera for each episode; v3.0 has many episodes in each file, and tables that
say where (`meta/episodes`). Images are mp4 or inside the parquet files. Facts of the formats: huggingface/lerobot at
7427f318, `src/lerobot/datasets`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from semanticvla_jax import cli
from semanticvla_jax.data import images, lerobot_video, writer
from semanticvla_jax.errors import refuse

VERSIONS = ("v2.1", "v3.0")
_OF_FRAMES = ("episode_index", "frame_index", "timestamp", "task_index")
_BATCH = 128  # rows of a parquet file in memory at a time, images included


class Episode(NamedTuple):
  """One episode of `t` frames.

  Attributes:
    index: as the dataset numbers it.
    columns: by the dataset's key, f32[t d].
    seconds: f64[t], time since its first frame.
    tasks: what was asked, of each frame.
    cameras: by the dataset's key: JPEGs. Stored ones are kept as they are, others have quality 95.
  """

  index: int
  columns: dict[str, Float32[np.ndarray, "t d"]]
  seconds: np.ndarray
  tasks: list[str]
  cameras: dict[str, writer.Encoded]


class _Place(NamedTuple):
  """Where an episode is: its parquet file, its frames, and (mp4, seconds of its first frame) of each camera."""

  data: pathlib.Path
  length: int
  videos: dict[str, tuple[pathlib.Path, float]]


class LeRobot:
  """A dataset, described.

  Args:
    root: folder with meta/info.json.

  Attributes:
    version: one of VERSIONS. fps: frames a second.
    vectors: {key: width} of the numeric features. names: {key: names of its dimensions, () where there are none}.
    cameras: {key: whether it is a video}.
    episodes: how many.

  Raises:
    ValueError: no such dataset, another version, or metadata that do not fit together.
  """

  def __init__(self, root: str | pathlib.Path):
    self.root = pathlib.Path(root)
    self.info = _json(self.root / "meta" / "info.json")
    self.version = self.info.get("codebase_version")
    if self.version not in VERSIONS:
      raise refuse(
        f"LeRobot dataset {self.root}",
        f"codebase_version {self.version!r}",
        f"one of {', '.join(VERSIONS)}",
        "convert it with LeRobot's own scripts first",
      )
    try:
      self.fps, features = float(self.info["fps"]), dict(self.info["features"])
      kinds = {key: (feature["dtype"], tuple(feature["shape"])) for key, feature in features.items()}
    except (KeyError, TypeError, ValueError) as error:
      raise _metadata(self.root / "meta" / "info.json", error) from error
    self.cameras = {key: kind == "video" for key, (kind, _) in kinds.items() if kind in ("video", "image")}
    self.vectors = {
      key: shape[0] for key, (kind, shape) in kinds.items() if kind.startswith("float") and len(shape) == 1
    }
    self.vectors.pop("timestamp", None)
    self.names = {key: _names(features[key].get("names")) for key in self.vectors}
    self._tasks = self._load_tasks()
    self._places = self._load_places()
    self.episodes = len(self._places)

  def read(self, keys: Sequence[str], cameras: Sequence[str], first: int = 0) -> Iterator[Episode]:
    """Yields episodes first, first + 1, … with these features and cameras; holds one at a time.

    Raises:
      ValueError: a file is missing or damaged, lacks a column, or has other frames than the metadata say; a video has
        no frame at the time of one.
    """
    tables = _Tables([*keys, *_OF_FRAMES, *(key for key in cameras if not self.cameras[key])])
    films = {key: lerobot_video.Film() for key in cameras if self.cameras[key]}
    try:
      for index in range(first, self.episodes):
        yield self._episode(index, keys, cameras, tables, films)
    finally:
      for film in films.values():
        film.close()

  def _episode(
    self, index: int, keys: Sequence[str], cameras: Sequence[str], tables: _Tables, films: dict[str, Any]
  ) -> Episode:
    place = self._places[index]
    where = f"{place.data}, episode {index}"
    table = tables.of(place.data, index)
    seconds = np.asarray(table["timestamp"].to_numpy(), np.float64)
    _check_frames(where, table, place.length, seconds)
    unknown = set(table["task_index"].to_pylist()) - self._tasks.keys()
    if unknown:
      raise refuse(
        f"Tasks of {where}", f"the numbers {sorted(unknown)}", "those of meta/tasks", "download the dataset again"
      )
    seen = {}
    for key in cameras:
      if self.cameras[key]:
        path, begin = place.videos[key]
        frames = films[key].frames(path, begin + seconds, 0.25 / self.fps, f"{key!r} of episode {index}")
        seen[key] = _encoded(frames, f"{where}, {key!r}")
      else:
        seen[key] = _encoded(_stored(table[key].to_pylist(), f"{where}, {key!r}"), f"{where}, {key!r}")
    return Episode(
      index,
      {key: _matrix(table[key], self.vectors[key], f"{key!r} of {where}") for key in keys},
      seconds - seconds[0],
      [self._tasks[task] for task in table["task_index"].to_pylist()],
      seen,
    )

  def _load_tasks(self) -> dict[int, str]:
    if self.version == "v2.1":
      return {line["task_index"]: line["task"] for line in _lines(self.root / "meta" / "tasks.jsonl", "task_index")}
    path = self.root / "meta" / "tasks.parquet"
    columns = _strings(path, _parquet(path).read())
    sentences = [key for key in columns if key != "task_index"]
    if "task_index" not in columns or len(sentences) != 1:
      raise _metadata(path, f"the columns {sorted(columns)}")
    return dict(zip(columns["task_index"], columns[sentences[0]], strict=True))

  def _load_places(self) -> list[_Place]:
    """Where each episode is; they are numbered from 0 without a gap."""
    try:
      if self.version == "v2.1":
        found = {line["episode_index"]: self._place(line) for line in self._lines_of_episodes()}
      else:
        found = {row["episode_index"]: self._place_in_files(row) for row in self._rows_of_episodes()}
    except (KeyError, TypeError, IndexError) as error:
      raise _metadata(self.root / "meta", error) from error
    if not found or sorted(found) != list(range(len(found))):
      raise _metadata(self.root / "meta", f"the episodes {sorted(found)[:8]} …")
    return [found[index] for index in range(len(found))]

  def _lines_of_episodes(self) -> list[dict]:
    return _lines(self.root / "meta" / "episodes.jsonl", "episode_index")

  def _rows_of_episodes(self) -> Iterator[dict]:
    paths = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
    for path in paths:
      file = _parquet(path)
      wanted = [name for name in file.schema_arrow.names if not name.startswith("stats/") and name != "tasks"]
      yield from file.read(columns=wanted).to_pylist()

  def _place(self, line: dict) -> _Place:
    number = line["episode_index"]
    parts = {"episode_chunk": number // self.info["chunks_size"], "episode_index": number}
    videos = {
      key: (self.root / self.info["video_path"].format(video_key=key, **parts), 0.0)
      for key, is_video in self.cameras.items()
      if is_video
    }
    return _Place(self.root / self.info["data_path"].format(**parts), line["length"], videos)

  def _place_in_files(self, row: dict) -> _Place:
    videos = {}
    for key in (key for key, is_video in self.cameras.items() if is_video):
      parts = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
      path = self.root / self.info["video_path"].format(video_key=key, **parts)
      videos[key] = (path, float(row[f"videos/{key}/from_timestamp"]))
    parts = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
    return _Place(self.root / self.info["data_path"].format(**parts), row["length"], videos)


class _Tables:
  """Rows of one episode after the other; the file that two share is read once.

  Args:
    columns: that are read.
  """

  def __init__(self, columns: Sequence[str]):
    self._columns, self._path, self._batches = list(columns), None, iter(())
    self._kept: list[Any] = []  # of a batch, what no episode has taken

  def of(self, path: pathlib.Path, episode: int) -> Any:
    """The rows of an episode as a pyarrow.Table; episodes come in ascending order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if path != self._path:
      self._path, self._batches, self._kept = path, self._open(path), []
    found = []
    try:
      while True:
        batch = self._kept.pop() if self._kept else next(self._batches, None)
        if batch is None:
          break
        numbers = batch.column("episode_index")
        found.append(batch.filter(pc.equal(numbers, episode)))
        later = batch.filter(pc.greater(numbers, episode))
        if len(later):
          self._kept.append(later)
          break
    except (OSError, pa.ArrowException) as error:
      raise _damaged(path, error) from error
    rows = pa.Table.from_batches(found) if found else None
    if rows is None or not len(rows):
      raise refuse(f"{path}", f"no rows of episode {episode}", "some", "download the dataset again")
    return rows

  def _open(self, path: pathlib.Path) -> Iterator[Any]:
    file = _parquet(path)
    missing = [key for key in self._columns if key not in file.schema_arrow.names]
    if missing:
      raise refuse(
        f"{path}",
        f"the columns {file.schema_arrow.names}",
        f"{', '.join(map(repr, missing))} too",
        "name other features, or download the dataset again",
      )
    return file.iter_batches(batch_size=_BATCH, columns=self._columns)


def _check_frames(where: str, table: Any, length: int, seconds: np.ndarray) -> None:
  numbers = table["frame_index"].to_pylist()
  if len(table) != length or numbers != list(range(length)):
    raise refuse(
      f"Frames of {where}",
      f"{len(table)} of the numbers {numbers[:4]} …",
      f"{length}, from 0 on",
      "download the dataset again",
    )
  if not (np.isfinite(seconds).all() and (np.diff(seconds) > 0).all()):
    at = int(np.argmin(np.append(np.diff(seconds) > 0, False)))
    raise refuse(
      f"Time of {where}",
      f"{seconds[at : at + 2].tolist()} seconds at frame {at}",
      "time that increases",
      "repair its timestamps",
    )


def _matrix(column: Any, width: int, where: str) -> Float32[np.ndarray, "t d"]:
  rows = column.combine_chunks()
  flat = rows.flatten() if hasattr(rows, "flatten") and "list" in str(rows.type) else rows
  if len(flat) != len(rows) * width or flat.null_count or rows.null_count:
    raise refuse(where, f"{len(flat)} numbers in {len(rows)} frames", f"{width} a frame", "download the dataset again")
  found = flat.to_numpy(zero_copy_only=False).reshape(-1, width).astype(np.float32)
  if not np.isfinite(found).all():
    frame, dimension = np.argwhere(~np.isfinite(found))[0]
    raise refuse(
      where,
      f"{found[frame, dimension]} in dimension {dimension} of frame {frame}",
      "finite numbers",
      "repair the episode",
    )
  return found


def _encoded(frames: Iterator[UInt8[np.ndarray, "h w 3"] | bytes], where: str) -> writer.Encoded:
  """Frames as JPEGs, each as soon as it comes; JPEG bytes stay what they are."""
  encoded, sizes = [], set()
  for frame in frames:
    sizes.add(images.decode(frame).shape[:2] if isinstance(frame, bytes) else frame.shape[:2])
    encoded.append(writer.jpeg(frame))
  if len(sizes) != 1:
    raise refuse(where, f"images of the sizes {sorted(sizes)}", "one size", "repair the episode")
  return writer.Encoded(encoded, *sizes.pop())


def _stored(column: list[dict | None], where: str) -> Iterator[UInt8[np.ndarray, "h w 3"] | bytes]:
  """The images of a parquet column: JPEGs as they are, others decoded."""
  for number, one in enumerate(column):
    encoded = (one or {}).get("bytes")
    if not encoded:
      raise refuse(
        f"{where}, frame {number}",
        "no image",
        "a PNG or JPEG inside the parquet file",
        "write the dataset with its images embedded",
      )
    try:
      yield encoded if encoded[:2] == b"\xff\xd8" else images.decode(encoded)
    except ValueError as error:
      raise ValueError(f"{where}, frame {number}: {error}") from error


def _parquet(path: pathlib.Path) -> Any:
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    return pq.ParquetFile(path)
  except (OSError, pa.ArrowException) as error:
    raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
  what = "no such file" if isinstance(error, FileNotFoundError) else cli.first_line(error)
  return refuse(f"{path}", what, "a whole parquet file", "download the dataset again")


def _strings(path: pathlib.Path, table: Any) -> dict[str, list]:
  try:
    return table.to_pydict()
  except UnicodeDecodeError as error:
    raise _not_utf8(path, error.object) from error


def _names(names: Any) -> tuple[str, ...]:
  """Names of dimensions: a list, or one below the name of the axis."""
  if isinstance(names, dict) and len(names) == 1:
    (names,) = names.values()
  return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_bytes().decode()
  except OSError as error:
    raise refuse(
      "LeRobot dataset",
      f"no {path}" if isinstance(error, FileNotFoundError) else cli.first_line(error),
      "a folder with meta/info.json",
      "name the folder above meta, data and videos",
    ) from error
  except UnicodeDecodeError as error:
    line = error.object[: error.start].count(b"\n")
    raise _not_utf8(path, error.object.splitlines()[line], f", line {line + 1}") from error


def _not_utf8(path: pathlib.Path, encoded: bytes, where: str = "") -> ValueError:
  return refuse(f"Text of {path}{where}", f"the bytes {encoded[:60]!r}", "UTF-8", "store the file as UTF-8")


def _json(path: pathlib.Path) -> dict:
  text = _text(path)
  try:
    found = json.loads(text)
  except ValueError as error:
    raise _metadata(path, error) from error
  if not isinstance(found, dict):
    raise _metadata(path, f"a {type(found).__name__}")
  return found


def _lines(path: pathlib.Path, key: str) -> list[dict]:
  """Lines of a .jsonl file, JSON objects that all have `key`."""
  text = _text(path)
  try:
    found = [json.loads(line) for line in text.splitlines() if line.strip()]
  except ValueError as error:
    raise _metadata(path, error) from error
  if not all(isinstance(line, dict) and key in line for line in found):
    raise _metadata(path, f"lines without {key!r}")
  return found


def _metadata(path: pathlib.Path, found: object) -> ValueError:
  got = cli.first_line(found) if isinstance(found, Exception) else found
  return refuse(f"Metadata {path}", got, "those that LeRobot writes", "download the dataset again")
