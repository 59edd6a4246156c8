"""The launch scripts with --dry-run: what they would do, and what they say about wrong arguments."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = ["--", "--config=configs/libero.py:full@7b", "--workdir=gs://bucket/run", "--config.data.mixture=a b"]
LOCAL = ["--", "--config=configs/libero.py:full@7b", "--workdir=runs/x"]
TPU = ["--name=vla", "--zone=us-west4-a"]
XPK = ["--cluster=c", "--workload=w", "--tpu-type=v5litepod-16", "--image=i"]


def run(script, *arguments, **options):
  command = ["bash", str(ROOT / "launch" / script), *arguments]
  return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=30, **options)


def commands(done):
  """The commands a dry run printed, each split as a shell would."""
  assert done.returncode == 0, done.stderr
  return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("$ ")]


def after(command, word):
  return command[command.index(word) + 1]


def test_gpu():
  (command,) = commands(run("gpu.sh", "--dry-run", "--gpus=0,1", *LOCAL))
  assert "CUDA_VISIBLE_DEVICES=0,1" in command
  assert command[-5:] == [".venv/bin/python", "-m", "semanticvla_jax.train", "--multihost=none", *LOCAL[1:]][-5:]


def test_slurm_prints_a_job_of_one_task_a_gpu_that_requeues():
  done = run(
    "slurm.sh", "--dry-run", "--nodes=2", "--gpus-per-node=8", "--account=lab", "--sbatch=--mail-type=END", *LOCAL
  )
  assert commands(done) == [["sbatch", "--mail-type=END", "semanticvla.sbatch"]]
  for line in ("--nodes=2", "--ntasks-per-node=8", "--account=lab", "--signal=TERM@120", "--requeue"):
    assert f"#SBATCH {line}\n" in done.stdout
  assert "--partition" not in done.stdout
  assert "semanticvla_jax.train --multihost=slurm --config=configs/libero.py:full@7b" in done.stdout
  assert 'scontrol requeue "$SLURM_JOB_ID"' in done.stdout
  script = done.stdout[: done.stdout.index("$ sbatch")]
  assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_xpk():
  (command,) = commands(run("xpk.sh", "--dry-run", *XPK, "--slices=2", *TRAIN))
  assert command[:3] == ["xpk", "workload", "create"] and after(command, "--num-slices") == "2"
  assert after(command, "--restart-on-exit-codes") == "75"
  inner = shlex.split(after(command, "--command"))
  assert inner[:4] == ["python", "-m", "semanticvla_jax.train", "--multihost=tpu"]
  assert "--config.mesh.replica=2" in inner and inner[-3:] == TRAIN[1:]
  (command,) = commands(run("xpk.sh", "--dry-run", *XPK, "--delete"))
  assert command[:3] == ["xpk", "workload", "delete"]


def test_tpu_vm_up_creates_installs_starts_and_follows():
  found = commands(run("tpu_vm.sh", "up", "--dry-run", *TPU, "--type=v5litepod-16", "--spot", *TRAIN))
  assert [command[0] for command in found] == ["gcloud", "git", "gcloud", "rm", "gcloud", "gcloud", "gcloud"]
  create, _, copy, _, install, start, follow = found
  assert create[3:5] == ["queued-resources", "create"] and "--spot" in create
  assert after(create, "--runtime-version") == "v2-alpha-tpuv5-lite" and after(create, "--node-id") == "vla"
  assert copy[3:5] == ["tpu-vm", "scp"] and "--worker=all" in copy
  assert "requirements-tpu.txt" in install[-1]
  assert "--worker=all" in start and "--multihost=tpu" in start[-1] and "a b" in start[-1]
  assert "--worker=0" in follow and "tail" in follow[-1]


def test_tpu_vm_over_two_slices():
  found = commands(run("tpu_vm.sh", "create", "--dry-run", *TPU, "--type=v6e-16", "--slices=2"))
  assert after(found[0], "--node-count") == "2" and after(found[0], "--runtime-version") == "v2-alpha-tpuv6e"
  found = commands(run("tpu_vm.sh", "start", "--dry-run", *TPU, "--slices=2", *TRAIN))
  assert [command[5] for command in found] == ["vla-0", "vla-1"]
  assert all("--config.mesh.replica=2" in command[-1] for command in found)


@pytest.mark.parametrize("verb", ["stop", "status", "logs", "delete"])
def test_tpu_vm_other_verbs(verb):
  assert all(
    command[:3] == ["gcloud", "compute", "tpus"] for command in commands(run("tpu_vm.sh", verb, "--dry-run", *TPU))
  )


def test_tpu_vm_starts_a_shell_command_that_keeps_its_arguments(tmp_path):
  """What `start` sends is run here by a shell, with a program that writes down its arguments in Python's place."""
  ((*_, sent),) = commands(run("tpu_vm.sh", "start", "--dry-run", *TPU, *TRAIN))
  (tmp_path / "semanticvla_jax" / ".venv" / "bin").mkdir(parents=True)
  python = tmp_path / "semanticvla_jax" / ".venv" / "bin" / "python"
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 75\n')
  python.chmod(0o755)
  subprocess.run(["sh", "-c", sent.removeprefix("--command=")], cwd=tmp_path, check=True, timeout=10)
  status = tmp_path / "semanticvla_jax" / "train.status"
  for _ in range(100):
    if status.exists() and status.read_text():
      break
    time.sleep(0.05)
  assert status.read_text() == "75\n"
  log = (tmp_path / "semanticvla_jax" / "train.log").read_text().splitlines()
  assert log == ["-m", "semanticvla_jax.train", "--multihost=tpu", *TRAIN[1:]]


@pytest.mark.parametrize(
  ("script", "arguments", "message"),
  [
    ("gpu.sh", ["--gpu=1", *LOCAL], "got '--gpu=1', expected --gpus"),
    ("gpu.sh", ["--gpus=a", *LOCAL], "--gpus: got 'a', expected numbers such as 0,1,2"),
    ("gpu.sh", ["--", "--workdir=x"], "expected --config=FILE after --"),
    ("gpu.sh", ["--python=/no/such", *LOCAL], "/no/such: not found, expected it on PATH; make the environment"),
    ("slurm.sh", ["--gpus-per-node=8", *LOCAL], "--nodes: got nothing, expected how many nodes"),
    ("slurm.sh", ["--nodes=two", "--gpus-per-node=8", *LOCAL], "--nodes: got 'two', expected a whole number"),
    ("xpk.sh", XPK[:3], "--image: got nothing, expected a container image"),
    ("xpk.sh", ["--dry-run", *XPK, *LOCAL], "hosts of a slice share no disk, expected gs://BUCKET/FOLDER"),
    ("tpu_vm.sh", ["launch"], "got verb 'launch', expected up, create"),
    ("tpu_vm.sh", ["up", "--dry-run", *TPU, *TRAIN], "--type: got nothing, expected an accelerator such as"),
    ("tpu_vm.sh", ["start", "--dry-run", *TPU, *LOCAL], "workers share no disk"),
  ],
)
def test_wrong_arguments_are_explained(script, arguments, message):
  path = "/usr/bin:/bin"  # no gcloud, xpk or sbatch
  done = run(script, *(["--dry-run"] if script == "xpk.sh" else []), *arguments, env={"PATH": path})
  assert done.returncode == 2 and message in done.stderr and "README.md" in done.stderr


@pytest.mark.parametrize("script", ["gpu.sh", "slurm.sh", "xpk.sh", "tpu_vm.sh"])
def test_help(script):
  done = run(script, "--help")
  assert done.returncode == 0 and f"launch/{script}" in done.stdout and "--dry-run" in done.stdout


def fake_python(tmp_path, body):
  python = tmp_path / "python"
  python.write_text(f"#!/bin/bash\n{body}\n")
  python.chmod(0o755)
  return f"--python={python}"


def test_gpu_goes_on_after_a_preemption(tmp_path):
  again = fake_python(
    tmp_path, f"echo run >> {tmp_path}/runs; [[ $(wc -l < {tmp_path}/runs) == 2 ]] && exit 0; exit 75"
  )
  done = run("gpu.sh", again, *LOCAL)
  assert done.returncode == 0 and (tmp_path / "runs").read_text() == "run\nrun\n"
  assert "starting again (1 of 3)" in done.stdout


def test_gpu_passes_sigterm_on_and_then_ends(tmp_path):
  waiting = fake_python(
    tmp_path, f"trap 'echo told > {tmp_path}/told; exit 75' TERM; touch {tmp_path}/up; sleep 20 & wait"
  )
  command = ["bash", str(ROOT / "launch" / "gpu.sh"), waiting, *LOCAL]
  process = subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL)
  for _ in range(100):
    if (tmp_path / "up").exists():
      break
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(10) == 75 and (tmp_path / "told").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
  scripts = sorted(map(str, (ROOT / "launch").glob("*.sh")))
  done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 0, done.stdout


def test_scripts_are_executable():
  assert all(os.access(path, os.X_OK) for path in (ROOT / "launch").glob("*.sh") if path.name != "common.sh")
