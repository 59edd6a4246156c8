"""Wall-clock times of several functions in turns, their quantiles, and the device's rates of copies and products."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from semanticvla_jax.benchmark import record

QUANTILES = {"p50": 50, "p95": 95, "p99": 99}


def in_turns(
  functions: Mapping[str, Callable[[], Any]], calls: int, blocks: int = 5, settle: float = 0.0
) -> dict[str, np.ndarray]:
  """Seconds of each call of each function, f64[calls]: in blocks that alternate, so that a drift meets all alike.

  Each function returns when its work is done. Before each block it is called once untimed; its caches and threads, and
  nobody else's, are then warm.

  Args:
    settle: seconds to wait before a block, where another library's threads still spin after its last call.
  """
  found: dict[str, list[float]] = {name: [] for name in functions}
  blocks = min(blocks, calls)
  for block in range(blocks):
    share = calls * (block + 1) // blocks - calls * block // blocks
    for name, function in functions.items():
      time.sleep(settle)
      function()
      for _ in range(share):
        begin = time.perf_counter()
        function()
        found[name].append(time.perf_counter() - begin)
  return {name: np.array(seconds) for name, seconds in found.items()}


def add_quantiles(result: record.Result, name: str, seconds: np.ndarray) -> None:
  """Adds p50, p95, p99 and the least of some times to a result, in milliseconds."""
  for label, q in QUANTILES.items():
    result.add(f"{name} {label}", 1e3 * float(np.percentile(seconds, q)), "ms")
  result.add(f"{name} min", 1e3 * float(seconds.min()), "ms", quiet=True)


def best(function: Callable[[], Any], repeats: int = 5) -> float:
  """Seconds of the fastest of some calls after a first one."""
  function()
  found = []
  for _ in range(repeats):
    begin = time.perf_counter()
    function()
    found.append(time.perf_counter() - begin)
  return min(found)


def rates(dtype: str, smoke: bool = False) -> dict[str, float]:
  """What the device does at its best, measured now: {"copy": bytes/s read and written, "matmul": FLOP/s in `dtype`}.

  Large arrays and square products, each the best of several sizes and calls. On CPUs a copy by one thread per core
  counts too, where it is faster than the compiled one.
  """
  on_cpu = jax.default_backend() == "cpu"
  nbytes = 1 << (24 if smoke else 28 if on_cpu else 31)
  sides = (256,) if smoke else (1024, 2048) if on_cpu else (4096, 8192, 16384)
  return {"copy": _copy_rate(nbytes, on_cpu), "matmul": max(_matmul_rate(n, dtype) for n in sides)}


def _copy_rate(nbytes: int, on_cpu: bool) -> float:
  x = jnp.ones((nbytes // 4,), jnp.float32)
  negate = jax.jit(lambda x: -x)
  seconds = best(lambda: negate(x).block_until_ready())
  return 2 * nbytes / (min(seconds, _threaded_copy(nbytes)) if on_cpu else seconds)


def _threaded_copy(nbytes: int) -> float:
  """Seconds to copy so many bytes of host memory, a thread per core."""
  source, target = np.ones(nbytes // 4, np.float32), np.zeros(nbytes // 4, np.float32)
  workers = record.cores()
  parts = list(zip(np.array_split(source, workers), np.array_split(target, workers)))
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    return best(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts)))


def _matmul_rate(side: int, dtype: str) -> float:
  keys = jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(key, (side, side), jnp.dtype(dtype)) for key in keys)
  product = jax.jit(jnp.matmul)
  return 2 * side**3 / best(lambda: product(a, b).block_until_ready())
