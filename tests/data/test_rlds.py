"""Writer, index and batches: what was written comes out, in a reproducible order, and bad data is refused."""

import dataclasses
import logging
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from toy_rlds import LENGTHS, NAME, assert_equal, batches, episode, episodes

from semanticvla_jax.data import __main__ as command
from semanticvla_jax.data import datasets, images, loader, rlds, statistics, tfrecord_index, writer

# The writer.


def test_tfds_reads_what_was_written(data_dir):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(data_dir / NAME / "1.0.0")
  read = list(builder.as_dataset(split="train", shuffle_files=False))
  assert len(read) == len(LENGTHS)
  for got, want in zip(read, episodes(), strict=True):
    assert got["episode_metadata"]["file_path"].numpy().decode() == want.file_path
    steps = next(iter(got["steps"].batch(100)))
    assert set(steps) == {
      *("observation", "action", "discount", "reward", "is_first", "is_last", "is_terminal", "language_instruction")
    }
    assert set(steps["observation"]) == {"image", "wrist_image", "state", "joint_state"}
    np.testing.assert_array_equal(steps["action"], want.action)
    np.testing.assert_array_equal(steps["observation"]["state"], want.state)
    assert steps["observation"]["state"].dtype == np.float32
    difference = steps["observation"]["image"].numpy().astype(int) - want.image
    assert steps["observation"]["image"].dtype == np.uint8 and np.abs(difference).mean() < 5
    assert set(steps["language_instruction"].numpy()) == {want.instruction.encode()}
    end = [0.0] * (len(want.action) - 1) + [1.0]
    assert steps["reward"].numpy().tolist() == steps["is_last"].numpy().tolist() == end
    assert steps["is_terminal"].numpy().tolist() == end and steps["is_first"].numpy().tolist()[:2] == [True, False]
    assert steps["discount"].numpy().tolist() == [1.0] * len(want.action)


def test_writing_is_deterministic_and_sharded(data_dir, tmp_path):
  folder = writer.write(tmp_path, NAME, iter(episodes()), episodes_per_shard=2)
  first = {path.name: path.read_bytes() for path in (data_dir / NAME / "1.0.0").iterdir()}
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
  assert sorted(first)[2:] == [f"{NAME}-train.tfrecord-0000{i}-of-00003" for i in range(3)]


def test_a_failing_writer_leaves_no_dataset(tmp_path):
  def broken():
    yield episode(0, 5)
    raise RuntimeError("the simulator stopped")

  with pytest.raises(RuntimeError):
    writer.write(tmp_path, NAME, broken())
  with pytest.raises(ValueError, match="No dataset"):
    rlds.find(str(tmp_path), NAME)
  writer.write(tmp_path, NAME, [episode(0, 5)])


def test_the_writer_refuses_bad_episodes(data_dir, tmp_path):
  good = episode(0, 5)
  nan = good.action.copy()
  nan[2, 3] = np.nan
  for bad, message in (
    (good._replace(action=nan), "Bad column 'action'.*episode 1.*finite: False"),
    (good._replace(state=good.state[:, :7]), "Bad column 'state'.*got width 7"),
    (good._replace(state=good.state[:4]), "Bad column 'state'.*expected float32 with 5 rows"),
    (good._replace(action=good.action.astype(np.float64)), "Bad column 'action'.*got float64"),
    (good._replace(image=good.image.astype(np.float32)), "Bad column 'image'"),
    (good._replace(instruction=" "), "No instruction"),
    (episode(1, 5, size=16), "Image size changes in episode 1"),
  ):
    with pytest.raises(ValueError, match=message):
      writer.write(tmp_path, "x", [good, bad])
  with pytest.raises(ValueError, match="No episodes"):
    writer.write(tmp_path, "x", [])
  with pytest.raises(ValueError, match="Dataset exists"):
    writer.write(data_dir, NAME, [good])


# The index.


def test_index_finds_every_column_and_image(dataset, data_dir):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(data_dir / NAME / "1.0.0")
  decoders = {"steps": {"observation": {key: tfds.decode.SkipDecoding() for key in ("image", "wrist_image")}}}
  reader = tfrecord_index.Reader(dataset.index)
  whole = tfrecord_index.Reader(dataset.index, whole_records=True, cache_bytes=1)
  frame = 0
  for got in builder.as_dataset(split="train", decoders=decoders, shuffle_files=False):
    steps = next(iter(got["steps"].batch(100)))
    for t in range(len(steps["action"])):
      for view, key in enumerate(("image", "wrist_image")):
        encoded = steps["observation"][key][t].numpy()
        assert reader.image(frame, view) == whole.image(frame, view) == encoded
      np.testing.assert_array_equal(dataset.index.columns["action"][frame], steps["action"][t])
      np.testing.assert_array_equal(dataset.index.columns["observation/state"][frame], steps["observation"]["state"][t])
      assert dataset.instruction(frame).encode() == steps["language_instruction"][t]
      frame += 1
  assert frame == sum(LENGTHS) == len(dataset.actions)
  assert reader.where(12) == f"{dataset.index.files[0]}, episode 1, frame 0"


def test_statistics_equal_numpy(dataset):
  action = np.concatenate([one.action for one in episodes()])
  action = np.concatenate([action[:, :6], 1 - np.clip(action[:, 6:], 0, 1)], axis=1)
  state = np.concatenate([one.state for one in episodes()])
  for got, want in ((dataset.statistics.action, action), (dataset.statistics.proprio, state)):
    np.testing.assert_allclose(got.mean, want.mean(0), atol=1e-6)
    np.testing.assert_allclose(got.std, want.std(0), rtol=1e-5)
    np.testing.assert_allclose(got.q99, np.quantile(want, 0.99, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(got.min, want.min(0))
  assert dataset.statistics.action.mask.tolist() == [True] * 6 + [False]
  assert dataset.statistics[2:] == (sum(LENGTHS), len(LENGTHS))


def test_index_is_cached_by_content(data_dir, dataset, tmp_path, monkeypatch):
  rlds.load(str(data_dir), NAME, cache_dir=str(tmp_path))
  assert len(list(tmp_path.glob("*.npz"))) == 1
  monkeypatch.setattr(tfrecord_index, "_build", None)  # the second time nothing may be built
  cached = rlds.load(str(data_dir), NAME, cache_dir=str(tmp_path))
  for field in tfrecord_index.Index._fields:
    assert_equal(getattr(cached.index, field), getattr(dataset.index, field))
  with pytest.raises(TypeError):
    rlds.load(str(data_dir), "tabletop_other", cache_dir=str(tmp_path))


def test_a_byte_in_the_middle_is_noticed_and_shards_are_read_once(data_dir, tmp_path, monkeypatch):
  read, real = [], tfrecord_index._content
  monkeypatch.setattr(tfrecord_index, "_content", lambda path, stamp: read.append(path) or real(path, stamp))
  shards, cache = copy(data_dir, tmp_path), tmp_path / "cache"
  for _ in range(2):
    rlds.load(str(tmp_path), NAME, cache_dir=str(cache))
  assert sorted(read) == [str(path) for path in shards]
  data = bytearray(shards[1].read_bytes())
  data[len(data) // 2] ^= 1
  shards[1].write_bytes(data)
  with pytest.raises(ValueError, match="Shard is corrupt"):
    rlds.load(str(tmp_path), NAME, cache_dir=str(cache))
  assert read[3:] == [str(shards[1])]


def test_an_index_is_kept_unless_told_otherwise(data_dir, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(tfrecord_index, "CACHE", str(tmp_path / "default"))
  rlds.load(str(data_dir), NAME, cache_dir="")
  assert not (tmp_path / "default").exists()
  rlds.load(str(data_dir), NAME)
  assert [*(tmp_path / "default").glob(f"{NAME}-*.npz")]
  (tmp_path / "file").write_text("no folder")
  rlds.load(str(data_dir), NAME, cache_dir=str(tmp_path / "file"))
  assert "not kept for the next run" in caplog.text


def test_part_of_a_split(data_dir):
  part = rlds.load(str(data_dir), NAME, split="train[1:4]")
  assert np.bincount(part.episodes).tolist() == list(LENGTHS[1:4])
  np.testing.assert_array_equal(part.proprio[0], episode(1, LENGTHS[1]).state[0])


# Batches.


def test_batches_hold_the_frames_they_claim(dataset, tokenizers):
  source = episodes()
  seen = set()
  for batch in batches([(dataset, 1.0)], tokenizers, 3):
    state = statistics.unnormalize(batch.observation.proprio, dataset.statistics.proprio)
    for row in range(8):
      distance = [np.abs(np.clip(one.state, *bounds(dataset)) - state[row]).max(1) for one in source]
      number = int(np.argmin([d.min() for d in distance]))
      t = int(distance[number].argmin())
      seen.add((number, t))
      assert distance[number][t] < 1e-4 and t <= LENGTHS[number] - 8
      one = source[number]
      for view, pictures in enumerate((one.image, one.wrist_image)):
        np.testing.assert_array_equal(batch.observation.images[row, view], images.jpeg_round_trip(pictures[t]))
      want = datasets.libero({"action": one.action[t : t + 8], "observation/state": one.state[t : t + 8]}).actions
      np.testing.assert_allclose(batch.actions[row], statistics.normalize(want, dataset.statistics.action), atol=1e-6)
      prompt, mask = tokenizers.prompt([one.instruction])
      np.testing.assert_array_equal(batch.observation.prompt[row], prompt[0])
      np.testing.assert_array_equal(batch.observation.prompt_mask[row], mask[0])
    assert batch.action_mask.all()
  assert len(seen) == sum(max(length - 7, 0) for length in LENGTHS) == 18


def bounds(dataset):
  return dataset.statistics.proprio.q01, dataset.statistics.proprio.q99


def test_shapes_types_and_ranges(dataset, tokenizers):
  (batch,) = batches([(dataset, 1.0)], tokenizers, augmentation=images.RELEASE, image_size=48)
  got = {jax.tree_util.keystr(path): (x.shape, x.dtype.name) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
  assert got == {
    ".observation.images": ((8, 2, 48, 48, 3), "uint8"),
    ".observation.proprio": ((8, 8), "float32"),
    ".observation.prompt": ((8, 32), "int32"),
    ".observation.prompt_mask": ((8, 32), "bool"),
    ".observation.instruction": ((8, 32), "int32"),
    ".observation.instruction_mask": ((8, 32), "bool"),
    ".actions": ((8, 8, 7), "float32"),
    ".action_mask": ((8, 8), "bool"),
  }
  assert np.abs(batch.actions).max() <= 1 and np.abs(batch.observation.proprio).max() <= 1


def test_pad_masks_what_runs_past_the_end(dataset, tokenizers):
  found = batches([(dataset, 1.0)], tokenizers, 7, trajectory_end="pad")  # 51 frames, 56 examples
  masks = np.concatenate([batch.action_mask for batch in found])
  assert set(masks.sum(1)) == set(range(1, 9))
  actions = statistics.unnormalize(np.concatenate([b.actions for b in found]), dataset.statistics.action)
  for mask, action in zip(masks, actions, strict=True):
    assert (np.diff(mask.astype(int)) <= 0).all()
    np.testing.assert_allclose(action[~mask, :6], 0, atol=1e-6)
    assert (action[~mask, 6] == action[mask, 6][-1]).all()


def test_a_policy_without_pruner_gets_no_instruction(dataset, tokenizers):
  (batch,) = batches([(dataset, 1.0)], tokenizers._replace(siglip=None))
  assert batch.observation.instruction is None and batch.observation.instruction_mask is None


MIXES = {"one": {}, "window": {"window": 2}, "mixture": {}}


@pytest.mark.parametrize("kind", MIXES)
def test_resume_and_host_count(kind, dataset, other, tokenizers):
  mixture = [(dataset, 1.0), (other, 2.0)] if kind == "mixture" else [(dataset, 1.0)]
  options = {"augmentation": images.RELEASE, "seed": 3} | MIXES[kind]
  straight = batches(mixture, tokenizers, 8, **options)
  assert_equal(batches(mixture, tokenizers, 8, **options, workers=1, prefetch=0), straight)  # deterministic
  assert_equal(batches(mixture, tokenizers, 3, start_step=5, **options), straight[5:])  # resumed
  hosts = [batches(mixture, tokenizers, 8, rows=np.arange(4 * i, 4 * i + 4), **options) for i in range(2)]
  together = [jax.tree.map(lambda *rows: np.concatenate(rows), *pair) for pair in zip(*hosts, strict=True)]
  assert_equal(together, straight)
  from_two_to_one = batches(mixture, tokenizers, 1, start_step=7, **options)
  assert_equal(jax.tree.map(lambda x: x[4:], from_two_to_one[0]), hosts[1][7])
  changed = batches(mixture, tokenizers, 1, **(options | {"seed": 4}))
  assert not np.array_equal(changed[0].observation.images, straight[0].observation.images)


def test_a_mixture_normalizes_each_dataset_by_its_own_statistics(dataset, other, tokenizers):
  found = batches([(dataset, 1.0), (other, 1.0)], tokenizers, 20)
  proprio = np.concatenate([batch.observation.proprio for batch in found])
  own = [statistics.normalize(one.proprio, one.statistics.proprio) for one in (dataset, other)]
  near = np.array([[np.abs(table - row).max(1).min() < 1e-6 for table in own] for row in proprio])
  assert near.any(1).all()
  assert 0.35 < near[:, 0].mean() < 0.65


# What is refused, or counted and logged.


def test_short_trajectories_are_counted(dataset, tokenizers, caplog):
  with caplog.at_level(logging.WARNING):
    batches([(dataset, 1.0)], tokenizers)
  assert f"{NAME}: 1 of 5 episodes are shorter than the chunk of 8 and are skipped" in caplog.text
  with pytest.raises(ValueError, match="has no examples: got episodes of at most 15 frames; expected 16"):
    batches([(dataset, 1.0)], tokenizers, chunk=16)


def test_silent_episodes_are_dropped_and_counted(dataset, caplog):
  mute = dataset.index._replace(instructions=("", *dataset.index.instructions[1:]))
  with caplog.at_level(logging.WARNING):
    left = rlds.assemble(NAME, datasets.TABLETOP, mute)
  assert "3 of 5 episodes have no instruction and are dropped" in caplog.text
  assert np.bincount(left.episodes).tolist() == [LENGTHS[1], LENGTHS[3]]
  np.testing.assert_array_equal(left.proprio[0], episode(1, LENGTHS[1]).state[0])
  np.testing.assert_array_equal(left.frames[:2], [12, 13])


def test_non_finite_numbers_are_named(dataset):
  action = dataset.index.columns["action"].copy()
  action[14, 3] = np.nan
  broken = dataset.index._replace(columns=dataset.index.columns | {"action": action})
  with pytest.raises(ValueError, match=r"'tabletop_toy', 'action': got nan in dimension 3 of .*episode 1, frame 2"):
    rlds.assemble(NAME, datasets.TABLETOP, broken)


def regripped(index: tfrecord_index.Index, convention) -> tfrecord_index.Index:
  """The same frames with gripper commands (-1 open, +1 closed) stored as `convention` gives them."""
  action = index.columns["action"].copy()
  action[:, 6] = convention(action[:, 6])
  return index._replace(columns=index.columns | {"action": action})


GRIPPERS = {  # stored otherwise than as -1 open, +1 closed
  "1 open, 0 closed": lambda g: (1 - g) / 2,
  "0 open, 1 closed": lambda g: (1 + g) / 2,
  "width": lambda g: 40 - 40 * g,
  "never opens": lambda g: np.zeros_like(g),
}


@pytest.mark.parametrize("kind", GRIPPERS)
def test_grippers_of_another_convention_are_named(dataset, kind):
  wrong = regripped(dataset.index, GRIPPERS[kind])
  low, high = (f"{value:g}" for value in (wrong.columns["action"][:, 6].min(), wrong.columns["action"][:, 6].max()))
  message = rf"'tabletop_toy', action dimension 6: got gripper commands in \[{low}, {high}\]; expected -1 open … 1 cl"
  with pytest.raises(ValueError, match=message):
    rlds.assemble(NAME, datasets.TABLETOP, wrong)


def test_grippers_that_never_move_are_accepted(dataset):
  for value in (-1.0, 1.0):
    still = regripped(dataset.index, lambda g: np.full_like(g, value))  # noqa: B023
    assert set(rlds.assemble(NAME, datasets.TABLETOP, still).actions[:, 6]) == {float(value < 0)}


def test_the_commands_name_a_gripper_of_another_convention(tmp_path):
  wrong = episodes()
  for one in wrong:
    one.action[:, 6] = (1 - one.action[:, 6]) / 2
  writer.write(tmp_path, "libero_toy", wrong)
  for verb in ("inspect", "statistics"):
    with pytest.raises(SystemExit, match=r"'libero_toy', action dimension 6: got gripper commands in \[0, 1\]"):
      command.main([verb, "--data-dir", str(tmp_path), "--name", "libero_toy", "--out", str(tmp_path / "out.json")])


def copy(data_dir: pathlib.Path, to: pathlib.Path) -> list[pathlib.Path]:
  folder = to / NAME / "1.0.0"
  folder.mkdir(parents=True)
  for path in (data_dir / NAME / "1.0.0").iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  return sorted(folder.glob("*tfrecord*"))


def test_damaged_shards(data_dir, tmp_path):
  shard = copy(data_dir, tmp_path / "flip")[1]
  data = bytearray(shard.read_bytes())
  data[len(data) // 2] ^= 1
  shard.write_bytes(data)
  with pytest.raises(ValueError, match=r"Shard is corrupt: got [\s\S]*00001-of-00003 after 1 records"):
    rlds.load(str(tmp_path / "flip"), NAME)
  shard = copy(data_dir, tmp_path / "short")[2]
  shard.write_bytes(b"")
  with pytest.raises(ValueError, match=r"Shard is too short: got 0 records .*expected 1"):
    rlds.load(str(tmp_path / "short"), NAME)
  copy(data_dir, tmp_path / "gone")[0].unlink()
  for cache_dir in (None, str(tmp_path)):
    with pytest.raises(ValueError, match="Shard is missing"):
      rlds.load(str(tmp_path / "gone"), NAME, cache_dir=cache_dir)


def test_damaged_image(dataset, tokenizers):
  cut = dataset.index._replace(image_bytes=np.minimum(dataset.index.image_bytes, 50))
  with pytest.raises(ValueError, match=r"'tabletop_toy', 'image' of .*, frame \d+: Image cannot be decoded: got 50"):
    batches([(dataclasses.replace(dataset, index=cut), 1.0)], tokenizers)


def test_missing_features(data_dir):
  wants = datasets.TABLETOP._replace(views=("image", "wrist_camera"))
  with pytest.raises(
    ValueError, match=r"lacks the feature 'observation/wrist_camera'.*nearest: 'observation/wrist_image"
  ):
    rlds.load(str(data_dir), NAME, spec=wants)
  wants = datasets.TABLETOP._replace(columns={"action": 14, "observation/state": 8})
  with pytest.raises(ValueError, match=r"feature 'action': got shape \(7,\) a step; expected \(14,\)"):
    rlds.load(str(data_dir), NAME, spec=wants)


def test_values_of_a_record_and_what_is_none():
  import tensorflow as tf

  feature = {
    "text": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"ab", b"", b"cde"])),
    "number": tf.train.Feature(float_list=tf.train.FloatList(value=[1.5, -2.0])),
    "count": tf.train.Feature(int64_list=tf.train.Int64List(value=[1, 2, 300])),
    "none": tf.train.Feature(float_list=tf.train.FloatList()),
  }
  record = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
  found = tfrecord_index.values(record, {"text", "number", "none"})
  assert [record[a:b] for a, b in found["text"]] == [b"ab", b"", b"cde"]
  assert found["number"].tolist() == [1.5, -2.0] and found["none"].size == 0
  with pytest.raises(IndexError):
    tfrecord_index.values(record[:-3], {"text"})


def test_bad_arguments(data_dir, dataset, tokenizers):
  for options, message in (
    ({"batch_size": 0}, "Bad batch size: got 0"),
    ({"rows": np.arange(8, 16)}, "Bad rows of a batch: got 8 rows of 8 examples"),
    ({"rows": np.array([1, 1])}, "Bad rows of a batch"),
    ({"start_step": -1}, "start_step -1"),
    ({"trajectory_end": "wrap"}, "Unknown trajectory end"),
    ({"window": 0}, "window=0"),
    ({"augmentation": images.RELEASE, "crop_area": 0.9}, "Two crops: got augmentation and crop_area=0.9"),
    ({"jitter": loader.Jitter(-0.01)}, "got -0.01 meters"),
    ({"jitter": loader.Jitter(0.0, 0.6)}, "0.6 radians"),
  ):
    with pytest.raises(ValueError, match=message):
      batches([(dataset, 1.0)], tokenizers, **options)
  with pytest.raises(ValueError, match="Empty mixture"):
    batches([], tokenizers)
  absolute = dataclasses.replace(dataset, spec=datasets.TABLETOP._replace(absolute=(True,) * 7))
  with pytest.raises(ValueError, match="'tabletop_toy', whose actions are targets"):
    batches([(absolute, 1.0)], tokenizers, jitter=loader.Jitter(0.01))
  still = dataclasses.replace(dataset, proprio=np.zeros_like(dataset.proprio))
  with pytest.raises(ValueError, match="'tabletop_toy', whose arm moves 0 a unit"):
    batches([(still, 1.0)], tokenizers, jitter=loader.Jitter(0.01))
  narrow = dataclasses.replace(dataset, spec=datasets.TABLETOP._replace(views=("image",)))
  with pytest.raises(ValueError, match="Datasets do not fit together"):
    batches([(dataset, 1.0), (dataclasses.replace(narrow, name="x"), 1.0)], tokenizers)
  with pytest.raises(ValueError, match="did you mean 'tabletop_toy'"):
    rlds.load(str(data_dir), "tabletop_toi")
  with pytest.raises(ValueError, match="has no split 'test'"):
    rlds.load(str(data_dir), NAME, split="test")


def test_a_bucket_that_cannot_be_reached(monkeypatch):
  import tensorflow as tf
  from etils import epath

  def unreachable(path):
    raise tf.errors.UnavailableError(None, None, "could not resolve host")

  monkeypatch.setattr(type(epath.Path("x")), "exists", unreachable)
  with pytest.raises(ValueError, match="could not resolve host.*from gs://nowhere; expected .* check its address"):
    rlds.load("gs://nowhere", NAME)


# The command.


def test_command(data_dir, tmp_path, capsys):
  where = ["--data_dir", str(data_dir), "--name", NAME]
  command.main(["inspect", *where])
  told = capsys.readouterr().out
  assert "tabletop_toy: 5 episodes, 51 frames, 3 shards" in told
  assert "examples of 8 actions: 18 when cut at the end, 51 when padded" in told
  assert "3 x pick up the red cube" in told
  for kind in ("openvla", "openpi"):
    path = tmp_path / kind / "stats.json"
    command.main(["statistics", *where, "--format", kind, "--out", str(path)])
    (got,) = statistics.load(path).values()
    assert got.action.q99.shape == (7,)
  command.main(["preview", *where, "--out", str(tmp_path / "sheet.png"), "--count", "2", "--size", "64"])
  assert Image.open(tmp_path / "sheet.png").size == (6 * 64 + 640, 2 * (8 + 16 * 12))
  with pytest.raises(SystemExit, match="No dataset 'tabletop_none'"):
    command.main(["inspect", "--data_dir", str(data_dir), "--name", "tabletop_none"])
