"""What published evaluations of LIBERO fix besides the simulator, and whose statistics a policy of a suite uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from semanticvla_jax.libero import suites


class Protocol(NamedTuple):
  """What a published evaluation fixes besides the simulator.

  Attributes:
    seed: of the resets.
    replan_steps: actions executed per policy query.
    jpeg_quality: of the round trip that frames take, as stored training frames did; None for none.
  """

  seed: int
  replan_steps: int
  jpeg_quality: int | None


PROTOCOLS = {"openvla": Protocol(0, 8, 95), "openpi": Protocol(7, 5, None)}


def fitting(names: Sequence[str], suite: str) -> list[str]:
  """Those of a policy's statistics that are in a LIBERO suite's units, the best first.

  The suite's own, with or without `_no_noops` as the release chooses, else those of the four suites together; a suite
  of LIBERO-PRO has those of the suite that it perturbs.
  """
  suite = suites.parent(suite)
  own = [name for name in (suite, f"{suite}_no_noops") if name in names]
  return own + [name for name in names if name.startswith("libero_4_task_suites") and suite != "libero_90"]
