"""Other entries of a dataset's folder, and its cache: only x.y.z is a version, a damaged cache is made again."""

import json
import logging
import shutil

import numpy as np
import pytest
from toy_rlds import NAME

from semanticvla_jax.data import rlds, tfrecord_index


@pytest.fixture
def folder(data_dir, tmp_path):
  return shutil.copytree(data_dir / NAME, tmp_path / "data" / NAME).parent


@pytest.mark.parametrize("other", ["1.0.0.bak", "1.0.0-old", "2.0", "latest", "9.9.9.9", "1.0.1 (copy)", "v3.0.0"])
def test_only_three_numbers_are_a_version_and_others_are_named_once(folder, other, caplog):
  shutil.copytree(folder / NAME / "1.0.0", folder / NAME / other)
  assert rlds.find(str(folder), NAME).endswith("1.0.0") and rlds.find(str(folder), NAME).endswith("1.0.0")
  assert [record.message.count(other) for record in caplog.records] == [1]


def test_the_highest_complete_version_is_read(folder, caplog):
  for version in ("1.2.0", "1.10.0"):
    shutil.copytree(folder / NAME / "1.0.0", folder / NAME / version)
  (folder / NAME / "2.0.0").mkdir()  # a download that was given up
  (folder / NAME / ".1.0.0.partial").mkdir()
  assert rlds.find(str(folder), NAME).endswith("1.10.0")
  assert "2.0.0" in caplog.text and "partial" not in caplog.text


def test_a_dataset_of_other_folders_alone_is_refused(folder):
  (folder / NAME / "1.0.0").rename(folder / NAME / "1.0.0.bak")
  with pytest.raises(ValueError, match=r"No dataset 'tabletop_toy': got \['1.0.0.bak'\].*expected a folder x.y.z"):
    rlds.find(str(folder), NAME)


def half(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
  path.write_bytes(b"")


def noise(path):
  path.write_bytes(np.random.default_rng(0).bytes(4000))


def of_other_shapes(path):
  with np.load(path) as file:
    arrays = dict(file)
  np.savez(path, **arrays | {"image_offset": arrays["image_offset"][:-3]})


def without_a_part(path):
  with np.load(path) as file:
    np.savez(path, **{name: x for name, x in file.items() if name != "lengths"})


def another_thing(path):
  path.write_text(json.dumps([1, 2, 3]) if path.suffix == ".json" else "index")


def a_folder(path):
  path.unlink()
  path.mkdir()


@pytest.mark.parametrize("damage", [half, emptied, noise, of_other_shapes, without_a_part, another_thing, a_folder])
def test_a_damaged_index_is_named_and_made_anew(folder, damage, tmp_path, caplog):
  cache = tmp_path / "cache"
  sound = rlds.load(str(folder), NAME, cache_dir=str(cache))
  (kept,) = cache.glob("*.npz")
  damage(kept)
  with caplog.at_level(logging.WARNING):
    again = rlds.load(str(folder), NAME, cache_dir=str(cache))
  assert str(kept) in caplog.text and again.digest == sound.digest
  np.testing.assert_array_equal(again.index.image_offset, sound.index.image_offset)
  if damage is not a_folder:  # which cannot be replaced: that is said too
    caplog.clear()
    rlds.load(str(folder), NAME, cache_dir=str(cache))
    assert not caplog.text


@pytest.mark.parametrize("damage", [half, emptied, noise, another_thing, a_folder])
def test_a_damaged_memory_of_hashes_is_named_and_made_anew(folder, damage, tmp_path, caplog):
  cache = tmp_path / "cache"
  sound = rlds.load(str(folder), NAME, cache_dir=str(cache))
  damage(cache / "shards.json")
  again = rlds.load(str(folder), NAME, cache_dir=str(cache))
  assert str(cache / "shards.json") in caplog.text and again.digest == sound.digest


def test_entries_of_another_kind_are_hashed_anew(folder, tmp_path, caplog):
  cache = tmp_path / "cache"
  rlds.load(str(folder), NAME, cache_dir=str(cache))
  known = json.loads((cache / "shards.json").read_text())
  (cache / "shards.json").write_text(json.dumps({path: entry[:2] for path, entry in known.items()}))
  rlds.load(str(folder), NAME, cache_dir=str(cache))
  assert "is damaged" in caplog.text and json.loads((cache / "shards.json").read_text()) == known


def test_a_user_without_a_home_goes_without_a_cache(folder, monkeypatch, caplog):
  def homeless(self):
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr(tfrecord_index.pathlib.Path, "expanduser", homeless)
  assert len(rlds.load(str(folder), NAME).actions) > 0
  assert "not kept for the next run: Could not determine home directory" in caplog.text
