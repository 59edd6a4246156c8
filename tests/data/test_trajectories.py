"""Chunks, ends, no-ops and the standardizing functions, by hand-written examples."""

import numpy as np
import pytest

from semanticvla_jax.data import datasets, mixtures, trajectories


def test_starts():
  assert trajectories.starts(10, 8, "cut").tolist() == [0, 1, 2]
  assert trajectories.starts(8, 8, "cut").tolist() == [0]
  assert trajectories.starts(7, 8, "cut").tolist() == []
  assert trajectories.starts(3, 8, "pad").tolist() == [0, 1, 2]
  assert trajectories.starts(3, 1, "cut").tolist() == [0, 1, 2]
  with pytest.raises(ValueError, match="Unknown trajectory end"):
    trajectories.starts(3, 8, "wrap")
  with pytest.raises(ValueError, match="Bad chunk length"):
    trajectories.starts(3, 0)


def test_windows_stay_inside_their_episode():
  actions = np.arange(1, 11, dtype=np.float32).reshape(5, 2)  # episodes of 3 and 2 frames
  frames, ends = np.array([0, 1, 3]), np.array([3, 3, 5])
  chunks, inside = trajectories.windows(actions, frames, ends, 3, np.array([False, True]))
  assert inside.tolist() == [[True] * 3, [True, True, False], [True, True, False]]
  assert chunks[0].tolist() == [[1, 2], [3, 4], [5, 6]]
  assert chunks[1].tolist() == [[3, 4], [5, 6], [0, 6]]  # displacement 0, target repeated
  assert chunks[2].tolist() == [[7, 8], [9, 10], [0, 10]]


def test_stride_is_what_a_command_moves_within_episodes():
  rng = np.random.default_rng(0)
  actions = rng.uniform(-1, 1, (20, 7)).astype(np.float32)
  proprio = np.zeros((20, 8), np.float32)
  proprio[1:, :3] = 0.02 * np.cumsum(actions[:-1, :3], axis=0)
  proprio[12:, :3] += 9  # another episode, elsewhere
  ends = np.repeat([12, 20], [12, 8])
  assert trajectories.stride(actions, proprio, ends) == pytest.approx(0.02, rel=1e-5)


def test_a_displaced_arm_is_led_back_and_nothing_else_changes():
  proprio = np.arange(16, dtype=np.float32).reshape(2, 8)
  actions = np.full((2, 4, 7), 0.5, np.float32)
  shift = np.array([[0.02, 0, -0.01, 0.1, 0, 0], [0.5, 0, 0, 0, 0, 0]])
  inside = np.array([[True] * 4, [True, True, False, False]])
  moved, answer = trajectories.displaced(proprio, actions, shift, 0.05, inside)
  np.testing.assert_allclose(moved - proprio, [[0.02, 0, -0.01, 0.1, 0, 0, 0, 0], [0.5, *[0] * 7]], atol=1e-6)
  np.testing.assert_allclose(answer[0, :, 0], 0.5 - 0.02 / (4 * 0.05) * 0.75 ** np.arange(4), rtol=1e-6)
  left = shift[0, :3] + 0.05 * (answer[0, :, :3] - 0.5).sum(axis=0)  # after the chunk
  np.testing.assert_allclose(left, shift[0, :3] * 0.75**4, atol=1e-6)
  assert answer[1, :, 0].tolist() == [-1, -1, 0.5, 0.5]  # kept within limits, and as it was past the end
  np.testing.assert_array_equal(answer[:, :, 3:], actions[:, :, 3:])
  assert answer.dtype == moved.dtype == np.float32 and (actions == 0.5).all()


def test_kept_drops_no_ops():
  def act(x, gripper):
    return [x, 0, 0, 0, 0, 0, gripper]

  actions = np.array(
    [
      act(0, -1),  # no-op at the start: the norm alone decides
      act(0, 1),  # the same: nothing is kept yet, so the gripper does not count
      act(0.5, -1),
      act(0, -1),  # no-op
      act(0, 1),  # still, but the gripper closes
      act(9e-5, 1),  # below the threshold
      act(2e-4, 1),
      act(0, -1),  # opens
    ]
  )
  assert trajectories.kept(actions).tolist() == [False, False, True, False, True, False, True, True]


def test_libero():
  columns = {
    "action": np.array([[1, 2, 3, 4, 5, 6, -1], [0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0.25]], np.float32),
    "observation/state": np.arange(24, dtype=np.float32).reshape(3, 8),
  }
  out = datasets.libero(columns)
  assert out.actions[:, 6].tolist() == [1, 0, 0.75]
  assert out.actions[0, :6].tolist() == [1, 2, 3, 4, 5, 6]
  np.testing.assert_array_equal(out.proprio, columns["observation/state"])
  assert out.frames.tolist() == [0, 1, 2]
  assert out.actions.dtype == np.float32


def test_bridge():
  state = np.array([[0] * 7, [1] * 7, [3] * 7, [6, 6, 6, 6, 6, 6, 0.5]], np.float32)
  action = np.array([[0] * 7, [9] * 6 + [1.0], [9] * 6 + [0.5], [9] * 6 + [0.0]], np.float32)
  out = datasets.bridge({"action": action, "observation/state": state})
  assert out.actions.tolist() == [[2] * 6 + [1], [3] * 6 + [0]]  # 0.5 takes what is reached afterwards: closed
  assert out.proprio.tolist() == [[1] * 7, [3] * 7]
  assert out.frames.tolist() == [1, 2]


def test_binary_gripper():
  command = np.array([0.5, 1.0, 0.6, 0.0, 0.99, 0.3], np.float32)
  np.testing.assert_allclose(datasets.binary_gripper(command), [1, 1, 0, 0, 1, 0.3])


def test_aloha_is_identity():
  columns = {
    key: np.random.default_rng(0).normal(size=(4, 14)).astype(np.float32) for key in ("action", "observation/state")
  }
  out = datasets.ALOHA.read(columns)
  np.testing.assert_array_equal(out.actions, columns["action"])
  np.testing.assert_array_equal(out.proprio, columns["observation/state"])
  assert datasets.ALOHA.views == ("image", "left_wrist_image", "right_wrist_image")


def test_recipes_by_name():
  assert datasets.spec("libero_10_no_noops") is datasets.LIBERO
  assert datasets.spec("aloha_scoop") is datasets.ALOHA
  assert datasets.spec("bridge_orig").chunk == 5
  assert datasets.spec("tabletop_pick").proprio_dim == 8
  with pytest.raises(ValueError, match="without a spec: got 'droid'"):
    datasets.spec("droid")


def test_mixtures():
  suites = mixtures.mixture("libero_4_task_suites_no_noops")
  assert [weight for _, weight in suites] == [1.0] * 4
  assert {name for name, _ in suites} == {f"libero_{suite}_no_noops" for suite in ("spatial", "object", "goal", "10")}
  assert mixtures.mixture("libero_goal_no_noops") == (("libero_goal_no_noops", 1.0),)
  with pytest.raises(ValueError, match="use 'libero_4_task_suites_no_noops'"):
    mixtures.mixture("libero_4_task_suite_no_noops")
