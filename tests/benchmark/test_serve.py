"""What a server is measured with: clients in a process without jax, doors in front of nothing, delayed actions."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from semanticvla_jax.benchmark import delay, load, serve
from semanticvla_jax.benchmark.record import Result


@pytest.mark.parametrize(("protocol", "disturbed"), [("openpi", False), ("openpi", True), ("act", False)])
def test_a_door_in_front_of_zeros(protocol, disturbed):
  with serve.zeros() as url:
    found = load.run(url, protocol, clients=3, seconds=0.6, disturbed=disturbed)
    assert serve.memory(url) > 1e6
  assert found["errors"] == 0 and len(found["ms"]) > 3 and min(found["ms"]) > 0 and found["seconds"] >= 0.6


def test_a_long_load_says_what_memory_does(monkeypatch):
  monkeypatch.setattr(serve, "SAMPLES", 4)
  assert serve.growth([(0.0, 5e6), (30.0, 6e6), (60.0, 7e6)]) == pytest.approx(2.0)
  result = Result("serve", {}, say=lambda line: None)
  with serve.zeros() as url:
    serve._soak(result, url, clients=2, seconds=0.8)
  assert result.value("soak, 2 clients, errors") == 0 and result.value("soak, 2 clients, memory at the end") > 1
  assert np.isfinite(result.value("soak, 2 clients, memory growth"))


def test_clients_need_no_jax():
  code = "import sys, semanticvla_jax.benchmark.load; assert not {'jax', 'starlette'} & sys.modules.keys()"
  subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_are_counted_and_no_answer_at_all_is_refused():
  result = Result("serve", {}, say=lambda line: None)
  serve._add(result, "some", {"ms": [1.0, 3.0], "seconds": 2.0, "errors": 1, "error": "gone"})
  assert result.value("some, throughput") == 1.0 and result.value("some, errors") == 1 and "gone" in result.notes[0]
  with pytest.raises(ValueError, match="no answer at all"):
    serve._add(result, "none", {"ms": [], "seconds": 2.0, "errors": 1, "error": "gone"})


class Clock:
  """A robot for which every moment has one right action, its number; without an action no moment passes."""

  def __init__(self, k=8):
    self._k, self.done = k, []

  def begin(self):
    return SimpleNamespace(instruction=[0], moment=0)

  def ask(self, state):
    moments = np.arange(state.moment, state.moment + self._k, dtype=np.float32) + 1
    return np.repeat(moments[:, None, None], 7, axis=2)

  def act(self, state, action):
    if not action[0, : delay.GRIPPER].any():
      return state, np.array([False])
    self.done.append(float(action[0, 0]) - 1 == state.moment)
    return SimpleNamespace(instruction=[0], moment=state.moment + 1), np.array([False])

  def right(self, mode, steps):
    delay.run(self.ask, self.begin, self.act, delay.MODES[mode], steps, 40)
    return np.mean(self.done), len(self.done)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_aligned_actions_are_those_of_their_moment_and_the_robot_never_waits(steps):
  right, moved = Clock().right("asynchronous, aligned", steps)
  assert right == 1.0 and moved == 40 - steps  # it stood still until the first answer


def test_other_modes_stand_still_or_act_on_the_past():
  assert Clock().right("waits for each chunk", 0) == (1.0, 40)
  right, moved = Clock().right("waits for each chunk", 2)
  assert right == 1.0 and moved == 32
  right, moved = Clock().right("asynchronous, not aligned", 2)
  assert right < 0.5 and moved == 38


@pytest.mark.slow
def test_delay_end_to_end(tmp_path):
  from test_measured import figures

  found, record = figures(tmp_path, "delay")
  assert {*found.values()} <= {0, 1, 2} and len(found) == 4 and record["settings"]["suite"] == "place"


@pytest.mark.processes
def test_serve_end_to_end(tmp_path):
  from test_measured import figures

  found, _ = figures(tmp_path, "serve", "--clients=1,2")
  assert found["batched, 2 clients, errors"] == 0 and found["one at a time, 1 clients, throughput"] > 0
  assert found["door openpi, policy of zeros p50"] < found["batched, 1 clients p50"]
