"""Images of examples made in other processes, where Python's lock would hold back the threads of one.

A process is started as `python -m semanticvla_jax.data.image_processes`, never forked, and imports numpy and Pillow
alone. It ends when its end of the socket closes, so also when this process is killed; signals to the group of both
(Ctrl-C, a preemption) are this process's to answer, which still needs batches while it saves.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from semanticvla_jax.data.example_images import ExampleImages
from semanticvla_jax.errors import refuse

# Each process works on one image at a time: threads of a linear algebra library would only get in each other's way. And
# glibc would give each temporary of an image back to the system, which costs more than what is computed in it.
_VARIABLES = {
  "OPENBLAS_NUM_THREADS": "1",
  "OMP_NUM_THREADS": "1",
  "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
  "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
  "MALLOC_TOP_PAD_": str(16 << 20),
}
_AHEAD = 2  # requests that a process has at a time: one to work on while another comes or its images go back


class _Worker(NamedTuple):
  process: subprocess.Popen
  connections: tuple[Connection, ...]  # one for each request that it has at a time


class ImageProcesses:
  """Processes that make images, as many as `count`.

  Attributes:
    at_once: threads that may call at a time; fewer do not keep all processes busy.

  Raises:
    ValueError: when called, for an image that cannot be used, or when a process has ended by itself.
  """

  def __init__(self, how: ExampleImages, count: int):
    self.at_once = count * _AHEAD
    self._workers = [_start(how) for _ in range(count)]
    self._free: queue.SimpleQueue[tuple[subprocess.Popen, Connection]] = queue.SimpleQueue()
    for i in range(_AHEAD):
      for process, connections in self._workers:
        self._free.put((process, connections[i]))

  def __call__(self, examples: Int[np.ndarray, "g 3"], encoded: Sequence[bytes]) -> UInt8[np.ndarray, "g v s s 3"]:
    """As ExampleImages.make."""
    process, connection = self._free.get()
    try:
      connection.send((examples, list(encoded)))
      found = connection.recv()
    except (EOFError, OSError) as error:
      raise _ended(process) from error
    finally:
      self._free.put((process, connection))
    if isinstance(found, ValueError):
      raise found
    return found

  def close(self) -> None:
    """Ends the processes and waits for them."""
    for _, connections in self._workers:
      for connection in connections:
        connection.close()
    for process, _ in self._workers:
      process.wait()


def _start(how: ExampleImages) -> _Worker:
  pairs = [socket.socketpair() for _ in range(_AHEAD)]
  theirs = [one.fileno() for _, one in pairs]
  command = [sys.executable, "-m", "semanticvla_jax.data.image_processes", *map(str, theirs)]
  try:
    process = subprocess.Popen(command, pass_fds=theirs, env=os.environ | _VARIABLES, stdin=subprocess.DEVNULL)
  finally:
    for _, one in pairs:
      one.close()
  connections = tuple(Connection(ours.detach()) for ours, _ in pairs)
  connections[0].send(how)
  return _Worker(process, connections)


def _ended(process: subprocess.Popen) -> ValueError:
  try:
    status = process.wait(timeout=5)
  except subprocess.TimeoutExpired:
    status = None
  return refuse(
    "A process that makes images",
    "no answer" if status is None else f"its end with status {status}",
    "images",
    "-9: less memory for each, lower config.data.processes; else see what it printed",
  )


def _serve(connections: Sequence[Connection]) -> None:
  """Makes images until the other side is gone."""
  try:
    how = connections[0].recv()
    while True:
      for connection in wait(connections):
        examples, encoded = connection.recv()
        try:
          connection.send(how.make(examples, encoded))
        except ValueError as error:
          connection.send(error)
  except (EOFError, OSError):
    return


if __name__ == "__main__":
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  _serve([Connection(int(number)) for number in sys.argv[1:]])
