"""What only the simulator knows of a LIBERO scene: where things are and how they are shaped."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from semanticvla_jax.libero import fixtures, grasps

_SLIDE = 2  # mujoco.mjtJoint.mjJNT_SLIDE


class Scene:
  """What a robosuite environment with LIBERO's objects holds now: positions and collision shapes in the world."""

  def __init__(self, environment: Any):
    self._bodies: dict[str, int] = environment.obj_body_id
    self._environment, self._sim = environment, environment.sim
    self._model, self._data = environment.sim.model._model, environment.sim.data._data
    self._grip = environment.sim.model.site_name2id("gripper0_grip_site")
    self._solid = (self._model.geom_contype != 0) | (self._model.geom_conaffinity != 0)
    roots = self._model.body_rootid[self._model.geom_bodyid]
    self._geoms = {name: np.flatnonzero(self._solid & (roots == body)) for name, body in self._bodies.items()}

  @property
  def grip(self) -> Float[np.ndarray, "3"]:
    """Position of the point between the finger tips."""
    return self._data.site_xpos[self._grip].copy()

  @property
  def opening(self) -> float:
    """Meters between the fingers."""
    first, second = (self._sim.data.get_joint_qpos(f"gripper0_finger_joint{i}") for i in (1, 2))
    return float(first - second)

  @property
  def base(self) -> Float[np.ndarray, "2"]:
    """Where the arm stands, in the plane."""
    return self._data.body("robot0_base").xpos[:2].copy()

  @property
  def attitude(self) -> Float[np.ndarray, "3 3"]:
    """The gripper's rotation; its x axis is the one on which it closes."""
    return self._data.site_xmat[self._grip].reshape(3, 3).copy()

  def position(self, name: str) -> Float[np.ndarray, "3"]:
    """Of an object, a fixture or a region."""
    if name in self._bodies:
      return self._data.xpos[self._bodies[name]].copy()
    return np.array(self._sim.data.get_site_xpos(name))

  def owner(self, name: str) -> str | None:
    """The object or fixture that a region belongs to; None for one of the table's."""
    owners = [body for body in self._bodies if name == body or name.startswith(f"{body}_")]
    return max(owners, key=len, default=None)

  def points(self, name: str, spacing: float = 0.006) -> Float[np.ndarray, "n 3"]:
    """Points inside the collision shapes of an object, as boxes around each of them."""
    return self._fill(self._geoms[name], spacing)

  def part(self, name: str) -> fixtures.Part:
    """What moves of a fixture, or the drawer that a region is in."""
    joint, sign = self._joint(name)
    moving = self._solid & (self._model.geom_bodyid == self._model.jnt_bodyid[joint])
    return fixtures.Part(self._fill(np.flatnonzero(moving), 0.006), sign * self._data.xaxis[joint])

  def moved(self, name: str) -> float:
    """How far that part is from where it is closed, in meters or radians."""
    joint, sign = self._joint(name)
    return float(sign * self._data.qpos[self._model.jnt_qposadr[joint]])

  def is_in_drawer(self, region: str) -> bool:
    """Whether a region is in a drawer, which may be closed."""
    known = self._environment.object_sites_dict.get(region)
    return known is not None and bool(known.joints) and self._model.jnt_type[self._joint(region)[0]] == _SLIDE

  def holds(self, relation: str, name: str) -> bool:
    """Whether a drawer is open ("open") or a fixture on ("turnon"), by LIBERO's own rules."""
    state = self._environment.object_states_dict[name]
    return state.is_open() if relation == "open" else state.turn_on()

  def _joint(self, name: str) -> tuple[int, float]:
    """The joint of a fixture or region, and the sign of its positions when it is not closed."""
    joint = self._model.joint(self._environment.get_object(name).joints[0]).id
    low, high = self._model.jnt_range[joint]
    return joint, 1.0 if abs(high) > abs(low) else -1.0

  def _fill(self, geoms: Int[np.ndarray, " g"], spacing: float) -> Float[np.ndarray, "n 3"]:
    found = [np.zeros((0, 3))]
    for geom in geoms:
      rotation, box = self._data.geom_xmat[geom].reshape(3, 3), self._model.geom_aabb[geom]
      found.append(grasps.fill(self._data.geom_xpos[geom] + rotation @ box[:3], rotation, box[3:], spacing))
    return np.concatenate(found)

  def others(self, *names: str) -> Float[np.ndarray, "n 3"]:
    """Points of everything but the named."""
    found = [self.points(name, 0.01) for name in self._bodies if name not in names]
    return np.concatenate([np.zeros((0, 3)), *found])
