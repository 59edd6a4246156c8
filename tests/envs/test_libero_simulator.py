"""The real simulator: what it shows, that it repeats itself, and what it refuses."""

import libero_assets
import numpy as np
import pytest

from semanticvla_jax.envs.subprocess_env import BrokenEnvironment
from semanticvla_jax.libero import simulator as libero_simulator
from semanticvla_jax.libero import suites

pytestmark = pytest.mark.sim
ACTIONS = np.random.default_rng(0).uniform(-0.6, 0.6, (12, 7))
VIEWS = ("observation/image", "observation/wrist_image")


@pytest.fixture(scope="module")
def simulator():
  process = libero_simulator.start(suites.Settings("libero_spatial", libero_assets.assets(), size=128, max_steps=8))
  yield process
  process.close()


def rollout(simulator, seed, every, actions=ACTIONS[:6]):
  simulator.begin(seed)
  seen = simulator.receive().observations
  simulator.act(actions, every=every)
  moment = simulator.receive()
  return [seen[-1], *moment.observations], moment


@pytest.fixture(scope="module")
def shown(simulator):
  return rollout(simulator, 3, every=True)


def test_an_observation_as_the_protocol_says(shown, simulator):
  seen, moment = shown
  for one in seen:
    assert all(one[name].shape == (128, 128, 3) and one[name].dtype == np.uint8 for name in VIEWS)
    assert one["observation/state"].dtype == np.float32 and one["observation/state"].shape == (8,)
    assert one["prompt"] == simulator.instruction == suites.tasks("libero_spatial")[0].instruction
  assert len(seen) == 7 and moment.steps == 6 and not moment.done and not moment.success
  state = seen[0]["observation/state"]  # above the table, pointing down, open
  assert 0.9 < state[2] < 1.4 and 2.5 < state[3] < 3.8 and abs(state[6] + state[7]) < 1e-3


def test_the_front_view_is_upright(shown):
  """The robot stands at the far side: its white arm is in the upper half, the table's edge below."""
  image = shown[0][0]["observation/image"].astype(float)
  bright = (image.min(axis=2) > 200).astype(float)
  assert bright[:64].sum() > bright[64:].sum()


def test_only_what_is_seen_is_drawn_and_it_is_the_same(shown, simulator):
  """Cameras that were closed on the way, a repeated episode, another simulator's state before: the same bytes."""
  seen, _ = shown
  last, _ = rollout(simulator, 3, every=False)
  assert len(last) == 2
  for name in (*VIEWS, "observation/state"):
    np.testing.assert_array_equal(last[0][name], seen[0][name])
    np.testing.assert_array_equal(last[1][name], seen[-1][name])


def test_a_drawer_stands_where_it_stood_however_often_it_was_reset(simulator):
  """Task 4 has one; its sampler is added anew at every reset of the benchmark's code."""
  drawer = 4 * suites.EPISODES
  first = simulator.reset(drawer)
  simulator.reset(drawer + 1)
  again = simulator.reset(drawer)
  for name in VIEWS:
    np.testing.assert_array_equal(first[name], again[name])


def test_an_episode_ends_at_its_limit(simulator):
  _, moment = rollout(simulator, 3, every=False, actions=ACTIONS)
  assert moment.done and moment.steps == 8 and not moment.success and len(moment.observations) == 1


def test_what_does_not_exist_is_refused_with_a_traceback(simulator):
  for seed in (suites.EPISODES * 10, -1):
    with pytest.raises(BrokenEnvironment, match="ValueError: LIBERO: got episode"):
      simulator.reset(seed)
  simulator.reset(3)
  with pytest.raises(BrokenEnvironment, match="expected 7 finite numbers"):
    simulator.step(np.full(7, np.nan))


def test_what_draws_is_known(simulator):
  assert simulator.ask("facts", 3)["renderer"].startswith("egl: ")


@pytest.mark.parametrize("visible", ["1", "GPU-3f5c0b1e", ""])
def test_an_episode_runs_whatever_the_shell_says_of_devices(visible, monkeypatch):
  wrong = {"MUJOCO_EGL_DEVICE_ID": "7", "MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "glx"}
  for name, value in ({"CUDA_VISIBLE_DEVICES": visible} | wrong).items():
    monkeypatch.setenv(name, value)
  process = libero_simulator.start(suites.Settings("libero_spatial", libero_assets.assets(), size=32, egl_device=0))
  try:
    assert process.reset(3)["observation/image"].std() > 10 and process.ask("facts", 3)["renderer"].startswith("egl: ")
    assert process.step(ACTIONS[0], observe=False) == (None, False)
  finally:
    process.close()


def test_a_device_that_does_not_exist_is_refused_before_anything_starts():
  with pytest.raises(ValueError, match=r"EGL device: got 99; expected 0 to \d+, for this machine has \d+ EGL device"):
    libero_simulator.start(suites.Settings("libero_spatial", libero_assets.assets(), egl_device=99))


def test_once_per_environment_is_another_seeding_that_repeats_itself_too():
  """Trial 1 directly, and trial 1 after trial 0: the missing reset is made up for."""
  seeding = dict(seeding="environment", seed=7, size=64)
  process = libero_simulator.start(suites.Settings("libero_goal", libero_assets.assets(), **seeding))
  try:
    alone = process.reset(1)
    process.reset(0)
    after = process.reset(1)
    for name in VIEWS:
      np.testing.assert_array_equal(alone[name], after[name])
  finally:
    process.close()
