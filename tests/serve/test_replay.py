"""What was served can be run again, bit for bit; what changed since is found."""

import json

import numpy as np
import pytest
from serving import equal, observation, robot, serving

from semanticvla_jax.serve import contract, record


@pytest.fixture(scope="module")
def folder(tmp_path_factory, policy):
  """A recording of twelve answers of four clients."""
  path = tmp_path_factory.mktemp("recording")
  recorder = record.Recorder(path, record.facts(policy, "off", contract.device()))
  with serving(policy, record=recorder) as (_, port), robot(port) as one, robot(port) as other:
    for seed in range(5):
      one.ask(observation(seed))
      other.ask({"examples": [example(seed), example(seed + 1)]})
    one.ask(b"\xc1")
  recorder.close()
  assert recorder.left_out == 0
  return path


def example(seed):
  image, wrist, state, prompt = observation(seed).values()
  return {"image": [image, wrist], "state": state, "lang": prompt}


def test_a_replay_gives_the_same_answers_bit_for_bit(folder, policy):
  seen = []
  found = record.replay(policy, record.recordings(folder), seen.append)
  assert (found.observations, found.unequal, found.different) == (15, 0, [])
  assert seen == [*range(1, found.calls + 1)]


def test_the_recording_holds_what_was_asked_and_answered(folder, policy):
  ((path, known),) = record.recordings(folder)
  assert known["batch_sizes"] == [1, 4] and known["policy_hash"] == policy.metadata["policy_hash"]
  row = next(rows[0] for _, rows in record.calls(path))
  assert equal(row["observation"]["observation/image"], observation(0)["observation/image"])
  assert equal(row["actions"], policy.infer(observation(0))["actions"])


def test_another_answer_is_found(folder, policy, monkeypatch):
  monkeypatch.setattr(policy, "device_step", lambda seen: np.zeros((4, 8, 7), np.float32))
  found = record.replay(policy, record.recordings(folder))
  assert found.unequal == 15 and found.largest > 0 and "row 0: actions differ by up to" in found.different[0]


@pytest.mark.parametrize(("name", "value"), [("policy_hash", "another"), ("batch_sizes", [1, 2])])
def test_another_policy_is_refused(folder, policy, name, value):
  ((path, known),) = record.recordings(folder)
  with pytest.raises(ValueError, match=name):
    record.replay(policy, [(path, known | {name: value})])


def test_a_call_that_was_cut_off_is_left_out(folder, policy, tmp_path, caplog):
  ((path, known),) = record.recordings(folder)
  (tmp_path / "a.msgpack").write_bytes(path.read_bytes()[:-20])
  (tmp_path / "a.json").write_text(json.dumps(known))
  whole = record.replay(policy, record.recordings(folder)).calls
  assert record.replay(policy, record.recordings(tmp_path)).calls == whole - 1
  assert "cut off" in caplog.text


def test_a_full_disk_costs_the_recording_and_no_answer(tmp_path, policy, caplog):
  recorder = record.Recorder(tmp_path, record.facts(policy, "off", contract.device()), most_bytes=20_000)
  with serving(policy, record=recorder) as (_, port), robot(port) as one:
    assert all("actions" in one.ask(observation(seed)) for seed in range(6))
  recorder.close()
  assert 0 < recorder.left_out < 6 and "left out" in caplog.text
  assert record.replay(policy, record.recordings(tmp_path)).calls == 6 - recorder.left_out


def test_no_recording_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no .*msgpack in it"):
    record.recordings(tmp_path)
  (tmp_path / "a.msgpack").touch()
  with pytest.raises(ValueError, match="facts of a recording"):
    record.recordings(tmp_path)
