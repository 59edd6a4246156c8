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
from multiprocessing.connection import Connection
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


class _Worker(NamedTuple):
  process: subprocess.Popen
  connection: Connection


class ImageProcesses:
  """Processes that make images, as many as `count`; to be called from as many threads at a time.

  Raises:
    ValueError: when called, for an image that cannot be used, or when a process has ended by itself.
  """

  def __init__(self, how: ExampleImages, count: int):
    self._workers = [_start(how) for _ in range(count)]
    self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in self._workers:
      self._free.put(worker)

  def __call__(self, examples: Int[np.ndarray, "g 3"], encoded: Sequence[bytes]) -> UInt8[np.ndarray, "g v s s 3"]:
    """As ExampleImages.make."""
    worker = self._free.get()
    try:
      worker.connection.send((examples, list(encoded)))
      found = worker.connection.recv()
    except (EOFError, OSError) as error:
      raise _ended(worker.process) from error
    finally:
      self._free.put(worker)
    if isinstance(found, ValueError):
      raise found
    return found

  def close(self) -> None:
    """Ends the processes and waits for them."""
    for worker in self._workers:
      worker.connection.close()
    for worker in self._workers:
      worker.process.wait()


def _start(how: ExampleImages) -> _Worker:
  ours, theirs = socket.socketpair()
  with theirs:
    command = [sys.executable, "-m", "semanticvla_jax.data.image_processes", str(theirs.fileno())]
    process = subprocess.Popen(
      command, pass_fds=[theirs.fileno()], env=os.environ | _VARIABLES, stdin=subprocess.DEVNULL
    )
  connection = Connection(ours.detach())
  connection.send(how)
  return _Worker(process, connection)


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


def _serve(connection: Connection) -> None:
  """Makes images until the other side is gone."""
  try:
    how = connection.recv()
    while True:
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
  _serve(Connection(int(sys.argv[1])))
