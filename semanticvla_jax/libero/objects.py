"""Where in a frame the objects are that a LIBERO task names, by MuJoCo's segmentation rendering.

They are those of the bddl's `(:obj_of_interest …)`. A part of an object or fixture ("wooden_cabinet_1_top_region")
means the whole one; a region of the table is not an object.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool


def named(environment: Any) -> list[str]:
  """Names of the objects and fixtures of interest in a robosuite environment of LIBERO."""
  known = {**environment.objects_dict, **environment.fixtures_dict}
  wanted = environment.obj_of_interest
  parts = [[name for name in known if one == name or one.startswith(f"{name}_")] for one in wanted]
  return [*dict.fromkeys(max(names, key=len) for names in parts if names)]


def geoms(environment: Any) -> Bool[np.ndarray, " g"]:
  """Which geoms belong to the objects of interest; known until the next hard reset."""
  known = {**environment.objects_dict, **environment.fixtures_dict}
  model = environment.sim.model
  roots = {model.body_name2id(known[name].root_body) for name in named(environment)}
  parents = np.asarray(model.body_parentid)
  inside = np.zeros(len(parents), bool)
  for body, parent in enumerate(parents):  # a parent comes before its children
    inside[body] = body in roots or (body > 0 and inside[parent])
  return inside[np.asarray(model.geom_bodyid)]


def mask(environment: Any, camera: str, size: int, wanted: Bool[np.ndarray, " g"]) -> Bool[np.ndarray, "{size} {size}"]:
  """The pixels of a camera that show one of the wanted geoms now, rows as OpenGL has them: bottom first.

  robosuite's own decoding of the ids overflows with numpy 2, so the colors are read here.
  """
  from mujoco import mjtObj

  sim = environment.sim
  context = sim._render_context_offscreen
  context.render(width=size, height=size, camera_id=sim.model.camera_name2id(camera), segmentation=True)
  red, green, blue = np.moveaxis(context.read_pixels(size, size).astype(np.int32), -1, 0)
  scene = context.scn
  shown = np.zeros(scene.ngeom + 1, bool)  # by segment: 0 is the background
  for i in range(scene.ngeom):
    one = scene.geoms[i]
    if one.segid >= 0 and one.objtype == mjtObj.mjOBJ_GEOM:
      shown[one.segid + 1] = wanted[one.objid]
  segment = red + 256 * green + 65536 * blue
  return shown[np.where(segment <= scene.ngeom, segment, 0)]
