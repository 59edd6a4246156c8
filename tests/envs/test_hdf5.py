"""LIBERO's own files."""

import numpy as np
import pytest

from semanticvla_jax.libero import hdf5

h5py = pytest.importorskip("h5py")


def write(path, demonstrations):
  path.parent.mkdir(parents=True, exist_ok=True)
  with h5py.File(path, "w") as file:
    for name, actions in demonstrations.items():
      group = file.create_group(f"data/{name}")
      group["actions"], group["states"] = actions, np.arange(2 * len(actions), dtype=float).reshape(-1, 2)


def actions(length):
  found = np.full((length, 7), 0.5)
  found[:, 6] = -1
  return found


def test_demonstrations_by_number_without_no_ops(tmp_path):
  still = actions(5)
  still[2:4, :6] = 0
  write(tmp_path / "lift_demo.hdf5", {"demo_10": actions(3), "demo_2": still})
  two, ten = hdf5.read(tmp_path / "lift_demo.hdf5")
  assert (two.name, ten.name) == ("demo_2", "demo_10") and len(two.actions) == 5
  np.testing.assert_array_equal(two.moving, still[[0, 1, 4]])
  np.testing.assert_array_equal(ten.first, [0, 1])


def test_the_folder_may_be_the_suites_or_the_one_above(tmp_path):
  write(tmp_path / "libero_goal" / "lift_demo.hdf5", {"demo_0": actions(3)})
  assert hdf5.folder(tmp_path, "libero_goal") == hdf5.folder(tmp_path / "libero_goal", "libero_goal")
  with pytest.raises(ValueError, match=r"no \*_demo.hdf5"):
    hdf5.folder(tmp_path, "libero_object")


@pytest.mark.parametrize(
  "content, message",
  [
    (b"text", "expected data/demo_i"),
    (np.full((3, 6), 1.0), r"got actions \(3, 6\)"),
    (np.full((3, 7), np.nan), "finite"),
  ],
)
def test_what_is_damaged_is_refused(tmp_path, content, message):
  path = tmp_path / "lift_demo.hdf5"
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    write(path, {"demo_0": content})
  with pytest.raises(ValueError, match=message):
    hdf5.read(path)


@pytest.mark.parametrize("seed", [None, 0, 500002])
def test_the_seed_of_a_recording(tmp_path, seed):
  path = tmp_path / "lift_demo.hdf5"
  write(path, {"demo_0": actions(3)})
  if seed is not None:
    with h5py.File(path, "a") as file:
      file["data/demo_0"].attrs["seed"] = seed
  assert hdf5.read(path)[0].seed == seed


@pytest.mark.parametrize("seed", ["seven", 1.5, -1, 2**32, [1, 2]])
def test_a_seed_that_numpy_would_not_take_is_refused(tmp_path, seed):
  path = tmp_path / "lift_demo.hdf5"
  write(path, {"demo_0": actions(3)})
  with h5py.File(path, "a") as file:
    file["data/demo_0"].attrs["seed"] = seed
  with pytest.raises(ValueError, match=r"got seed=.* of demo_0 .*expected a whole number from 0"):
    hdf5.read(path)
