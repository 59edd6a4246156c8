"""Writes episodes as an RLDS dataset on disk: in exactly the layout of the `libero_*_no_noops` sets, or of a spec."""

from __future__ import annotations

import functools
import io
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from semanticvla_jax import files
from semanticvla_jax.data import datasets, statistics
from semanticvla_jax.data.spec import DatasetSpec
from semanticvla_jax.errors import refuse

_VERSION = "1.0.0"


class Encoded:
  """Frames that are JPEG already, in place of an array u8[t h w 3] of an Episode.

  Args:
    frames: one file each.
    height, width: of all of them, pixels.
  """

  dtype = np.dtype(np.uint8)

  def __init__(self, frames: Sequence[bytes], height: int, width: int):
    self.frames, self.shape = list(frames), (len(frames), height, width, 3)

  def __len__(self) -> int:
    return len(self.frames)

  def __getitem__(self, index: int) -> bytes:
    return self.frames[index]


class Episode(NamedTuple):
  """One episode; row i holds what was seen before action i.

  Attributes:
    image, wrist_image: RGB, upright, one size for the whole dataset; stored as JPEG of quality 95. Or Encoded ones,
      which are stored as they are.
    state: end effector position (3, meters), axis-angle (3, radians), two finger positions (meters).
    action: displacement (6) and gripper command, -1 open, +1 closed.
    instruction: what was asked, the same for all steps.
    joint_state: joint positions, radians; None, for an arm without joints, is stored as zeros.
    file_path: where the episode comes from.
  """

  image: UInt8[np.ndarray, "t h w 3"] | Encoded
  wrist_image: UInt8[np.ndarray, "t h w 3"] | Encoded
  state: Float32[np.ndarray, "t 8"]
  action: Float32[np.ndarray, "t 7"]
  instruction: str
  joint_state: Float32[np.ndarray, "t 7"] | None = None
  file_path: str = ""


class Recording(NamedTuple):
  """One episode of any robot; row i holds what was seen before action i.

  Attributes:
    images: by view of the spec: u8[t h w 3], RGB, upright, one size for the whole dataset, stored as JPEG of quality
      95; or Encoded ones. An empty image of an optional view is b"" in an Encoded.
    columns: by column of the spec: f32[t d].
    instruction: what was asked, the same for all steps.
  """

  images: Mapping[str, UInt8[np.ndarray, "t h w 3"] | Encoded]
  columns: Mapping[str, Float32[np.ndarray, "t d"]]
  instruction: str


def write_recordings(
  data_dir: str | pathlib.Path,
  name: str,
  spec: DatasetSpec,
  recordings: Iterable[Recording],
  *,
  episodes_per_shard: int = 64,
) -> pathlib.Path:
  """Writes `<data_dir>/<name>/1.0.0` with the columns and views of a spec, as `write` does.

  Raises:
    ValueError: as `write`; or an episode lacks a column or view, or has others.
  """
  layout = _Layout(
    lambda one: {view: images.shape[1:] for view, images in one.images.items()},
    functools.partial(_features_of, spec),
    functools.partial(_example_of, spec),
  )
  return _write(data_dir, name, recordings, layout, episodes_per_shard)


def write(
  data_dir: str | pathlib.Path,
  name: str,
  episodes: Iterable[Episode],
  *,
  episodes_per_shard: int = 64,
  finish: Callable[[pathlib.Path], None] | None = None,
) -> pathlib.Path:
  """Writes `<data_dir>/<name>/1.0.0`: features.json, dataset_info.json and tfrecord shards of split "train".

  The last step of an episode has reward 1 and is terminal, as in the LIBERO sets, which hold successes only. Equal
  episodes give equal bytes. Everything is written to a temporary folder, which is renamed when complete, so that a
  reader never sees half a dataset. The result is read by `rlds.load` and by `tfds.builder_from_directory`.

  Args:
    data_dir, name: where to.
    episodes: made one by one while they are written.
    episodes_per_shard: of each shard but the last.
    finish: writes what else belongs into the folder, before it has its name.

  Returns:
    The folder.

  Raises:
    ValueError: the folder exists or another run writes it, there are no episodes, or an episode has wrong shapes or
      non-finite numbers.
  """
  return _write(data_dir, name, episodes, _LIBERO, episodes_per_shard, finish)


class _Layout(NamedTuple):
  """How episodes become records: the sizes of their images, tfds' features of those, and an episode as an example."""

  sizes: Callable[[Any], Any]
  features: Callable[[Any], Any]
  example: Callable[[Any, str], dict]


def _write(
  data_dir: str | pathlib.Path,
  name: str,
  episodes: Iterable[Any],
  layout: _Layout,
  episodes_per_shard: int,
  finish: Callable[[pathlib.Path], None] | None = None,
) -> pathlib.Path:
  folder = pathlib.Path(data_dir) / name / _VERSION
  if folder.exists():
    raise refuse("Dataset exists", f"{folder}", "a new folder", "remove it or choose another name")
  with files.alone(folder):
    partial = folder.with_name(f".{_VERSION}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    counts, num_bytes = _fill(partial, name, iter(episodes), layout, episodes_per_shard)
    if finish is not None:
      finish(partial)
    partial.rename(folder)
  logging.info("%s: %d episodes in %d shards, %.1f MB", folder, sum(counts), len(counts), num_bytes / 1e6)
  return folder


def _fill(
  folder: pathlib.Path, name: str, episodes: Iterator[Any], layout: _Layout, episodes_per_shard: int
) -> tuple[list[int], int]:
  """Writes shards and descriptions; returns the numbers of episodes by shard, and the bytes of all."""
  first = next(episodes, None)
  if first is None:
    folder.rmdir()
    raise refuse(f"No episodes for {name!r}", "an empty iterator", "at least one", "check what makes them")
  features = layout.features(layout.sizes(first))
  whole = _chain(first, episodes, layout.sizes)
  counts, num_bytes = _write_shards(folder, name, features, whole, layout.example, episodes_per_shard)
  complete(folder, name, features, counts, num_bytes)
  return counts, num_bytes


def _chain(first: Any, rest: Iterable[Any], sizes: Callable[[Any], Any]) -> Iterable[Any]:
  yield first
  for number, episode in enumerate(rest, start=1):
    if sizes(episode) != sizes(first):
      raise refuse(
        f"Image size changes in episode {number}",
        f"{sizes(episode)}",
        f"{sizes(first)} as in the first",
        "render all episodes at one size",
      )
    yield episode


def _vector(width: int) -> Any:
  import tensorflow_datasets as tfds

  return tfds.features.Tensor(shape=(width,), dtype=np.float32)


def _picture(shape: tuple[int, ...]) -> Any:
  import tensorflow_datasets as tfds

  return tfds.features.Image(shape=shape, dtype=np.uint8, encoding_format="jpeg")


def _features_of(spec: DatasetSpec, sizes: Mapping[str, tuple[int, ...]]) -> Any:
  import tensorflow_datasets as tfds

  flat = {f"observation/{view}": _picture(shape) for view, shape in sizes.items()}
  flat |= {key: _vector(width) for key, width in spec.columns.items()}
  flat |= {"language_instruction": tfds.features.Text()}
  return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(_nested(flat))})


def _nested(flat: Mapping[str, Any]) -> dict:
  """{"observation/state": x} → {"observation": {"state": x}}."""
  out: dict = {}
  for path, value in flat.items():
    *folders, name = path.split("/")
    node = out
    for folder in folders:
      node = node.setdefault(folder, {})
    node[name] = value
  return out


def _example_of(spec: DatasetSpec, one: Recording, where: str) -> dict:
  have, want = {*one.images, *one.columns}, {*spec.views, *spec.columns}
  if have != want:
    raise refuse(
      f"Recording ({where})",
      f"{sorted(have)}",
      f"the views and columns {sorted(want)}",
      "fix what makes the episode, or the DatasetSpec",
    )
  length = len(next(iter(one.columns.values())))
  _check_arrays({**one.columns, **one.images}, length, spec.columns, where)
  _check_instruction(one.instruction, where)
  steps = [
    _nested(
      {f"observation/{view}": jpeg(images[t]) for view, images in one.images.items()}
      | {key: column[t] for key, column in one.columns.items()}
      | {"language_instruction": one.instruction}
    )
    for t in range(length)
  ]
  return {"steps": steps}


def _features(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> Any:
  return features_of(dict(zip(("image", "wrist_image"), sizes)), {"state": 8, "joint_state": 7}, 7)


def features_of(pictures: Mapping[str, tuple[int, ...]], vectors: Mapping[str, int], action: int) -> Any:
  """The tfds.features of a dataset in LIBERO's layout.

  Args:
    pictures: {name: (height, width, 3)} below `observation/`, stored as JPEG.
    vectors: {name: width} below `observation/`. action: its width.
  """
  import tensorflow_datasets as tfds

  observation = {name: _picture(shape) for name, shape in pictures.items()}
  observation |= {name: _vector(width) for name, width in vectors.items()}
  step = {
    "observation": tfds.features.FeaturesDict(observation),
    "action": _vector(action),
    "discount": tfds.features.Scalar(dtype=np.float32),
    "reward": tfds.features.Scalar(dtype=np.float32),
    "is_first": tfds.features.Scalar(dtype=np.bool_),
    "is_last": tfds.features.Scalar(dtype=np.bool_),
    "is_terminal": tfds.features.Scalar(dtype=np.bool_),
    "language_instruction": tfds.features.Text(),
  }
  return tfds.features.FeaturesDict(
    {
      "steps": tfds.features.Dataset(step),
      "episode_metadata": tfds.features.FeaturesDict({"file_path": tfds.features.Text()}),
    }
  )


def serializer(features: Any) -> Callable[[dict], bytes]:
  """Turns an episode, {"steps", "episode_metadata"}, into the bytes of its record: equal ones for equal episodes."""
  from tensorflow_datasets.core import example_serializer

  made = example_serializer.ExampleSerializer(features.get_serialized_info())
  # Deterministic: the order of a proto map is otherwise random.
  return lambda example: made.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)


def _write_shards(
  folder: pathlib.Path,
  name: str,
  features: Any,
  episodes: Iterable[Any],
  to_example: Callable[[Any, str], dict],
  episodes_per_shard: int,
) -> tuple[list[int], int]:
  """Writes the shards and returns their numbers of episodes and the number of bytes of all."""
  import tensorflow as tf

  serialize = serializer(features)
  counts, num_bytes, out = [], 0, None
  for number, episode in enumerate(episodes):
    record = serialize(to_example(episode, f"{name}, episode {number}"))
    if number % episodes_per_shard == 0:
      if out is not None:
        out.close()
      out = tf.io.TFRecordWriter(str(folder / f"{len(counts):05d}"))
      counts.append(0)
    out.write(record)
    counts[-1] += 1
    num_bytes += len(record)
  out.close()
  return counts, num_bytes


def complete(folder: pathlib.Path, name: str, features: Any, counts: list[int], num_bytes: int) -> None:
  """Makes a dataset of the shards 00000, 00001, … of a folder: their names, features.json and dataset_info.json.

  Args:
    folder: of the version. name: of the dataset. features: see features_of.
    counts: episodes of each shard. num_bytes: of all records.
  """
  for shard in range(len(counts)):
    (folder / f"{shard:05d}").rename(folder / f"{name}-train.tfrecord-{shard:05d}-of-{len(counts):05d}")
  _write_info(folder, name, features, counts, num_bytes)


def _write_info(folder: pathlib.Path, name: str, features: Any, counts: list[int], num_bytes: int) -> None:
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info, naming

  identity = dataset_info.DatasetIdentity(name, tfds.core.Version(_VERSION), str(folder), __name__)
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  info.set_file_format("tfrecord")
  template = naming.ShardedFileTemplate(folder, dataset_name=name, split="train", filetype_suffix="tfrecord")
  split = tfds.core.SplitInfo(name="train", shard_lengths=counts, num_bytes=num_bytes, filename_template=template)
  info.set_splits(tfds.core.splits.SplitDict([split]))
  info.write_to_directory(folder)


def _example(episode: Episode, where: str) -> dict:
  joints = np.zeros((len(episode.action), 7), np.float32) if episode.joint_state is None else episode.joint_state
  columns = {"state": episode.state, "joint_state": joints, "action": episode.action}
  _check(episode, columns, where)
  last = len(episode.action) - 1
  steps = [
    {
      "observation": {
        "image": jpeg(episode.image[t]),
        "wrist_image": jpeg(episode.wrist_image[t]),
        "state": episode.state[t],
        "joint_state": joints[t],
      },
      "action": episode.action[t],
      "discount": 1.0,
      "reward": float(t == last),
      "is_first": t == 0,
      "is_last": t == last,
      "is_terminal": t == last,
      "language_instruction": episode.instruction,
    }
    for t in range(last + 1)
  ]
  return {"steps": steps, "episode_metadata": {"file_path": episode.file_path}}


_LIBERO = _Layout(lambda one: (one.image.shape[1:], one.wrist_image.shape[1:]), _features, _example)


def _check(episode: Episode, columns: dict[str, np.ndarray], where: str) -> None:
  arrays = columns | {"image": episode.image, "wrist_image": episode.wrist_image}
  _check_arrays(arrays, len(episode.action), {"state": 8, "joint_state": 7, "action": 7}, where)
  _check_instruction(episode.instruction, where)


def _check_arrays(arrays: Mapping[str, Any], length: int, widths: Mapping[str, int], where: str) -> None:
  """Raises ValueError unless columns are finite f32[length width] and all others u8[length …]."""
  for key, array in arrays.items():
    kind = np.float32 if key in widths else np.uint8
    if array.dtype != kind or len(array) != length or length == 0 or array.shape[1:] == ():
      raise refuse(
        f"Bad column {key!r} ({where})",
        f"{array.dtype}{list(array.shape)}",
        f"{np.dtype(kind)} with {length or 'at least 1'} rows, one an action",
        "fix what makes the episode",
      )
  for key, width in widths.items():
    if arrays[key].shape[1] != width or not np.isfinite(arrays[key]).all():
      raise refuse(
        f"Bad column {key!r} ({where})",
        f"width {arrays[key].shape[1]}, finite: {bool(np.isfinite(arrays[key]).all())}",
        f"{width} finite numbers a row",
        "fix what makes the episode",
      )


def _check_instruction(sentence: str, where: str) -> None:
  if not sentence.strip():
    raise refuse(f"No instruction ({where})", f"{sentence!r}", "a sentence", "name the task")


def jpeg(image: UInt8[np.ndarray, "h w 3"] | bytes) -> bytes:
  """A frame as it is stored, quality 95; bytes stay what they are."""
  if isinstance(image, bytes):
    return image
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "JPEG", quality=95)
  return buffer.getvalue()


def write_statistics(folder: pathlib.Path, name: str, kept: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
  """Writes dataset_statistics.json with the statistics that training computes from the dataset.

  Args:
    folder: of the dataset. name: of the dataset, which decides how it is read.
    kept: (action f32[t 7], state f32[t 8]) of each episode, as stored.
  """
  spec = datasets.spec(name)
  found = [spec.read({"action": action, "observation/state": state}) for action, state in kept]
  actions, proprio = (np.concatenate([getattr(one, key) for one in found]) for key in ("actions", "proprio"))
  stats = statistics.DatasetStatistics(
    statistics.compute(actions, spec.normalized), statistics.compute(proprio), len(actions), len(found)
  )
  statistics.save_openvla(folder / "dataset_statistics.json", {name: stats})
