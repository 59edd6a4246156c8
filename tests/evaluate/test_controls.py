"""Controls change one thing and nothing else."""

import collections

import numpy as np
import policies
import pytest

from semanticvla_jax.evaluate import controls
from semanticvla_jax.evaluate.rollout import Episodes

SAID = ["a", "a", "a", "b", "b", "c", "d", "e"]


class Runner:
  """Remembers what it was asked; every episode succeeds."""

  def __init__(self, seeds=range(20, 28)):
    self.seeds, self.log = [*seeds], []

  def __call__(self, policy, row, told=None):
    self.log.append((policy.config["model"].get("anchor_rule"), row, told))
    n = len(self.seeds)
    said = told or SAID[:n]
    return Episodes(np.array(self.seeds), np.ones(n, bool), np.ones(n, np.int32), np.zeros(n, bool), SAID, said)


@pytest.mark.parametrize("seed", range(8))
def test_nobody_keeps_its_own_sentence(seed):
  told = controls.shuffle(SAID, seed)
  assert collections.Counter(told) == collections.Counter(SAID)
  assert not any(a == b for a, b in zip(told, SAID))
  assert told == controls.shuffle(SAID, seed)


def test_shuffles_differ_and_hard_ones_work_and_impossible_ones_are_refused():
  assert len({tuple(controls.shuffle(SAID, seed)) for seed in range(8)}) > 3
  assert controls.shuffle(["a"] * 4 + ["b"] * 4) == ["b"] * 4 + ["a"] * 4
  with pytest.raises(ValueError, match="'a' in 3 of 4 episodes"):
    controls.shuffle(["a", "a", "a", "b"])


@pytest.mark.parametrize("seed", range(4))
def test_what_was_told_before_is_kept_where_the_rest_can_be_arranged_round_it(seed):
  before = controls.shuffle(SAID, seed)
  more = [*SAID, "a", "f", "b"]
  told = controls.shuffle(more, seed + 9, dict(enumerate(before)))
  assert told[: len(SAID)] == before and collections.Counter(told) == collections.Counter(more)
  assert not any(a == b for a, b in zip(told, more))
  some = {i: before[i] for i in (1, 4, 6)}  # of an interrupted run
  assert controls.shuffle(SAID, seed, some) == before
  told = controls.shuffle(more, seed, some)
  assert all(told[i] == sentence for i, sentence in some.items()) and not any(a == b for a, b in zip(told, more))


@pytest.mark.parametrize("said", [{0: "a"}, {0: "nothing of these"}, {2: "a"}])
def test_what_cannot_be_kept_is_told_anew(said):
  own = ["a", "a", "b", "b"] if 2 not in said else ["a", "a", "b", "c", "c", "c"]
  told = controls.shuffle(own, 0, said)
  assert collections.Counter(told) == collections.Counter(own) and not any(a == b for a, b in zip(told, own))


def test_controls_come_one_by_one_as_they_are_measured():
  policy, runner = policies.policy(), Runner()
  result = runner(policy, "policy")
  runner.log.clear()
  found = controls.each(policy, runner, result, before={20: "c"})
  assert next(found)[0] == "shuffled" and len(runner.log) == 1 and runner.log[0][2][0] == "c"
  assert next(found)[0] == "blind" and len(runner.log) == 2


def test_each_control_runs_the_same_episodes():
  policy, runner = policies.policy(), Runner()
  result = runner(policy, "policy")
  runner.log.clear()
  names, found, changes = zip(*controls.each(policy, runner, result))
  assert names == (*controls.NAMES,)
  assert [one.seeds.tolist() for one in found] == [[*range(20, 28)]] * 5
  assert [rule for rule, _, _ in runner.log] == [None, None, "random", "uniform", "centre"]
  assert [told is None for _, _, told in runner.log] == [False, True, True, True, True]
  assert [row for _, row, _ in runner.log] == ["shuffled", "blind", "random", "uniform", "centre"]
  assert [*changes] == [{}, {"images": "grey"}, *({"anchor_rule": rule} for rule in ("random", "uniform", "centre"))]
  with pytest.raises(ValueError, match="name none twice"):
    controls.check(["blind", "shuffled", "blind"])
  with pytest.raises(ValueError, match=r"got \['middle'\]"):
    next(controls.each(policy, runner, result, names=("middle",)))


def test_pruning_controls_are_left_out_where_they_change_nothing():
  no_pruner = policies.policy(
    config={
      **policies.CONFIG,
      "model": {
        **policies.CONFIG["model"],
        "siglip_pruner": None,
        "dino_pruner": None,
        "film": (),
        "dense_fuser": None,
      },
    }
  )
  runner = Runner(range(8))
  found = controls.each(no_pruner, runner, runner(no_pruner, "policy"))
  assert [name for name, _, _ in found] == ["shuffled", "blind"]
