"""The launch scripts of a sharded evaluation with --dry-run: job scripts that shells, YAML and our own parsers read."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from semanticvla_jax.evaluate import merge, run
from semanticvla_jax.evaluate.shards import Shard

ROOT = Path(__file__).parents[2]
SUITES = "libero_spatial,libero_object,libero_goal,libero_10"
EVALUATE = ["--", "--policy=/data/policies/it's", f"--suite={SUITES}", "--workers=4", "--films=2"]
SLURM = ["--dry-run", "--shards=16", "--out=/shared/runs/a b"]
GKE = ["--dry-run", "--shards=16", "--name=libero", "--image=host/vla:1", "--claim=results"]


def launch(script, *words, **options):
  command = ["bash", str(ROOT / "launch" / script), *words]
  done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, **options)
  return done


def printed(script, *words):
  done = launch(script, *words)
  assert done.returncode == 0, done.stderr
  return done.stdout


def executed(script, folder, program, **variables):
  """The words that a job script gives to a program, which is replaced by one that prints them."""
  fake = folder / program
  fake.parent.mkdir(parents=True, exist_ok=True)
  fake.write_text('#!/bin/sh\nprintf "%s\\0" "$0" "$@"\n')
  fake.chmod(0o755)
  environment = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
  done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=20)
  assert done.returncode == 0, done.stderr
  return done.stdout.split("\0")[1:-1]


def check_shard(words, index, out):
  assert words[:3] == ["-m", "semanticvla_jax.evaluate", "run"]
  _, args = run.arguments(words[3:])
  assert args.shard == Shard(index, 16) and args.out == f"{out}/shard_{index}"
  assert args.policy == "/data/policies/it's" and args.suite == SUITES.split(",") and args.trials == 50


def check_merge(words, out):
  assert words[:3] == ["-m", "semanticvla_jax.evaluate", "merge"]
  args = merge.arguments(words[3:])
  assert args.shards == [f"{out}/shard_{i}" for i in range(16)] and args.out == f"{out}/merged"


def test_slurm_prints_an_array_of_shards_and_then_a_merge(tmp_path):
  text = printed("evaluate_slurm.sh", *SLURM, "--at-once=8", "--account=lab", "--sbatch=--qos=high", *EVALUATE)
  scripts, submitted = [], []
  for line in text.splitlines():
    if line.startswith("$ "):
      submitted.append(shlex.split(line[2:]))
    elif line == "#!/usr/bin/env bash":
      scripts.append("")
    else:
      scripts[-1] += line + "\n"
  assert submitted == [
    ["sbatch", "--parsable", "--qos=high", "evaluate.sbatch"],
    ["sbatch", "--dependency=afterok:JOB", "--qos=high", "evaluate-merge.sbatch"],
  ]
  shards, merged = scripts
  for line in ("--array=0-15%8", "--gpus-per-task=1", "--account=lab", "--requeue", "--mem=32G"):
    assert f"#SBATCH {line}\n" in shards
  assert "--array" not in merged and "--gpus" not in merged and "--partition" not in shards + merged
  for script in scripts:
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
  for index in (0, 15):
    words = executed(shards, tmp_path, "srun", SLURM_ARRAY_TASK_ID=str(index))
    assert words[0] == ".venv/bin/python"
    check_shard(words[1:], index, "/shared/runs/a b")
  check_merge(executed(merged, tmp_path, ".venv/bin/python"), "/shared/runs/a b")


def test_slurm_submits_the_merge_after_the_array(tmp_path):
  sbatch = tmp_path / "sbatch"
  sbatch.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho "4711;cluster"\n')
  sbatch.chmod(0o755)
  copy = tmp_path / "repository" / "launch"
  copy.mkdir(parents=True)
  for name in ("common.sh", "evaluate_slurm.sh"):
    (copy / name).write_text((ROOT / "launch" / name).read_text())
  words = [*(word for word in SLURM if word != "--dry-run"), *EVALUATE]
  environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  subprocess.run(["bash", str(copy / "evaluate_slurm.sh"), *words], env=environment, check=True, timeout=20)
  calls = (tmp_path / "calls").read_text().splitlines()
  assert calls == ["--parsable evaluate.sbatch", "--dependency=afterok:4711 evaluate-merge.sbatch"]
  assert "--array=0-15\n" in (tmp_path / "repository" / "evaluate.sbatch").read_text()


def test_gke_prints_an_indexed_job_and_then_a_merge(tmp_path):
  text = printed("evaluate_gke.sh", *GKE, "--accelerator=nvidia-l4", "--at-once=4", *EVALUATE)
  manifests, commands = text.rsplit("---\n", 1)
  shards, merged = yaml.safe_load_all(manifests)
  kubectl = [shlex.split(line[2:]) for line in commands.splitlines()]
  assert [command[1] for command in kubectl] == ["apply", "wait", "apply"]
  assert kubectl[1][-1] == "job/libero" and kubectl[2][-1] == "libero-merge.yaml"
  assert (shards["kind"], shards["spec"]["completionMode"], shards["spec"]["completions"]) == ("Job", "Indexed", 16)
  assert shards["spec"]["parallelism"] == 4 and shards["spec"]["backoffLimitPerIndex"] == 3
  pods = [job["spec"]["template"]["spec"] for job in (shards, merged)]
  containers = [pod["containers"][0] for pod in pods]
  assert all(pod["restartPolicy"] == "Never" for pod in pods) and "completions" not in merged["spec"]
  assert pods[0]["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"} and "nodeSelector" not in pods[1]
  assert containers[0]["resources"]["limits"] == {"nvidia.com/gpu": "1"} and "limits" not in containers[1]["resources"]
  for pod, container in zip(pods, containers):
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "results"}
    assert container["volumeMounts"][0]["mountPath"] == "/data" and container["command"] == ["sh", "-c"]
  for index in (0, 15):
    words = executed(containers[0]["args"][0], tmp_path, "python", JOB_COMPLETION_INDEX=str(index))
    check_shard(words, index, "/data/libero")
  check_merge(executed(containers[1]["args"][0], tmp_path, "python"), "/data/libero")


@pytest.mark.parametrize(
  ("script", "words", "message"),
  [
    ("evaluate_slurm.sh", [*SLURM[:1], SLURM[2], *EVALUATE], "--shards: got nothing, expected how many shards"),
    ("evaluate_slurm.sh", [*SLURM, "--shards=0", *EVALUATE], "--shards: got '0', expected a whole number"),
    ("evaluate_slurm.sh", [*SLURM, "--memory=much", *EVALUATE], "--memory: got 'much', expected a size such as 32G"),
    ("evaluate_slurm.sh", [*SLURM, *EVALUATE[:2]], "expected --suite=NAMES after --"),
    ("evaluate_slurm.sh", [*SLURM, "--", EVALUATE[2]], "expected --policy=FOLDER after --"),
    ("evaluate_slurm.sh", [*SLURM, *EVALUATE, "--shard=0/2"], "got --shard, expected none"),
    ("evaluate_slurm.sh", [*SLURM, *EVALUATE, "--out=x"], "got --out, expected it before --"),
    ("evaluate_gke.sh", [*GKE[:4], *EVALUATE], "--claim: got nothing, expected a persistent volume claim"),
    ("evaluate_gke.sh", [*GKE, "--name=My_Run", *EVALUATE], "--name: got 'My_Run', expected small letters"),
    ("evaluate_gke.sh", [*GKE, "--timeout=soon", *EVALUATE], "--timeout: got 'soon', expected a time such as 24h"),
    ("evaluate_gke.sh", [*GKE, "--image=a b", *EVALUATE], "--image: got 'a b', expected the address of an image"),
  ],
)
def test_wrong_arguments_are_explained(script, words, message):
  done = launch(script, *words, env={"PATH": "/usr/bin:/bin"})
  assert done.returncode == 2 and message in done.stderr and "README.md" in done.stderr


@pytest.mark.parametrize("script", ["evaluate_slurm.sh", "evaluate_gke.sh"])
def test_help(script):
  assert f"launch/{script}" in printed(script, "--help") and "--dry-run" in printed(script, "--help")
