"""What the config says about data reaches the batches."""

import numpy as np
import pytest
from small_runs import NAME, make_config, write_data

from semanticvla_jax.data import images, records, rlds, statistics
from semanticvla_jax.train import __main__ as command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def dataset(data):
  return rlds.load(str(data), NAME)


def source(data, base=None, **changes):
  """The first batch of a tiny config with changes of config.data, and the statistics that go with it."""
  config = make_config(data)
  config.data.update(changes)
  _, bare = command.init.make_model(config)
  tokenizers = command.load_tokenizers(config, bare)
  batches, stats = command.rlds_source(config, bare, tokenizers, np.arange(config.data.batch_size), 0, base)
  return next(batches), stats


@pytest.mark.parametrize("mode", statistics.MODES)
def test_the_normalisation_of_the_config_is_the_one_trained_on(data, dataset, mode):
  batch, _ = source(data, normalisation=mode)
  own = statistics.normalise(dataset.proprio, dataset.statistics.proprio, mode=mode)
  other = next(name for name in statistics.MODES if name != mode)
  wrong = statistics.normalise(dataset.proprio, dataset.statistics.proprio, mode=other)
  near, far = (
    [np.abs(table - row).max(1).min() for row in batch.observation.proprio] for table in (own, wrong)
  )
  assert max(near) < 1e-6 < min(far)
  with pytest.raises(ValueError, match="Unknown normalisation: got 'q90'"):
    source(data, normalisation="q90")


def test_random_crops_have_the_area_of_the_config(data, monkeypatch):
  asked, real = [], images.augment
  monkeypatch.setattr(images, "augment", lambda *args: asked.append(args[2]) or real(*args))
  source(data)
  source(data, crop_area=0.8, diagonal_crop=True)
  assert images.RELEASE in asked and images.Augmentation(crop_area=0.8, diagonal_crop=True) in asked


def test_jpegs_are_decoded_as_the_config_says(data, dataset):
  encoded = records.Reader(dataset.index).image(0, 0)
  assert np.any(images.decode(encoded, "fast") != images.decode(encoded, "accurate"))
  shown = [source(data, augment=False, crop_area=None, dct=dct)[0].observation.images for dct in images.DCTS]
  assert 0 < np.abs(shown[0].astype(int) - shown[1]).mean() < 3
  with pytest.raises(ValueError, match="got dct='slow'"):
    source(data, dct="slow")


def test_text_of_the_pruner_at_evaluation_leaves_training_alone(data):
  one, other = (source(data, pruner_text_eval=written)[0].observation for written in (None, "prompt"))
  np.testing.assert_array_equal(one.instruction, other.instruction)
  with pytest.raises(ValueError, match="pruner_text_eval: got 'answer', expected None"):
    source(data, pruner_text_eval="answer")


@pytest.mark.parametrize("area", [0.9, None])
def test_without_augmentation_training_sees_what_evaluation_will(data, dataset, area):
  batch, _ = source(data, augment=False, crop_area=area)
  reader = records.Reader(dataset.index)
  size = batch.observation.images.shape[2]
  stored = [images.decode(reader.image(frame, 0)) for frame in range(len(dataset.frames))]
  shown = {images.prepare(image, size, crop_area=area).tobytes() for image in stored}
  assert {view.tobytes() for view in batch.observation.images[:, 0]} <= shown


@pytest.mark.parametrize("augment, area", [(True, None), (True, 0.0), (False, 1.1)])
def test_crops_that_evaluation_could_not_repeat_are_refused(data, augment, area):
  with pytest.raises(ValueError, match=f"augment={augment}, crop_area={area}, expected a share"):
    source(data, augment=augment, crop_area=area)
