"""A dataset appears whole or not at all, and is written by one run at a time."""

import pytest
from toy_rlds import NAME, episodes

from semanticvla_jax import files
from semanticvla_jax.data import writer


def test_two_runs_do_not_write_one_dataset(tmp_path):
  folder = tmp_path / NAME / "1.0.0"
  with files.alone(folder), pytest.raises(ValueError, match="got process .* at work on it"):
    writer.write(tmp_path, NAME, episodes())
  assert writer.write(tmp_path, NAME, episodes()) == folder
  assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]


def test_what_belongs_beside_the_shards_is_there_when_the_dataset_is(tmp_path):
  def fail(folder):
    assert (folder / "features.json").exists()
    raise OSError(28, "No space left on device")

  with pytest.raises(OSError, match="No space left"):
    writer.write(tmp_path, NAME, episodes(), finish=fail)
  assert not (tmp_path / NAME / "1.0.0").exists()
  folder = writer.write(tmp_path, NAME, episodes(), finish=lambda folder: files.write_json(folder / "facts.json", {}))
  assert (folder / "facts.json").exists()
