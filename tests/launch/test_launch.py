"""The launch scripts with --dry-run: what they would do, and what they say about wrong arguments."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
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
  return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, **options)


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
    ("slurm.sh", ["--nodes=2", "--gpus-per-node=8", "--time=soon", *LOCAL], "--time: got 'soon', expected D-HH:MM:SS"),
    ("slurm.sh", ["--nodes=2", "--gpus-per-node=8", "--sbatch=qos", *LOCAL], "--sbatch: got 'qos', expected an option"),
    ("slurm.sh", ["--nodes=2", "--gpus-per-node=8", "--restarts=0", *LOCAL], "--restarts: got '0', expected a whole"),
    ("xpk.sh", XPK[:3], "--image: got nothing, expected a container image"),
    ("xpk.sh", ["--dry-run", *XPK, *LOCAL], "hosts of a slice share no disk, expected gs://BUCKET/FOLDER"),
    ("tpu_vm.sh", ["launch"], "got verb 'launch', expected up, create"),
    ("tpu_vm.sh", ["up", "--dry-run", *TPU, *TRAIN], "--type: got nothing, expected an accelerator such as"),
    ("tpu_vm.sh", ["start", "--dry-run", *TPU, *LOCAL], "workers share no disk"),
    ("tpu_vm.sh", ["stop", "--dry-run", "--name=My_Run", TPU[1]], "--name: got 'My_Run', expected small letters"),
    ("tpu_vm.sh", ["logs", "--dry-run", *TPU, "--worker=first"], "--worker: got 'first', expected a number"),
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


GCLOUD = """#!/bin/bash
# Stands in for gcloud: answers `describe` and the follower's ssh from two lists, and writes down what else was asked.
next() {  # the first line of a file; the last one stays
  head -n 1 "$1"
  [[ $(wc -l < "$1") == 1 ]] || sed -i 1d "$1"
}
cd "$(dirname "$0")"
case "$*" in
  *describe*)
    state=$(next states)
    [[ $state != NONE ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    [[ $state != DOWN ]] || { echo "ERROR: connection refused" >&2; exit 1; }
    echo "$state" ;;
  *"storage ls"*) next steps ;;
  *"tail -n"*) echo follow >> calls; exit "$(next ends)" ;;
  *create*) echo create >> calls ;;
  *delete*) echo delete >> calls ;;
  *nohup*) echo start >> calls ;;
esac
"""


def up(tmp_path, states, ends, steps=("gs://bucket/run/checkpoints/1/",), *arguments):
  """What `up` does where the cloud says `states`, following ends with `ends` and the newest checkpoint is `steps`."""
  for program, text in (("gcloud", GCLOUD), ("git", "#!/bin/true\n")):
    (tmp_path / program).write_text(text)
    (tmp_path / program).chmod(0o755)
  for name, lines in (("states", states), ("ends", ends), ("steps", steps)):
    (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
  environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TPU_VM_PAUSE": "0.01"}
  done = run("tpu_vm.sh", "up", *TPU, "--type=v5litepod-16", *arguments, *TRAIN, env=environment)
  return done, (tmp_path / "calls").read_text().split()


def test_up_follows_again_when_only_the_connection_was_lost(tmp_path):
  done, calls = up(tmp_path, ["ACTIVE"], [255, 255, 0])
  assert done.returncode == 0 and calls == ["start", "follow", "follow", "follow"], done.stderr
  assert done.stdout.count("following again") == 2


def test_up_takes_silence_of_the_cloud_for_no_preemption(tmp_path):
  done, calls = up(tmp_path, ["ACTIVE", *["DOWN"] * 3, "ACTIVE"], [255, 0])
  assert done.returncode == 0 and calls == ["start", "follow", "follow"], done.stderr


def test_up_asks_again_when_an_old_resource_was_just_being_deleted(tmp_path):
  done, calls = up(tmp_path, ["DELETING", "DELETING", "NONE", "WAITING_FOR_RESOURCES", "ACTIVE"], [0])
  assert done.returncode == 0 and calls == ["create", "start", "follow"], done.stderr


def test_up_starts_anew_where_the_slice_was_taken_away(tmp_path):
  steps = ["gs://bucket/run/checkpoints/9/", "gs://bucket/run/checkpoints/10/"]
  done, calls = up(tmp_path, ["NONE", "ACTIVE", "SUSPENDED", "SUSPENDED", "NONE", "ACTIVE"], [255, 0], steps)
  assert done.returncode == 0, done.stderr
  assert calls == ["create", "start", "follow", "delete", "create", "start", "follow"]


def test_up_ends_where_the_run_was_stopped_on_purpose(tmp_path):
  done, calls = up(tmp_path, ["ACTIVE"], [76])
  assert done.returncode == 75 and "stopped by tpu_vm.sh stop" in done.stdout and calls == ["start", "follow"]
  assert "touch train.stop" in run("tpu_vm.sh", "stop", "--dry-run", *TPU).stdout
  assert "rm -f train.status train.stop" in run("tpu_vm.sh", "start", "--dry-run", *TPU, *TRAIN).stdout


def test_up_gives_up_on_a_run_that_gets_nowhere(tmp_path):
  done, calls = up(tmp_path, ["ACTIVE"], [75], ["gs://bucket/run/checkpoints/7/"], "--restarts=2")
  assert done.returncode == 2 and "got 2 starts in a row without a new checkpoint" in done.stderr
  assert calls == ["start", "follow"] * 2


@pytest.mark.parametrize(
  ("status", "mark", "ends"), [("75", True, 76), ("75", False, 75), ("1", True, 1), (None, False, 75)]
)
def test_what_following_ends_with(tmp_path, status, mark, ends):
  """What `up` sends to follow a run is run here by a shell, after a run that has ended."""
  sent = commands(run("tpu_vm.sh", "up", "--dry-run", *TPU, "--type=v6e-8", *TRAIN))[-1][-1]
  folder = tmp_path / "semanticvla_jax"
  folder.mkdir()
  ended = subprocess.Popen(["true"])
  ended.wait()
  (folder / "train.pid").write_text(str(ended.pid))
  (folder / "train.log").write_text("")
  if status is not None:
    (folder / "train.status").write_text(status)
  if mark:
    (folder / "train.stop").touch()
  done = subprocess.run(["sh", "-c", sent.removeprefix("--command=")], cwd=tmp_path, timeout=20, check=False)
  assert done.returncode == ends


SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (requirements-dev.txt)")
def test_shellcheck():
  scripts = sorted(map(str, (ROOT / "launch").glob("*.sh")))
  done = subprocess.run([SHELLCHECK, "-x", *scripts], capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 0, done.stdout


def test_scripts_are_executable():
  assert all(os.access(path, os.X_OK) for path in (ROOT / "launch").glob("*.sh") if path.name != "common.sh")
