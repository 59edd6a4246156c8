"""ALOHA's and Bridge's layouts, written as their own builders would, to batches of the shapes their configs ask for."""

import itertools

import numpy as np
import pytest

from configs import aloha, bridge
from semanticvla_jax.data import __main__ as command
from semanticvla_jax.data import datasets, images, loader, mixtures, rlds, statistics, text, writer
from semanticvla_jax.data.spec import DatasetSpec


def write(folder, name, views, state, action, instruction="put the lid on the pot"):
  """One dataset with episodes of the given states [t p] and actions [t a] and random pictures of 24 pixels."""
  import tensorflow as tf
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import example_serializer

  def numbers(width):
    return tfds.features.Tensor(shape=(width,), dtype=np.float32)

  picture = tfds.features.Image(shape=(24, 24, 3), dtype=np.uint8, encoding_format="jpeg")
  seen = tfds.features.FeaturesDict({view: picture for view in views} | {"state": numbers(state[0].shape[1])})
  step = {"observation": seen, "action": numbers(action[0].shape[1]), "language_instruction": tfds.features.Text()}
  features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step)})
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  path = folder / name / "1.0.0"
  path.mkdir(parents=True)
  rng, total = np.random.default_rng(0), 0
  with tf.io.TFRecordWriter(str(path / f"{name}-train.tfrecord-00000-of-00001")) as out:
    for states, actions in zip(state, action):
      steps = [
        {
          "observation": {view: rng.integers(0, 256, (24, 24, 3), np.uint8) for view in views} | {"state": s},
          "action": a,
          "language_instruction": instruction,
        }
        for s, a in zip(states, actions)
      ]
      record = serializer.serialize_example(features.encode_example({"steps": steps}))
      out.write(record)
      total += len(record)
  writer._write_info(path, name, features, [len(state)], total)


def random(width, lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(t, width)).astype(np.float32) for t in lengths]


def batch(folder, config):
  """The first batch of the config's mixture, as training reads it, and its dataset."""
  ((name, _),) = mixtures.mixture(config.data.mixture)
  spec = datasets.spec(name)
  dataset = rlds.load(str(folder), name, spec=spec._replace(mode=config.data.normalisation))
  options = loader.BatchOptions(4, config.model.chunk, image_size=32, augmentation=images.RELEASE)
  tokenizers = text.load(prompt_length=40, instruction_length=40)
  (first,) = itertools.islice(loader.BatchLoader([(dataset, 1.0)], tokenizers, options).batches(workers=1), 1)
  model = config.model
  assert first.observation.images.shape == (4, model.num_views, 32, 32, 3)
  assert first.observation.proprio.shape == (4, model.proprio_dim)
  assert first.actions.shape == (4, model.chunk, model.action_dim) and np.abs(first.actions).max() <= 1
  return first, dataset


def test_aloha(tmp_path):
  states, actions = random(14, (30, 28)), random(14, (30, 28), seed=1)
  write(tmp_path, "aloha", datasets.ALOHA.views, states, actions)
  first, dataset = batch(tmp_path, aloha.get_config("@tiny"))
  np.testing.assert_array_equal(dataset.actions, np.concatenate(actions))
  assert dataset.statistics.action.mask.all() and len(dataset.starts(25, "cut")) == 6 + 4
  extremes = statistics.normalize(dataset.actions, dataset.statistics.action, mode="bounds")
  rows = [np.abs(extremes - row).max(1).min() for row in first.actions.reshape(-1, 14)]
  assert max(rows) < 1e-6
  sheet = command.preview(dataset, count=1, size=32)
  assert (sheet[-command._LINE :, -command._TEXT_WIDTH :] < 128).any(), "the last of 25 actions is there"
  assert (sheet[:, -command._MARGIN :] == 255).all(), "and the last of 14 numbers"


def test_bridge(tmp_path):
  states, actions = random(7, (9, 12)), random(7, (9, 12), seed=1)
  for one in actions:
    one[:, 6] = np.arange(len(one)) % 2  # 1 open, 0 closed
  write(tmp_path, "bridge_orig", datasets.BRIDGE.views, states, actions)
  first, dataset = batch(tmp_path, bridge.get_config("@tiny"))
  np.testing.assert_allclose(dataset.actions[:7, :6], np.diff(states[0][1:, :6], axis=0))
  assert dataset.actions[:7, 6].tolist() == actions[0][1:-1, 6].tolist() and len(dataset.actions) == 7 + 10
  assert set(first.actions[..., 6].reshape(-1)) == {0.0, 1.0}


def test_bridge_with_commands_of_libero_is_refused(tmp_path):
  actions = random(7, (9,))
  actions[0][:, 6] = np.where(np.arange(9) < 4, -1, 1)
  write(tmp_path, "bridge_orig", datasets.BRIDGE.views, random(7, (9,)), actions)
  with pytest.raises(ValueError, match=r"gripper commands in \[-1, 1\]; expected 1 open … 0 closed"):
    rlds.load(str(tmp_path), "bridge_orig")


def test_an_empty_image_of_an_optional_view_is_black_in_batches_and_refused_in_others(tmp_path):
  rng, length = np.random.default_rng(0), 10
  optional = DatasetSpec(
    columns={"action": 2, "observation/state": 1}, views=("front", "hand"), absolute=(True, True), optional=("hand",)
  )
  front, hand = rng.integers(1, 256, (2, length, 16, 16, 3), np.uint8)
  hand = writer.Encoded([b"" if t % 2 else writer.jpeg(x) for t, x in enumerate(hand)], 16, 16)
  state = np.arange(length, dtype=np.float32)[:, None]
  columns = {"action": random(2, (length,))[0], "observation/state": state}
  one = writer.Recording({"front": front, "hand": hand}, columns, "go")
  writer.write_recordings(tmp_path, "pair", optional, [one])
  dataset = rlds.load(str(tmp_path), "pair", spec=optional)
  options = loader.BatchOptions(6, 1, image_size=16, augmentation=images.RELEASE)
  tokenizers = text.load(prompt_length=40, instruction_length=40)
  for batch in itertools.islice(loader.BatchLoader([(dataset, 1.0)], tokenizers, options).batches(workers=1), 3):
    frame = np.round(statistics.unnormalize(batch.observation.proprio, dataset.statistics.proprio)[:, 0])
    inner = (frame > 0) & (frame < length - 1)  # the outermost are clipped to the quantiles
    shown = batch.observation.images.any(axis=(2, 3, 4))
    assert shown[:, 0].all() and (shown[inner, 1] == (frame[inner] % 2 == 0)).all()
  with pytest.raises(ValueError, match="'hand': got an empty image in .*, frame 1; .*set optional="):
    rlds.load(str(tmp_path), "pair", spec=optional._replace(optional=()))
