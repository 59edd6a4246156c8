"""What the parts of a policy do, as lines."""

import re

import policies
import pytest

from semanticvla_jax.evaluate import model_doctor
from semanticvla_jax.evaluate.__main__ import main

PROMPTS = ("pick up the red cube", "put the ball in the bowl")


def test_every_part_has_its_line():
  observations = [policies.observation(i, prompt=prompt) for i, prompt in enumerate(PROMPTS)]
  fuser, scale, shift, aggregation, cues = model_doctor.diagnose(policies.policy(), observations)
  assert fuser == "dense fuser: behind dino blocks 0, 1, 2 of 0 to 3; siglip blocks 0, 1, 2 of 0 to 3"
  assert scale.startswith("FiLM of dino, scale") and len(re.findall(r"\d\.\d\d\(\d+%\)", scale)) == 4
  assert "FiLM of dino, shift" in shift and "(0%)" not in shift, "instructions differ"
  assert re.search(r"entropy there 0\.\d\d \(.*\d+% of it differs between tokens", aggregation)
  assert re.match(r"cues: 3 words a view; chosen: \S+ \d+%", cues)


def test_a_policy_that_is_not_there():
  with pytest.raises(SystemExit, match="error: .*nowhere"):
    main(["doctor", "--model", "--policy=nowhere"])
