"""Flags that every source of LIBERO's demonstrations has: of the simulator, and of the dataset that is written."""

from __future__ import annotations

from collections.abc import Callable

from semanticvla_jax.libero import suites


def add_flags(add: Callable, settings: suites.Settings, seeded: str) -> None:
  """Adds them.

  Args:
    add: of an argparse parser. settings: the defaults. seeded: what the seed decides, for --help.
  """
  add_simulator_flags(add, settings)
  add("--size", type=int, default=settings.size, help="width and height of both views in pixels (default: 256)")
  add("--seed", type=int, default=settings.seed, help=f"seed of {seeded} (default: 0)")
  add("--out", default="data", help="folder of datasets (default: data)")
  add("--name", help="name of the dataset (default: <suite>_no_noops)")


def add_simulator_flags(add: Callable, settings: suites.Settings) -> None:
  """Adds those of how the simulator runs on this machine; see `add_flags`."""
  add("--workers", type=int, default=2, help="number of simulators running at once, about 2 GB each (default: 2)")
  add("--assets", help=f"folder of assets (default: ${suites.ASSETS_VARIABLE}, site-packages, ~/.cache/libero)")
  add("--renderer", default=settings.renderer, help="OpenGL library: egl or osmesa (default: egl)")
  add("--egl-device", type=int, help="number of the EGL device that renders (default: the first that works)")
