"""Handles and knobs for the scripted expert, without a simulator."""

import numpy as np
import pytest

from semanticvla_jax.libero import fixtures, grasps


def turned(points, yaw):
  rotation = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1.0]])
  return points @ rotation.T


def box(center, half):
  return grasps.fill(np.array(center, float), np.eye(3), np.array(half))


@pytest.mark.parametrize("yaw", [0.0, 1.0, -2.0])
def test_a_handle_is_what_stands_out_from_a_drawers_front(yaw):
  """Along +x: a box, two posts of 2 cm, and a bar off the middle."""
  parts = [box((0, 0, 1), (0.08, 0.1, 0.03)), box((0.09, 0.04, 1), (0.01, 0.005, 0.006))]
  parts += [box((0.09, -0.02, 1), (0.01, 0.005, 0.006)), box((0.108, 0.01, 1.01), (0.008, 0.044, 0.008))]
  drawer = fixtures.Part(turned(np.concatenate(parts), yaw), np.array([np.cos(yaw), np.sin(yaw), 0]))
  np.testing.assert_allclose(fixtures.handle(drawer), turned(np.array([[0.108, 0.01, 1.01]]), yaw)[0], atol=0.004)


@pytest.mark.parametrize("yaw", [0.0, 0.7, -1.2])
def test_a_knob_is_taken_across_its_bar(yaw):
  knob = np.concatenate([box((0, 0, 0.9), (0.045, 0.045, 0.01)), box((0.004, 0, 0.94), (0.04, 0.012, 0.03))])
  point, across = fixtures.knob(fixtures.Part(turned(knob, yaw), np.array([0, 0, 1.0])))
  np.testing.assert_allclose(point, turned(np.array([[0.004, 0, 0.95]]), yaw)[0], atol=1e-6)
  assert abs(np.sin(across - yaw)) == pytest.approx(1)


@pytest.mark.parametrize("dip", [0.0, 0.3, 1.2])
def test_a_gripper_looks_where_it_shall(dip):
  ahead = np.array([0.6, -0.8, 0])
  found = grasps.sideways(ahead, dip)
  np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-12)
  assert np.linalg.det(found) == pytest.approx(1)
  np.testing.assert_allclose(found[:, 2], np.cos(dip) * ahead + [0, 0, -np.sin(dip)], atol=1e-12)
  assert found[2, 0] == pytest.approx(np.cos(dip)) and found[2, 1] == pytest.approx(0)  # closes in a vertical plane
