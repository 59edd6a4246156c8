"""Images of training batches made on other hosts: a tf.data service of one dispatcher and one worker on each of them.

tf.data service sends a worker the graph of a dataset, in which our numpy functions are but keys into a table of the
process that made it. So each server makes the dataset itself, registers it with its own dispatcher, and a training host
reads it by its id. With n servers, batch i comes from server i modulo n: the batches and their order are those of one
pipeline here. Every host reads the dataset's columns itself; only images come from servers.

A server answers requests on one port (XML-RPC: `facts`, `begin`), its dispatcher and worker are on the two after it.
Nothing is encrypted and everybody is served, so the ports belong in a private network.
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import socketserver
import threading
import xmlrpc.client
import xmlrpc.server
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from semanticvla_jax import cli
from semanticvla_jax.data import images, pipeline
from semanticvla_jax.errors import refuse

PORT = 5050
_AHEAD = 2  # batches that each server, and each host for each server, works on ahead
_PATIENCE = 10.0  # seconds without a batch before a server is asked whether it is there
_ANSWER = 60.0  # seconds that an answer may take; a machine whose server has ended refuses at once
_COMMAND = "python -m semanticvla_jax.train.image_server"


class Unreachable(ValueError):
  """A server that does not answer; `address` says which."""

  def __init__(self, address: str, problem: str):
    message = refuse(
      f"Image server {address}",
      f"no answer ({problem})",
      "one that runs",
      f"start it there with `{_COMMAND} --config=…`, and run the command again: a run resumes",
    )
    super().__init__(str(message))
    self.address = address


class _Requests(socketserver.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
  daemon_threads = True


class ImageServer:
  """Serves the images of a loader's batches until it is closed.

  Args:
    loader: a loader.BatchLoader with the data and options of the training run.
    host: the name under which training hosts reach this machine.
    port: of the requests; 0 takes any three ports that are free.
    workers: threads that read for all training hosts, and as many that decode and augment for each, but of these no
      more than there are cores; None for one per core, at most 16.
    processes: that decode and augment, in place of threads; 0 for none.

  Attributes:
    address: "host:port" for training hosts.

  Raises:
    ValueError: a port that is not free.
  """

  def __init__(self, loader: Any, host: str, port: int = PORT, workers: int | None = None, processes: int = 0):
    import tensorflow as tf
    from tensorflow.data.experimental import service

    images.hide_accelerators()
    self._loader, self._datasets = loader, []
    dispatcher, worker = (port + 1, port + 2) if port else (0, 0)
    try:
      self._requests = _Requests(("", port), allow_none=True, logRequests=False)
      self._dispatcher = service.DispatchServer(service.DispatcherConfig(port=dispatcher))
      found = self._dispatcher.target.rpartition(":")[2]
      reached = f"{host}:%port%" if not worker else f"{host}:{worker}"
      self._worker = service.WorkerServer(service.WorkerConfig(f"localhost:{found}", reached, port=worker))
    except (OSError, RuntimeError, tf.errors.OpError) as error:
      got = f"{port} ({cli.first_line(error)})"
      raise refuse("--port", got, "one that is free, as are the two after it", "take another") from error
    self._dispatcher_port = int(found)
    self._held, self._calls = contextlib.ExitStack(), pipeline.Calls()
    # One pool of each for all hosts: hosts that come and go leave no threads behind.
    self._processes = self._held.enter_context(loader.stages(np.arange(1), processes))
    self._readers = self._held.enter_context(contextlib.closing(pipeline.Readers(pipeline.threads(workers))))
    self._requests.register_function(loader.image_facts, "facts")
    self._requests.register_function(self._begin, "begin")
    self.address = f"{host}:{self._requests.server_address[1]}"
    threading.Thread(target=self._requests.serve_forever, daemon=True).start()

  def _begin(self, start: int, rows: list[int], stride: int) -> list:
    """Registers `rows` of batches start, start + stride, …: the dispatcher's port and the dataset's id."""
    from tensorflow.data.experimental import service

    chosen = np.asarray(rows)
    with self._loader.stages(chosen) as stages:
      stages = stages._replace(make=self._processes.make, at_once=self._processes.at_once)
      how = dict(stride=stride, group=self._loader.group, prefetch=_AHEAD, calls=self._calls)
      dataset = pipeline.dataset(stages, start, len(chosen), self._readers, **how)
    self._datasets.append(dataset)  # its functions live as long
    number = service.register_dataset(f"grpc://localhost:{self._dispatcher_port}", dataset, compression=None)
    return [self._dispatcher_port, number.numpy().decode()]

  def close(self) -> None:
    """Ends the server, its threads and processes. Training hosts find it gone."""
    self._requests.shutdown()
    self._requests.server_close()
    self._calls.end()  # the worker's `stop` waits for its threads and holds Python's lock meanwhile
    self._worker.stop()
    self._dispatcher.stop()
    self._held.close()


class _Transport(xmlrpc.client.Transport):
  """XML-RPC's, with a limit to how long an answer may take."""

  def make_connection(self, host: Any) -> Any:
    connection = super().make_connection(host)
    connection.timeout = _ANSWER
    return connection


def batches(address: str, start: int, rows: Int[np.ndarray, " b"], stride: int) -> Iterator:
  """Batches start, start + stride, … of a server (see check_servers), as `pipeline.dataset` makes them.

  Args:
    address: "host:port" of an ImageServer.
    start, stride: see pipeline.dataset.
    rows: of each global batch.

  Raises:
    Unreachable: at once or while iterating.
    tf.errors.OpError: while iterating, for what fails in the server.
  """
  from tensorflow.data.experimental import service

  images.hide_accelerators()
  host, _, _ = address.rpartition(":")
  dispatcher, number = _call(address, "begin", start, rows.tolist(), stride)
  dataset = service.from_dataset_id(service.ShardingPolicy.OFF, f"grpc://{host}:{dispatcher}", number)
  return _watched(dataset.prefetch(_AHEAD).as_numpy_iterator(), lambda: _call(address, "facts"))


def check_servers(addresses: Sequence[str], facts: dict[str, str]) -> None:
  """Raises ValueError unless servers are there (Unreachable) and have these `BatchLoader.image_facts`."""
  for address in addresses:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
      raise refuse("config.data.servers", repr(address), "host:port of an image server", "correct it")
    _check_facts(address, _call(address, "facts"), facts)


def check(address: str, number: int, examples: Int[np.ndarray, "b 3"], wanted: Int[np.ndarray, "b 3"]) -> None:
  """Raises ValueError where a server has sent other examples than those of a batch."""
  if not np.array_equal(examples, wanted):
    raise refuse(
      f"Image server {address}, batch {number}", "other examples than drawn here", "the same", "start it anew"
    )


def _call(address: str, name: str, *arguments: Any) -> Any:
  """The answer of a server. Raises Unreachable where there is none."""
  with xmlrpc.client.ServerProxy(f"http://{address}", _Transport(), allow_none=True) as server:
    try:
      return getattr(server, name)(*arguments)
    except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
      raise Unreachable(address, cli.first_line(error)) from error


def _check_facts(address: str, theirs: dict[str, str], ours: dict[str, str]) -> None:
  differing = [name for name in ours if theirs.get(name) != ours[name]]
  if differing:
    name = differing[0]
    raise refuse(
      f"Image server {address}",
      f"{name}={_short(theirs.get(name))}" + (f" ({', '.join(differing[1:])} differ too)" if differing[1:] else ""),
      f"{name}={_short(ours[name])}, as this run has",
      "start it anew with this run's config, data and versions",
    )


def _short(text: str | None) -> str:
  return str(text) if len(str(text)) <= 80 else f"{str(text)[:77]}…"


def _watched(source: Iterator, ask: Callable[[], Any]) -> Iterator:
  """What `source` gives; tf.data waits for a server without end, so `ask`, which raises, is called meanwhile, and once
  more where `source` fails: a server that is being closed fails first."""
  wanted, given = queue.SimpleQueue(), queue.SimpleQueue()

  def work(held: list[Iterator]) -> None:
    while wanted.get():
      try:
        given.put(next(held[0]))
      except BaseException as error:  # for the thread that waits
        given.put(error)
    held.clear()

  threading.Thread(target=work, args=([source],), daemon=True).start()
  del source
  try:
    while True:
      wanted.put(True)
      while True:
        with contextlib.suppress(queue.Empty):
          found = given.get(timeout=_PATIENCE)
          break
        ask()
      if isinstance(found, BaseException):
        ask()
        raise found
      yield found
  finally:
    wanted.put(False)
