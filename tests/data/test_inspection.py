"""What is reported before training: each kind of fault counted in a dataset that has it, and nothing in a sound one."""

import re

import numpy as np
import pytest
from PIL import Image

from semanticvla_jax.data import __main__ as command
from semanticvla_jax.data import inspection, rlds, writer
from semanticvla_jax.data.spec import DatasetSpec, Gripper

SPEC = DatasetSpec(
  name="arm",
  columns={"action": 4, "observation/state": 3, "observation/time": 1},
  views=("front", "hand"),
  absolute=(False, False, False, True),
  groups={"trans": (0, 1, 2), "grip": (3,)},
  gripper=Gripper(3, open=0.08, closed=0.0, kind="continuous"),
  ranges=((-0.1, 0.1),) * 3 + ((0.0, 0.08),),
  optional=("hand",),
  time="observation/time",
  control_hz=10.0,
  units={"trans": "m"},
)
FILE = """
from semanticvla_jax.data.spec import DatasetSpec, Gripper
SPEC = DatasetSpec(
  name="arm", columns={"action": 4, "observation/state": 3}, views=("front", "hand"), optional=("hand",),
  absolute=(False, False, False, True), gripper=Gripper(3, 0.08, 0.0, "continuous"),
  groups={"trans": (0, 1, 2), "grip": (3,)},
)
"""


def recording(number: int, length: int = 12, **changes) -> writer.Recording:
  rng = np.random.default_rng(number)
  action = rng.uniform(-0.1, 0.1, (length, 4)).astype(np.float32)
  action[:, 3] = rng.uniform(0, 0.08, length)
  state = rng.normal(size=(length, 3)).astype(np.float32)
  seconds = (np.arange(length, dtype=np.float32) / 10)[:, None]
  front, hand = (rng.integers(0, 256, (length, *size, 3), np.uint8) for size in ((24, 32), (16, 16)))
  columns = {"action": action, "observation/state": state, "observation/time": seconds}
  images = {"front": front, "hand": hand}
  if "images" in changes:
    images |= changes.pop("images")
  return writer.Recording(images, columns | changes, "pick up the red cube")


def encoded(images, broken: dict[int, bytes]) -> writer.Encoded:
  """The images as JPEG, some of them others' bytes."""
  return writer.Encoded([broken.get(i, writer.jpeg(image)) for i, image in enumerate(images)], *images.shape[1:3])


def look(folder, recordings, spec=SPEC, **limits):
  """Writes the recordings and inspects them."""
  writer.write_recordings(folder, "arm", SPEC, recordings)
  return inspection.inspect(str(folder), "arm", spec, cache_dir="", limits=inspection.Limits(**limits))


def test_recordings_come_back_as_they_were_written(tmp_path):
  given = [recording(0), recording(1, images={"hand": encoded(recording(1).images["hand"], {3: b""})})]
  writer.write_recordings(tmp_path, "arm", SPEC, given)
  read = rlds.load(str(tmp_path), "arm", spec=SPEC)
  np.testing.assert_array_equal(read.actions, np.concatenate([one.columns["action"] for one in given]))
  np.testing.assert_array_equal(read.index.columns["observation/time"][12:], given[1].columns["observation/time"])
  assert (read.index.image_bytes == 0).nonzero()[0].tolist() == [15]
  assert read.instruction(20) == "pick up the red cube"


def test_what_is_no_recording_of_the_spec_is_refused(tmp_path):
  other = recording(0, extra=np.zeros((12, 1), np.float32))
  with pytest.raises(ValueError, match="Recording .*: got .*'extra'.*expected the views and columns"):
    writer.write_recordings(tmp_path, "arm", SPEC, [other])
  narrow = recording(0, action=np.zeros((12, 3), np.float32))
  with pytest.raises(ValueError, match="Bad column 'action'.*got width 3.*expected 4 finite"):
    writer.write_recordings(tmp_path, "arm", SPEC, [narrow])


def test_a_sound_dataset_has_nothing_to_report(tmp_path):
  dataset, found = look(tmp_path, map(recording, range(5)))
  assert found == [] and len(dataset.actions) == 60
  assert inspection.describe(found) == "training stops at: nothing\nworth a look: nothing"
  _, (short,) = inspection.inspect(str(tmp_path), "arm", SPEC._replace(chunk=13))
  assert short.stops and short.line.startswith("5 of 5 episodes are shorter than the chunk of 13 and skipped")


def still(number: int) -> writer.Recording:
  """A first dimension that moves by a micrometer."""
  one = recording(number)
  one.columns["action"][:, 0] *= 1e-5
  return one


def test_everything_is_counted_at_once(tmp_path):
  nan = recording(1)
  nan.columns["observation/state"][4, 1] = np.inf
  front, again = recording(2).images["front"], recording(6)
  late = recording(4)
  late.columns["observation/time"][5:] -= 2
  recordings = [
    recording(0),
    recording(2, images={"front": encoded(front, {1: b"", 5: b"", 6: writer.jpeg(front[6])[:200]})}),
    recording(3, images={"front": encoded(recording(3).images["front"], {2: b""})}),
    late,
    recording(5, length=6),
    again,
    again,
  ]
  dataset, found = look(tmp_path, recordings, prompt=8, instruction=6)
  stops, looks = ([one.line for one in found if one.stops is kind] for kind in (True, False))
  assert [line.split(";")[0] for line in stops if "episodes; the first" in line] == [
    "empty images in 2 episodes",
    "frames out of time in 1 episodes",
    "images that cannot be decoded in 1 episodes",
  ]
  assert any("prompt tokens" in line and "set config.data.prompt_length=" in line for line in stops)
  assert any("instruction tokens" in line and "shorten the sentences" in line for line in stops)
  assert len(dataset.actions) == 12 + 6 + 12 + 12 and sum(one.skippable for one in found) == 3
  assert any(line.startswith("1 of 7 episodes repeat another's numbers") for line in looks)
  assert any(line.startswith("1 of 4 episodes are shorter than the chunk of 8") for line in looks)
  with pytest.raises(ValueError, match="Bad column 'observation/state'.*finite: False"):
    writer.write_recordings(tmp_path, "other", SPEC, [nan])


@pytest.mark.parametrize(
  ("make", "change", "stops", "message"),
  [
    (still, {}, False, r"dimension 0 is nearly constant: .*2% of the robot's range"),
    (still, {"ranges": None}, False, r"dimension 0 is nearly constant: .*1% of the widest of its group"),
    (recording, {"ranges": ((-0.01, 0.01),) * 4}, False, r"dimension 0: got values in .* of 36 outside; .*check unit"),
    (
      recording,
      {"gripper": Gripper(3, 1.0, -1.0), "normalized": None},
      True,
      r"dimension 3: got gripper commands in .*1 open",
    ),
    (recording, {"gripper": None, "normalized": (True, True, True, False)}, None, None),
    (recording, {"control_hz": 25.0}, False, "33 times more than 0.072 s pass between two frames"),
    (recording, {"control_hz": 30.0}, False, r"time: got 10 frames a second; expected control_hz=30"),
  ],
)
def test_numbers_are_compared_with_what_the_spec_says_of_the_robot(tmp_path, make, change, stops, message):
  _, found = look(tmp_path, map(make, range(3)), SPEC._replace(**change))
  if message is None:
    assert found == []
    return
  assert any(one.stops is stops and re.search(message, one.line) for one in found), found


def test_images_of_several_sizes_are_listed(tmp_path):
  hand = recording(0).images["hand"]
  large = encoded(hand, {2: writer.jpeg(np.zeros((40, 30, 3), np.uint8))})
  _, (one,) = look(tmp_path, [recording(0, images={"hand": large})])
  assert not one.stops and "'hand' have 2 sizes (11 of 16 x 16, 1 of 40 x 30)" in one.line


def test_what_is_next_to_the_version_is_listed(tmp_path):
  writer.write_recordings(tmp_path, "arm", SPEC, map(recording, range(3)))
  (tmp_path / "arm" / "1.0.0-old").mkdir()
  _, (one,) = inspection.inspect(str(tmp_path), "arm", SPEC, cache_dir="")
  assert not one.stops and one.line == "1 folders or files next to the version that is read: ['1.0.0-old']"


def test_no_sound_episode_is_a_report_too(tmp_path):
  front = recording(0).images["front"]
  dataset, found = look(tmp_path, [recording(0, images={"front": encoded(front, {0: b""})})])
  assert dataset is None and [one.stops for one in found] == [True, True]


# The command.


@pytest.fixture
def place(tmp_path):
  """A spec in a file, and a dataset with one bad episode of three."""
  (tmp_path / "arm.py").write_text(FILE, encoding="utf-8")
  bad = encoded(recording(1).images["front"], {0: b"not an image"})
  spec = SPEC._replace(columns={"action": 4, "observation/state": 3}, time=None)
  recordings = [recording(0), recording(1, images={"front": bad}), recording(2)]
  for one in recordings:
    del one.columns["observation/time"]
  writer.write_recordings(tmp_path, "arm", spec, recordings)
  return [f"--spec={tmp_path}/arm.py:SPEC", f"--data-dir={tmp_path}"]


def test_inspect_by_a_spec_ends_with_status_1_where_training_would_stop(place, capsys):
  with pytest.raises(SystemExit, match="error: training would stop at 1 kinds of faults; the first: images"):
    command.main(["inspect", *place])
  printed = capsys.readouterr().out
  assert "arm: 2 episodes, 24 frames" in printed and "front (24 x 32), hand (16 x 16)" in printed
  assert "training stops at: 1\n  - images that cannot be decoded in 1 episodes; the first: Dataset 'arm'" in printed
  command.main(["inspect", *place, "--skip-bad"])
  assert "arm: 2 episodes, 24 frames" in capsys.readouterr().out


def test_statistics_and_preview_by_a_spec(place, tmp_path, caplog):
  out = tmp_path / "stats.json"
  command.main(["statistics", *place, "--skip-bad", f"--out={out}"])
  assert '"arm"' in out.read_text(encoding="utf-8") and "1 of 3 episodes are skipped" in caplog.text
  sheet = tmp_path / "sheet.html"
  command.main(["preview", *place, "--skip-bad", f"--out={sheet}", "--count=2", "--size=32"])
  page = sheet.read_text(encoding="utf-8")
  assert page.count("data:image/png;base64,") == 2 * 2 * 3 and page.count("<svg ") == 2
  assert "front: stored, 24 x 32" in page and "pick up the red cube" in page and "http" not in page
  png = tmp_path / "sheet.png"
  command.main(["preview", *place, "--skip-bad", f"--out={png}", "--count=1", "--size=32"])
  assert Image.open(png).size[0] >= 6 * 32


def test_without_a_name_the_spec_has_to_have_one(tmp_path):
  with pytest.raises(SystemExit, match="error: --name: got nothing; expected the dataset's name, or one --spec"):
    command.main(["inspect", f"--data-dir={tmp_path}"])
  with pytest.raises(SystemExit, match="error: Spec nothing.py:SPEC: got no such file"):
    command.main(["inspect", f"--data-dir={tmp_path}", "--spec=nothing.py:SPEC"])
