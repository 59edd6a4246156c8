"""The whole chain as one command at tiny size: demonstrations, training, evaluation, summary; and again after that."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import random_params
from policies import stats

from semanticvla_jax import checkpoint, quickstart
from semanticvla_jax.data import statistics, text
from semanticvla_jax.models.semanticvla import build

CONFIG = """
from configs import common

def get_config(arg=None):
  config = common.get_config("tiny")
  config.model.cues = 3
  config.lora.update(rank=2, alpha=4.0)
  config.optim.update(warmup_steps=1, decay_steps=10)
  config.data.update(batch_size=8, prompt_length=32, instruction_length=24, keep_statistics=True)
  config.data.update(mixture="tabletop", augment=False, crop_area=None)
  config.train.update(steps=2, save_every=1, keep_last=2, log_every=1)
  return config
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """The command line over a tiny base of random parameters."""
  folder = tmp_path_factory.mktemp("quickstart")
  (folder / "config.py").write_text(CONFIG)
  space = {}
  exec(CONFIG, space)
  config = space["get_config"]()
  config.lora = None
  config = json.loads(config.to_json_best_effort())
  checkpoint.save_policy(
    folder / "base", random_params(build(config["model"])), config=config, tokenizers=text.EMBEDDED,
    statistics={"tabletop_pick": statistics.to_openvla(stats())},
  )
  return [
    sys.executable, "-m", "semanticvla_jax.quickstart", "--suite=pick", "--split=unseen", "--demonstrations=3",
    "--episodes=4", "--size=32", "--controls=shuffled", f"--base={folder / 'base'}", f"--config={folder / 'config.py'}",
    f"--out={folder / 'out'}",
  ]  # fmt: skip


def run(command):
  environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")}
  return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.processes
def test_the_whole_chain_and_again(command):
  first = run(command)
  assert first.returncode == 0, first.stdout + first.stderr
  out = command[-1].removeprefix("--out=")
  for stage in ("demonstrate --suite=pick --split=unseen", "train --config=", "evaluate --policy="):
    assert f"$ python -m semanticvla_jax.{stage}" in first.stdout
  end = first.stdout[first.stdout.index("before fine-tuning") :]
  assert "after fine-tuning" in end and "control: told another episode's instruction" in end
  assert f"{out}/report/report.html" in end and f"{out}/policy" in end and "in all" in end
  results = json.loads(Path(out, "report/results.json").read_text())["results"]
  assert {one["per_episode"][0]["seed"] for one in results} == {quickstart.EVALUATION_SEED}
  assert {one["fingerprint"]["split"] for one in results} == {"unseen"}

  again = run(command)
  assert again.returncode == 0, again.stdout + again.stderr
  assert "demonstrations: done before" in again.stdout and "evaluation: done before" in again.stdout
  assert "resumed from step 2" in again.stdout + again.stderr

  other = run([*command, "--split=train"])
  assert other.returncode and "got demonstrations of" in other.stderr and "choose another --out" in other.stderr


def test_a_missing_base_is_named(command):
  with pytest.raises(SystemExit, match=r"Base: got nowhere, expected a policy folder.*--base"):
    quickstart.main(["--base=nowhere"])


def test_a_stage_that_fails_ends_the_command(tmp_path, command, capfd):
  base = next(flag for flag in command if flag.startswith("--base="))
  with pytest.raises(SystemExit) as ended:
    quickstart.main([base, "--suite=pik", f"--out={tmp_path}"])
  assert ended.value.code == 1 and "did you mean 'pick'" in capfd.readouterr().err


@pytest.fixture
def measured(tmp_path, monkeypatch):
  """(the command's arguments, its evaluation): a report of just that evaluation is there."""
  monkeypatch.setattr(checkpoint, "policy_hash", lambda folder: f"hash of {folder.name}")
  args = quickstart._arguments([f"--out={tmp_path}", "--episodes=4"])
  command = quickstart.evaluate(args)
  names = {"policy": "policy", "baseline": quickstart.BASE.name}
  rows = [{"kind": kind, "fingerprint": {"policy": {"policy_hash": f"hash of {name}"}}} for kind, name in names.items()]
  (tmp_path / "report").mkdir()
  results = {"command": "python -m " + shlex.join(command), "results": rows}
  (tmp_path / "report" / "results.json").write_text(json.dumps(results))
  return args, command


def test_a_report_of_the_same_evaluation_is_kept(measured):
  args, _ = measured
  assert quickstart.evaluate(args) is None and (args.out / "report").exists()


@pytest.mark.parametrize("change", [{"episodes": 5}, {"split": "heldout"}, {"controls": "shuffled"}, {"suite": "pick"}])
def test_a_report_of_another_evaluation_is_set_aside(measured, change, capsys):
  args, _ = measured
  vars(args).update(change)
  ((name, value),), (report, aside) = change.items(), (args.out / "report", args.out / "report_1")
  assert f"--{name}={value}" in quickstart.evaluate(args)
  assert f"{report} was measured without --{name}={value}: kept as {aside}" in capsys.readouterr().out
  assert (aside / "results.json").exists() and not report.exists()


def test_a_report_of_another_policy_or_a_broken_one_is_set_aside(measured, monkeypatch, capsys):
  args, command = measured
  monkeypatch.setattr(checkpoint, "policy_hash", lambda folder: f"newer hash of {folder.name}")
  assert quickstart.evaluate(args) == command
  assert "was measured with another policy and another baseline: kept as" in capsys.readouterr().out
  (args.out / "report").mkdir()
  (args.out / "report" / "results.json").write_text("[]")
  assert quickstart.evaluate(args) == command
  assert "cannot be read: kept as" in capsys.readouterr().out and (args.out / "report_2").exists()


def test_the_summary_reads_from_before_to_after(tmp_path):
  rows = [
    {"kind": kind, "name": name, "successes": n, "episodes": 100, "rate": n / 100, "interval": [0.1, 0.2]}
    for kind, name, n in (("policy", "this policy", 91), ("baseline", "before", 12), ("control", "told another", 15))
  ]
  lines = quickstart.summary(rows, {"training": 312.0, "evaluation": 61.0}, tmp_path).splitlines()
  assert [line.split()[0] for line in lines if "%" in line] == ["before", "after", "control:"]
  assert "91/100" in lines[2] and "91.0 %" in lines[2] and "in all 6:13" in "\n".join(lines)
