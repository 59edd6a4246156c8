"""A server of a tiny policy over a real socket, and what a client of each protocol sends."""

import contextlib
import threading

import numpy as np
import policies
from websockets.sync.client import connect

from semanticvla_jax.serve import contract, limits, wire
from semanticvla_jax.serve.core import Core, Settings
from semanticvla_jax.serve.metrics import Metrics
from semanticvla_jax.serve.server import Address, Background
from semanticvla_jax.serve.site import Site

KEY = "a key of the tests, long enough"


class Slow:
  """A policy that waits for `release` in every call of the device, and can fail."""

  def __init__(self, policy):
    self._policy, self.release, self.calls, self.fails = policy, threading.Event(), [], False
    self.stats, self.preparation, self.metadata = policy.stats, policy.preparation, policy.metadata
    self.observe = policy.observe

  def device_step(self, prepared):
    self.calls.append(len(prepared.images))
    if self.fails:
      raise RuntimeError("the device is on fire")
    assert self.release.wait(30)
    return self._policy.device_step(prepared)


@contextlib.contextmanager
def serving(
  policy, settings=None, *, limit="off", key=None, record=None, grippers=(), clients=256, doors=(), **options
):
  """Yields (site, port) of a server in a thread, until the block ends."""
  metrics = Metrics()
  settings = Settings(max_batch=max(policy.metadata["batch_sizes"])) if settings is None else settings
  core = Core(policy, settings, limits.ActionLimit(policy.stats.action, limit), metrics, record)
  metrics.attach(core)
  site = Site(core, metrics, contract.grippers(grippers), **options)
  core.start()
  try:
    opening = [lambda loop, door=door: door(site, loop) for door in doors]
    background = Background(site, Address(port=0, key=key, clients=clients), opening)
    site.terminate = lambda: background.server.handle_exit(15, None)  # as SIGTERM does
    with background as port:
      site.other_doors = background.server.opened
      yield site, port
  finally:
    core.close()


class Robot:
  """openpi's protocol in ten lines."""

  def __init__(self, port, path="/", headers=None):
    options = dict(compression=None, max_size=None, open_timeout=600)
    self.opened = connect(f"ws://127.0.0.1:{port}{path}", additional_headers=headers, **options)
    self.socket = self.opened.__enter__()
    self.metadata = wire.unpack(self.socket.recv(timeout=600))

  def ask(self, value):
    self.socket.send(value if isinstance(value, bytes | str) else wire.pack(value))
    reply = self.socket.recv(timeout=600)
    return reply if isinstance(reply, str) else wire.unpack(reply)


@contextlib.contextmanager
def robot(port, path="/", headers=None):
  found = Robot(port, path, headers)
  try:
    yield found
  finally:
    found.opened.__exit__(None, None, None)


def observation(seed=0, prompt="pick up the red cube"):
  return policies.observation(seed, prompt=prompt)


def equal(a, b):
  np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  return True
