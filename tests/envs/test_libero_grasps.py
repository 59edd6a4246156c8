"""Geometry of the scripted expert, without a simulator."""

import numpy as np
import pytest

from semanticvla_jax.libero import grasps

NOTHING = np.zeros((0, 3))
BASE = np.array([-0.5, 0.0])  # of the arm, near enough to everything here


def box(center, half, yaw=0.0):
  rotation = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1.0]])
  return grasps.fill(np.array(center), rotation, np.array(half))


def bowl(center, radius=0.06, height=0.05):
  """Walls of 1 cm around a floor."""
  angles = np.arange(0, 2 * np.pi, np.pi / 12)
  place = [(center[0] + radius * np.cos(a), center[1] + radius * np.sin(a), center[2] + height / 2, a) for a in angles]
  walls = [box((x, y, z), (0.005, 0.008, height / 2), a) for x, y, z, a in place]
  return np.concatenate([*walls, box(center, (0.03, 0.03, 0.003))])


def test_points_of_a_box_reach_its_corners_and_leave_no_gap():
  points = grasps.fill(np.array([1.0, 2, 3]), np.eye(3), np.array([0.05, 0.02, 0.001]), 0.01)
  np.testing.assert_allclose([points.min(0), points.max(0)], [[0.95, 1.98, 2.999], [1.05, 2.02, 3.001]])
  for axis in range(3):
    assert np.diff(np.unique(points[:, axis].round(9))).max() <= 0.01


@pytest.mark.parametrize("axis", np.eye(3).tolist() + [[0.6, -0.8, 0]])
def test_a_rotation_vector_undoes_the_exponential(axis):
  from scipy.spatial.transform import Rotation

  vector = 1.2 * np.array(axis)
  np.testing.assert_allclose(grasps.rotation_vector(Rotation.from_rotvec(vector).as_matrix()), vector, atol=1e-9)
  assert not grasps.rotation_vector(np.eye(3)).any()


def test_a_gripper_turned_by_half_a_turn_is_the_same():
  held = grasps.downward(0.3)
  np.testing.assert_allclose(held @ [0, 0, 1], [0, 0, -1], atol=1e-12)
  assert np.linalg.det(held) == pytest.approx(1)
  np.testing.assert_allclose(grasps.turn(held, grasps.either_way(0.3 + np.pi)), np.zeros(3), atol=1e-6)
  np.testing.assert_allclose(grasps.turn(held, grasps.either_way(0.5)), [0, 0, 0.2], atol=1e-9)


def test_a_box_is_taken_across_its_narrow_side_in_the_middle():
  found = grasps.find(box((0.2, -0.1, 0.05), (0.05, 0.02, 0.05)), NOTHING, 0.0, BASE)
  np.testing.assert_allclose(found.position, [0.2, -0.1, 0.1 - 0.024], atol=1e-9)
  assert abs(np.cos(found.yaw)) < 0.14 and found.width == pytest.approx(0.04, abs=0.003) and not found.blocked


def test_what_is_round_is_taken_without_turning():
  can = np.concatenate([box((0, 0, 0.05), (0.03, 0.012, 0.05), yaw) for yaw in np.arange(0, np.pi, 0.2)])
  assert abs(np.rad2deg(grasps.find(can, NOTHING, np.deg2rad(30), BASE).yaw) - 30) < 8


def test_a_bowl_is_taken_by_its_rim():
  found = grasps.find(bowl((0.0, 0.0, 0.9)), NOTHING, 0.0, BASE)
  assert 0.045 < np.linalg.norm(found.position[:2]) < 0.075 and found.width < 0.03
  assert 0.9 < found.position[2] < 0.95


@pytest.mark.parametrize("height", [0.05, 0.07])
@pytest.mark.parametrize("radius", np.arange(0.045, 0.066, 0.005).round(3))
def test_a_rim_is_held_with_the_fingers_in_line_with_its_middle(radius, height):
  found = grasps.find(bowl((0.02, -0.03, 0.9), radius, height), NOTHING, 0.9, BASE)
  outward = found.position[:2] - [0.02, -0.03]
  in_line = abs(outward @ [np.cos(found.yaw), np.sin(found.yaw)]) / np.linalg.norm(outward)
  assert in_line > np.cos(np.deg2rad(5))


def test_a_tilted_hand_has_room_above_a_wall():
  cube = box((0, 0, 0.03), (0.01, 0.01, 0.03))
  top = grasps.find(cube, NOTHING, 0.0, BASE).position[2] + 0.04  # the hand begins 4.2 cm above the grip site
  walls = [box((0.085 * np.cos(a), 0.085 * np.sin(a), top / 2), (0.01, 0.06, top / 2), a) for a in range(6)]
  assert grasps.find(cube, np.concatenate(walls), 0.0, BASE).blocked


def test_a_bowl_at_the_end_of_the_reach_is_taken_by_its_near_rim():
  far = bowl((BASE[0] + 0.79, 0.0, 0.9))
  found = grasps.find(far, NOTHING, 0.0, BASE)
  assert np.linalg.norm(found.position[:2] - BASE) < 0.76 and found.width < 0.03


def test_what_is_too_wide_everywhere_is_not_taken():
  assert grasps.find(box((0, 0, 0.05), (0.08, 0.08, 0.05)), NOTHING, 0.0, BASE) is None


def test_a_neighbor_in_the_fingers_way_turns_the_grasp():
  cube, post = box((0, 0, 0.03), (0.02, 0.02, 0.03)), box((0.05, 0, 0.03), (0.005, 0.03, 0.03))
  free, beside = grasps.find(cube, NOTHING, 0.0, BASE), grasps.find(cube, post, 0.0, BASE)
  assert abs(free.yaw) < 1e-9 and not beside.blocked
  assert abs(np.cos(beside.yaw)) < 0.5  # no longer along x


def test_a_grasp_between_walls_says_that_it_is_blocked():
  cube = box((0, 0, 0.03), (0.02, 0.02, 0.03))
  walls = np.concatenate([box((0.048 * np.cos(a), 0.048 * np.sin(a), 0.03), (0.006, 0.03, 0.03), a) for a in range(6)])
  assert grasps.find(cube, walls, 0.0, BASE).blocked


def test_the_highest_point_near_a_way():
  points = np.array([[0.5, 0.05, 0.3], [0.5, 0.5, 0.9], [1.4, 0, 0.8]])
  start, end = np.array([0.0, 0, 0]), np.array([1.0, 0, 0])
  assert grasps.highest(points, start, end, 0.1) == 0.3
  assert grasps.highest(points, start, end, 0.6) == 0.9
  assert grasps.highest(points, start, start, 0.1) == -np.inf


def test_an_object_is_moved_where_there_is_room():
  mine, wall = box((0, 0, 0.02), (0.02, 0.02, 0.02)), box((0.08, 0, 0.02), (0.01, 0.2, 0.02))
  rng = np.random.default_rng(0)
  shifts = np.array([grasps.room(mine, wall, 0.05, rng) for _ in range(50)])
  radius = np.sqrt(2) * 0.02
  assert (abs(shifts) <= 0.05).all() and shifts.std(0).min() > 0.01
  assert shifts[:, 0].max() < 0.07 - radius - 0.01
  assert not grasps.room(mine, wall, 0.0, rng).any()


def test_what_carries_something_stays():
  plate, cup = box((0, 0, 0.01), (0.08, 0.08, 0.01)), box((0, 0, 0.05), (0.02, 0.02, 0.03))
  assert not grasps.room(plate, cup, 0.05, np.random.default_rng(0)).any()
