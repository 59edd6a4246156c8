"""Several processes: the roll call, a missing host, two processes equal to one, and going on with one."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
from jax._src import distributed as service
from small_runs import flags, losses_of, make_config, write_data

from semanticvla_jax import policy_folder
from semanticvla_jax.train import __main__ as command
from semanticvla_jax.train import checkpoints, distributed

TOLERANCE = 2e-4  # relative, on the loss: sums over devices in another order


def free_port() -> int:
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def roll(processes, present, deadline, configs=None):
  """What each of the `present` processes gets: None, or its message."""
  outcome, address = {}, f"localhost:{free_port()}"

  def call(i):
    try:
      config = (configs or {}).get(i, "same")
      outcome[i] = distributed.check_all_processes_joined(address, processes, i, deadline, config)
    except ValueError as error:
      outcome[i] = str(error)

  threads = [threading.Thread(target=call, args=(i,)) for i in present]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return outcome


def test_everybody_there():
  assert roll(3, (2, 0, 1), 10.0) == {0: None, 1: None, 2: None}


def test_a_missing_process_is_named_to_all():
  found = roll(4, (0, 2), 1.0)
  assert "process 1, 3 of 4 did not come within 1 s" in found[0]
  assert "process 1, 3 did not come" in found[2]


def test_another_config_is_told_to_all():
  found = roll(3, (0, 1, 2), 10.0, {2: "other"})
  assert "process 2 of 3: got another config than process 0" in found[0]
  assert all("process 2: got another config" in found[i] for i in (1, 2))


def test_a_missing_process_0_is_named():
  assert "waited 1 s for process 0 at localhost:" in roll(2, (1,), 1.0)[1]


def test_strangers_at_the_port_do_not_count():
  port = free_port()

  def stranger():
    for _ in range(50):
      try:
        with socket.create_connection(("localhost", port), timeout=1) as connection:
          connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
          return
      except OSError:
        time.sleep(0.02)

  thread = threading.Thread(target=stranger)
  thread.start()
  with pytest.raises(ValueError, match="process 1 of 2 did not come"):
    distributed.check_all_processes_joined(f"localhost:{port}", 2, 0, 1.0)
  thread.join()


def test_flags_are_checked():
  with pytest.raises(ValueError, match="expected all three or none"):
    distributed.initialize(coordinator="localhost:1", processes=2)
  with pytest.raises(ValueError, match="got process 2 of 2"):
    distributed.initialize("localhost:1", 2, 2)
  with pytest.raises(ValueError, match="--multihost=slurm, but no such cluster"):
    distributed.initialize(multihost="slurm")


def test_who_is_several_hosts():
  assert not distributed.several_hosts({})
  assert not distributed.several_hosts({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"})
  assert not distributed.several_hosts({"SLURM_NTASKS": "8"})  # a login shell or sbatch: no job step
  assert distributed.several_hosts({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "8"})
  assert distributed.several_hosts({"TPU_WORKER_HOSTNAMES": "a,b"})
  assert distributed.several_hosts({"MEGASCALE_NUM_SLICES": "2"})


def test_a_tpu_vm_is_asked_for_its_other_hosts(monkeypatch):
  asked = []
  monkeypatch.setattr(distributed, "several_hosts", lambda environment: False)
  monkeypatch.setattr(distributed, "on_tpu_vm", lambda: True)
  monkeypatch.setattr(distributed, "detect", lambda method, deadline: asked.append(method) or ("h:1", 1, 0, None))
  monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *who, **options: asked.append(who))
  distributed.initialize()
  assert asked == ["auto", ("h:1", 1, 0)]
  monkeypatch.undo()
  assert not distributed.on_tpu_vm()  # here


def test_collectives_on_cpus_wait_as_long_as_hosts(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_collective_timeout_seconds=7")
  distributed.raise_cpu_collective_timeout(500.0)
  assert os.environ["XLA_FLAGS"].split() == [
    "--xla_cpu_collective_timeout_seconds=7",
    "--xla_cpu_collective_call_terminate_timeout_seconds=500",
  ]


LATE = """DEADLINE_EXCEEDED: Barrier timed out. Id: policy::0. This happens because a task triggered the barrier \
too early or too slowly. Please look at the task logs (both timed out and first task) to debug further.
# of tasks that reached the barrier: 1/3.
The first task at the barrier: /job:jax_worker/replica:0/task:0. Some timed out task names:
/job:jax_worker/replica:0/task:2
/job:jax_worker/replica:0/task:1
"""


class Client:
  """Stands in for the coordination service's client."""

  def wait_at_barrier(self, name, milliseconds):
    raise jax.errors.JaxRuntimeError(LATE)


def test_meeting_names_who_is_late(monkeypatch):
  distributed.barrier("alone", 0.1)  # one process: no waiting
  monkeypatch.setattr(distributed.jax, "process_count", lambda: 3)
  monkeypatch.setattr(service.global_state, "client", Client())
  with pytest.raises(ValueError, match=r"process 1, 2 did not come to 'policy' within 5 s.*; expected all 3"):
    distributed.barrier("policy", 5.0)


def test_meeting_without_having_joined_says_so(monkeypatch):
  monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
  monkeypatch.setattr(service.global_state, "client", None)
  with pytest.raises(ValueError, match="got 2 processes that have not joined.*--multihost=tpu"):
    distributed.barrier("start", 1.0)


def test_sigterm_is_noticed_and_its_handler_put_back():
  before = signal.getsignal(signal.SIGTERM)
  with distributed.preemption() as preempted:
    assert not preempted(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preempted(2)
  assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_before_the_loop_leaves_with_the_same_status(caplog):
  before = signal.getsignal(signal.SIGTERM)
  try:
    distributed.exit_on_sigterm()
    with distributed.preemption() as preempted:  # the loop takes over, and gives back
      os.kill(os.getpid(), signal.SIGTERM)
      assert preempted(1)
    with pytest.raises(SystemExit) as left:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1)
    assert left.value.code == distributed.PREEMPTED and "stopped by SIGTERM while setting up" in caplog.text
  finally:
    signal.signal(signal.SIGTERM, before)


def start(arguments, devices):
  xla = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-m", "semanticvla_jax.train", *arguments],
    env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " " + xla},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_command_with_a_missing_host_ends_with_its_number(tmp_path):
  arguments = [f"--coordinator=localhost:{free_port()}", "--processes=2", "--process=0", "--host_deadline=1"]
  process = start([*flags(tmp_path, tmp_path), *arguments], devices=1)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 1
  assert "error: distributed: process 1 of 2 did not come within 1 s" in errors


@pytest.mark.processes
def test_command_told_to_stop_while_it_waits_for_hosts(tmp_path):
  port = free_port()
  arguments = [f"--coordinator=localhost:{port}", "--processes=2", "--process=0", "--host_deadline=600"]
  process = start([*flags(tmp_path, tmp_path), *arguments], devices=1)
  for _ in range(600):
    try:
      socket.create_connection(("localhost", port), timeout=1).close()
      break
    except OSError:
      time.sleep(0.5)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == distributed.PREEMPTED and "stopped by SIGTERM while setting up" in errors


def run_both(data, workdir, **train):
  """Two processes of four devices each; returns their stderr."""
  who = [f"--coordinator=localhost:{free_port()}", "--processes=2", "--host_deadline=900"]
  both = [start([*flags(data, workdir, **train), *who, f"--process={i}"], devices=4) for i in range(2)]
  errors = [process.communicate(timeout=900)[1] for process in both]
  assert [process.returncode for process in both] == [0, 0], errors
  return errors


@pytest.mark.processes
def test_sigterm_to_one_process_saves_and_ends_both(tmp_path):
  data, workdir = write_data(tmp_path / "data"), tmp_path / "run"
  who = [f"--coordinator=localhost:{free_port()}", "--processes=2", "--host_deadline=900"]
  train = dict(steps=2000, save_every=1000)
  both = [start([*flags(data, workdir, **train), *who, f"--process={i}"], devices=2) for i in range(2)]
  while both[0].poll() is None and max(losses_of(workdir), default=0) < 3:
    time.sleep(0.05)
  both[1].send_signal(signal.SIGTERM)
  errors = [process.communicate(timeout=900)[1] for process in both]
  assert [process.returncode for process in both] == [distributed.PREEMPTED] * 2, errors
  with checkpoints.Checkpointer(workdir) as checkpointer:
    assert f"saved at step {checkpointer.steps[-1]} of 2000" in errors[0]


@pytest.mark.processes
def test_two_processes_train_as_one_and_one_goes_on(tmp_path):
  data = write_data(tmp_path / "data")
  command.train(make_config(data), tmp_path / "one")
  alone = losses_of(tmp_path / "one")
  errors = run_both(data, tmp_path / "two", steps=2)
  assert "step 1/2" in errors[0] and "step 1/2" not in errors[1]  # process 0 tells
  assert losses_of(tmp_path / "two") == pytest.approx({k: alone[k] for k in (1, 2)}, rel=TOLERANCE)
  policy = command.train(make_config(data), tmp_path / "two")
  assert losses_of(tmp_path / "two") == pytest.approx(alone, rel=TOLERANCE)
  assert policy_folder.load_policy(policy).metadata["step"] == 4
