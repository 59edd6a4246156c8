"""A policy server under load, over loopback: latency and observations a second, and what a door itself costs.

Server and clients are separate processes. "one at a time" is the same server with a largest batch of one. A policy
of zeros, which neither prepares nor computes, shows the overhead of the doors.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from semanticvla_jax.benchmark import timing
from semanticvla_jax.benchmark.load import PROTOCOLS
from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.errors import refuse

SERVERS = {"batched": ["--batch-sizes=1,2,4,8"], "one at a time": ["--batch-sizes=1"]}
SAMPLES = 60  # of the memory of a server under a long load
BLOCKS = 4  # in which a load alternates between the two
PIXELS = 224  # of the images that the policy of zeros is sent, two views


def measure(result: Result, folder: str, clients: Sequence[int], seconds: float, soak: float = 0) -> None:
  """Loads a served policy with each number of clients, batched and one at a time, then the doors alone.

  Args:
    folder: policy folder. clients: numbers of clients at once. seconds: for each of them.
    soak: seconds for which the last number of clients asks while the server's memory is sampled; 0 for none.

  Adds for each: p50, p95, p99 in ms, observations a second, errors; the ratio of throughputs; the doors' overhead.
  """
  with contextlib.ExitStack() as stack:
    urls = {name: stack.enter_context(server(["--policy", folder, *flags], result)) for name, flags in SERVERS.items()}
    for count in clients:
      found = in_turns(urls, count, seconds)
      batched, single = (_add(result, f"{name}, {count} clients", one) for name, one in found.items())
      result.add(f"batched / one at a time, {count} clients", batched / single, "ratio")
    _add(
      result, f"disturbed, {clients[-1]} clients", load(urls["batched"], "openpi", clients[-1], seconds, disturbed=True)
    )
    if soak:
      _soak(result, urls["batched"], clients[-1], soak)
  with zeros() as url:
    for protocol in PROTOCOLS:
      _add(result, f"door {protocol}, policy of zeros", load(url, protocol, 1, seconds))


def in_turns(urls: dict[str, str], clients: int, seconds: float) -> dict[str, dict[str, Any]]:
  """Loads servers in blocks that alternate, so that what else the machine does meets all alike.

  Returns:
    {name: what `load` gives for all its blocks}.
  """
  found = {name: {"ms": [], "seconds": 0.0, "errors": 0, "error": None} for name in urls}
  for _ in range(BLOCKS):
    for name, url in urls.items():
      one = load(url, "openpi", clients, seconds / BLOCKS)
      total = found[name]
      found[name] = {key: total[key] + one[key] for key in ("ms", "seconds", "errors")}
      found[name]["error"] = total["error"] or one["error"]
  return found


def _soak(result: Result, url: str, clients: int, seconds: float) -> None:
  """Adds the figures of a long load, and by how much the server's memory grew over its second half."""
  name, samples = f"soak, {clients} clients", [(0.0, memory(url))]
  ended, begin = threading.Event(), time.perf_counter()

  def sample() -> None:
    while not ended.wait(seconds / SAMPLES):
      samples.append((time.perf_counter() - begin, memory(url)))

  sampler = threading.Thread(target=sample)
  sampler.start()
  try:
    found = load(url, "openpi", clients, seconds)
  finally:
    ended.set()
    sampler.join()
  _add(result, name, found)
  result.add(f"{name}, memory at the start", samples[0][1] / 1e6, "MB")
  result.add(f"{name}, memory at the end", samples[-1][1] / 1e6, "MB")
  result.add(f"{name}, memory growth", growth(samples[len(samples) // 2 :]), "MB/min")


def growth(samples: Sequence[tuple[float, float]]) -> float:
  """Slope of a line fitted to (seconds, bytes), in MB a minute."""
  seconds, resident = np.array(samples).T
  return float(np.polyfit(seconds, resident, 1)[0] * 60 / 1e6)


def memory(url: str) -> float:
  """Resident bytes of a server's process."""
  text = urllib.request.urlopen(f"{url}/metrics").read().decode()
  return float(next(line.split()[1] for line in text.splitlines() if line.startswith("process_resident_memory_bytes ")))


def _add(result: Result, name: str, found: dict[str, Any]) -> float:
  """Adds one load's figures; returns observations a second."""
  if found["error"] is not None:
    result.note(f"{name}: {found['errors']} errors, the first: {found['error']}")
  if not found["ms"]:
    raise refuse(name, "no answer at all", "a server that answers", "look at its messages")
  timing.add_quantiles(result, name, np.array(found["ms"]) / 1e3)
  rate = len(found["ms"]) / found["seconds"]
  result.add(f"{name}, throughput", rate, "observations/s")
  result.add(f"{name}, errors", found["errors"], f"of {found['errors'] + len(found['ms'])} requests")
  return rate


def load(url: str, protocol: str, clients: int, seconds: float, disturbed: bool = False) -> dict[str, Any]:
  """What `benchmark.load` measured in a separate process."""
  settings = dict(url=url, protocol=protocol, clients=clients, seconds=seconds, disturbed=disturbed)
  command = [sys.executable, "-m", "semanticvla_jax.benchmark.load", json.dumps(settings)]
  return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@contextlib.contextmanager
def server(flags: Sequence[str], result: Result) -> Iterator[str]:
  """The serve command on a free port; yields its address when it is ready, and adds how long that took."""
  command = [sys.executable, "-m", "semanticvla_jax.serve", "--port", "0", *flags]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    try:
      url = None
      for line in process.stdout:
        word, _, rest = line.strip().partition(" ")
        url = rest.strip() if word == "listens" else url
        if word == "ready":
          result.add(f"ready, {' '.join(flags[2:])}", float(rest.split()[1]), "s")
          break
      if url is None:
        raise refuse("serve", "no line that it listens", "a server that starts", "look at its messages")
      yield url
    finally:
      process.terminate()


class Zeros:
  """A policy that neither prepares nor computes: actions of zeros."""

  metadata = {
    "views": ["image", "wrist_image"],
    "proprio_dim": 8,
    "action_dim": 7,
    "chunk": 8,
    "replay": 8,
    "image_size": PIXELS,
    "gripper": "command",
    "dataset": "libero",
    "policy_hash": "zeros",
    "batch_sizes": [8],
    "prompt_lengths": [],
    "dtype": "float32",
  }

  class preparation:
    """Actions as they are."""

    gripper, robot = "command", None

    @staticmethod
    def actions(normalized: np.ndarray) -> np.ndarray:
      """See `Preparation`."""
      return normalized

  def __init__(self, stats: Any):
    self.stats = stats

  def observe(self, observations: Sequence[dict]) -> np.ndarray:
    """A number for each."""
    return np.zeros(len(observations))

  def device_step(self, prepared: np.ndarray) -> np.ndarray:
    """f32[b 8 7]."""
    return np.zeros((len(prepared), 8, 7), np.float32)


@contextlib.contextmanager
def zeros() -> Iterator[str]:
  """A server of `Zeros` in this process; yields its address."""
  from semanticvla_jax.data.statistics import DatasetStatistics, compute
  from semanticvla_jax.serve import contract, core, limits, metrics, server, site

  some = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
  stats = DatasetStatistics(compute(some[:, :7], [True] * 6 + [False]), compute(some), 50, 1)
  counted = metrics.Metrics()
  one = core.Core(Zeros(stats), core.Settings(), limits.ActionLimit(stats.action, "off"), counted)
  counted.attach(one)
  one.start()
  try:
    with server.Background(site.Site(one, counted, contract.grippers([]))) as port:
      yield f"http://127.0.0.1:{port}"
  finally:
    one.close()
