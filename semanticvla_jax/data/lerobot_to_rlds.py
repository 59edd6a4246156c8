"""A LeRobot dataset written as RLDS, with the DatasetSpec that reads it: episode by episode, resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from semanticvla_jax import files
from semanticvla_jax.data import lerobot, rlds, statistics, writer
from semanticvla_jax.data import spec as specs
from semanticvla_jax.errors import refuse

_VERSION = "1.0.0"
_MOST_VIEWS = 4
_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Options:
  """What is taken from a LeRobot dataset, and what it does not say of its robot.

  Attributes:
    absolute: dimensions of the action that are targets; the others are displacements.
    gripper: dimension, open and closed value of the gripper's command as stored; None without.
    action: feature of the actions.
    states: features of the proprioception, one after the other.
    views: features of the cameras in the model's order, one to four; () for all in the dataset's order.
    mode: how the spec normalizes, see statistics.normalize.
    chunk: actions predicted at a time.
    episodes_per_shard: what is written before an interruption is kept by whole shards.
  """

  absolute: tuple[int, ...]
  gripper: specs.Gripper | None
  action: str = "action"
  states: tuple[str, ...] = ("observation.state",)
  views: tuple[str, ...] = ()
  mode: str = "bounds_q99"
  chunk: int = 8
  episodes_per_shard: int = 16


class Summary(NamedTuple):
  """What was written: the version's folder, the file with SPEC, episodes and frames."""

  folder: pathlib.Path
  spec: pathlib.Path
  episodes: int
  frames: int
  statistics: statistics.DatasetStatistics


def convert(
  source: str | pathlib.Path,
  out: str | pathlib.Path,
  name: str,
  options: Options,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
  """Writes `<out>/<name>/1.0.0` and `<out>/<name>.py`, which holds SPEC.

  An interrupted run with the same options is taken up at its last whole shard. The result is read as it will be in
  training before this returns. Memory: one episode, its images as JPEGs.

  Args:
    source: folder of the LeRobot dataset.
    out, name: where to.
    options: see Options.
    progress: called after each shard with the episodes written and their total.

  Raises:
    ValueError: options that do not fit the dataset, a damaged dataset, the target exists or is being written.
  """
  data = lerobot.LeRobot(source)
  options = _checked(data, options)
  folder = pathlib.Path(out) / name / _VERSION
  if folder.exists():
    raise refuse("Dataset exists", f"{folder}", "a new folder", "remove it or choose another name")
  with files.alone(folder):
    partial = folder.with_name(f".{_VERSION}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    _begin(partial, data, options)
    shards = _write_shards(partial, data, options, progress)
    _finish(partial, name, data, options, shards)
    spec = pathlib.Path(out) / f"{name}.py"
    files.write(spec, spec_source(name, data, options))
    partial.rename(folder)
  stats = rlds.load(str(out), name, spec=specs.load(f"{spec}:SPEC")).statistics
  return Summary(folder, spec, data.episodes, sum(shard["frames"] for shard in shards), stats)


def _checked(data: lerobot.LeRobot, options: Options) -> Options:
  """The options with the views spelled out."""
  views = options.views or tuple(data.cameras)
  for kind, asked, have in (
    ("camera", views, data.cameras),
    ("feature", (options.action, *options.states), data.vectors),
  ):
    unknown = [key for key in asked if key not in have]
    if unknown:
      raise refuse(f"LeRobot dataset {data.root}", f"no {kind} {unknown[0]!r}", f"one of {sorted(have)}", "name one")
  short = [short_name(key) for key in views]
  if not 1 <= len(views) <= _MOST_VIEWS or len(set(short)) < len(views):
    raise refuse(
      "--views", f"{short}", f"1 to {_MOST_VIEWS} cameras, each once", "name those that the policy looks through"
    )
  width = data.vectors[options.action]
  dimensions = [*options.absolute, *([] if options.gripper is None else [options.gripper.dimension])]
  if any(not 0 <= one < width for one in dimensions):
    raise refuse(
      "--absolute and --gripper",
      f"the dimensions {dimensions}",
      f"0 to {width - 1}",
      dimensions_of(data, options.action),
    )
  if options.gripper is not None and options.gripper.open == options.gripper.closed:
    raise refuse("--gripper", f"{options.gripper.open} for open and closed", "two values", "name the command of each")
  return dataclasses.replace(options, views=views)


def dimensions_of(data: lerobot.LeRobot, key: str) -> str:
  """The dimensions of a feature with their names, for messages."""
  names = data.names[key]
  named = ", ".join(f"{i} {name}" for i, name in enumerate(names)) if names else f"{data.vectors[key]}, without names"
  return f"name some of the dimensions of {key!r} ({named})"


def short_name(key: str) -> str:
  """A LeRobot key as RLDS names it below `observation/`: observation.images.front is front."""
  bare = re.sub(r"^(observation\.)?(images?\.)?", "", key)
  return re.sub(r"\W", "_", bare) or "image"


def _begin(partial: pathlib.Path, data: lerobot.LeRobot, options: Options) -> None:
  """Remembers what is being written, or checks that the interrupted run wrote the same."""
  meta = (data.root / "meta" / "info.json").read_bytes()
  plan = {
    "source": hashlib.sha256(meta).hexdigest(),
    "episodes": data.episodes,
    "options": dataclasses.asdict(options),
  }
  plan = json.loads(json.dumps(plan))
  path = partial / _PLAN
  if not path.exists():  # begun anew, or interrupted while it was given its names
    shutil.rmtree(partial)
    partial.mkdir()
    files.write_json(path, plan)
  elif (before := json.loads(path.read_text(encoding="utf-8"))) != plan:
    changed = sorted(key for key in plan if before.get(key) != plan[key])
    raise refuse(
      f"{partial}",
      f"an interrupted conversion with other {', '.join(changed)}",
      "the same dataset and flags",
      "remove the folder to begin anew",
    )


def _write_shards(
  partial: pathlib.Path, data: lerobot.LeRobot, options: Options, progress: Callable[[int, int], None]
) -> list[dict]:
  """Writes the shards that are missing; what each holds: episodes, frames, bytes, image sizes."""
  shards = []
  while (path := partial / f"{len(shards):05d}.json").exists():
    shards.append(json.loads(path.read_text(encoding="utf-8")))
  done = sum(shard["episodes"] for shard in shards)
  episodes = data.read((options.action, *options.states), options.views, done)
  while done < data.episodes:
    count = min(options.episodes_per_shard, data.episodes - done)
    shard = _write_shard(
      partial / f"{len(shards):05d}", episodes, count, options, shards[0]["sizes"] if shards else None
    )
    files.write_json(partial / f"{len(shards):05d}.json", shard)
    shards.append(shard)
    done += count
    progress(done, data.episodes)
  return shards


def _write_shard(path: pathlib.Path, episodes: Any, count: int, options: Options, sizes: dict | None) -> dict:
  import tensorflow as tf

  frames = num_bytes = 0
  serialize = None
  with tf.io.TFRecordWriter(str(path)) as out:
    for _ in range(count):
      episode = next(episodes)
      found = {short_name(key): list(images.shape[1:]) for key, images in episode.cameras.items()}
      sizes = sizes or found
      if found != sizes:
        raise refuse(f"Images of episode {episode.index}", found, f"{sizes} as in the first", "leave the episode out")
      serialize = serialize or writer.serializer(
        _features(sizes, {k: v.shape[1] for k, v in episode.columns.items()}, options)
      )
      record = serialize(_example(episode, options))
      out.write(record)
      frames, num_bytes = frames + len(episode.tasks), num_bytes + len(record)
  return {"episodes": count, "frames": frames, "bytes": num_bytes, "sizes": sizes}


def _features(sizes: Mapping[str, Any], widths: Mapping[str, int], options: Options) -> Any:
  vectors = {short_name(key): widths[key] for key in options.states} | {"timestamp": 1}
  pictures = {name: tuple(size) for name, size in sizes.items()}
  return writer.features_of(pictures, vectors, widths[options.action])


def _example(episode: lerobot.Episode, options: Options) -> dict:
  last = len(episode.tasks) - 1
  steps = [
    {
      "observation": {
        **{short_name(key): images[t] for key, images in episode.cameras.items()},
        **{short_name(key): episode.columns[key][t] for key in options.states},
        "timestamp": np.array([episode.seconds[t]], np.float32),
      },
      "action": episode.columns[options.action][t],
      "discount": 1.0,
      "reward": float(t == last),
      "is_first": t == 0,
      "is_last": t == last,
      "is_terminal": t == last,
      "language_instruction": episode.tasks[t],
    }
    for t in range(last + 1)
  ]
  return {"steps": steps, "episode_metadata": {"file_path": f"episode {episode.index}"}}


def _finish(partial: pathlib.Path, name: str, data: lerobot.LeRobot, options: Options, shards: list[dict]) -> None:
  features = _features(shards[0]["sizes"], data.vectors, options)
  (partial / _PLAN).unlink()
  for number in range(len(shards)):
    (partial / f"{number:05d}.json").unlink()
  counts = [shard["episodes"] for shard in shards]
  writer.complete(partial, name, features, counts, sum(shard["bytes"] for shard in shards))


_SPEC = '''"""How {name} is read. Written from a LeRobot dataset; change it where it does not fit the robot."""

from semanticvla_jax.data.spec import DatasetSpec, Gripper  # noqa: F401

SPEC = DatasetSpec(
  name={name!r},
  columns={columns},
  views={views},
  absolute={absolute},
  proprio={states},
  gripper={gripper},
  mode={mode!r},
  chunk={chunk},
  control_hz={fps},
  time="observation/timestamp",
)
'''


def spec_source(name: str, data: lerobot.LeRobot, options: Options) -> str:
  """The Python file with SPEC."""
  width, grip = data.vectors[options.action], options.gripper
  columns = {"action": width} | {f"observation/{short_name(key)}": data.vectors[key] for key in options.states}
  return _SPEC.format(
    name=name,
    columns=columns | {"observation/timestamp": 1},
    views=tuple(short_name(key) for key in options.views),
    absolute=tuple(i in options.absolute or (grip is not None and i == grip.dimension) for i in range(width)),
    states=tuple(f"observation/{short_name(key)}" for key in options.states),
    gripper=grip,
    mode=options.mode,
    chunk=options.chunk,
    fps=data.fps,
  )
