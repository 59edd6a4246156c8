"""Which OpenGL device renders a simulator's frames, found by rendering with it.

MuJoCo and robosuite read CUDA_VISIBLE_DEVICES, MUJOCO_EGL_DEVICE_ID, MUJOCO_GL and PYOPENGL_PLATFORM, each in its own
way, and fail for values that CUDA accepts. So a rendering process gets its own environment variables, not those of
the shell, and the device is one that has rendered before.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from typing import NamedTuple

from semanticvla_jax.envs.subprocess_env import environment
from semanticvla_jax.errors import refuse

RENDERERS = ("egl", "osmesa")
PACKAGES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}  # of Debian and Ubuntu
_SECONDS = 180  # a first context on a busy machine takes some
_LOCK = threading.Lock()
_SCENE = (
  '<mujoco><visual><global offwidth="32" offheight="32"/></visual><worldbody><light pos="0 0 3"/>'
  '<geom type="box" size=".3 .3 .3" rgba="1 0 0 1"/></worldbody></mujoco>'
)


class Drawn(NamedTuple):
  """The result of drawing one small picture in a separate process.

  Attributes:
    devices: EGL devices that there are; None without EGL, or where they could not be counted.
    renderer: OpenGL's name of what drew; None where nothing was drawn.
    error: why not, in one line; None where it was.
    missing: the simulator's packages are not installed, so that nothing could be tried.
  """

  devices: int | None
  renderer: str | None
  error: str | None
  missing: bool = False


def variables(renderer: str, device: int | None = None) -> dict[str, str | None]:
  """The environment variables that a drawing process gets in addition to its parent's; None removes one.

  Args:
    renderer: "egl" or "osmesa".
    device: EGL's own number of the device, which may differ from CUDA's.
  """
  return {
    "MUJOCO_GL": renderer,
    "PYOPENGL_PLATFORM": renderer,
    "CUDA_VISIBLE_DEVICES": None,
    "MUJOCO_EGL_DEVICE_ID": None if device is None else str(device),
  }


def choose(renderer: str, device: int | None = None) -> int | None:
  """The EGL device to draw with: `device` if it works, else the first that does; None for OSMesa, which has none.

  The shell's MUJOCO_EGL_DEVICE_ID, or the first number in its CUDA_VISIBLE_DEVICES, is tried before the others.

  Raises:
    ValueError: there is no such device, or it cannot draw, or none can.
  """
  with _LOCK:  # simulators are started by several threads, and a message is printed once
    if renderer == "egl" and device is None:
      return _first(os.environ.get("MUJOCO_EGL_DEVICE_ID"), os.environ.get("CUDA_VISIBLE_DEVICES"))
    found = draw(renderer, device)
  if found.renderer is None:
    raise _refusal(renderer, device, found)
  return device


@functools.cache
def _first(wished: str | None, visible: str | None) -> int:
  """The first device that works; those that do not are named."""
  first = draw("egl", 0)
  count, failed = max(1, first.devices or 0), []
  numbers = [_number(wished), _number((visible or "").split(",")[0])]
  for device in dict.fromkeys([*(n for n in numbers if n is not None and n < count), *range(count)]):
    found = draw("egl", device)
    if found.renderer is not None:
      if wished and _number(wished) != device:
        failed.insert(0, f"MUJOCO_EGL_DEVICE_ID={wished!r} is not one of {count} EGL devices that works")
      if failed:
        logging.warning("%s; EGL device %d draws: %s.", "; ".join(failed), device, found.renderer)
      return device
    failed.append(f"EGL device {device} cannot draw ({found.error})")
  raise _refusal("egl", None, first)


def _number(word: str | None) -> int | None:
  return int(word) if word and word.strip().isascii() and word.strip().isdecimal() else None


def _refusal(renderer: str, device: int | None, found: Drawn) -> ValueError:
  """The error to raise for what cannot draw."""
  if device is not None and found.devices and not 0 <= device < found.devices:
    there = f"{found.devices} EGL device{'s' if found.devices > 1 else ''}"
    return refuse(
      "EGL device",
      device,
      f"0 to {found.devices - 1}, for this machine has {there}",
      "change --egl-device or leave it out",
    )
  name = {"egl": "EGL", "osmesa": "OSMesa"}[renderer] + ("" if device is None else f" device {device}")
  other = "another --egl-device or " if found.devices and found.devices > 1 else ""
  return refuse(
    "OpenGL",
    f"no picture from {name} ({found.error})",
    "a context that draws",
    f"apt-get install {PACKAGES[renderer]}, or choose {other}--renderer={'osmesa' if renderer == 'egl' else 'egl'}",
  )


@functools.cache
def draw(renderer: str, device: int | None = None) -> Drawn:
  """Draws in a separate process, as the simulator would, and reports which device did."""
  command = [sys.executable, "-m", __name__, renderer]
  with warnings.catch_warnings():  # jax warns of forks; this child becomes python at once
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called")
    try:
      done = subprocess.run(
        command,
        env=environment(variables(renderer, device)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_SECONDS,
        check=False,
      )
    except subprocess.TimeoutExpired:
      return Drawn(None, None, f"no answer within {_SECONDS} s")
  lines = done.stdout.decode(errors="replace").splitlines()
  answer = next((line for line in reversed(lines) if line.startswith('{"devices"')), None)
  if answer is None:
    last = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()][-1:]
    return Drawn(None, None, f"the process ended with status {done.returncode}: {last[0][:200] if last else 'silent'}")
  return Drawn(**json.loads(answer))


def _count() -> int | None:
  """EGL's devices, as the simulator counts them."""
  from mujoco.egl import egl_ext

  return len(egl_ext.eglQueryDevicesEXT())


def _picture() -> str:
  """Draws a box and returns OpenGL's name of what did.

  Raises:
    RuntimeError: the picture is empty; a missing library or device raises what it likes.
  """
  import mujoco
  from OpenGL import GL

  model = mujoco.MjModel.from_xml_string(_SCENE)
  data = mujoco.MjData(model)
  mujoco.mj_forward(model, data)
  with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    frame = renderer.render()
    name = GL.glGetString(GL.GL_RENDERER)
  if int(frame.max()) == int(frame.min()):
    raise RuntimeError("the picture is empty")
  return "unknown" if name is None else name.decode()


def main(argv: list[str]) -> None:
  """The process: draws with argv[0] as its variables say, and prints what came of it as one line of JSON."""
  found = {"devices": None, "renderer": None, "error": None, "missing": False}
  try:
    if argv[0] == "egl":
      found["devices"] = _count()
    if found["devices"] == 0:
      raise RuntimeError("EGL knows no device: neither a GPU's driver nor Mesa is installed")
    found["renderer"] = _picture()
  except Exception as error:  # missing or broken libraries may raise anything
    found["missing"] = isinstance(error, ModuleNotFoundError)
    found["error"] = next(iter(f"{type(error).__name__}: {error}".splitlines()))[:300]
  print(json.dumps(found), flush=True)
  os._exit(0)  # OpenGL contexts do not survive an orderly end


if __name__ == "__main__":
  main(sys.argv[1:])
