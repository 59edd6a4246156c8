"""A base's own config.json: what would give its parameters another meaning is refused, what only differs is listed."""

import copy
import logging
import shutil

import pytest

from configs import common, openvla, openvla_oft
from semanticvla_jax.data import text
from semanticvla_jax.train import base_settings, resume

PATHS = [
  "siglip/pos_embedding",
  "dino/Transformer/encoderblock_0/film/scale/kernel",
  "text/final",
  "llm/embed/embedding",
  "llm/layers/attn/q_proj/kernel",
  "llm/layers/attn/q_proj/lora_a",
  "siglip_id_pruner/text_projector/Dense_0/bias",
  "dense_fuser/pair_0_first/Dense_0/bias",
  "sparse_fuser/projector/Dense_0/bias",
  "coupler/trans/out/bias",
  "proprio_projector/Dense_0/bias",
]


@pytest.fixture
def config():
  return common.get_config("tiny")


def changed(config, field, value):
  base = resume.plain(config)
  *folders, name = field.split(".")
  node = base
  for folder in folders:
    node = node[folder]
  node[name] = value
  return base


@pytest.mark.parametrize(
  ("field", "value", "part"),
  [
    ("lora.alpha", 4.0, r".*/lora_a"),
    ("model.siglip_gelu", "tanh", "siglip/.*"),
    ("model.temperature", 0.03, "siglip_id_pruner/.*"),
    ("model.film_pool", "all", ".*/film/.*"),
    ("model.vision_layer", "second_to_last", "(sparse|dense)_fuser/.*"),
    ("model.mask", "causal", "coupler/.*"),
    ("model.dense_fuser", [[0, 0], [1, 1], [2, 3]], "dense_fuser/.*"),
    ("model.sparse_fuser", "separate", "sparse_fuser/.*"),
    ("data.normalisation", "bounds", "(coupler|proprio_projector)/.*"),
  ],
)
def test_what_would_mean_something_else_is_refused_where_it_is_taken(config, field, value, part, caplog):
  base = changed(config, field, value)
  with pytest.raises(ValueError, match=r"init_from BASE: its parameters were trained for other settings: got .* → "):
    base_settings.check("BASE", base, config, PATHS)
  others = [path for path in PATHS if not base_settings._some(part, [path])]
  with caplog.at_level(logging.INFO):
    base_settings.check("BASE", base, config, others)  # a tower of it may be taken all the same
  assert (field in caplog.text) == field.startswith(("model", "data"))


def test_sizes_that_no_shape_shows_are_compared_too(config):
  from semanticvla_jax.models.semanticvla import VARIANTS

  row = copy.deepcopy(VARIANTS["tiny"])
  row["llm"] |= {"theta": 1e6}
  with pytest.raises(ValueError, match=r"model, llm: theta 1000000.0 → 10000.0"):
    base_settings.check("BASE", changed(config, "model.variant", row), config, PATHS)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("model.keep", 4),
    ("model.similarity_noise", 0.5),
    ("model.chunk", 5),
    ("model.num_views", 1),
    ("data.crop_area", None),
    ("data.pruner_text", "prompt"),
  ],
)
def test_what_merely_differs_is_listed_once(config, field, value, caplog):
  with caplog.at_level(logging.INFO):
    base_settings.check("BASE", changed(config, field, value), config, PATHS)
  assert [record.getMessage().count(field) for record in caplog.records] == [1]
  assert f"{field} {value} → " in caplog.text


@pytest.mark.parametrize(
  ("field", "value"),
  [("model.dtype", "bfloat16"), ("model.remat", "full"), ("seed", 3), ("data.normalisation", "q99"), ("optim.lr", 1.0)],
)
def test_what_decides_nothing_is_not_mentioned(config, field, value, caplog):
  with caplog.at_level(logging.INFO):
    base_settings.check("BASE", changed(config, field, value), config, PATHS)
  assert not caplog.records or field == "data.normalisation"


def test_adapters_whose_alpha_nobody_knows_are_refused(config):
  with pytest.raises(ValueError, match="lora.alpha: not said → 128.0 .*convert fold"):
    base_settings.check("BASE", changed(config, "lora", None), config, PATHS)


def test_released_ways_of_starting_pass(config, caplog):
  base = resume.plain(openvla.get_config("base@tiny"))
  base_settings.check("openvla", base, config, ["siglip/pos_embedding", "llm/layers/attn/q_proj/kernel"])
  tower = resume.plain(config)
  base_settings.check("siglip", tower, config, ["text/final"])
  oft = openvla_oft.get_config("libero@tiny")
  plain = resume.plain(openvla.get_config("@tiny"))
  base_settings.check("openvla", plain, oft, ["siglip/pos_embedding", "sparse_fuser/projector/Dense_0/bias"])
  base_settings.check("bare", {}, config, PATHS)
  assert "says nothing of the model" in caplog.text


def test_another_tokenizer_is_refused_where_its_rows_are_taken(tmp_path):
  there, here = (shutil.copytree(text.EMBEDDED, tmp_path / name) for name in ("base/tokenizers", "here"))
  base, files = str(tmp_path / "base"), text.files(here)
  base_settings.check_tokenizers(base, files, PATHS)
  base_settings.check_tokenizers(str(tmp_path), files, PATHS)  # a base without any
  for name, path in (("tokenizer.model", "llm/embed/embedding"), ("spiece.model", "text/final")):
    (here / name).write_bytes((there / name).read_bytes() + b" ")
    base_settings.check_tokenizers(base, files, ["siglip/pos_embedding"])
    with pytest.raises(ValueError, match=f"got {name} of hash .* its embeddings have a row for each piece"):
      base_settings.check_tokenizers(base, files, [path])
    (there / name).unlink()  # a base that does not say
    base_settings.check_tokenizers(base, files, [path])
