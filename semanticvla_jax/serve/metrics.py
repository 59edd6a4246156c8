"""What the server counts, for Prometheus: a separate registry for each server."""

from __future__ import annotations

from typing import Any

import jax
import prometheus_client as prometheus

from semanticvla_jax.serve.core import Answer, Core

_PREFIX = "semanticvla_"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
  """Counters and histograms of one server; those of a core are added by `attach`."""

  def __init__(self):
    self._registry = prometheus.CollectorRegistry()
    own = {"registry": self._registry}
    prometheus.ProcessCollector(registry=self._registry)
    latency = "Seconds of an answered request, by door and layer (prepare, queue, infer, total)"
    self._latency = prometheus.Histogram(f"{_PREFIX}seconds", latency, ["door", "layer"], buckets=_SECONDS, **own)
    self._errors = prometheus.Counter(f"{_PREFIX}errors", "Requests answered with an error", ["door", "kind"], **own)
    self._sizes = prometheus.Histogram(f"{_PREFIX}batch_size", "Observations of a device call", buckets=_SIZES, **own)
    self._device = prometheus.Histogram(f"{_PREFIX}device_seconds", "Seconds of a device call", buckets=_SECONDS, **own)
    self._outside = prometheus.Counter(f"{_PREFIX}actions_outside_range", "Actions outside the training data's", **own)
    self._clients = prometheus.Gauge(f"{_PREFIX}clients", "Open websocket connections", ["door"], **own)

  def attach(self, core: Core) -> None:
    """Adds what is read from a core when it is asked for: queue, caches, device memory."""
    self._read("queue_depth", "Requests that wait for the device", lambda: core.depth)
    self._read("under_way", "Requests accepted and not answered yet", lambda: core.under_way)
    policy = core.policy
    if hasattr(policy, "inference"):
      self._read("cached_sentences", "Sentences whose states the device keeps", lambda: policy.inference.cached)
      self._read("cached_tokens", "Sentences whose tokens are kept", lambda: policy.preparation.cached)
    if (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use") is not None:
      self._read("device_bytes", "Device memory in use", lambda: jax.local_devices()[0].memory_stats()["bytes_in_use"])

  def _read(self, name: str, text: str, function: Any) -> None:
    prometheus.Gauge(_PREFIX + name, text, registry=self._registry).set_function(function)

  def batch(self, size: int, seconds: float) -> None:
    """One call of the device."""
    self._sizes.observe(size)
    self._device.observe(seconds)

  def outside(self, count: int) -> None:
    """Actions outside the range of the training data."""
    self._outside.inc(count)

  def answered(self, door: str, answer: Answer, total: float) -> None:
    """An answer, and the seconds from the request's arrival to it."""
    for layer, seconds in (*answer.seconds.items(), ("total", total)):
      self._latency.labels(door, layer).observe(seconds)

  def error(self, door: str, kind: str) -> None:
    """A request that got an error; `kind` is one of core.KINDS."""
    self._errors.labels(door, kind).inc()

  def client(self, door: str, change: int) -> None:
    """A websocket opened (+1) or closed (-1)."""
    self._clients.labels(door).inc(change)

  def text(self) -> bytes:
    """All of them in Prometheus' text format."""
    return prometheus.generate_latest(self._registry)
