"""A run that was killed, stopped by SIGTERM, or moved to other devices ends as an undisturbed one."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from small_runs import flags, losses_of, make_config, write_data

from semanticvla_jax import policy_folder
from semanticvla_jax.train import __main__ as command
from semanticvla_jax.train import distributed

KILLS = int(os.environ.get("KILLS", "1"))  # 20 with make soak
STEPS = dict(steps=20 + 5 * KILLS, save_every=5)
LAST = STEPS["steps"]
TOLERANCE = 2e-3  # relative, on the loss: sums over devices in another order, six updates long


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


def wait(process, happened):
  """Returns when that has happened to a run that goes on."""
  while process.poll() is None and not happened():
    time.sleep(0.005)
  assert process.poll() is None, process.stderr.read()


def reached(workdir):
  return max(losses_of(workdir), default=0)


def start(data, workdir, **train):
  """The command; its errors go to a file, so that it never waits for a reader."""
  command = [sys.executable, "-m", "semanticvla_jax.train", *flags(data, workdir, **STEPS | train)]
  command.append(f"--config.optim.decay_steps={LAST}")
  errors = workdir.with_suffix(".log").open("w+")
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, text=True)
  process.stderr = errors
  return process


def ended(process):
  """Exit status and what it said."""
  status = process.wait(timeout=900)
  process.stderr.seek(0)
  return status, process.stderr.read()


@pytest.mark.processes
def test_killed_and_told_to_stop_a_run_ends_as_the_one_left_alone(data, tmp_path):
  config = make_config(data, **STEPS)
  config.optim.decay_steps = LAST
  alone = command.train(config, tmp_path / "alone")
  workdir, rng = tmp_path / "run", random.Random(0)
  for step in sorted(rng.sample(range(1, LAST - 10), KILLS)):
    process, step = start(data, workdir), max(step, reached(workdir) + 1)
    wait(process, lambda: reached(workdir) >= step)  # noqa: B023
    time.sleep(rng.random() * 0.2)  # in the middle of a step, or of a save
    process.kill()
    process.wait()
    print(f"killed after step {reached(workdir)}; checkpoints of {saved(workdir)}", flush=True)

  process, before = start(data, workdir, save_every=1), reached(workdir)
  wait(process, lambda: reached(workdir) > before and [*(workdir / "checkpoints").glob("*tmp*")])  # saving just now
  process.send_signal(signal.SIGTERM)
  status, errors = ended(process)
  assert status == distributed.PREEMPTED, errors
  stopped = saved(workdir)[-1]
  assert stopped == reached(workdir) and f"saved at step {stopped} of {LAST}" in errors
  status, errors = ended(start(data, workdir))
  assert status == 0 and f"resumed from step {stopped}" in errors, errors
  assert losses_of(workdir) == losses_of(tmp_path / "alone")
  ours, theirs = (policy_folder.load_policy(path).params for path in (workdir / "policy", alone))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def saved(workdir):
  """Steps of the complete checkpoints."""
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_moved_to_other_devices_it_reads_the_same_examples(data, tmp_path, monkeypatch):
  read, place = [], command.sharding.place_batch

  def remember(batch, mesh, size):
    read.append(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(batch))).hexdigest())
    return place(batch, mesh, size)

  monkeypatch.setattr(command.sharding, "place_batch", remember)
  command.train(make_config(data, steps=6), tmp_path / "alone")
  straight, read[:] = list(read), []

  moved = make_config(data, steps=2)
  command.train(moved, tmp_path / "moved")
  moved.mesh.update(data=2, fsdp=4)
  moved.train.steps = 4
  command.train(moved, tmp_path / "moved")
  devices = jax.devices()
  monkeypatch.setattr(command.sharding.jax, "devices", lambda: devices[:1])
  moved.mesh.update(data=1, fsdp=1)
  moved.train.steps = 6
  command.train(moved, tmp_path / "moved")
  assert read == straight
  assert losses_of(tmp_path / "moved") == pytest.approx(losses_of(tmp_path / "alone"), rel=TOLERANCE)
