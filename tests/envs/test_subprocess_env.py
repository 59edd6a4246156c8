"""An environment in a process of its own."""

import functools

import numpy as np
import pytest
from point import FOLDER, Point

from semanticvla_jax.envs.subprocess_env import BrokenEnvironment, Process, environment

FORWARD = np.array([0.25, 0, 0, 0, 0, 0, 0], np.float32)


@pytest.fixture
def started(tmp_path):
  processes = []

  def start(trouble=None, **options):
    make = functools.partial(Point, str(tmp_path / "log"), trouble)
    processes.append(Process(make, {"PYTHONPATH": FOLDER}, **options))
    return processes[-1]

  yield start
  for process in processes:
    process.close()


def test_it_does_what_the_environment_does_here(started, tmp_path):
  there, here = started(), Point(str(tmp_path / "here"))
  first, same = there.reset(13), here.reset(13)
  for key in same:
    np.testing.assert_array_equal(first[key], same[key])
  for _ in range(4):
    seen, done = there.step(FORWARD)
    same, also = here.step(FORWARD)
    np.testing.assert_array_equal(seen["observation/state"], same["observation/state"])
    assert done == also and there.success == here.success and there.instruction == "go to goal 1"
  assert done and there.success


def test_several_actions_end_with_the_episode(started):
  process = started()
  process.reset(0)
  process.act(np.tile(FORWARD, (3, 1)))
  moment = process.receive()
  assert (moment.steps, moment.done, len(moment.observations)) == (3, False, 1)
  process.act(np.tile(FORWARD, (3, 1)), every=True)
  moment = process.receive()
  assert (moment.steps, moment.success, moment.done, len(moment.observations)) == (4, True, True, 1)
  process.reset(0)
  process.act(np.tile(FORWARD, (6, 1)))
  moment = process.receive()  # the end comes before the last action, which was to be looked at
  assert moment.done and moment.observations[0]["observation/image"][0, 0, 0] == 4


def test_nothing_is_rendered_that_is_not_asked_for(started):
  process = started()
  process.reset(0)
  for step in (1, 2, 3):
    assert process.step(FORWARD, observe=False) == (None, False)
    assert process.observe()["observation/image"][0, 0, 0] == step
  assert process.step(FORWARD, observe=False) == (None, True) and process.success
  process.reset(0)
  process.act(np.tile(FORWARD, (6, 1)), look=False)
  moment = process.receive()
  assert (moment.steps, moment.done, moment.observations) == (4, True, [])


def test_variables_of_this_process_are_changed_or_taken_away(started, monkeypatch):
  monkeypatch.setenv("TAKEN", "1")
  monkeypatch.setenv("CHANGED", "1")
  given = environment({"TAKEN": None, "NEVER": None, "CHANGED": "2", "NEW": ""})
  assert (given["CHANGED"], given["NEW"]) == ("2", "") and not {"TAKEN", "NEVER"} & given.keys()


def test_what_it_raises_comes_with_its_traceback(started):
  process = started({5: "raise"})
  process.reset(5)
  process.step(FORWARD)
  with pytest.raises(BrokenEnvironment, match="(?s)go_wrong.*ArithmeticError: the physics exploded"):
    process.step(FORWARD)


def test_what_it_warns_of_is_heard_here_once(started, caplog):
  process = started({5: "tell"})
  process.reset(5)
  process.step(FORWARD)
  assert not caplog.records
  process.step(FORWARD)
  process.step(FORWARD)
  (record,) = caplog.records
  assert record.levelname == "WARNING" and record.getMessage() == "a screw is loose in 5"


def test_a_dead_process_says_so_and_starts_again(started):
  process = started({5: "die"})
  process.reset(5)
  process.step(FORWARD)
  with pytest.raises(BrokenEnvironment, match="signal 9"):
    process.step(FORWARD)
  with pytest.raises(BrokenEnvironment, match="signal 9"):
    process.reset(5)
  process.restart()
  process.reset(5)
  assert process.step(FORWARD)[1] is False and process.step(FORWARD)[1] is False


def test_one_that_hangs_is_told_from_one_that_works(started):
  process = started({5: "hang"}, timeout=60.0)
  process.reset(5)
  process.timeout = 0.5
  process.step(FORWARD)
  with pytest.raises(BrokenEnvironment, match=r"No answer from the environment within 0.5 s"):
    process.step(FORWARD)


def test_one_that_cannot_be_made_says_why(tmp_path):
  process = Process(functools.partial(Point, 7), {"PYTHONPATH": FOLDER})
  with pytest.raises(BrokenEnvironment, match="TypeError"):
    process.reset(0)
  process.close()
  process = Process(functools.partial(Point, str(tmp_path / "log")))  # it cannot import the module
  with pytest.raises(BrokenEnvironment, match="(?s)status 1.*No module named 'point'"):
    process.reset(0)
  process.close()


def test_nothing_runs_before_a_reset(started):
  with pytest.raises(ValueError, match="call reset first"):
    started().success  # noqa: B018
