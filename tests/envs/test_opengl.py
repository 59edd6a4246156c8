"""Which OpenGL device draws, whatever the shell's variables say."""

import functools
import importlib

import libero_assets
import pytest

from semanticvla_jax.envs.subprocess_env import Process, environment
from semanticvla_jax.libero import opengl, suites

VISIBLE = ("1", "", "GPU-3f5c0b1e-aa", "0,1", "MIG-GPU-3f/1/0", "-1", "NoDevFiles", "1,GPU-3f", " 2 ")
WRONG = {"MUJOCO_EGL_DEVICE_ID": "7", "MUJOCO_GL": "glfw", "PYOPENGL_PLATFORM": "glx"}


@pytest.fixture
def shell(monkeypatch):
  """Sets variables; what was chosen under others is forgotten."""

  def set_(**values):
    for name in ("CUDA_VISIBLE_DEVICES", *WRONG):
      monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
      monkeypatch.setenv(name, value)
    opengl._first.cache_clear()

  yield set_
  opengl._first.cache_clear()


@pytest.fixture
def machine(monkeypatch, shell):
  """A machine whose EGL devices are given by what draws with each, None for one that cannot."""

  def has(*devices):
    def draw(renderer, device=None):
      if not devices:
        return opengl.Drawn(0, None, "RuntimeError: EGL knows no device")
      if device is not None and not 0 <= device < len(devices):
        return opengl.Drawn(len(devices), None, "RuntimeError: must be an integer")
      name = devices[device or 0]
      return opengl.Drawn(len(devices), name, None if name else "ImportError: Cannot initialize a EGL device display")

    monkeypatch.setattr(opengl, "draw", draw)
    return shell

  return has


@pytest.mark.parametrize("visible", VISIBLE)
def test_a_process_that_draws_has_variables_of_its_own(visible, shell):
  shell(CUDA_VISIBLE_DEVICES=visible, **WRONG)
  egl, osmesa = (environment(opengl.variables(*which)) for which in (("egl", 3), ("osmesa",)))
  for given, renderer in ((egl, "egl"), (osmesa, "osmesa")):
    assert "CUDA_VISIBLE_DEVICES" not in given and given["MUJOCO_GL"] == given["PYOPENGL_PLATFORM"] == renderer
  assert egl["MUJOCO_EGL_DEVICE_ID"] == "3" and "MUJOCO_EGL_DEVICE_ID" not in osmesa
  assert egl["PATH"] == osmesa["PATH"]


def test_the_process_itself_sees_them(shell):
  shell(CUDA_VISIBLE_DEVICES="GPU-3f", **WRONG)
  process = Process(functools.partial(importlib.import_module, "os"), opengl.variables("egl", 0))
  try:
    seen = {name: process.ask("getenv", name) for name in ("CUDA_VISIBLE_DEVICES", *WRONG)}
  finally:
    process.close()
  assert seen == opengl.variables("egl", 0)


@pytest.mark.parametrize(
  "values, device",
  [
    ({}, 0),
    ({"CUDA_VISIBLE_DEVICES": "2"}, 2),
    ({"CUDA_VISIBLE_DEVICES": "1,0"}, 1),
    ({"CUDA_VISIBLE_DEVICES": "GPU-3f"}, 0),
    ({"CUDA_VISIBLE_DEVICES": ""}, 0),
    ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
    ({"CUDA_VISIBLE_DEVICES": "9"}, 0),
    ({"MUJOCO_EGL_DEVICE_ID": "1"}, 1),
    ({"MUJOCO_EGL_DEVICE_ID": ""}, 0),
    ({"MUJOCO_EGL_DEVICE_ID": "1", "CUDA_VISIBLE_DEVICES": "2"}, 1),
  ],
)
def test_the_first_that_works_is_one_the_shell_names_where_it_can_be(values, device, machine, caplog):
  machine("a GPU", "a GPU", "a GPU", "llvmpipe")(**values)
  assert opengl.choose("egl") == device and not caplog.records
  assert opengl.choose("egl", 3) == 3


@pytest.mark.parametrize("value", ["7", "-1", "GPU-3f", "0x0", "²"])
def test_a_wrong_number_in_the_shell_is_said_once_and_does_not_matter(value, machine, caplog):
  machine("a GPU")(MUJOCO_EGL_DEVICE_ID=value)
  assert opengl.choose("egl") == opengl.choose("egl") == 0
  (record,) = caplog.records
  assert f"MUJOCO_EGL_DEVICE_ID={value!r}" in record.getMessage() and "EGL device 0 draws" in record.getMessage()


def test_devices_that_cannot_draw_are_passed_over_aloud(machine, caplog):
  machine(None, None, "llvmpipe")(CUDA_VISIBLE_DEVICES="1")
  assert opengl.choose("egl") == 2
  (record,) = caplog.records
  told = record.getMessage()
  assert told.index("EGL device 1 cannot") < told.index("EGL device 0 cannot") and "device 2 draws: llvmpipe" in told


@pytest.mark.parametrize(
  "devices, asked, message",
  [
    (["a", "b"], 2, "got 2; expected 0 to 1, for this machine has 2 EGL devices"),
    (["a"], -1, "got -1; expected 0 to 0, for this machine has 1 EGL device;"),
    (["a", None], 1, "no picture from EGL device 1 .ImportError.*another --egl-device"),
    ([None], None, "no picture from EGL .ImportError.*libegl1.*--renderer=osmesa"),
    ([], None, "EGL knows no device"),
    ([], 0, "EGL knows no device"),
  ],
)
def test_what_cannot_draw_is_one_line(devices, asked, message, machine):
  machine(*devices)()
  with pytest.raises(ValueError, match=message) as refused:
    opengl.choose("egl", asked)
  assert "\n" not in str(refused.value)


def test_osmesa_has_no_devices_to_choose_from():
  with pytest.raises(ValueError, match="egl_device=0 with renderer='osmesa'"):
    suites.check(suites.Settings("libero_goal", renderer="osmesa", egl_device=0))


@pytest.mark.parametrize(
  "program, seconds, error",
  [
    ("/bin/false", 60, "ended with status 1: silent"),
    ("/bin/cat", 60, "ended with status 1: "),
    ("/usr/bin/python3", 0.0001, "no answer within"),
  ],
)
def test_a_driver_that_kills_its_process_or_hangs_is_survived(program, seconds, error, monkeypatch):
  monkeypatch.setattr(opengl.sys, "executable", program)
  monkeypatch.setattr(opengl, "_SECONDS", seconds)
  found = opengl.draw.__wrapped__("egl", 0)
  assert found.renderer is None and error in found.error


@pytest.mark.sim
@pytest.mark.parametrize("visible", VISIBLE)
def test_it_draws_whatever_the_shell_says(visible, shell):
  libero_assets.assets()  # skips where there is no simulator
  shell(CUDA_VISIBLE_DEVICES=visible, **WRONG)
  found = opengl.draw.__wrapped__("egl", opengl.choose("egl"))
  assert found.error is None and found.renderer and found.devices >= 1


@pytest.mark.sim
def test_an_index_too_far_names_how_many_there_are():
  libero_assets.assets()
  count = opengl.draw("egl", 0).devices
  with pytest.raises(ValueError, match=f"got {count}; expected 0 to {count - 1}, for this machine has {count} EGL"):
    opengl.choose("egl", count)
