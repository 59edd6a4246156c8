"""openpi's door, and the dialects that share it: answers equal `Policy.infer` bit for bit."""

import numpy as np
import pytest
from serving import equal, observation, robot, serving

from semanticvla_jax.data import statistics
from semanticvla_jax.serve import wire


def test_actions_are_those_of_infer_bit_for_bit(served, policy):
  with robot(served[1]) as one:
    for seed in range(3):
      reply = one.ask(observation(seed))
      expected = policy.infer(observation(seed))["actions"]
      assert equal(reply["actions"], expected) and reply["actions"].dtype == np.float32
    timing = reply["policy_timing"]
    assert timing["infer_ms"] > 0 and timing["prepare_ms"] > 0 and timing["queue_ms"] >= 0
    assert reply["server_timing"]["infer_ms"] >= timing["infer_ms"]
    assert reply["server_timing"]["prev_total_ms"] > 0


def test_metadata_says_what_a_client_needs(served, policy):
  with robot(served[1]) as one:
    found = one.metadata
  assert found["answer"] == {"name": "actions", "dtype": "float32", "shape": [8, 7]}
  assert found["views"] == ["image", "wrist_image"] and found["policy_hash"] == "0123456789abcdef"
  assert found["grippers"]["openpi"]["convention"] == "command" and len(found["actions"]) == 7
  assert "folder" not in found and found["limits"]["actions"]["limit"] == "off"
  assert found["default_unnorm_key"] == "tabletop_place" and found["action_chunk_size"] == 8


@pytest.mark.parametrize("path", ["/", "/v1/realtime/robot/openpi"])
def test_other_names_and_layouts_of_the_same_observation(served, policy, path):
  seen = observation(7)
  expected = policy.infer(seen)["actions"]
  image, wrist, state, prompt = seen.values()
  first = lambda x: np.ascontiguousarray(np.moveaxis(x, -1, 0))  # noqa: E731
  with robot(served[1], path) as one:
    nested = {"state": state, "images": {"cam_high": first(image), "wrist": first(wrist)}, "prompt": prompt}
    droid = {"observation/exterior_image_1_left": image, "observation/wrist_image_left": wrist, "prompt": prompt}
    droid |= {"observation/joint_position": state[:7], "observation/gripper_position": state[7:]}
    inside = {"observation": {"image": image, "wrist_image": wrist, "state": state}, "prompt": prompt}
    for other in (nested, droid, inside):
      assert equal(one.ask(other)["actions"], expected)


def test_roboarena_gets_the_bare_array(served, policy):
  with robot(served[1], "/roboarena") as one:
    assert set(one.metadata) == {
      "image_resolution",
      "needs_wrist_camera",
      "n_external_cameras",
      "needs_stereo_camera",
      "needs_session_id",
      "action_space",
    }
    reply = one.ask(observation(1) | {"endpoint": "infer", "session_id": "x"})
    assert equal(reply, policy.infer(observation(1))["actions"])
    assert one.ask({"endpoint": "reset"}) == "reset successful"
    assert "endpoint" in one.ask({"endpoint": "leave"})


def test_starvla_shares_the_address(served, policy):
  image, wrist, state, prompt = observation(3).values()
  normalized = np.asarray(policy.device_step(policy.observe([observation(3)])))
  raw = statistics.unnormalize(normalized, policy.stats.action, mode=policy.mode)[0]  # the gripper as it was learned
  example = {"image": [image, wrist], "lang": prompt, "state": state[None]}
  with robot(served[1]) as one:
    reply = one.ask({"examples": [example], "unnorm_key": "tabletop_place", "do_sample": False})
    assert reply["ok"] and reply["type"] == "inference_result"
    assert equal(reply["data"]["actions"][0], raw)
    wrapped = one.ask({"type": "infer", "request_id": "7", "payload": {"examples": [example, example]}})
    assert wrapped["request_id"] == "7" and wrapped["data"]["actions"].shape == (2, 8, 7)
    assert one.ask({"type": "ping", "request_id": "8"})["ok"]
    failed = one.ask({"examples": [example], "unnorm_key": "bridge_orig"})
    assert failed["status"] == "error" and "unnorm_key" in failed["error"]["message"]
    assert not one.ask({"examples": []})["ok"]


@pytest.mark.parametrize(
  ("change", "what"),
  [
    ({"observation/state": np.full(8, np.nan, np.float32)}, "finite"),
    ({"observation/state": np.zeros(3, np.float32)}, "8 finite numbers"),
    ({"observation/image": np.zeros((32, 32), np.uint8)}, "uint8[h w 3]"),
    ({"observation/image": np.zeros((32, 32, 3), np.float32)}, "uint8[h w 3]"),
    ({"observation/image": None}, "lacks 'image'"),
    ({"full_image": np.zeros((8, 8, 3), np.uint8)}, "ambiguous"),
    ({"prompt": ""}, "instruction"),
    ({"prompt": "x " * 2000}, "characters"),
    ({"prompt": 3}, "instruction"),
    ({"unnorm_key": "another"}, "unnorm_key"),
  ],
)
def test_a_wrong_field_is_said_in_one_line_and_the_next_request_is_answered(served, policy, change, what):
  with robot(served[1]) as one:
    reply = one.ask(observation() | change)
    assert isinstance(reply, str) and what in reply and "\n" not in reply and "Traceback" not in reply
    assert equal(one.ask(observation())["actions"], policy.infer(observation())["actions"])


@pytest.mark.parametrize("frame", ["text", b"", b"\xc1", wire.pack([1]), wire.pack(observation())[:-5], b"\x81" * 5000])
def test_what_is_not_an_observation_is_an_error_and_no_end(served, frame):
  with robot(served[1]) as one:
    assert isinstance(one.ask(frame), str)
    assert "actions" in one.ask(observation())


def test_a_frame_over_the_limit_ends_its_connection_alone(policy):
  with serving(policy, max_bytes=200_000) as (_, port), robot(port) as other:
    with robot(port) as one, pytest.raises(Exception, match="1009"):
      one.ask(observation() | {"more": b"x" * 300_000})
    assert "actions" in other.ask(observation())


def test_a_gripper_convention_can_be_chosen_for_a_door(policy):
  with serving(policy, grippers=["openpi=raw"]) as (_, port), robot(port) as one:
    gripper = one.ask(observation())["actions"][:, 6]
    assert not {*gripper.tolist()} <= {-1.0, 1.0}
