"""Image servers as commands: a run that reads from them, and one whose servers are killed."""

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import flags, losses_of, write_data

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]
NAMED = r"error: Image server localhost:\d+: got no answer \(.*\); expected one that runs; start it there"


@contextlib.contextmanager
def server(data, *more):
  """(process, address) of an image server with the config of `flags`."""
  config = [one for one in flags(data, "none") if not one.startswith("--workdir")]
  command = [sys.executable, "-m", "semanticvla_jax.train.image_server", *config, "--host=localhost", "--port=0", *more]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
    yield process, process.stdout.readline().split()[-1]
    process.kill()


def start(data, workdir, servers=(), **train):
  command = [sys.executable, "-m", "semanticvla_jax.train", *flags(data, workdir, **train)]
  command.append(f"--config.data.servers={tuple(servers)!r}")
  return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_losses_are_those_without_servers_and_the_run_ends_with_the_last_server(tmp_path):
  data = write_data(tmp_path / "data")
  with server(data) as (first, one), server(data, "--config.data.processes=1") as (second, other):
    here, served = start(data, tmp_path / "here"), start(data, tmp_path / "served", (one, other), steps=10**6)
    assert here.communicate(timeout=600)[1] and here.returncode == 0
    while len(losses_of(tmp_path / "served")) < 4 and served.poll() is None:
      time.sleep(0.2)
    first.kill()
    before = len(losses_of(tmp_path / "served"))
    while len(losses_of(tmp_path / "served")) < before + 8 and served.poll() is None:  # more than was made ahead
      time.sleep(0.2)
    second.kill()
    said = served.communicate(timeout=120)[1]  # tf.data itself would wait for ever
    assert served.returncode == 1 and re.search(NAMED, said) and f"come from {other}." in said, said[-2000:]
    losses, found = losses_of(tmp_path / "here"), losses_of(tmp_path / "served")
    assert losses == {step: found[step] for step in range(1, 5)}
