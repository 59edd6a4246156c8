"""The commands: flags that do not fit, a server from its start to SIGTERM, a recording run again."""

import re
import signal
import socket
import subprocess
import sys

import pytest
from helpers import random_params, tiny
from policies import CONFIG, stats
from serving import observation

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics, text
from semanticvla_jax.policy import WEIGHTS
from semanticvla_jax.serve import __main__ as command
from semanticvla_jax.serve import core, server
from semanticvla_jax.serve.client import Client


@pytest.mark.parametrize(
  ("flag", "what"),
  [
    ("--batch-sizes=0", "whole numbers"),
    ("--batch-sizes=a", "whole numbers"),
    ("--max-wait-ms=-1", "number from 0"),
    ("--deadline-ms=nan", "number from 0"),
    ("--limit=some", "invalid choice"),
  ],
)
def test_a_flag_that_is_wrong(flag, what, capsys):
  with pytest.raises(SystemExit):
    command.arguments(["--policy=x", flag])
  assert what in capsys.readouterr().err


def test_flags_that_do_not_fit_together():
  with pytest.raises(ValueError, match="TLS"):
    command.arguments(["--policy=x", "--tls-cert=a"])
  with pytest.raises(ValueError, match="1 to 4, the largest compiled size"):
    core.check(core.Settings(max_batch=8), (1, 4))
  args = command.arguments(["--policy=x", "--batch-sizes=4,1,1"])
  assert args.batch_sizes == [1, 4] and args.max_batch == 4


def test_the_server_takes_every_kind_of_weights_that_a_policy_does():
  assert [command.arguments(["--policy=x", f"--weights={kind}"]).weights for kind in WEIGHTS] == [*WEIGHTS]


def test_a_port_in_use_is_found_before_anything_is_loaded(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="free port"):
    command.run(["--policy=nothing", f"--port={taken.getsockname()[1]}"])
  with pytest.raises(ValueError, match="certificate"):
    server.check(server.Address(certificate=str(tmp_path / "a"), certificate_key=str(tmp_path / "b")))


def test_what_is_missing_is_said_with_what_to_install():
  with pytest.raises(ValueError, match="got no no_such_library; .*requirements-serve.txt"):
    command.check_installed(("starlette", "no_such_library"))


def test_a_policy_that_was_exported_has_its_own_settings(tmp_path):
  (tmp_path / "policy.zip").touch()
  with pytest.raises(ValueError, match="the file has its own"):
    server.load(tmp_path / "policy.zip", sizes=(1,), dtype="bfloat16")


@pytest.mark.processes
def test_from_the_start_to_the_end_and_again(tmp_path):
  folder, entries = tmp_path / "policy", {"tabletop_pick": statistics.to_openvla(stats())}
  policy_folder.save_policy(folder, random_params(tiny()), config=CONFIG, statistics=entries, tokenizers=text.EMBEDDED)
  program = [sys.executable, "-m", "semanticvla_jax.serve"]
  flags = [f"--policy={folder}", "--port=0", "--batch-sizes=1", f"--record={tmp_path / 'record'}"]
  with subprocess.Popen([*program, *flags], stdout=subprocess.PIPE, text=True) as process:
    try:
      lines = []
      while not lines or not lines[-1].startswith("ready"):
        lines.append(process.stdout.readline())
      url = re.search(r"^listens +(\S+)", "".join(lines), re.M)[1]
      with Client(url, patience=60.0) as client:
        for seed in range(3):
          client.infer(observation(seed))
    finally:
      process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
  again = [*program, "replay", str(tmp_path / "record"), f"--policy={folder}"]
  found = subprocess.run(again, capture_output=True, text=True)
  assert found.returncode == 0, found.stderr
  assert "3 calls of the device, 3 observations:\nall equal, bit for bit" in found.stdout
