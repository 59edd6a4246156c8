"""Whether the LIBERO simulator can run here: packages, assets, an OpenGL library; tests skip with the reason if not."""

import ctypes.util
from pathlib import Path

import pytest

from semanticvla_jax.libero import suites

SHARED = Path(__file__).parents[2] / "shared" / "libero"
DEMONSTRATIONS = SHARED / "demonstrations"
RECORDED_WITH = "3.8.1"  # the version of mujoco, which decides where objects come to rest

skipped = pytest.mark.skipif(not suites.is_installed(), reason="LIBERO is not installed: make sim")


def installed(test):
  """Marks a test that reads the benchmark's tasks but starts no simulator: it runs where `make sim` installed them."""
  return pytest.mark.sim(skipped(test))


def assets() -> str:
  """The folder of assets: a configured one, or that of the packages that `make sim` installs."""
  if not suites.is_installed():
    pytest.skip("LIBERO is not installed: make sim")
  if ctypes.util.find_library("EGL") is None:
    pytest.skip("no EGL library: apt-get install libegl1 libgl1-mesa-dri")
  try:
    return str(suites.find_assets())
  except ValueError as error:
    pytest.skip(str(error))


def demonstrations() -> Path:
  """The folder of recorded demonstrations."""
  if not DEMONSTRATIONS.is_dir():
    pytest.skip(f"no demonstrations: {DEMONSTRATIONS} does not exist")
  return DEMONSTRATIONS
