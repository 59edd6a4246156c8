"""A policy of several datasets, whose requests say in which one's units they are."""

import numpy as np
import policies
import pytest
from helpers import random_params, tiny
from serving import equal, observation, robot, serving

from semanticvla_jax import policy_folder
from semanticvla_jax.data import datasets, statistics, text
from semanticvla_jax.data import robot as data_robot
from semanticvla_jax.policy import Policy
from semanticvla_jax.serve import limits, record, units

NAMES = ("tabletop_place", "tabletop_pick")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  found = tmp_path_factory.mktemp("several") / "policy"
  entries = {name: statistics.to_openvla(policies.stats(seed)) for seed, name in enumerate(NAMES)}
  params = random_params(tiny())
  policy_folder.save_policy(found, params, config=policies.CONFIG, statistics=entries, tokenizers=text.EMBEDDED)
  return found


@pytest.fixture(scope="module")
def both(folder):
  return {name: Policy.load(folder, dataset=name, batch_sizes=(1, 2)) for name in NAMES}


def test_of_dataset_equals_the_policy_loaded_for_it(both):
  first, second = (both[name] for name in NAMES)
  other = first.of_dataset(NAMES[1])
  assert other.metadata == second.metadata and other.datasets == first.datasets == NAMES
  assert other.executables is first.executables  # nothing is compiled again
  seen = policies.observation()
  assert equal(other.infer(seen)["actions"], second.infer(seen)["actions"])
  assert not np.array_equal(other.infer(seen)["actions"], first.infer(seen)["actions"])
  with pytest.raises(ValueError, match="No statistics of 'bridge'"):
    first.of_dataset("bridge")


def test_the_time_between_two_actions_is_that_of_the_robots_description(both):
  spec = datasets.LIBERO._replace(name="arm", control_hz=20.0)
  described = policies.policy(
    config=policies.CONFIG | {data_robot.KEY: {"arm": data_robot.of(spec).to_json()}}, metadata={"dataset": "arm"}
  )
  periods = lambda policy: units.Units(policy, limits.ActionLimit(policy.stats.action, "off")).period_ms  # noqa: E731
  assert periods(described) == 50 and periods(both[NAMES[0]]) == 0


def test_a_key_may_leave_out_what_the_release_appends(both):
  policy = both[NAMES[0]]
  names = ("libero_goal_no_noops", "libero_goal", "libero_10_no_noops", None)
  kept = {name: units.Units(policy, limits.ActionLimit(policy.stats.action, "off")) for name in names}
  choose = lambda key: units.choose(kept, key, None)  # noqa: E731
  assert choose("libero_10") is choose(names[2]) is kept[names[2]] and choose(None) is kept[None]
  assert choose("libero_goal") is kept["libero_goal"]
  for wrong in ("libero", "_no_noops", ["libero_10"], 3):
    with pytest.raises(ValueError, match="unnorm_key"):
      choose(wrong)


def test_a_request_names_the_dataset_whose_units_it_wants(both):
  with serving(both[NAMES[0]]) as (_, port), robot(port) as one:
    assert one.metadata["available_unnorm_keys"] == [*NAMES]
    assert one.metadata["default_unnorm_key"] == NAMES[0]
    for name, key in ((NAMES[0], {}), (NAMES[1], {"unnorm_key": NAMES[1]}), (NAMES[0], {"unnorm_key": NAMES[0]})):
      assert equal(one.ask(observation() | key)["actions"], both[name].infer(observation())["actions"])
    refused = one.ask(observation() | {"unnorm_key": "bridge"})
    assert "unnorm_key: got 'bridge'; expected one of 'tabletop_place', 'tabletop_pick'" in str(refused)


def test_a_recording_of_both_is_replayed_in_the_units_of_each(both, tmp_path):
  policy = both[NAMES[0]]
  recorder = record.Recorder(tmp_path, record.facts(policy, "off", "cpu"))
  with serving(policy, record=recorder) as (_, port), robot(port) as one:
    answers = [one.ask(observation() | key)["actions"] for key in ({}, {"unnorm_key": NAMES[1]})]
  recorder.close()
  assert not np.array_equal(*answers)
  found = record.replay(policy, record.recordings(tmp_path))
  assert found.observations == 2 and not found.unequal
