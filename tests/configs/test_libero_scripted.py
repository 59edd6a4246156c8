"""The model that learns LIBERO from scratch: it builds, its images keep an object in sight, its sentences fit."""

import jax
import numpy as np
import pytest

from configs import libero_scripted
from semanticvla_jax.data import text
from semanticvla_jax.models.semanticvla import abstract_params, build, dummy_observation

LONGEST = "pick up the black bowl in the top drawer of the wooden cabinet and place it on the plate"


@pytest.mark.parametrize("suite", libero_scripted.SUITES)
def test_it_builds(suite):
  config = libero_scripted.get_config(suite)
  model = build(config.model)
  params = abstract_params(model, dummy_observation(model))
  assert 5e6 < sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params)) < 6e6
  assert dummy_observation(model).images.shape[1:] == (2, 96, 96, 3) and config.model.keep * 4 == (96 // 8) ** 2
  lengths = dict(prompt_length=config.data.prompt_length, instruction_length=config.data.instruction_length)
  tokenizers = text.load(**lengths)
  assert tokenizers.instruction([LONGEST])[0].shape[1] <= model.text.positions and tokenizers.prompt([LONGEST])


def test_other_suites_are_refused():
  with pytest.raises(ValueError, match="'object', 'spatial'"):
    libero_scripted.get_config("goal")
