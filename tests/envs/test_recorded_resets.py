"""The reset of a recorded episode is found again, though nobody wrote down how many came before it."""

import sys
import types

import numpy as np
import pytest

from semanticvla_jax.libero import simulator as libero_simulator
from semanticvla_jax.libero import suites

SEEDS = (3, 4, 7, 6)


def camera():
  def sensor(cache):
    return np.zeros((8, 8, 3), np.uint8)

  sensor.__modality__ = "image"
  return types.SimpleNamespace(_sensor=sensor)


class Piling:
  """Behaves as LIBERO's environments do: every reset adds a sampler to those of all before, and each draws."""

  samplers = 1  # that a reset adds

  def __init__(self, **_):
    self.env, self.object_property_initializers = self, []
    self.resets, self.stood = 0, None
    self.reset()

  def reset(self):
    self.resets += 1
    self.object_property_initializers += [object()] * self.samplers
    for _ in self.object_property_initializers:
      np.random.uniform()
    self.state = np.random.uniform(size=3)
    self._observables = {name: camera() for name in libero_simulator._CAMERAS.values()}

  def step(self, action):
    self.state = self.state + 0.01
    return self.seen(), 0.0, False, {}

  def set_init_state(self, state):
    self.stood, self.state = self.state, state
    return self.seen()

  def seen(self):
    arm = {"robot0_eef_pos": np.zeros(3), "robot0_eef_quat": np.array([0.0, 0, 0, 1])}
    arm |= {"robot0_gripper_qpos": np.zeros(2), "robot0_joint_pos": np.zeros(7)}
    return arm | {name: np.zeros((8, 8, 3), np.uint8) for name in libero_simulator._CAMERAS.values()}

  def get_sim_state(self):
    return self.state

  def close(self):
    pass


class Plain(Piling):
  """One without drawers."""

  samplers = 0


def record(kind):
  """One environment, seeded with 0, 1, 2, … before its resets; of SEEDS, where it stood and where it began."""
  environment, stood, begun = kind(), [], {}
  for seed in range(max(SEEDS) + 1):
    np.random.seed(seed)
    environment.reset()
    stood.append(environment.state)
    for _ in range(10):
      environment.step(suites.WAIT)
    begun[seed] = suites.Beginning(environment.state, seed)
  return [stood[seed] for seed in SEEDS], {i: begun[seed] for i, seed in enumerate(SEEDS)}


@pytest.fixture
def simulate(monkeypatch):
  monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
  monkeypatch.setattr(suites, "tasks", lambda suite: [suites.Task("open", "open", None, None)])

  def make(kind, begun):
    monkeypatch.setattr(libero_simulator, "_import", lambda assets: kind)
    return libero_simulator.Simulator(suites.Settings("libero_spatial", "unused", size=8), begun)

  return make


def test_what_stood_where_it_stood_stands_there_again(simulate):
  stood, begun = record(Piling)
  simulator, resets = simulate(Piling, begun), []
  for episode in (0, 1, 2, 3, 0):
    simulator.reset(episode)
    np.testing.assert_array_equal(simulator._environment.stood, stood[episode])
    resets.append(simulator._environment.resets)
  assert resets[0] == 1 + 4 + 1, "made, tried with 3 (its seed), 1, 2 and 4 before, and then as found"
  assert np.diff(resets).tolist() == [2] * 4, "where seeds were counted up, the first guess is right"


def test_without_drawers_nothing_is_tried(simulate):
  stood, begun = record(Plain)
  simulator = simulate(Plain, begun)
  for count, episode in enumerate((2, 1), 2):
    simulator.reset(episode)
    np.testing.assert_array_equal(simulator._environment.stood, stood[episode])
    assert simulator._environment.resets == count


def test_a_reset_that_cannot_be_found_is_told_once(simulate, caplog):
  _, begun = record(Piling)
  begun = {i: one._replace(state=one.state + 0.5) for i, one in begun.items()}
  simulator = simulate(Piling, begun)
  simulator.reset(1)
  tried = simulator._environment.resets
  simulator.reset(2)
  assert simulator._environment.resets == tried + 1
  assert caplog.text.count("another first state") == 1 and "Episode 1: its recorded seed 4" in caplog.text


def test_what_came_before_changes_nothing_where_no_seed_is_known(simulate):
  begun = {i: suites.Beginning(np.zeros(3)) for i in range(2)}
  simulator, stood = simulate(Piling, begun), []
  for episode in (0, 1, 0):
    simulator.reset(episode)
    stood.append(simulator._environment.stood)
  np.testing.assert_array_equal(stood[0], stood[2])
  assert not np.array_equal(stood[0], stood[1])
