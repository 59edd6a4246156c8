"""Where every image of an RLDS dataset is on disk, found in one pass that decodes no image.

A tfrecord shard holds one serialized tf.train.Example an episode. The pass walks each record's wire format, keeps the
few numeric columns, and of the images only their byte ranges, so that training reads single frames in any order.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import logging
import os
import pathlib
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from semanticvla_jax import cli, files
from semanticvla_jax.data import text
from semanticvla_jax.data.tf_example import values
from semanticvla_jax.errors import refuse

_HEADER, _FOOTER = 12, 4  # bytes of framing around a record: length and checksum before, checksum after
_LAYOUT = 2  # part of the cache key: raise it when Index or the pass changes
_INSTRUCTION = "language_instruction"
CACHE = "~/.cache/semanticvla_jax"  # of indices, unless a call names another


class Index(NamedTuple):
  """The frames of one split: `n` frames of `e` episodes, `v` views.

  Memory: about 16 bytes a frame and view, and 4 bytes a number: 25 MB for the four LIBERO suites (273,465 frames).

  Attributes:
    files: paths of the shards.
    record_file: i32[e], the shard of each episode; record_offset, record_bytes: i64[e], its record inside.
    lengths: i64[e], frames of each episode.
    image_offset, image_bytes: i64[n v], i32[n v], the encoded image inside the record.
    instruction: i32[n], into `instructions`.
    columns: numeric step features, f32[n d] each.
  """

  files: tuple[str, ...]
  record_file: Int[np.ndarray, " e"]
  record_offset: Int[np.ndarray, " e"]
  record_bytes: Int[np.ndarray, " e"]
  lengths: Int[np.ndarray, " e"]
  image_offset: Int[np.ndarray, "n v"]
  image_bytes: Int[np.ndarray, "n v"]
  instruction: Int[np.ndarray, " n"]
  instructions: tuple[str, ...]
  columns: dict[str, Float32[np.ndarray, "n d"]]


Lost = list[tuple[int, ValueError]]  # (number of episodes, why they cannot be read)


class Part(NamedTuple):
  """A run of records in one shard: skip the first `skip`, then `take`."""

  path: str
  skip: int
  take: int


def index(
  parts: Sequence[Part],
  columns: Mapping[str, int],
  views: Sequence[str],
  cache_dir: str | pathlib.Path | None = None,
  name: str = "dataset",
  bad: Lost | None = None,
) -> Index:
  """Indexes the records, or loads the index from `cache_dir` if the same files were indexed before.

  "The same" is judged by `fingerprint`.

  Args:
    parts: what to read, local or gs:// paths.
    columns: numeric features below `steps/` with their widths.
    views: image features below `steps/observation/`.
    cache_dir: local folder for `<name>-<hash>.npz` and shards.json; None for CACHE, "" to keep nothing.
    name: for the cache file and messages.
    bad: takes what cannot be read, record or shard, which is then left out; such an index is not kept.

  Raises:
    ValueError: a shard is missing, or, without `bad`, corrupt or shorter than announced, or a record lacks a feature.
  """
  path = kept_at(parts, columns, views, cache_dir, name)
  if path is None:
    return _build(parts, columns, views, bad)
  kept = _load(path, [part.path for part in parts], columns, views)
  if kept is not None:
    logging.info("%s: index read from %s", name, path)
    return kept
  built = _build(parts, columns, views, bad)
  if not bad:
    _save(path, built)
  return built


def kept_at(
  parts: Sequence[Part],
  columns: Mapping[str, int],
  views: Sequence[str],
  cache_dir: str | pathlib.Path | None,
  name: str,
) -> pathlib.Path | None:
  """The file of the cache that an index has; None where nothing is kept. Arguments as in `index`."""
  folder = _folder(cache_dir)
  if folder is None:
    return None
  return folder / f"{name}-{fingerprint(parts, columns, views, folder / 'shards.json')}.npz"


def _folder(cache_dir: str | pathlib.Path | None) -> pathlib.Path | None:
  """Where indices are kept; None for nowhere, which is said where it was not asked for."""
  if cache_dir == "":
    return None
  try:
    return pathlib.Path(CACHE if cache_dir is None else cache_dir).expanduser()
  except RuntimeError as error:  # a container's user may have no home
    logging.warning("indices are not kept for the next run: %s; pass cache_dir to keep them", error)
    return None


def fingerprint(
  parts: Sequence[Part], columns: Mapping[str, int], views: Sequence[str], memory: pathlib.Path | None = None
) -> str:
  """Hashes what an index depends on: names and contents of the shards, and the columns and views asked for.

  Args:
    parts, columns, views: as in `index`.
    memory: file that remembers the hash of each shard with its size and time of change, so that it is read once.
  """
  known = {} if memory is None else _remembered(memory)
  digest, found = hashlib.sha256(repr((_LAYOUT, sorted(columns.items()), tuple(views))).encode()), {}
  for part in parts:
    stamp, before = _stamp(part.path), known.get(part.path)
    found[part.path] = before if before is not None and before[:2] == stamp else [*stamp, _content(part.path, stamp)]
    content = (pathlib.PurePath(part.path).name, part.skip, part.take, found[part.path][2])
    digest.update(repr(content).encode())
  if memory is not None and (known | found) != known:
    replace(memory, json.dumps(known | found).encode())
  return digest.hexdigest()[:16]


def _remembered(memory: pathlib.Path) -> dict[str, list]:
  """{path: [size, time, hash]} of a file; what of it cannot be read is hashed anew, with a warning."""
  try:
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
  except (OSError, ValueError) as error:
    logging.warning("%s cannot be read (%s): made anew", memory, cli.first_line(error))
    return {}
  sound = {path: entry for path, entry in known.items() if _is_entry(entry)} if isinstance(known, dict) else {}
  if not isinstance(known, dict) or sound.keys() != known.keys():
    logging.warning("%s is damaged: what it says of other shards is made anew", memory)
  return sound


def _is_entry(entry: Any) -> bool:
  kinds = [type(part) for part in entry] if isinstance(entry, list) else []
  return kinds == [int, int, str]


def _stamp(path: str) -> list[int]:
  """Size in bytes and time of change in nanoseconds."""
  import tensorflow as tf

  try:
    if "://" in path:
      found = tf.io.gfile.stat(path)
      return [found.length, found.mtime_nsec]
    found = os.stat(path)
  except (FileNotFoundError, tf.errors.NotFoundError) as error:
    raise _missing(path) from error
  return [found.st_size, found.st_mtime_ns]


def _content(path: str, stamp: list[int]) -> str:
  """A hash of the whole file; of an object in a bucket, which is only ever replaced as a whole, size and time."""
  if "://" in path:
    return repr(stamp)
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _missing(path: str) -> ValueError:
  return refuse("Shard is missing", f"no file {path}", "it from dataset_info.json", "download the dataset again")


def _build(
  parts: Sequence[Part],
  columns: Mapping[str, int],
  views: Sequence[str],
  bad: Lost | None = None,
) -> Index:
  keys = {f"steps/{key}": width for key, width in columns.items()}
  image_keys = [f"steps/observation/{view}" for view in views]
  rows, codes = collections.defaultdict(list), {}
  for number, part in enumerate(parts):
    left = part.take
    try:
      for count, offset, record in _records(part):
        left -= 1
        try:
          found = _values_of(record, {*keys, *image_keys, f"steps/{_INSTRUCTION}"}, part.path, count)
          _add(rows, codes, found, record, keys, image_keys, f"{part.path}, record {count}")
        except ValueError as error:
          if bad is None:
            raise
          bad.append((1, error))
          continue
        rows["record"].append((number, offset + _HEADER, len(record)))
    except ValueError as error:
      if bad is None:
        raise
      bad.append((left, error))
  record = np.array(rows["record"], np.int64).reshape(-1, 3)
  return Index(
    files=tuple(part.path for part in parts),
    record_file=record[:, 0].astype(np.int32),
    record_offset=record[:, 1],
    record_bytes=record[:, 2],
    lengths=np.array(rows["length"], np.int64),
    image_offset=_stack(rows["offset"], (len(views),), np.int64),
    image_bytes=_stack(rows["bytes"], (len(views),), np.int32),
    instruction=_stack(rows["instruction"], (), np.int32),
    instructions=tuple(codes),
    columns={key: _stack(rows[f"steps/{key}"], (width,), np.float32) for key, width in columns.items()},
  )


def _records(part: Part) -> Iterator[tuple[int, int, bytes]]:
  """(number, offset in the file, bytes) of each record of a run.

  Raises:
    ValueError: the shard is missing, corrupt or too short.
  """
  import tensorflow as tf

  offset, count = 0, 0
  try:
    for record in tf.data.TFRecordDataset(part.path, buffer_size=8 << 20).as_numpy_iterator():
      if part.skip <= count < part.skip + part.take:
        yield count, offset, record
      offset, count = offset + _HEADER + len(record) + _FOOTER, count + 1
  except tf.errors.NotFoundError as error:
    raise _missing(part.path) from error
  except tf.errors.DataLossError as error:
    raise _corrupt(part.path, count, error) from error
  if count < part.skip + part.take:
    raise refuse(
      "Shard is too short",
      f"{count} records in {part.path}",
      f"{part.skip + part.take} from dataset_info.json",
      "download or write the dataset again",
    )


def _corrupt(path: str, count: int, error: Exception) -> ValueError:
  return refuse(
    "Shard is corrupt",
    f"{error} in {path} after {count} records",
    "whole tfrecords",
    "download or write the shard again",
  )


def _stack(parts: list[np.ndarray], shape: tuple[int, ...], dtype: type) -> np.ndarray:
  return np.concatenate([np.zeros((0, *shape), dtype), *parts]).astype(dtype)


def _add(
  rows: dict[str, list],
  codes: dict[str, int],
  found: dict[str, np.ndarray],
  record: bytes,
  keys: Mapping[str, int],
  image_keys: Sequence[str],
  where: str,
) -> None:
  """Appends one episode's columns, image ranges and instruction codes to `rows`; nothing where it is refused."""
  language = found.get(f"steps/{_INSTRUCTION}", np.zeros((0, 2), np.int64))
  length, parts = len(language), {}
  for key, width in keys.items():
    got = found.get(key, np.zeros(0, np.float32))
    if got.shape != (length * width,):
      raise refuse(
        f"Bad column {key!r} ({where})",
        f"{got.size} numbers of {got.dtype}",
        f"{length} frames of {width} floats",
        "convert the dataset again, or fix the spec",
      )
    parts[key] = got.reshape(length, width)
  ranges = [found.get(key, np.zeros((0, 2), np.int64)) for key in image_keys]
  for key, part in zip(image_keys, ranges, strict=True):
    if part.shape != (length, 2):
      raise refuse(
        f"Bad images {key!r} ({where})",
        f"{len(part)}",
        f"{length}, one a frame",
        "convert the dataset again",
      )
  texts = [_sentence(record[start:stop], where) for start, stop in language]
  ranges = np.stack(ranges, axis=1)
  parts |= {"offset": ranges[:, :, 0], "bytes": ranges[:, :, 1] - ranges[:, :, 0], "length": length}
  parts["instruction"] = np.array([codes.setdefault(text, len(codes)) for text in texts], np.int32)
  for key, part in parts.items():
    rows[key].append(part)


def _sentence(encoded: bytes, where: str) -> str:
  try:
    return text.tidy(encoded.decode())
  except UnicodeDecodeError as error:
    raise refuse(
      f"Bad instruction ({where})",
      f"the bytes {encoded[:60]!r}",
      "UTF-8",
      "write the dataset again",
    ) from error


def _values_of(record: bytes, keys: set[str], path: str, count: int) -> dict[str, np.ndarray]:
  """`values` of a record of a shard. Raises ValueError where it is not an example."""
  try:
    return values(record, keys)
  except IndexError as error:
    raise _corrupt(path, count, error) from error


def _save(path: pathlib.Path, built: Index) -> None:
  arrays = {field: getattr(built, field) for field in Index._fields if field not in ("files", "columns")}
  arrays["instructions"] = np.array(built.instructions, dtype=str)
  buffer = io.BytesIO()
  np.savez(buffer, **arrays, **{f"column:{key}": column for key, column in built.columns.items()})
  replace(path, buffer.getvalue())


def replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file of the cache as a whole; says so where that cannot be."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, content)
  except OSError as error:
    logging.warning("not kept for the next run: %s (%s)", path, error)


def _load(path: pathlib.Path, shards: Sequence[str], columns: Mapping[str, int], views: Sequence[str]) -> Index | None:
  """The index that a file holds; None where there is none, or a damaged one, which is said."""
  try:
    if not path.exists():
      return None
    with np.load(path) as stored:
      found = _unpacked({key: stored[key] for key in stored.files}, shards)
    _check_kept(found, columns, len(views))
    return found
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    logging.warning("%s is damaged (%s): the dataset is indexed anew", path, cli.first_line(error))
    return None


def _unpacked(arrays: dict[str, np.ndarray], shards: Sequence[str]) -> Index:
  columns = {key.removeprefix("column:"): arrays.pop(key) for key in list(arrays) if key.startswith("column:")}
  instructions = tuple(arrays.pop("instructions").tolist())
  return Index(files=tuple(shards), columns=columns, instructions=instructions, **arrays)


def _check_kept(index_: Index, columns: Mapping[str, int], views: int) -> None:
  """Raises ValueError where the arrays of an index do not belong together."""
  e, n = len(index_.lengths), int(index_.lengths.sum())
  shapes = {
    "record_file": (e,),
    "record_offset": (e,),
    "record_bytes": (e,),
    "image_offset": (n, views),
    "image_bytes": (n, views),
    "instruction": (n,),
  }
  have = {name: getattr(index_, name).shape for name in shapes} | {k: x.shape for k, x in index_.columns.items()}
  want = shapes | {key: (n, width) for key, width in columns.items()}
  if have != want:
    raise ValueError(f"shapes {have}, expected {want}")


class Reader:
  """Reads encoded images by frame number, from any thread.

  Local images are read one by one: the operating system's page cache is the cache. With `whole_records`, or from
  gs://, the `cache_bytes` used last are kept in memory: whole episodes in the first case, single images otherwise.
  """

  def __init__(self, index_: Index, *, whole_records: bool = False, cache_bytes: int = 2 << 30):
    self._index, self._whole, self._budget = index_, whole_records, cache_bytes
    self._episode = np.repeat(np.arange(len(index_.lengths)), index_.lengths)
    self._cache: collections.OrderedDict[tuple[int, int], bytes] = collections.OrderedDict()
    self._cached_bytes, self._lock = 0, threading.Lock()

  def image(self, frame: int, view: int) -> bytes:
    """Returns the encoded bytes of view `view` of frame `frame` (numbered through the whole index)."""
    episode = self._episode[frame]
    path = self._index.files[self._index.record_file[episode]]
    offset = int(self._index.image_offset[frame, view])
    size = int(self._index.image_bytes[frame, view])
    base = int(self._index.record_offset[episode])
    if self._whole:
      return self._cached(path, base, int(self._index.record_bytes[episode]))[offset : offset + size]
    return self._cached(path, base + offset, size) if "://" in path else _read(path, base + offset, size)

  def where(self, frame: int) -> str:
    """Names a frame in messages: shard, episode of the index, frame of the episode."""
    episode = self._episode[frame]
    first = int(self._index.lengths[:episode].sum())
    return f"{self._index.files[self._index.record_file[episode]]}, episode {episode}, frame {frame - first}"

  def _cached(self, path: str, offset: int, size: int) -> bytes:
    key = (path, offset)
    with self._lock:
      if key in self._cache:
        self._cache.move_to_end(key)
        return self._cache[key]
    data = _read(path, offset, size)
    with self._lock:
      if key not in self._cache:
        self._cache[key] = data
        self._cached_bytes += size
      while self._cached_bytes > self._budget and len(self._cache) > 1:
        self._cached_bytes -= len(self._cache.popitem(last=False)[1])
    return data


def _read(path: str, offset: int, size: int) -> bytes:
  if "://" in path:
    import tensorflow as tf

    with tf.io.gfile.GFile(path, "rb") as file:
      file.seek(offset)
      return file.read(size)
  with open(path, "rb", buffering=0) as file:
    file.seek(offset)
    return file.read(size)
