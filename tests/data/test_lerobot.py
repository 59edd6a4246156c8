"""LeRobot datasets that LeRobot's own code wrote (tests/data/lerobot/write.py), read and written as RLDS."""

import json
import pathlib
import runpy
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semanticvla_jax.data import datasets, images, lerobot, lerobot_to_rlds, rlds, tfrecord_index
from semanticvla_jax.data import spec as specs
from semanticvla_jax.demonstrate import __main__ as command

FOLDER = pathlib.Path(__file__).parent / "lerobot"
WRITTEN = runpy.run_path(str(FOLDER / "write.py"))
SETS, LENGTHS, TASKS = WRITTEN["SETS"], WRITTEN["LENGTHS"], WRITTEN["TASKS"]
OPTIONS = lerobot_to_rlds.Options((), datasets.Gripper(6, 1.0, 0.0), episodes_per_shard=1, chunk=4)
CODEC = 3  # grey levels on average: AV1 at the library's quality, then JPEG; the next frame is 10 away


def painted(jpeg: bytes) -> tuple[int, np.ndarray]:
  """The number that is painted into a frame (see write.picture), and the frame."""
  picture = images.decode(jpeg).astype(int)
  blocks = picture[4:18].mean(axis=(0, 2)).reshape(8, -1)[:, 3:-3].mean(axis=1)
  return int(((blocks > 128) << np.arange(7, -1, -1)).sum()), picture


def check(root: pathlib.Path, name: str) -> None:
  """Every number, sentence and frame of a dataset is the one that was written."""
  version, cameras, videos = SETS[name]
  data = lerobot.LeRobot(root / name)
  assert (data.version, data.fps, data.episodes) == (version, 10, 3)
  assert list(data.cameras.values()) == [videos] * len(cameras)
  assert data.names["action"][5:] == ("yaw", "gripper")
  for first in (0, 1, 2):
    found = list(data.read(("action", "observation.state"), tuple(data.cameras), first))
    assert [episode.index for episode in found] == [*range(first, 3)]
    for episode in found:
      for key, column in WRITTEN["columns"](episode.index).items():
        np.testing.assert_array_equal(episode.columns[key], column)
      assert episode.tasks == [TASKS[episode.index]] * LENGTHS[episode.index]
      np.testing.assert_allclose(episode.seconds, np.arange(LENGTHS[episode.index]) / 10, atol=1e-6)
      for number, camera in enumerate(cameras):
        for frame, jpeg in enumerate(episode.cameras[f"observation.images.{camera}"].frames):
          seen, picture = painted(jpeg)
          assert seen == 32 * episode.index + frame
          assert np.abs(picture - WRITTEN["picture"](number, episode.index, frame)).mean() <= CODEC


@pytest.mark.parametrize("name", SETS)
def test_what_was_written_is_read(name):
  check(FOLDER, name)


@pytest.mark.lerobot
def test_what_the_library_writes_today_is_read(tmp_path):
  python = pathlib.Path(__file__).parents[2] / ".venv-lerobot" / "bin" / "python"
  if not python.exists():
    pytest.skip("make lerobot installs what writes them")
  subprocess.run([python, FOLDER / "write.py", tmp_path], check=True, timeout=1800)
  for name in SETS:
    check(tmp_path, name)


def stored_statistics(root: pathlib.Path, version: str) -> dict[str, dict[str, np.ndarray]]:
  """What the library computed: of the dataset in v3.0; of each episode in v2.1, put together."""
  if version == "v3.0":
    return json.loads((root / "meta" / "stats.json").read_text())
  lines = (root / "meta" / "episodes_stats.jsonl").read_text().splitlines()
  each = [json.loads(line)["stats"] for line in lines]
  out = {}
  for key in ("action", "observation.state"):
    part = {name: np.array([one[key][name] for one in each]) for name in ("mean", "std", "min", "max", "count")}
    share = part["count"] / part["count"].sum()
    mean = (share * part["mean"]).sum(0)
    variance = (share * (part["std"] ** 2 + part["mean"] ** 2)).sum(0) - mean**2
    out[key] = {"mean": mean, "std": variance**0.5, "min": part["min"].min(0), "max": part["max"].max(0)}
  return out


@pytest.mark.parametrize("name", SETS)
def test_a_dataset_becomes_rlds_with_its_spec(name, tmp_path):
  version, cameras, _ = SETS[name]
  seen = []
  summary = lerobot_to_rlds.convert(FOLDER / name, tmp_path, "arm", OPTIONS, lambda *at: seen.append(at))
  assert (summary.episodes, summary.frames, seen) == (3, 18, [(1, 3), (2, 3), (3, 3)])
  spec = specs.load(f"{summary.spec}:SPEC")
  assert spec.views == cameras
  assert (spec.normalized, spec.absolute) == ((True,) * 6 + (False,), (False,) * 6 + (True,))
  dataset = rlds.load(str(tmp_path), "arm", spec=spec)
  columns = [WRITTEN["columns"](episode) for episode in range(3)]
  np.testing.assert_array_equal(dataset.actions, np.concatenate([one["action"] for one in columns]))
  np.testing.assert_array_equal(dataset.proprio, np.concatenate([one["observation.state"] for one in columns]))
  assert [dataset.instruction(frame) for frame in (0, 7, 12)] == list(TASKS)
  reader = tfrecord_index.Reader(dataset.index)
  want = [32 * episode + frame for episode in range(3) for frame in range(LENGTHS[episode])]
  for view in range(len(cameras)):
    assert [painted(reader.image(frame, view))[0] for frame in range(18)] == want
  stored = stored_statistics(FOLDER / name, version)
  for ours, key in ((dataset.statistics.action, "action"), (summary.statistics.proprio, "observation.state")):
    for moment in ("mean", "std", "min", "max"):
      np.testing.assert_allclose(getattr(ours, moment), stored[key][moment], rtol=1e-5, atol=1e-6)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_interrupted_conversion_goes_on(tmp_path):
  class Stopped(Exception):
    pass

  def stop(done, total):
    raise Stopped

  straight = lerobot_to_rlds.convert(FOLDER / "v30_video", tmp_path / "a", "arm", OPTIONS)
  for _ in range(2):
    with pytest.raises(Stopped):
      lerobot_to_rlds.convert(FOLDER / "v30_video", tmp_path / "b", "arm", OPTIONS, stop)
  with pytest.raises(ValueError, match="an interrupted conversion with other options; expected the same dataset"):
    changed = lerobot_to_rlds.Options((0,), None)
    lerobot_to_rlds.convert(FOLDER / "v30_video", tmp_path / "b", "arm", changed)
  assert sorted(path.name for path in (tmp_path / "b/arm/.1.0.0.partial").glob("*.json")) == [
    "00000.json",
    "00001.json",
    "plan.json",
  ]
  resumed = lerobot_to_rlds.convert(FOLDER / "v30_video", tmp_path / "b", "arm", OPTIONS)
  assert contents(resumed.folder) == contents(straight.folder)
  (resumed.folder / "00000").touch()  # left over where an earlier run was interrupted at its very end
  resumed.folder.rename(resumed.folder.with_name(".1.0.0.partial"))
  again = lerobot_to_rlds.convert(FOLDER / "v30_video", tmp_path / "b", "arm", OPTIONS)
  assert contents(again.folder) == contents(straight.folder)
  with pytest.raises(ValueError, match="Dataset exists"):
    lerobot_to_rlds.convert(FOLDER / "v30_video", tmp_path / "b", "arm", OPTIONS)


# What is refused.


@pytest.fixture
def copy(tmp_path):
  def make(name: str, to: str = "copy") -> pathlib.Path:
    return pathlib.Path(shutil.copytree(FOLDER / name, tmp_path / to / name))

  return make


def read(root: pathlib.Path, first: int = 0) -> None:
  data = lerobot.LeRobot(root)
  for _ in data.read(("action", "observation.state"), tuple(data.cameras), first):
    pass


def change_rows(path: pathlib.Path, change) -> None:
  pq.write_table(change(pq.read_table(path)), path)


def with_column(table: pa.Table, name: str, values) -> pa.Table:
  at = table.schema.get_field_index(name)
  return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


def test_damaged_videos_are_named(copy):
  root = copy("v21_video")
  video = root / "videos/chunk-000/observation.images.front/episode_000001.mp4"
  whole = video.read_bytes()
  video.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=r"^Video .*episode_000001.mp4: got .*; expected a whole video; [^\n]*$"):
    read(root)
  shutil.copy(video.with_name("episode_000002.mp4"), video)  # a frame longer: the first five have the right times
  read(root)
  shutil.copy(video, video.with_name("episode_000000.mp4"))  # six frames where seven are wanted
  with pytest.raises(ValueError, match=r"got its last frame at 0.5000 s; expected one at 0.6000 s \(frame 6, "):
    read(root)
  video.with_name("episode_000000.mp4").unlink()
  with pytest.raises(ValueError, match=r"episode_000000.mp4: got no such file; expected a whole video"):
    read(root)


@pytest.mark.parametrize("shift", [-0.1, -0.05, 0.05, 0.1])
def test_a_frame_at_another_time_is_an_error(copy, shift):
  root = copy("v21_video")

  def move(table):
    seconds = np.array(table["timestamp"].to_pylist())
    seconds[3:] += shift if shift > 0 else 0
    seconds[:4] += min(shift, 0)
    return with_column(table, "timestamp", seconds)

  change_rows(root / "data/chunk-000/episode_000000.parquet", move)
  with pytest.raises(ValueError, match=r"^Video .*episode_000000.mp4: got a frame at .*'observation.images.front'"):
    read(root)


def test_rows_that_do_not_fit_the_metadata(copy):
  for name, change, message in (
    ("a", lambda t: t.drop_columns(["action"]), r"got the columns \[.*\]; expected 'action' too"),
    ("b", lambda t: t.slice(1), "got 6 of the numbers"),
    ("c", lambda t: with_column(t, "task_index", [9] * 7), r"the numbers \[9\]"),
    ("d", lambda t: with_column(t, "timestamp", [0.0, 0.2, 0.1, 0.3, 0.4, 0.5, 0.6]), "seconds at frame 1; expected"),
    ("e", lambda t: with_column(t, "episode_index", [5] * 7), "no rows of episode 0"),
    ("f", lambda t: with_column(t, "action", [[float("nan")] * 7] * 7), "got nan in dimension 0 of frame 0"),
  ):
    root = copy("v21_image", name)
    change_rows(root / "data/chunk-000/episode_000000.parquet", change)
    with pytest.raises(ValueError, match=message):
      read(root)


def test_damaged_tables_and_text(copy):
  root = copy("v21_image")
  tasks = root / "meta" / "tasks.jsonl"
  tasks.write_bytes(tasks.read_text(encoding="utf-8").encode("latin-1"))
  with pytest.raises(ValueError, match=r"^Text of .*tasks.jsonl, line 2: got the bytes b'.*xf6ffne.*; expected UTF-8"):
    lerobot.LeRobot(root)
  tasks.write_text('{"task_index": 0}\n[]')
  with pytest.raises(ValueError, match="lines without 'task_index'|those that LeRobot writes"):
    lerobot.LeRobot(root)
  table = copy("v30_image") / "data/chunk-000/file-000.parquet"
  table.write_bytes(table.read_bytes()[:-500])
  with pytest.raises(ValueError, match=r"file-000.parquet: got ArrowInvalid.*; expected a whole parquet file"):
    read(table.parents[2])
  info = table.parents[2] / "meta" / "info.json"
  info.write_text(info.read_text().replace("v3.0", "v1.6"))
  with pytest.raises(ValueError, match="got codebase_version 'v1.6'; expected one of v2.1, v3.0"):
    lerobot.LeRobot(table.parents[2])
  with pytest.raises(ValueError, match=r"^LeRobot dataset: got no .*/meta/info.json; expected a folder"):
    lerobot.LeRobot(root / "data")


def test_text_of_a_parquet_file_in_latin_1(copy):
  root = copy("v30_image")
  path = root / "meta" / "tasks.parquet"
  table = pq.read_table(path)
  text = pa.array([one.encode("latin-1") for one in table["__index_level_0__"].to_pylist()], pa.binary())
  at = table.schema.get_field_index("__index_level_0__")
  pq.write_table(table.set_column(at, "task", text.view(pa.string())), path)
  with pytest.raises(ValueError, match=r"^Text of .*tasks.parquet: got the bytes b'.*xf6ffne.*; expected UTF-8; "):
    lerobot.LeRobot(root)


def test_the_command(tmp_path, capsys):
  words = [f"--from_lerobot={FOLDER / 'v30_image'}", f"--out={tmp_path}"]
  command.main([*words, "--absolute=none", "--gripper=6:1:0", "--name=arm"])
  said = capsys.readouterr().out
  assert f"{tmp_path}/arm/1.0.0: 3 episodes, 18 frames; read by SPEC of {tmp_path}/arm.py" in said
  named = r"name some of the dimensions of 'action' \(0 x, 1 y, .*, 6 gripper\)"
  for flags, message in (
    (["--gripper=none"], rf"--absolute: got None; expected all, none, or dimensions such as 0,1,2; {named}"),
    (["--absolute=all"], rf"--gripper: got None; expected none, or DIM:OPEN:CLOSED such as 6:1:0; {named}"),
    (["--absolute=7", "--gripper=none"], rf"got the dimensions \[7\]; expected 0 to 6; {named}"),
    (["--absolute=all", "--gripper=6:0:0"], "two values"),
    (["--absolute=all", "--gripper=none", "--views=observation.images.top"], "no camera 'observation.images.top'"),
    (["--absolute=all", "--gripper=none", "--states=state"], "no feature 'state'"),
    (["--absolute=all", "--gripper=6:0.5:0.2", "--name=wrong"], "gripper commands in .*; expected 0.5 open … 0.2 cl"),
  ):
    with pytest.raises(SystemExit, match=message):
      command.main([*words, *flags])
