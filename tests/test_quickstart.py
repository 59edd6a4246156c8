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

from semanticvla_jax import files, policy_folder, quickstart
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
  policy_folder.save_policy(
    folder / "base",
    random_params(build(config["model"])),
    config=config,
    tokenizers=text.EMBEDDED,
    statistics={"tabletop_pick": statistics.to_openvla(stats())},
  )
  return [
    sys.executable,
    "-m",
    "semanticvla_jax.quickstart",
    "--suite=pick",
    "--split=unseen",
    "--demonstrations=3",
    "--episodes=4",
    "--size=32",
    "--controls=shuffled",
    f"--base={folder / 'base'}",
    f"--config={folder / 'config.py'}",
    f"--out={folder / 'out'}",
  ]


def run(command):
  environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")}
  return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.processes
def test_the_whole_chain_and_again(command):
  first = run(command)
  assert first.returncode == 0, first.stdout + first.stderr
  out = command[-1].removeprefix("--out=")
  for stage in ("demonstrate --suite=pick --split=unseen", "train --config=", "evaluate run --policy="):
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
  with pytest.raises(SystemExit, match=r"Base: got nowhere; expected a policy folder.*--base"):
    quickstart.main(["--base=nowhere"])


def test_a_stage_that_fails_ends_the_command(tmp_path, command, capfd):
  base = next(flag for flag in command if flag.startswith("--base="))
  with pytest.raises(SystemExit) as ended:
    quickstart.main([base, "--suite=pik", f"--out={tmp_path}"])
  assert ended.value.code == 1 and "did you mean 'pick'" in capfd.readouterr().err


@pytest.fixture
def measured(tmp_path, monkeypatch):
  """(the command's arguments, its evaluation): a report of just that evaluation is there."""
  monkeypatch.setattr(policy_folder, "policy_hash", lambda folder: f"hash of {folder.name}")
  args = quickstart._arguments([f"--out={tmp_path}", "--episodes=4"])
  command = quickstart.evaluate(args)
  names = {"policy": "policy", "baseline": Path(quickstart.BASE).name}
  rows = [{"kind": kind, "fingerprint": {"policy": {"policy_hash": f"hash of {name}"}}} for kind, name in names.items()]
  (tmp_path / "report").mkdir()
  results = {"command": "python -m " + shlex.join(command), "results": rows}
  (tmp_path / "report" / "results.json").write_text(json.dumps(results))
  return args, command


def test_a_report_of_the_same_evaluation_is_kept(measured):
  args, command = measured
  assert quickstart.evaluate(args) is None and (args.out / "report").exists()
  without_subcommand = shlex.join(word for word in command if word != "run")
  whole(args, command=f"python -m {without_subcommand}")
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
  monkeypatch.setattr(policy_folder, "policy_hash", lambda folder: f"newer hash of {folder.name}")
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


def whole(args, **changes):
  """The report's results.json with other values."""
  path = args.out / "report" / "results.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_report_that_is_not_finished_is_gone_on_with(measured):
  args, command = measured
  rows = json.loads((args.out / "report" / "results.json").read_text())["results"]
  whole(args, finished=False)
  assert quickstart.evaluate(args) == command
  whole(args, results=rows[:1])  # the baseline is yet to be measured
  assert quickstart.evaluate(args) == command
  whole(args, results=[rows[0] | {"errors": 2}, rows[1]], finished=True)
  assert quickstart.evaluate(args) == command, "broken episodes are repeated"
  whole(args, results=rows, finished=True)
  assert quickstart.evaluate(args) is None and not (args.out / "report_1").exists()
  whole(args, results=rows[:1], finished=True)
  assert quickstart.evaluate(args) == command and (args.out / "report_1").exists()


def test_a_report_that_another_run_writes_is_not_set_aside(measured):
  args, _ = measured
  args.episodes = 5
  with files.alone(args.out / "report", inside=True), pytest.raises(ValueError, match="is being written: got process"):
    quickstart.evaluate(args)
  assert (args.out / "report" / "results.json").exists()
  quickstart.evaluate(args)
  assert [path.name for path in (args.out / "report_1").iterdir()] == ["results.json"]


def test_the_summary_says_what_left_a_rate_and_where_there_is_none(tmp_path):
  common = {"kind": "policy", "name": "this policy", "interval": [0.98765, 0.99987]}
  rows = [
    common | {"successes": 511, "episodes": 512, "rate": 511 / 512, "errors": 3, "nonfinite": 1},
    common | {"kind": "control", "successes": 0, "episodes": 0, "rate": None, "errors": 12, "nonfinite": 0},
    common | {"kind": "baseline", "successes": 19999, "episodes": 20000, "rate": 19999 / 20000},
  ]
  _, before, after, control, *_ = quickstart.summary(rows, {"evaluation": 1.0}, tmp_path).splitlines()
  assert "511/512   99.8 %  (95 %: 99–99.99), 3 broke and are not counted, 1 failed by a non-finite action" in after
  assert control.endswith("no rate: all 12 episodes broke") and "19999/20000  99.995 %" in before


@pytest.mark.parametrize("below", ["", "data", "report"])
def test_a_file_where_a_folder_belongs_is_said_before_a_stage_runs(tmp_path, command, below, monkeypatch):
  monkeypatch.setattr(quickstart, "run", lambda *_: pytest.fail("a stage ran"))
  (tmp_path / "out").mkdir()
  place = tmp_path / "out" / (below or "file")
  place.write_text("x")
  base = next(flag for flag in command if flag.startswith("--base="))
  with pytest.raises(SystemExit, match=f"got {place}, which is a file; expected a folder"):
    quickstart.main([base, f"--out={place if not below else place.parent}"])


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--controls=shufled", r"Controls: got \['shufled'\]; expected some of"),
    ("--controls=blind,blind", "name none twice"),
    ("--episodes=0", "--episodes: got 0; expected at least 1"),
    ("--demonstrations=-1", "--demonstrations: got -1; expected at least 1"),
    ("--steps=0", "--steps: got 0; expected at least 1"),
    ("--config=configs/none.py:tiny", "Config: got configs/none.py; expected a file"),
  ],
)
def test_what_a_later_stage_would_refuse_is_said_before_a_stage_runs(tmp_path, command, flag, message, monkeypatch):
  monkeypatch.setattr(quickstart, "run", lambda *_: pytest.fail("a stage ran"))
  with pytest.raises(SystemExit, match=message):
    quickstart.main([*command[3:], f"--out={tmp_path / 'out'}", flag])
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_list_of_demonstrations_is_named(tmp_path, content):
  args = quickstart._arguments([f"--out={tmp_path}"])
  facts = tmp_path / "data" / "tabletop_place" / "1.0.0" / "demonstrations.json"
  facts.parent.mkdir(parents=True)
  facts.write_text(content)
  with pytest.raises(ValueError, match=f"{facts} is damaged: .*remove that folder"):
    quickstart.demonstrate(args)
