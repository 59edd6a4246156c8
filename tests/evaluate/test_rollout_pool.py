"""Several simulators, one policy: every episode once, whatever breaks."""

import functools
import json
import os
import signal

import numpy as np
import policies
import pytest
from point import FOLDER, Point

from semanticvla_jax.envs.subprocess_env import BrokenEnvironment, Process
from semanticvla_jax.evaluate import results
from semanticvla_jax.evaluate.rollout_pool import EpisodeLog, EpisodeResult, OnSimulators, stored_as_jpeg
from semanticvla_jax.policy import Policy


class Half:
  """Walks in even episodes (there in four steps), stands still in odd ones; keeps what it was asked."""

  replan_steps = 3

  def __init__(self):
    self.asked, self.sizes, self.stop = [], [], None

  def infer_batch(self, observations):
    self.sizes.append(len(observations))
    self.asked += [(one["episode"], one["step"], one["prompt"], one["observation/image"]) for one in observations]
    return [{"actions": self.actions(one["episode"])} for one in observations]

  def actions(self, episode):
    if episode == self.stop:
      raise KeyboardInterrupt
    return np.tile([0.25 if episode % 2 == 0 else 0.0, 0, 0, 0, 0, 0, 1], (8, 1)).astype(np.float32)


@pytest.fixture
def runner(tmp_path):
  made = []

  def make(trouble=None, policy=None, timeout=60.0, seen=None, **options):
    start = functools.partial(Process, functools.partial(Point, str(tmp_path / "log"), trouble), {"PYTHONPATH": FOLDER})
    options = dict(workers=2, task=lambda seed: (seed // 10, f"goal {seed}")) | options
    made.append(OnSimulators(policy or Half(), functools.partial(start, timeout=timeout), **options))
    made[-1].seen = seen
    return made[-1]

  yield make
  for one in made:
    one.close()


def begun(tmp_path):
  return [int(line) for line in (tmp_path / "log").read_text().split()]


def test_all_episodes_once_in_the_order_asked_for(runner, tmp_path):
  one, seeds, told = runner(), [20, 11, 10, 1, 0, 21], []
  result = one.run(seeds, progress=lambda done, successes: told.append((done, successes)))
  assert result.seeds.tolist() == seeds and result.success.tolist() == [True, False, True, False, True, False]
  assert result.steps.tolist() == [4, 6, 4, 6, 4, 6] and not result.error.any()
  assert result.instruction[:2] == result.told[:2] == ["go to goal 2", "go to goal 1"]
  assert sorted(begun(tmp_path)) == sorted(seeds) and told[-1] == (6, 3)
  assert {step for _, step, _, _ in one.policy.asked} == {0, 3} and set(one.policy.sizes) <= {1, 2}


def test_simulators_stay_in_their_group(runner, tmp_path):
  runner(workers=1).run([0, 10, 1, 11, 2])
  assert begun(tmp_path) == [0, 1, 2, 10, 11]


def test_what_is_told_and_shown(runner):
  one = runner(workers=1, prepare=stored_as_jpeg(50))
  result = one.run([0, 2], told=["sit", "stand"])
  assert result.told == ["sit", "stand"] and result.instruction == ["go to goal 0"] * 2
  assert {(episode, prompt) for episode, _, prompt, _ in one.policy.asked} == {(0, "sit"), (2, "stand")}
  (image,) = {image.tobytes() for _, step, _, image in one.policy.asked if step == 3}
  assert len(image) == 8 * 8 * 3


def test_a_crash_costs_a_retry_and_nothing_else(runner, tmp_path):
  one = runner({2: "die", 3: "hang"}, timeout=20.0)
  one.first()
  records = EpisodeLog(tmp_path / "records")
  result = one.run([0, 1, 2, 3, 4], records=records)
  assert result.success.tolist() == [True, False, True, False, True] and not result.error.any()
  assert [records.found[seed].retries for seed in range(5)] == [0, 0, 1, 1, 0]
  assert sorted(begun(tmp_path)) == [0, 1, 2, 2, 3, 3, 4]


def test_what_breaks_every_time_is_an_error_with_its_traceback_and_no_failure(runner, tmp_path):
  records = EpisodeLog(tmp_path / "records")
  result = runner({1: "raise", 2: "always die"}, retries=1, workers=3).run([0, 1, 2], records=records)
  assert result.error.tolist() == [False, True, True] and result.success.tolist() == [True, False, False]
  assert result.valid == 1 and result.instruction[1] == "goal 1"
  assert "ArithmeticError: the physics exploded" in records.found[1].error and "signal 9" in records.found[2].error
  assert begun(tmp_path).count(1) == 2


def test_what_broke_is_tried_again_by_the_next_run(runner, tmp_path):
  path = tmp_path / "records"
  assert runner({1: "raise"}, retries=0).run([0, 1, 2], records=EpisodeLog(path)).error.tolist() == [False, True, False]
  again = runner().run([0, 1, 2], records=EpisodeLog(path))
  assert not again.error.any() and begun(tmp_path).count(1) == 2 and begun(tmp_path).count(0) == 1
  assert EpisodeLog(path).found[1].error is None and again.retries.tolist() == [0, 0, 0]
  stored = results.to_json([results.Row("this policy", "policy", "x", {}, {}, again)], "", {})["results"][0]
  told = stored["per_episode"]
  assert [one["retries"] for one in told] == [0, 0, 0] and all(one["seconds"] > 0 for one in told)


def test_a_simulator_that_never_works_ends_the_evaluation(runner):
  with pytest.raises(BrokenEnvironment, match="(?s)All of the first 2 episodes broke.*exploded"):
    runner(dict.fromkeys(range(9), "raise"), retries=0, workers=1).run(range(9))


def test_an_interrupted_evaluation_goes_on_at_the_next_episode(runner, tmp_path):
  policy, path = Half(), tmp_path / "records"
  policy.stop = 4
  with pytest.raises(KeyboardInterrupt):
    runner(policy=policy, workers=1).run(range(6), records=EpisodeLog(path))
  assert begun(tmp_path) == [0, 1, 2, 3, 4]
  with path.open("a") as file:
    file.write('{"seed": 9, "succ')  # killed while it wrote
  result = runner(workers=1).run(range(6), records=EpisodeLog(path))
  assert result.success.tolist() == [True, False] * 3
  assert begun(tmp_path) == [0, 1, 2, 3, 4, 4, 5]
  assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4, 5]
  assert runner().run(range(6), records=EpisodeLog(path)).successes == 3 and len(begun(tmp_path)) == 7


def test_a_damaged_line_is_named(tmp_path):
  (tmp_path / "records").write_text('{"seed": 1}\n{}\n')
  with pytest.raises(ValueError, match="remove the line"):
    EpisodeLog(tmp_path / "records")


def test_a_killed_worker_costs_its_episode_a_retry(runner, tmp_path):
  one = runner(workers=1)
  one.first()
  killed = []

  class Killing(Half):
    def actions(self, episode):
      if episode == 2 and not killed:
        killed.append(one.first().pid)
        os.kill(killed[0], signal.SIGKILL)
      return super().actions(episode)

  one.policy = Killing()
  result = one.run(range(4))
  assert result.success.tolist() == [True, False, True, False] and begun(tmp_path) == [0, 1, 2, 2, 3]


def test_actions_that_are_not_finite_are_a_failure_and_none_end_the_episode(runner, tmp_path):
  class Odd(Half):
    def actions(self, episode):
      walk = super().actions(0)
      late = np.where(np.arange(8)[:, None] == 1, np.inf, walk)  # finite actions before it are executed
      return {0: np.full((8, 7), np.nan), 1: np.zeros((0, 7)), 3: late}.get(episode, walk)

  records = EpisodeLog(tmp_path / "records")
  result = runner(policy=Odd()).run([0, 1, 2, 3], records=records)
  assert not result.error.any() and result.success.tolist() == [False, False, True, False]
  assert result.nonfinite.tolist() == [True, False, False, True] and (result.valid, result.spoilt) == (4, 2)
  assert result.steps.tolist() == [0, 0, 4, 1]
  kept = EpisodeLog(tmp_path / "records").found
  assert [kept[seed].nonfinite for seed in range(4)] == [True, False, False, True] and kept[0].error is None


def test_success_before_an_action_that_is_not_finite_counts(runner):
  class Late(Half):
    def actions(self, episode):
      return np.array([[1.0] * 7, [np.nan] * 7], np.float32)

  result = runner(policy=Late()).run([0])
  assert result.success.tolist() == [True] and result.steps.tolist() == [1] and not result.nonfinite.any()


def test_a_state_that_is_not_finite_is_a_broken_simulator(runner):
  result = runner({1: "nan"}, retries=0).run([0, 1, 2])
  assert result.error.tolist() == [False, True, False] and result.valid == 2


def test_records_of_an_earlier_version_are_read(tmp_path):
  old = {
    "seed": 3,
    "success": True,
    "steps": 9,
    "error": None,
    "instruction": "go",
    "told": "go",
    "retries": 0,
    "seconds": 1.5,
  }
  (tmp_path / "records").write_text(json.dumps(old) + "\n", encoding="utf-8")
  assert EpisodeLog(tmp_path / "records").found[3].nonfinite is False


@pytest.mark.parametrize("bad", [b"{}", b'{"seed": 2, "succ', b"[]", b"\xff\xfe", b"", b'{"seed": "x"}'])
def test_damaged_lines_are_put_aside_and_their_episodes_run_again(runner, tmp_path, caplog, bad):
  path = tmp_path / "records"
  records = EpisodeLog(path)
  for seed in (0, 1):
    records.add(EpisodeResult(seed, True, 4, None, "go", "go", 0, 1.0))
  first, second = path.read_bytes().splitlines()
  path.write_bytes(first + b"\n" + bad + b"\n" + second + b"\n")
  assert [*EpisodeLog(path, repair=True).found] == [0, 1]
  assert str(path) in caplog.text and "1 damaged lines" in caplog.text
  assert (tmp_path / "records.damaged").read_bytes() == bad + b"\n"
  assert [*EpisodeLog(path).found] == [0, 1]


def test_an_episode_is_recorded_before_anybody_looks_at_it(runner, tmp_path):
  records = EpisodeLog(tmp_path / "records")

  def look(record, views):
    raise OSError("No space left on device")

  with pytest.raises(OSError, match="No space"):
    runner(workers=1, seen=look).run([0, 1], records=records)
  assert [*EpisodeLog(tmp_path / "records").found] == [0]


def test_what_was_told_something_else_is_run_again(runner, tmp_path):
  path = tmp_path / "records"
  runner(workers=1).run([0, 2], ["sit", "stand"], records=EpisodeLog(path))
  assert runner(workers=1).run([0, 2], ["sit", "lie"], records=EpisodeLog(path)).told == ["sit", "lie"]
  assert begun(tmp_path) == [0, 2, 2]


def test_broken_episodes_are_counted_for_the_progress(runner):
  told = []
  one = runner({1: "raise"}, retries=0, workers=1)
  one.run([0, 1, 2], progress=lambda done, successes: told.append((done, successes, one.broken)))
  assert told == [(1, 1, 0), (2, 1, 1), (3, 2, 1)]


def test_what_was_seen_is_handed_on(runner):
  seen = {}
  runner(workers=1, seen=lambda record, views: seen.update({record.seed: len(views)})).run([0, 1])
  assert seen == {0: 3, 1: 3}  # at the start, after three actions, at the end


def test_nonsense_is_refused(runner):
  with pytest.raises(ValueError, match="workers=0"):
    runner(workers=0)
  with pytest.raises(ValueError, match="replan_steps=0; expected at least 1"):
    runner(replan_steps=0)


class Recorded(Policy):
  """A policy that keeps what it answered: {(episode, step): actions}."""

  def infer_batch(self, observations, episodes=None):
    found = super().infer_batch(observations, episodes)
    asked = [(one["episode"], one["step"]) for one in observations]
    self.answers |= {key: one["actions"] for key, one in zip(asked, found, strict=True)}
    return found


def test_a_memory_is_of_its_episode_whoever_answers_first(runner):
  """Two simulators, one of which dies, or one after the other: each query of an episode gets the same answer."""
  policy, answers = policies.remembering(batch_sizes=(2,)), []
  policy.__class__ = Recorded
  for options in (dict(trouble={1: "die"}, workers=2), dict(workers=1)):
    policy.answers = {}
    runner(policy=policy, replan_steps=1, **options).run(range(3))
    answers.append(policy.answers)
    assert not policy.memories, "nothing is left of the episodes"
  assert answers[0].keys() == answers[1].keys() and len(answers[0]) == 3 * Point.max_steps
  for key, actions in answers[0].items():
    np.testing.assert_array_equal(actions, answers[1][key])
