"""Small datasets that several modules read."""

import pathlib

import pytest
from toy_rlds import NAME, episodes

from semanticvla_jax.data import rlds, text, writer


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("rlds")
  writer.write(folder, NAME, episodes(), episodes_per_shard=2)
  writer.write(folder, "tabletop_other", episodes(100), episodes_per_shard=5)
  return folder


@pytest.fixture(scope="module")
def dataset(data_dir) -> rlds.Dataset:
  return rlds.load(str(data_dir), NAME)


@pytest.fixture(scope="module")
def other(data_dir) -> rlds.Dataset:
  return rlds.load(str(data_dir), "tabletop_other")


@pytest.fixture(scope="module")
def tokenizers() -> text.Tokenizers:
  return text.load(prompt_length=32, instruction_length=32)
