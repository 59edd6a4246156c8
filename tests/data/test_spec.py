"""A dataset described as data: what a spec fills in, how it reads columns, where it is found, and what is refused."""

import numpy as np
import pytest

from semanticvla_jax.data import datasets, spec
from semanticvla_jax.data.spec import DatasetSpec, Gripper

ARM = dict(
  name="arm",
  columns={"action": 7, "observation/joints": 6, "observation/fingers": 1},
  views=("front", "side", "hand"),
  absolute=(False,) * 6 + (True,),
  groups={"translation": (0, 1, 2), "rotation": (3, 4, 5), "gripper": (6,)},
  gripper=Gripper(6, open=0.08, closed=0.0, kind="continuous"),
  proprio=("observation/joints", "observation/fingers"),
)


def columns(length=4):
  rng = np.random.default_rng(0)
  return {key: rng.uniform(0, 0.08, (length, width)).astype(np.float32) for key, width in ARM["columns"].items()}


def test_columns_suffice_for_most_robots():
  arm, stored = DatasetSpec(**ARM), columns()
  assert arm.proprio_dim == 7 and arm.normalized == (True,) * 7 and arm.openings == ()
  read = arm.read(stored)
  np.testing.assert_array_equal(read.actions, stored["action"])
  np.testing.assert_array_equal(
    read.proprio, np.concatenate([stored["observation/joints"], stored["observation/fingers"]], axis=1)
  )
  assert read.frames.tolist() == [0, 1, 2, 3] and read.actions.dtype == np.float32


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_a_gripper_that_is_not_normalized_is_an_opening(kind):
  stored = columns()
  stored["action"][:, 6] = [0.0, 0.02, 0.08, 0.09]
  arm = DatasetSpec(**ARM | {"gripper": Gripper(6, 0.08, 0.0, kind), "normalized": (True,) * 6 + (False,)})
  assert arm.openings == (6,)
  np.testing.assert_allclose(arm.read(stored).actions[:, 6], [0, 0.25, 1, 1], atol=1e-6)
  np.testing.assert_array_equal(arm.read(stored).actions[:, :6], stored["action"][:, :6])
  assert stored["action"][3, 6] == np.float32(0.09), "what is stored stays as it is"


def test_a_binary_gripper_is_passed_through_unless_the_spec_says_so():
  arm = DatasetSpec(**ARM | {"gripper": (Gripper(2, 1, -1), Gripper(6, 0, 1))})
  assert arm.normalized == (True, True, False, True, True, True, False) and arm.openings == (2, 6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"columns": {"action": 0}}, "columns: got 'action' of width 0; expected a whole number"),
    ({"action": ("actions",)}, r"action: got 'actions'; expected one of .*did you mean 'action'"),
    ({"action": "action"}, r"action: got 'action'; expected a tuple of columns; write \('action',\)"),
    ({"columns": ARM["columns"] | {"action": 8}}, r"columns \['action'\] of width 8; expected 7, as in `absolute`"),
    ({"proprio_dim": 9}, "proprio_dim: got 9; expected 7"),
    ({"views": ()}, r"views: got \(\); expected 1 to 4"),
    ({"views": ("a", "b", "c", "d", "e")}, "expected 1 to 4"),
    ({"views": ("a", "a")}, "expected 1 to 4 different names"),
    ({"optional": ("hnad",)}, "optional: got the view 'hnad'; .*did you mean 'hand'"),
    ({"optional": ARM["views"]}, "optional: got every view; expected at least one"),
    ({"aliases": {"rear": ("back",)}}, "aliases: got the view 'rear'"),
    ({"absolute": ()}, "absolute: got no dimensions"),
    ({"normalized": (True,) * 6}, "normalized: got 6 entries; expected 7"),
    ({"ranges": ((0.0, 1.0),) * 8}, "ranges: got 8 entries; expected 7"),
    ({"ranges": ((1.0, 0.0),) * 7}, r"ranges: got \(1.0, 0.0\); expected low below high"),
    (
      {"groups": {"a": (0, 1, 2, 3), "b": (3, 4, 5, 6)}},
      "groups: got dimension 3 in 'a' and 'b'; expected each",
    ),
    ({"groups": {"a": (0, 1, 2, 3), "b": (4, 5)}}, r"groups: got no group for dimensions \[6\]"),
    ({"groups": {"a": (*range(7),), "b": ()}}, "groups: got 'b' without dimensions"),
    ({"groups": {"a": (*range(8),)}}, "groups: got dimension 7 in 'a'; expected 0 to 6"),
    ({"groups": {"Left arm": (*range(7),)}}, "groups: got the name 'Left arm'"),
    ({"gripper": Gripper(7, 1, 0)}, "gripper: got dimension 7"),
    ({"gripper": (Gripper(6, 1, 0), Gripper(6, 0, 1))}, "gripper: got dimension 6; .*one gripper each"),
    ({"gripper": Gripper(6, 1, 1)}, r"open and closed \(1, 1\); expected two different"),
    ({"gripper": Gripper(6, 1, 0, "soft")}, "kind='soft'; expected one of"),
    ({"gripper": Gripper(6, 1, 0), "normalized": (True,) * 7}, "a binary gripper in dimension 6, which is normalized"),
    ({"mode": "q99"}, "mode: got 'q99'"),
    ({"chunk": 0}, "chunk: got 0"),
    ({"control_hz": 0.0}, "control_hz: got 0"),
    ({"time": "observation/time"}, "time: got 'observation/time'; expected one of its columns"),
    ({"time": "observation/joints"}, "time: got 'observation/joints' of width 6; expected width 1"),
    ({"units": {"grip": "m"}}, "units: got 'grip'; .*did you mean 'gripper'"),
    ({"standardize": lambda columns: None, "proprio": ("state",)}, "proprio_dim: got None; expected the width"),
  ],
)
def test_wrong_values_are_refused_in_one_line(change, message):
  with pytest.raises(ValueError, match=message) as error:
    DatasetSpec(**ARM | change)
  assert str(error.value).startswith("DatasetSpec 'arm', ") and "\n" not in str(error.value)


def test_shipped_datasets_are_found_by_the_beginning_of_their_name_and_others_by_their_own():
  arm, nameless = DatasetSpec(**ARM), DatasetSpec(**ARM | {"name": None})
  assert datasets.spec("libero_goal_no_noops") is datasets.LIBERO
  assert datasets.spec("arm", [arm]) is arm
  assert datasets.spec("other", [nameless]) is nameless and datasets.spec("arm", [arm, nameless]) is arm
  for own in ([arm], [nameless, nameless]):
    with pytest.raises(ValueError, match="Spec of dataset 'libero_goal': got specs named"):
      datasets.spec("libero_goal", own)
  with pytest.raises(ValueError, match="without a spec: got 'arm'.*--spec=FILE.py:NAME"):
    datasets.spec("arm")


def test_a_spec_is_read_from_a_file_that_may_import_its_neighbors(tmp_path):
  (tmp_path / "neighbor_of_my_robot.py").write_text("WIDTH = 7\n", encoding="utf-8")
  file = tmp_path / "my_robot.py"
  file.write_text(
    "from neighbor_of_my_robot import WIDTH\n"
    "from semanticvla_jax.data.spec import DatasetSpec\n"
    "SPEC = DatasetSpec(columns={'action': WIDTH, 'observation/state': 8}, views=('front',), absolute=(True,) * 7)\n"
    "other = 3\n",
    encoding="utf-8",
  )
  assert spec.load(f"{file}:SPEC").columns["action"] == 7
  for place, message in (
    (f"{file}:SPCE", r"got no such name; expected one of \['SPEC'\]; name 'SPEC'"),
    (f"{file}:other", "got int; expected one of"),
    (f"{tmp_path}/none.py:SPEC", "got no such file"),
    (f"{file}", "expected FILE.py:NAME"),
    ("my_robot", "expected FILE.py:NAME"),
  ):
    with pytest.raises(ValueError, match=message):
      spec.load(place)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("import nothing_of_this_name", "got ModuleNotFoundError: .*expected a file that runs"),
    ("SPEC = (", "got SyntaxError"),
    (
      "from semanticvla_jax.data.spec import DatasetSpec\nSPEC = DatasetSpec(columns={}, views=(), absolute=(), a=1)",
      "got TypeError: .*'a'",
    ),
    (
      "from semanticvla_jax.data.spec import DatasetSpec\n"
      "SPEC = DatasetSpec(columns={'action': 3}, views=('a',), absolute=(True,), proprio=())",
      r"broken.py:SPEC: DatasetSpec, action: got columns \['action'\] of width 3; expected 1",
    ),
    ("", "got no such name; expected a DatasetSpec; write SPEC = DatasetSpec"),
  ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, text, message):
  (tmp_path / "broken.py").write_text(text, encoding="utf-8")
  with pytest.raises(ValueError, match=message) as error:
    spec.load(f"{tmp_path}/broken.py:SPEC")
  assert "\n" not in str(error.value)
