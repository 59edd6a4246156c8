"""Several hosts as one run: who takes part, meeting points with a deadline, and the notice before a preemption.

`jax.distributed` does the work. What it lacks is a message: where a host is missing it ends the program after its
time-out without saying which one, so the processes call the roll first, over the coordinator's own port.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from semanticvla_jax import files
from semanticvla_jax.errors import refuse
from semanticvla_jax.train import jax_internals

PREEMPTED = 75  # exit status of a run that SIGTERM stopped after saving, to be started again (EX_TEMPFAIL)
METHODS = ("auto", "none", "tpu", "slurm")
# How long XLA's collectives on CPUs wait for another process, and for another device of this one.
PATIENCE = ("xla_cpu_collective_timeout_seconds", "xla_cpu_collective_call_terminate_timeout_seconds")


def initialize(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  multihost: str = "auto",
  deadline: float = 300.0,
  config: str = "",
) -> None:
  """Joins this process to the others, before any other use of jax.

  Args:
    coordinator, processes, process: "host:port" of process 0, how many there are, which one this is; all or none.
    multihost: where to find them otherwise. 'tpu': the metadata of a TPU VM or GKE; 'slurm': the job step, one task a
      device; 'auto': either where the environment names several hosts; 'none': this process alone.
    deadline: seconds to wait for the others. config: what all of them must have alike, as text or a hash of it.

  Raises:
    ValueError: flags that contradict each other; or, by number, processes that did not come within the deadline or have
      another config.
  """
  given = [x is not None for x in (coordinator, processes, process)]
  if any(given) and not all(given):
    raise refuse(
      "distributed",
      f"--coordinator={coordinator} --processes={processes} --process={process}",
      "all three or none",
      "give them all; --process counts from 0",
    )
  devices = None
  if not any(given):
    if multihost not in METHODS:
      raise refuse("distributed", f"--multihost={multihost}", f"one of {METHODS}", "choose one of them")
    if multihost == "none" or (multihost == "auto" and not several_hosts(os.environ) and not on_tpu_vm()):
      return
    coordinator, processes, process, devices = detect(multihost, deadline)
  if processes < 1 or not 0 <= process < processes or ":" not in coordinator:
    raise refuse(
      "distributed",
      f"process {process} of {processes} with coordinator {coordinator!r}",
      "0 … processes-1 and host:port",
      "fix --process, --processes, --coordinator",
    )
  check_all_processes_joined(coordinator, processes, process, deadline, config)
  raise_cpu_collective_timeout(deadline)
  jax.distributed.initialize(
    coordinator, processes, process, local_device_ids=devices, initialization_timeout=int(max(deadline, 1))
  )


def raise_cpu_collective_timeout(deadline: float) -> None:
  """Lets collectives on CPUs wait `deadline` seconds instead of half a minute (Gloo), where XLA_FLAGS does not say.

  Elsewhere they wait for ever, and flags that a plugin may not know are better left out.
  """
  if jax.config.jax_platforms != "cpu":
    return
  given = os.environ.get("XLA_FLAGS", "")
  missing = [f"--{name}={int(max(deadline, 60))}" for name in PATIENCE if name not in given]
  os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()


def several_hosts(environment: Mapping[str, str]) -> bool:
  """Whether the environment of a SLURM job step or of a TPU pod names more than one process."""
  slurm = "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1
  return (
    slurm or "," in environment.get("TPU_WORKER_HOSTNAMES", "") or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1
  )


def on_tpu_vm() -> bool:
  """Whether this is a Cloud TPU VM, whose metadata know the other workers (on GKE the environment does)."""
  return jax_internals.on_gce_tpu()


def detect(multihost: str, deadline: float) -> tuple[str, int, int, list[int] | None]:
  """(coordinator, processes, process, local devices) as jax's own detection finds them.

  Raises:
    ValueError: when it finds none.
  """
  found, slurm = (None, None, None, None), multihost == "slurm"
  if not slurm or "SLURM_STEP_NODELIST" in os.environ:
    seconds, method = int(max(deadline, 1)), "slurm" if slurm else None
    found = jax_internals.detect_cluster(method, seconds)
  if None in found[:3]:
    raise refuse(
      "distributed",
      f"--multihost={multihost}, but no such cluster around this process",
      "a TPU VM's metadata or a SLURM job step (srun)",
      "start it there, or pass --coordinator, --processes and --process",
    )
  return found


def check_all_processes_joined(
  coordinator: str, processes: int, process: int, deadline: float, config: str = ""
) -> None:
  """Returns when all processes have answered, with the config of process 0.

  Raises:
    ValueError: with the numbers of those missing at the deadline, or of those with another config; on all processes.
  """
  if processes == 1:
    return
  host, _, port = coordinator.rpartition(":")
  end = time.monotonic() + deadline
  if process == 0:
    _ask(int(port), processes, end, deadline, config)
  else:
    _answer(host.strip("[]"), int(port), process, end, deadline, config)


def _ask(port: int, processes: int, end: float, deadline: float, config: str) -> None:
  """Process 0's part: hears everybody and tells everybody the outcome."""
  present: dict[int, tuple[socket.socket, str]] = {}  # with its config
  dual = socket.has_dualstack_ipv6()
  try:
    family = socket.AF_INET6 if dual else socket.AF_INET
    server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=processes)
  except OSError as error:
    raise refuse(
      f"distributed: process 0 cannot listen on port {port}",
      error,
      "a free port",
      "choose another one for --coordinator, or end the run that holds it",
    ) from error
  with server, contextlib.ExitStack() as stack:
    while len(present) < processes - 1 and (left := end - time.monotonic()) > 0:
      server.settimeout(left)
      try:
        connection, _ = server.accept()
        stack.enter_context(connection)
        connection.settimeout(10)
        said = json.loads(connection.makefile().readline())
        present[int(said["process"])] = (connection, said["config"])
      except (OSError, ValueError, KeyError):
        continue  # the deadline, or a stranger at the port
    missing = sorted(set(range(1, processes)) - set(present))
    other = sorted(number for number, (_, theirs) in present.items() if theirs != config)
    for connection, _ in present.values():
      with contextlib.suppress(OSError):
        connection.sendall((json.dumps({"missing": missing, "other": other}) + "\n").encode())
  _check_the_roll(missing, other, processes, deadline)


def _answer(host: str, port: int, process: int, end: float, deadline: float, config: str) -> None:
  """The part of every other process."""
  while True:
    try:
      with socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())) as connection:
        connection.sendall((json.dumps({"process": process, "config": config}) + "\n").encode())
        connection.settimeout(max(0.1, end - time.monotonic()) + 10)
        reply = connection.makefile().readline()
      if reply:
        break
    except OSError:
      pass
    if time.monotonic() >= end:
      raise refuse(
        f"distributed: process {process} waited {deadline:g} s for process 0 at {host}:{port}",
        "no answer",
        "it there",
        "look at its log, and whether that port is open between the hosts",
      )
    time.sleep(min(0.5, max(0.0, end - time.monotonic())))
  said = json.loads(reply)
  _check_the_roll(said["missing"], said["other"], None, deadline)


def _check_the_roll(missing: list[int], other: list[int], processes: int | None, deadline: float) -> None:
  of = "" if processes is None else f" of {processes}"
  if missing:
    raise refuse(
      f"distributed: process {', '.join(map(str, missing))}{of} did not come within {deadline:g} s",
      "no call from there",
      "one from every process",
      "look at the logs of those hosts, start the command on every host, or give them longer: --host-deadline",
    )
  if other:
    raise refuse(
      f"distributed: process {', '.join(map(str, other))}{of}",
      "another config than process 0",
      "the same command and files on every host",
      "start them alike",
    )


def barrier(name: str, deadline: float) -> None:
  """Waits here for all processes. Raises ValueError naming those that did not come within `deadline` seconds."""
  if jax.process_count() == 1:
    return
  client = jax_internals.coordination_client()
  if client is None:
    raise refuse(
      "distributed",
      f"{jax.process_count()} processes that have not joined",
      "jax.distributed",
      "start with --multihost=tpu, --multihost=slurm, or --coordinator, --processes and --process",
    )
  try:
    client.wait_at_barrier(name, int(1000 * deadline))
  except jax.errors.JaxRuntimeError as error:
    late = sorted({int(task) for task in re.findall(r"/task:(\d+)", str(error).partition("timed out task")[2])})
    who = f"process {', '.join(map(str, late))}" if late else "another process"
    raise refuse(
      f"distributed: {who} did not come to {name!r} within {deadline:g} s",
      str(error).splitlines()[0][:200],
      f"all {jax.process_count()}",
      "look at the logs of those hosts, or give them longer: --host-deadline",
    ) from error


@contextlib.contextmanager
def alone(workdir: os.PathLike) -> Iterator[None]:
  """Keeps other runs out of a workdir: process 0 holds its lock, and all of them hear whether it does.

  Raises:
    ValueError: another run is at work there.
  """
  with contextlib.ExitStack() as stack:
    problem = None
    if jax.process_index() == 0:
      try:
        stack.enter_context(files.alone(workdir, inside=True))
      except ValueError as error:
        problem = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(problem is not None)):
      problem = problem or ValueError(f"{workdir} is being written by another run: process 0 says which one.")
    if problem is not None:
      raise problem
    yield


def set_up_logging() -> None:
  """Process 0 tells everything, the others their errors, with their number."""
  index = jax.process_index()
  name = f"[process {index}] " if jax.process_count() > 1 else ""
  logging.basicConfig(
    level=logging.INFO if index == 0 else logging.ERROR,
    format=f"%(asctime)s {name}%(message)s",
    datefmt="%H:%M:%S",
    force=True,
  )
  logging.getLogger("absl").setLevel(logging.WARNING if index == 0 else logging.ERROR)  # Orbax: a dozen lines a save
  for handler in logging.getLogger().handlers:
    handler.addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
  """False for tracebacks out of Orbax's threads and tasks: what they tell is raised where the save is waited for."""
  trace = record.exc_info[2] if record.exc_info else None
  return not any("/orbax/" in frame.filename for frame in traceback.extract_tb(trace))


def exit_on_sigterm() -> None:
  """From here on SIGTERM ends this process with PREEMPTED, where nothing catches it (see `preemption`).

  For the time in which a run sets up or restores and has nothing to save. Several processes: until they have joined,
  when jax takes the notice and the first step acts on it.
  """

  def leave(number, frame):
    logging.warning("stopped by SIGTERM while setting up or writing the policy; run it again to resume")
    sys.exit(PREEMPTED)

  if threading.current_thread() is threading.main_thread():  # Python delivers signals there only
    signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
  """Inside, SIGTERM ends nothing by itself; yields preempted(step): whether to save after `step` and leave.

  All processes get the same answer: the notice of one host reaches the others, and jax picks the step.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():  # Python delivers signals there only
    yield lambda step: False
    return
  before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
  try:
    yield lambda step: bool(received)
  finally:
    signal.signal(signal.SIGTERM, before)
