"""What the parts of a policy do, as lines."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import policies
import pytest
from helpers import random_params

from semanticvla_jax.action_tokens import ActionTokenizer
from semanticvla_jax.evaluate import model_doctor
from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.policy import Policy

PROMPTS = ("pick up the red cube", "put the ball in the bowl")


def test_every_part_has_its_line():
  observations = [policies.observation(i, prompt=prompt) for i, prompt in enumerate(PROMPTS)]
  fuser, scale, shift, aggregation, cues, layers, choice = model_doctor.diagnose(policies.policy(), observations)
  assert fuser == "dense fuser: behind dino blocks 0, 1, 2 of 0 to 3; siglip blocks 0, 1, 2 of 0 to 3"
  assert scale.startswith("FiLM of dino, scale") and len(re.findall(r"\d\.\d\d\(\d+%\)", scale)) == 4
  assert "FiLM of dino, shift" in shift and "(0%)" not in shift, "instructions differ"
  assert re.search(r"entropy there 0\.\d\d \(.*\d+% of it differs between tokens", aggregation)
  assert re.match(r"cues: 3 words a view; chosen: \S+ \d+%", cues)
  assert re.fullmatch(r"decoder layers, importance .*: 0 \d\.\d{3}, 1 \d\.\d{3}", layers)
  assert re.search(r"first: (0, 1|1, 0); .*share, 1 of 2, .*variant\(skip_layers=\([01],\)\)", choice)


OFT = dict(dino_pruner=None, siglip_pruner=None, film=(), dense_fuser=None, vision_layer="second_to_last", scan=False)
OFT |= dict(coupler="single", mask="full", chunk=2)


@pytest.mark.slow
def test_a_layer_that_does_nothing_is_the_least_important_and_can_be_left_out():
  policy = policies.policy(config=policies.CONFIG | {"model": policies.TINY | OFT}, batch_sizes=(1,))
  kernels = policy.params["llm"]["layers_1"]
  kernels["attn"]["o_proj"] = jax.tree.map(jnp.zeros_like, kernels["attn"]["o_proj"])
  kernels["mlp"]["down_proj"] = jax.tree.map(jnp.zeros_like, kernels["mlp"]["down_proj"])
  observations = [policies.observation(i, prompt=prompt) for i, prompt in enumerate(PROMPTS)]
  importance = model_doctor.layer_importance(policy, policy.observe(observations))
  assert importance[0] > 0.01 and abs(importance[1]) < 1e-6
  short = policy.variant(skip_layers=(1,))
  np.testing.assert_allclose(
    short.infer(observations[0])["actions"], policy.infer(observations[0])["actions"], atol=1e-6
  )
  again = model_doctor.layer_importance(short, policy.observe(observations))
  np.testing.assert_array_equal(again, importance, "measured with all layers")


LIGHT = dict(decoder_pruner=dict(block=0, score="light", keep=1))
UNCONSTRAINED = dict(OFT, coupler=None, mask="causal", chunk=8, codec=ActionTokenizer(8, 7), decoding="greedy")


def last_line(fields):
  config = policies.CONFIG | {"model": policies.TINY | fields}
  model = build(config["model"])
  policy = Policy(model, random_params(model, 0), policies.stats(), policies.tokenizers(), config, batch_sizes=())
  *_, last = model_doctor.diagnose(policy, [policies.observation(i, prompt=prompt) for i, prompt in enumerate(PROMPTS)])
  return last


def test_chunks_that_were_not_said_whole_are_counted():
  assert last_line(UNCONSTRAINED).startswith("chunks: 2 of 2 were not said whole")


def test_chosen_patches_without_a_place_are_counted():
  line = r"chosen patches: (\d+\.\d) of an observation \(\d+ to \d+\), of which (\d+\.\d) had no place"
  chosen, over = map(float, re.match(line, last_line(OFT | LIGHT)).groups())
  assert chosen == over + 2, "a place for each view"


def test_a_policy_that_is_not_there():
  with pytest.raises(SystemExit, match="error: .*nowhere"):
    main(["doctor", "--model", "--policy=nowhere"])
