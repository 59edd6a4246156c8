"""What a dataset on disk can have wrong: refused in one line, or skipped and counted."""

import functools
import json
import shutil

import numpy as np
import pytest
from toy_rlds import LENGTHS, NAME, episodes

from semanticvla_jax.data import datasets, faults, images, rlds, tfrecord_index
from semanticvla_jax.data.spec import DatasetSpec


@pytest.fixture
def folder(data_dir, tmp_path):
  return shutil.copytree(data_dir / NAME, tmp_path / "data" / NAME).parent


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
  """The record's bytes with others of the same length in their place."""
  assert len(old) == len(new) and old in data
  return data.replace(old, new, 1)


def rewrite(shard, change):
  """Applies `change` to the first record of a shard."""
  import tensorflow as tf

  records = [record.numpy() for record in tf.data.TFRecordDataset(str(shard))]
  with tf.io.TFRecordWriter(str(shard)) as out:
    for i, record in enumerate(records):
      out.write(change(record) if i == 0 else record)


def latin(record: bytes) -> bytes:
  return replaced(record, b"pick up the red", b"pick \xfcp the red")


def empty_image(record: bytes) -> bytes:
  import tensorflow as tf

  example = tf.train.Example.FromString(record)
  example.features.feature["steps/observation/image"].bytes_list.value[3] = b""
  return example.SerializeToString(deterministic=True)


def cut_image(record: bytes) -> bytes:
  import tensorflow as tf

  example = tf.train.Example.FromString(record)
  values = example.features.feature["steps/observation/wrist_image"].bytes_list.value
  values[2] = values[2][:100]
  return example.SerializeToString(deterministic=True)


def missing_image(record: bytes) -> bytes:
  import tensorflow as tf

  example = tf.train.Example.FromString(record)
  del example.features.feature["steps/observation/image"].bytes_list.value[-1]
  return example.SerializeToString(deterministic=True)


def not_a_number(record: bytes) -> bytes:
  import tensorflow as tf

  example = tf.train.Example.FromString(record)
  example.features.feature["steps/action"].float_list.value[9] = np.nan
  return example.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
  ("change", "message", "kind"),
  [
    (latin, r"Bad instruction \(.*00000-of-00003, record 0\): got the bytes .*xfcp.*expected UTF-8", faults.RECORDS),
    (missing_image, r"Bad images 'steps/observation/image' \(.*record 0\): got 11; expected 12", faults.RECORDS),
    (empty_image, r"'image': got an empty image in .*00000-of-00003, episode 0, frame 3", "empty images"),
    (not_a_number, "'action': got nan in dimension 2 of .*episode 0, frame 1", "non-finite numbers"),
    (cut_image, None, "images that cannot be decoded"),
  ],
)
def test_a_bad_episode_is_an_error_or_is_skipped_and_counted(folder, change, message, kind, caplog):
  (shard, *_) = sorted((folder / NAME / "1.0.0").glob("*.tfrecord*"))
  rewrite(shard, change)
  if message is not None:
    with pytest.raises(ValueError, match=message):
      rlds.load(str(folder), NAME, cache_dir="")
  left = rlds.load(str(folder), NAME, cache_dir="", skip_bad=True)
  assert f"1 of {len(LENGTHS)} episodes are skipped" in caplog.text and f"1 x {kind}; the first: " in caplog.text
  assert np.bincount(left.episodes).tolist() == list(LENGTHS[1:])
  np.testing.assert_array_equal(left.proprio[0], episodes()[1].state[0])
  encoded = tfrecord_index.Reader(left.index).image(int(left.frames[0]), 0)
  np.testing.assert_array_equal(images.decode(encoded), images.jpeg_round_trip(episodes()[1].image[0]))


def test_an_index_without_its_bad_records_is_not_kept(folder, tmp_path):
  (shard, *_) = sorted((folder / NAME / "1.0.0").glob("*.tfrecord*"))
  rewrite(shard, latin)
  rlds.load(str(folder), NAME, cache_dir=str(tmp_path), skip_bad=True)
  with pytest.raises(ValueError, match="Bad instruction"):
    rlds.load(str(folder), NAME, cache_dir=str(tmp_path))


def test_images_are_decoded_once_for_a_content(folder, tmp_path, monkeypatch):
  (shard, *_) = sorted((folder / NAME / "1.0.0").glob("*.tfrecord*"))
  rewrite(shard, cut_image)
  load = functools.partial(rlds.load, str(folder), NAME, cache_dir=str(tmp_path), skip_bad=True)
  first, looks, look = load(), [], faults.of_images
  monkeypatch.setattr(faults, "of_images", lambda *args: looks.append(args) or look(*args))
  np.testing.assert_array_equal(load().actions, first.actions)
  assert not looks
  (kept,) = tmp_path.glob("*.images.json")
  kept.write_text("[[1")
  np.testing.assert_array_equal(load().actions, first.actions)
  assert len(looks) == 1 and json.loads(kept.read_text())[0][0] == 0


def test_a_corrupt_shard_loses_its_own_episodes_alone(folder, caplog):
  (_, shard, _) = sorted((folder / NAME / "1.0.0").glob("*.tfrecord*"))
  shard.write_bytes(shard.read_bytes()[:-200])
  left = rlds.load(str(folder), NAME, cache_dir="", skip_bad=True)
  assert "1 of 5 episodes are skipped" in caplog.text and "Shard is corrupt" in caplog.text
  assert np.bincount(left.episodes).tolist() == [LENGTHS[i] for i in (0, 1, 2, 4)]


def test_a_sound_dataset_is_the_same_with_skipping(folder, dataset, caplog):
  same = rlds.load(str(folder), NAME, cache_dir="", skip_bad=True)
  np.testing.assert_array_equal(same.actions, dataset.actions)
  assert "episodes are skipped" not in caplog.text


def test_time_that_does_not_increase(folder, dataset):
  seconds = np.arange(len(dataset.index.instruction), dtype=np.float32)[:, None]
  seconds[15] = seconds[14]
  index = dataset.index._replace(columns=dataset.index.columns | {"time": seconds})
  timed = datasets.TABLETOP._replace(columns=datasets.TABLETOP.columns | {"time": 1}, time="time")
  (fault,) = faults.of_numbers(NAME, timed, index)
  assert fault.episode == 1 and "14 s after 14 s in " in str(fault.error) and "episode 1, frame 3" in str(fault.error)
  seconds[15] = 14.5
  seconds[12:] -= 5  # each episode has its own clock
  assert not [*faults.of_numbers(NAME, timed, index)]


def test_a_standardizing_function_of_other_widths(folder):
  narrow = datasets.TABLETOP._replace(proprio_dim=7)
  with pytest.raises(ValueError, match=r"standardize: got actions \[12, 7\] and proprioception \[12, 8\] of 12 frames"):
    rlds.load(str(folder), NAME, spec=narrow)


def test_a_spec_with_a_width_or_a_view_that_the_data_lacks(folder):
  own = DatasetSpec(columns={"action": 6, "observation/state": 8}, views=("image",), absolute=(False,) * 6)
  with pytest.raises(ValueError, match=r"feature 'action': got shape \(7,\) a step; expected \(6,\)"):
    rlds.load(str(folder), NAME, spec=own)
  with pytest.raises(ValueError, match="lacks the feature 'observation/wrist'.*nearest: 'observation/wrist_image'"):
    rlds.load(str(folder), NAME, spec=datasets.TABLETOP._replace(views=("wrist",), aliases={}))


def test_a_robot_without_proprioception_has_statistics_of_width_zero(folder):
  own = DatasetSpec(
    columns={"action": 7},
    views=("image",),
    absolute=(False,) * 6 + (True,),
    proprio=(),
    gripper=datasets.LIBERO.gripper,
  )
  read = rlds.load(str(folder), NAME, spec=own)
  assert read.proprio.shape == (sum(LENGTHS), 0) and read.statistics.proprio.mean.shape == (0,)


# Folders.


def test_older_versions_are_named(folder, caplog):
  shutil.copytree(folder / NAME / "1.0.0", folder / NAME / "1.1.0")
  assert rlds.find(str(folder), NAME).endswith("1.1.0") and "older versions, ignored: 1.0.0" in caplog.text


def test_a_dataset_below_a_tfds_config_is_named_with_it(folder):
  (folder / NAME / "small").mkdir()
  (folder / NAME / "1.0.0").rename(folder / NAME / "small" / "1.0.0")
  with pytest.raises(ValueError, match=rf"got tfds configs \['small'\] in .*; name it '{NAME}/small'"):
    rlds.load(str(folder), NAME, spec=datasets.TABLETOP)
  assert len(rlds.load(str(folder), f"{NAME}/small", spec=datasets.TABLETOP).actions) == sum(LENGTHS)


@pytest.mark.parametrize("lengths", [None, []])
def test_metadata_without_shard_lengths(folder, lengths):
  path = folder / NAME / "1.0.0" / "dataset_info.json"
  info = json.loads(path.read_text(encoding="utf-8"))
  (split,) = info["splits"]
  split.pop("shardLengths") if lengths is None else split.update(shardLengths=lengths)
  path.write_text(json.dumps(info), encoding="utf-8")
  with pytest.raises(ValueError, match="split 'train': got no shardLengths in dataset_info.json"):
    rlds.load(str(folder), NAME)


def test_metadata_that_is_not_json(folder):
  (folder / NAME / "1.0.0" / "dataset_info.json").write_text("{", encoding="utf-8")
  with pytest.raises(ValueError, match="got metadata that cannot be read"):
    rlds.load(str(folder), NAME)


def test_all_episodes_bad(folder):
  with pytest.raises(ValueError, match="is empty: got 0 episodes without an instruction and 5 that are skipped"):
    index = rlds.load(str(folder), NAME).index
    rlds.assemble(NAME, datasets.TABLETOP, index, None, {*range(5)})
