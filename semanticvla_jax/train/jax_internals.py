"""Names of jax that have no public equivalent, in one place: a release of jax that moves one is found by its test."""

from __future__ import annotations

from typing import Any


def coordination_client() -> Any | None:
  """The client of the coordination service that jax.distributed started, for its barrier; None without one."""
  from jax._src import distributed

  return distributed.global_state.client


def detect_cluster(method: str | None, seconds: int) -> tuple[Any, Any, Any, Any]:
  """(coordinator, processes, process, local devices) as jax.distributed.initialize() finds them, None where unknown."""
  from jax._src.clusters import ClusterEnv

  return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, method, seconds)


def on_gce_tpu() -> bool:
  """Whether this is a Cloud TPU VM, by its metadata."""
  from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

  return GceTpuCluster.is_env_present()
