"""What the config says about data reaches the batches."""

import jax
import numpy as np
import pytest
from small_runs import NAME, make_config, write_data

from configs import aloha, common, pretrain
from semanticvla_jax import sources
from semanticvla_jax.data import images, rlds, statistics, tfrecord_index
from semanticvla_jax.tabletop import training
from semanticvla_jax.train import init, inputs, program, resume, sharding


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
  _, bare = init.make_model(config)
  tokenizers = inputs.load_tokenizers(config, bare)
  made, datasets = inputs.rlds_loader(config, bare, tokenizers, base)
  return next(made.batches()), {one.name: one.statistics for one in datasets}


@pytest.mark.parametrize("mode", statistics.MODES)
def test_the_normalization_of_the_config_is_the_one_trained_on(data, dataset, mode):
  batch, _ = source(data, normalisation=mode)
  own = statistics.normalize(dataset.proprio, dataset.statistics.proprio, mode=mode)
  other = next(name for name in statistics.MODES if name != mode)
  wrong = statistics.normalize(dataset.proprio, dataset.statistics.proprio, mode=other)
  near, far = ([np.abs(table - row).max(1).min() for row in batch.observation.proprio] for table in (own, wrong))
  assert max(near) < 1e-6 < min(far)
  with pytest.raises(ValueError, match="Unknown normalisation: got 'q90'"):
    source(data, normalisation="q90")


def test_a_batch_has_an_instruction_where_the_model_has_a_text_tower(data):
  """Not where the folder of the tokenizers has SigLIP's: the program is compiled for what the model reads."""
  for fields in ({}, {"siglip_pruner": None, "film": ()}):
    config = make_config(data)
    config.model.update(fields)
    _, bare = init.make_model(config)
    tokenizers = inputs.load_tokenizers(config, bare)
    made, _ = inputs.rlds_loader(config, bare, tokenizers, None)
    wanted = program.abstract_observation(config, bare, config.data.batch_size)
    seen = next(made.batches()).observation
    assert jax.tree.map(lambda x: (x.shape, x.dtype), seen) == jax.tree.map(lambda x: (x.shape, x.dtype), wanted)
    assert (seen.instruction is None) == bool(fields)


def test_kept_statistics_are_those_of_the_dataset(data, dataset):
  def scaled(factor):
    one = dataset.statistics.proprio
    return dataset.statistics._replace(proprio=one.replace(q01=factor * one.q01, q99=factor * one.q99))

  one, other = scaled(0.5), scaled(0.25)
  for base, expected in (({NAME: one, "a": other}, one), ({"a": other, NAME: one}, one), ({"a": other}, other)):
    _, stats = source(data, base, keep_statistics=True)
    np.testing.assert_array_equal(stats[NAME].proprio.q99, expected.proprio.q99)
  _, stats = source(data, {"a": other})
  np.testing.assert_array_equal(stats[NAME].proprio.q99, dataset.statistics.proprio.q99)
  with pytest.raises(ValueError, match=rf"statistics of \['a', 'b'\] in the base; expected those of '{NAME}'"):
    source(data, {"a": one, "b": other}, keep_statistics=True)


def test_an_index_is_kept_where_the_config_says(data, tmp_path):
  source(data, cache_dir=str(tmp_path))
  assert [*tmp_path.glob(f"{NAME}-*.npz")]


def test_data_of_another_robot_is_refused_before_it_is_read(tmp_path):
  config = aloha.get_config("@tiny")
  _, bare = init.make_model(config)
  config.data.update(mixture="libero_object_no_noops", dir=str(tmp_path))
  with pytest.raises(ValueError, match=r"got \(views, proprio_dim, action_dim\) \(2, 8, 7\); expected \(3, 14, 14\)"):
    inputs.rlds_loader(config, bare, inputs.load_tokenizers(config, bare))


@pytest.mark.parametrize("servers, of", [((), "|||"), ("a", "a|a|a|a"), ("abc", "a|b|c|a"), ("abcdefg", "ae|bf|cg|d")])
def test_hosts_share_the_image_servers(servers, of):
  assert "|".join("".join(inputs.servers_of_host(tuple(servers), host, 4)) for host in range(4)) == of


def test_runs_from_before_these_fields_had_what_they_say_now():
  data = resume.plain(common.get_config("tiny"))["data"]
  for field in ("diagonal_crop", "dct", "pruner_text_eval", "cache_dir", "jitter"):
    assert resume.FIELD_DEFAULTS_BEFORE[f"data.{field}"] == data[field]


def test_random_crops_have_the_area_of_the_config(data, monkeypatch):
  asked, real = [], images.augment
  monkeypatch.setattr(images, "augment", lambda *args: asked.append(args[2]) or real(*args))
  source(data)
  source(data, crop_area=0.8, diagonal_crop=True)
  assert images.RELEASE in asked and images.Augmentation(crop_area=0.8, diagonal_crop=True) in asked


def test_jpegs_are_decoded_as_the_config_says(data, dataset):
  encoded = tfrecord_index.Reader(dataset.index).image(0, 0)
  assert np.any(images.decode(encoded, "fast") != images.decode(encoded, "accurate"))
  shown = [source(data, augment=False, crop_area=None, dct=dct)[0].observation.images for dct in images.DCTS]
  assert 0 < np.abs(shown[0].astype(int) - shown[1]).mean() < 3
  with pytest.raises(ValueError, match="got dct='slow'"):
    source(data, dct="slow")


def test_text_of_the_pruner_at_evaluation_leaves_training_alone(data):
  one, other = (source(data, pruner_text_eval=written)[0].observation for written in (None, "prompt"))
  np.testing.assert_array_equal(one.instruction, other.instruction)
  with pytest.raises(ValueError, match="pruner_text_eval: got 'answer'; expected None"):
    source(data, pruner_text_eval="answer")


@pytest.mark.parametrize("area", [0.9, None])
def test_without_augmentation_training_sees_what_evaluation_will(data, dataset, area):
  batch, _ = source(data, augment=False, crop_area=area)
  reader = tfrecord_index.Reader(dataset.index)
  size = batch.observation.images.shape[2]
  stored = [images.decode(reader.image(frame, 0)) for frame in range(len(dataset.frames))]
  shown = {images.prepare(image, size, crop_area=area).tobytes() for image in stored}
  assert {view.tobytes() for view in batch.observation.images[:, 0]} <= shown


@pytest.mark.parametrize("augment, area", [(True, None), (True, 0.0), (False, 1.1)])
def test_crops_that_evaluation_could_not_repeat_are_refused(data, augment, area):
  with pytest.raises(ValueError, match=f"augment={augment}, crop_area={area}; expected a share"):
    source(data, augment=augment, crop_area=area)


def expert_config(**changes):
  config = make_config("nowhere")
  config.update_from_flattened_dict({"data.mixture": "expert", "data.crop_area": None, "data.augment": False} | changes)
  with config.unlocked():
    config.data.suites = (1, 1, 0, 0, 0, 0)
  return config


@pytest.mark.slow
def test_the_expert_gives_batches_without_targets_where_no_loss_asks_for_them():
  """So that its batches serve LoRA and plain L1 too, normalized with the base's statistics where these are kept."""
  config = expert_config(**{"data.keep_statistics": True, "data.batch_size": 8})
  _, bare = init.make_model(config)
  tokenizers = inputs.load_tokenizers(config, bare)
  _, stats = training.batches(config, bare, tokenizers, None)
  base, mesh = {"expert": stats}, sharding.make_mesh(config.mesh)
  source, stats, digests = inputs.make_source(
    config, bare, tokenizers, mesh, 0, base, generator=sources.generator(config)
  )
  assert digests == {}
  batch = source(0)
  assert batch.aux is None and stats["expert"] is base["expert"]
  assert batch.actions.shape == (8, config.model.chunk, 7)


@pytest.mark.parametrize("suites", [None, (1, 1), (0,) * 6, (-1, 1, 0, 0, 0, 0)])
def test_suites_of_the_expert_are_six_weights(suites):
  config = expert_config()
  with config.unlocked(), config.data.ignore_type():
    config.data.suites = suites
  with pytest.raises(ValueError, match="config.data.suites: got .*expected a weight for each of"):
    training.check(config)


def test_another_normalization_with_the_expert_is_refused():
  config = expert_config(**{"data.normalisation": "bounds"})
  with pytest.raises(ValueError, match="config.data.normalisation: got 'bounds' with mixture 'expert'"):
    training.check(config)


def test_jitter_with_the_expert_is_refused():
  config = pretrain.get_config()
  config.data.jitter = (0.01, 0.0)
  _, bare = init.make_model(config)
  with pytest.raises(ValueError, match=r"config.data.jitter: got \(0.01, 0.0\) with mixture 'expert'"):
    training.batches(config, bare, inputs.load_tokenizers(config, bare), None)


def test_image_servers_with_the_expert_are_refused():
  config = expert_config(**{"data.servers": ("cpu-0:5050",)})
  with pytest.raises(ValueError, match=r"servers: got \('cpu-0:5050',\) with mixture 'expert', expected \(\)"):
    training.check(config)
