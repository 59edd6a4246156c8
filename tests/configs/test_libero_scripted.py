"""The model that learns LIBERO from scratch: it builds, its images keep an object in sight, its sentences fit."""

import jax
import numpy as np
import pytest

from configs import libero_scripted
from semanticvla_jax.data import text
from semanticvla_jax.models.semanticvla import abstract_params, build, dummy_observation

LONGEST = "pick up the black bowl in the top drawer of the wooden cabinet and place it on the plate"
OF_OBJECT = "pick up the chocolate pudding and place it in the basket"


@pytest.mark.parametrize(
  ("argument", "pixels", "millions", "sentence"),
  [
    ("object", 96, (5, 6), LONGEST),
    ("spatial", 96, (5, 6), LONGEST),
    ("object@small64", 64, (1, 1.5), OF_OBJECT),
    ("spatial@small64", 64, (1, 1.5), LONGEST),
    ("goal@small64", 64, (1, 1.5), "open the top drawer and put the bowl inside"),
  ],
)
def test_it_builds(argument, pixels, millions, sentence):
  config = libero_scripted.get_config(argument)
  model = build(config.model)
  params = abstract_params(model, dummy_observation(model))
  assert millions[0] < sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params)) / 1e6 < millions[1]
  assert dummy_observation(model).images.shape[1:] == (2, pixels, pixels, 3)
  assert config.model.keep * 4 == (pixels // 8) ** 2
  lengths = dict(prompt_length=config.data.prompt_length, instruction_length=config.data.instruction_length)
  tokenizers = text.load(**lengths)
  assert tokenizers.instruction([sentence])[0].shape[1] <= model.text.positions and tokenizers.prompt([sentence])


@pytest.mark.parametrize("argument", ["90", "spatial@small", "object@7b"])
def test_other_suites_and_sizes_are_refused(argument):
  with pytest.raises(ValueError, match="'object', 'spatial'"):
    libero_scripted.get_config(argument)
