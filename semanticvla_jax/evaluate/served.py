"""A policy behind a server, as evaluations call it: `evaluate run --policy=ws://127.0.0.1:8000 --suite=place`.

A request of a lone client runs alone on the device, so the actions equal those of `Policy.infer` bit for bit, and so do
the results. Their fingerprint has the served policy's hash and the server's device, and says that it was served.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from semanticvla_jax.errors import refuse

SCHEMES = ("ws://", "wss://", "http://", "https://")
KEY = "SEMANTICVLA_API_KEY"  # environment variable: a key on the command line would be seen by others


def is_url(policy: str | None) -> bool:
  """Whether --policy names a server instead of a folder."""
  return policy is not None and policy.startswith(SCHEMES)


class ServedPolicy:
  """What evaluations need of a policy, through a server's openpi door.

  Args:
    url: of the server. Its key is read from the environment variable KEY.
    connections: requests under way at the same time, of `infer_batch`.

  Raises:
    ValueError: the server refuses. serve.client.ServerGone: it does not answer.
  """

  def __init__(self, url: str, connections: int = 1):
    from semanticvla_jax.serve.client import Client  # websockets and msgpack are needed for this alone

    key = os.environ.get(KEY)
    self.url = url
    self._clients = [Client(url, api_key=key, timeout=60.0, patience=120.0) for _ in range(connections)]
    self._pool = concurrent.futures.ThreadPoolExecutor(connections, "served")
    known = self._clients[0].metadata
    self.metadata = {**known, "folder": url}
    self.chunk, self.replan_steps = known["chunk"], known["replay"]
    self.gripper, self.image_size = known["grippers"]["openpi"]["convention"], known["image_size"]

  @property
  def facts(self) -> dict[str, Any]:
    """What its fingerprint says in addition: who served, and the device that computed."""
    known = self.metadata
    return {"device": known["device"], "served": {"server": known["server"], "protocol": "openpi"}}

  def close(self) -> None:
    """Closes the connections."""
    self._pool.shutdown()
    for client in self._clients:
      client.close()

  def reset(self) -> None:
    """Begins an episode."""
    self._clients[0].reset()

  def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
    """As `Policy.infer`."""
    return self._clients[0].infer(_plain(observation))

  def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As `Policy.infer_batch`; the server batches what arrives together."""
    found: list[dict[str, Any]] = []
    for first in range(0, len(observations), len(self._clients)):
      part = [_plain(one) for one in observations[first : first + len(self._clients)]]
      found += self._pool.map(lambda client, one: client.infer(one), self._clients, part)
    return found


def _plain(observation: Mapping[str, Any]) -> dict[str, Any]:
  """The same with arrays of numpy, whoever made them."""
  return {name: np.asarray(x) if hasattr(x, "__array__") else x for name, x in observation.items()}


def metadata(url: str) -> dict[str, Any]:
  """What a server says of its policy."""
  policy = ServedPolicy(url)
  policy.close()
  return policy.metadata | {"gripper": policy.gripper}


def check_flags(args: Any, allowed_controls: Sequence[str] = ("shuffled",)) -> None:
  """Raises ValueError for flags that would change what only the server can: its statistics, its dtype, its model."""
  for name in ("dataset", "dtype", "weights"):
    if getattr(args, name) not in (None, "full"):
      got = f"--{name}={getattr(args, name)} with --policy={args.policy}"
      raise refuse(f"--{name}", got, "a policy folder", f"start the server with --{name}")
  if other := [name for name in args.controls if name not in allowed_controls]:
    got = f"{', '.join(other)} with --policy={args.policy}"
    raise refuse("--controls", got, f"{', '.join(allowed_controls)}", "evaluate the policy folder for the others")
