"""Where jax is set to 64 bits, the tabletop and a policy give the numbers they give elsewhere, and commands say so."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import policies
import pytest

from semanticvla_jax.evaluate.rollout import OnDevice
from semanticvla_jax.tabletop import expert, physics


def both(function):
  """What a function returns with 64 bits on and off."""
  with jax.enable_x64(True):
    assert jnp.zeros(1).dtype == jnp.float64
    wide = jax.tree.map(np.asarray, function())
  return wide, jax.tree.map(np.asarray, function())


def assert_equal(pair):
  jax.tree.map(np.testing.assert_array_equal, *pair)
  assert jax.tree.map(lambda x: x.dtype, pair[0]) == jax.tree.map(lambda x: x.dtype, pair[1])


def test_an_environment_is_the_same():
  def episode():
    environment = physics.TabletopEnvironment("place", "heldout", 32)
    first = environment.reset(5)
    then, _ = environment.step(np.full(7, 0.4))  # float64, as a planner in 64 bits gives
    return [one[key] for one in (first, then) for key in ("observation/image", "observation/state")]

  assert_equal(both(episode))


def test_the_expert_is_the_same_under_a_jit_of_ones_own():
  def rolled():
    key = jax.random.key(3)
    return jax.jit(lambda key: expert.rollout(key, "pick", "train", steps=4))(key).actions

  assert_equal(both(rolled))


@pytest.mark.slow
def test_a_policy_and_its_episodes_are_the_same():
  def acted():
    policy = policies.policy(batch_sizes=(1,))
    episodes = OnDevice(policy, "pick", batch=2).run(range(2))
    return policy.infer(policies.observation())["actions"], episodes.success, episodes.steps

  assert_equal(both(acted))


def test_a_command_says_that_it_computes_in_32_bits():
  program = "import jax\nfrom semanticvla_jax import cli\ncli.run(lambda argv: print(jax.numpy.zeros(1).dtype))"
  run = subprocess.run([sys.executable, "-c", program], env=os.environ | {"JAX_ENABLE_X64": "1"}, capture_output=True)
  assert run.stdout == b"float32\n" and run.stderr.decode().startswith("JAX_ENABLE_X64 is set: this command computes")
