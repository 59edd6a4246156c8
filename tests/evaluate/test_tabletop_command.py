"""The tabletop's command: what it checks before an episode, what it keeps when something ends it, what it goes on with.

Most episodes here are made up, by the seed alone; what runs them for real is in test_rollout.py and test_report.py.
"""

import functools
import json
import os

import earlier_results
import numpy as np
import policies
import pytest
from helpers import random_params, tiny

from semanticvla_jax import files, policy_folder
from semanticvla_jax.data import statistics, text
from semanticvla_jax.evaluate import __main__ as command
from semanticvla_jax.evaluate import controls, report, tabletop, visualize
from semanticvla_jax.evaluate.rollout import Episodes, OnDevice, OnHost


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root, entry = tmp_path_factory.mktemp("policies"), statistics.to_openvla(policies.stats())
  kinds = {
    "a": {"tabletop_pick": entry},
    "b": {"tabletop_pick": entry},
    "two": {"tabletop_pick": entry, "other": entry},
  }
  for seed, (name, entries) in enumerate(kinds.items()):
    policy_folder.save_policy(
      root / name, random_params(tiny(), seed), config=policies.CROPPING, tokenizers=text.EMBEDDED, statistics=entries
    )
  return root


@pytest.fixture
def made_up(monkeypatch):
  """What was run, (suite, seeds); `made_up.stop` raises in that suite, `made_up.broken` seeds break."""

  class MadeUp:
    runs, stop, broken, spoilt = [], None, (), ()

    def __call__(self, runner, seeds, told=None, progress=None):
      suite = runner._setup.suite if isinstance(runner, OnDevice) else "pick"
      if suite == self.stop:
        raise KeyboardInterrupt
      self.runs.append((suite, [int(seed) for seed in seeds]))
      said = tabletop.instructions(suite, "heldout", seeds)
      seeds = np.array(seeds, np.int64)
      broke, bad = np.isin(seeds, self.broken), np.isin(seeds, self.spoilt)
      success = (seeds % 2 == 0) & ~broke & ~bad
      return Episodes(seeds, success, np.full(len(seeds), 7, np.int32), broke, said, told or said, nonfinite=bad)

  MadeUp.runs = []
  made = MadeUp()
  for kind in (OnDevice, OnHost):
    monkeypatch.setattr(kind, "run", lambda self, *words, **more: made(self, *words, **more))
  monkeypatch.setattr(tabletop.Policy, "load", _load)
  return made


_LOAD = tabletop.Policy.load


@functools.cache
def _load(path, **options):
  """Each policy once: what is tried here is what comes after it."""
  return _LOAD(path, **options)


def flags(folders, out, *more, policy="a", suite="pick"):
  return [f"--policy={folders / policy}", f"--suite={suite}", "--episodes=4", "--films=0", f"--out={out}", *more]


def rows(out):
  found = json.loads((out / "results.json").read_text())["results"]
  return {(one["suite"], one["name"]): one for one in found}


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ("--suite=pick,plcae", "--suite: got 'plcae'; expected one of.*did you mean 'place'"),
    ("--suite=pick,pick", "name none twice"),
    ("--suite=pick,", "got ''"),
    ("--suite=pick,libero_goal", r"got \['pick'\] of the tabletop and \['libero_goal'\] of LIBERO"),
    ("--suite=libero_goal,libero_gaol", "libero_gaol"),
    ("--split=helout", "did you mean 'heldout'"),
    ("--films=-1", "--films: got -1; expected at least 0"),
    ("--replan-steps=0", "--replan-steps: got 0; expected at"),
    ("--replay=0", "--replan-steps: got 0"),
    ("--replan-steps=9", "replan_steps=9; expected 1 to 8"),
    ("--replay=9 --host", "replan_steps=9; expected 1 to 8"),
    ("--suite=pick,plcae --host", "did you mean 'place'"),
    ("--batch=0", "--batch: got 0; expected at least 1"),
    ("--controls=blind,blind", "name none twice"),
    ("--controls=bilnd", "bilnd"),
    ("--trials=3", "--trials: got a flag of LIBERO with suites of the tabletop"),
    ("--metrics=nowhere.jsonl", "nowhere.jsonl, which does not exist"),
    ("--dataset=bridge", "bridge"),
    ("--metrics=.", "Metrics cannot be read"),
    ("--baseline=nowhere", "nowhere"),
    ("--seed=499999999", "outside split"),
  ],
)
def test_wrong_flags_end_the_command_before_an_episode(folders, made_up, tmp_path, wrong, message):
  with pytest.raises(SystemExit, match=message) as ended:
    command.main([*flags(folders, tmp_path / "out"), *wrong.split()])
  assert "\n" not in ended.value.code and not made_up.runs


def test_statistics_of_another_robot_are_refused_unless_they_are_chosen(made_up, tmp_path):
  policies.saved_for_libero(tmp_path / "libero")
  given, own = flags(tmp_path, tmp_path / "out", policy="libero"), "libero_object_no_noops"
  with pytest.raises(SystemExit, match=f"no statistics of the tabletop: got those of {own}; .* choose with --dataset"):
    command.main(given)
  assert not made_up.runs
  command.main([*given, f"--dataset={own}"])
  assert made_up.runs


def test_a_control_that_cannot_be_is_refused_before_an_episode(folders, made_up, tmp_path):
  with pytest.raises(SystemExit, match="in 1 of 1 episodes; expected at most half"):
    command.main([*flags(folders, tmp_path), "--controls=blind,shuffled", "--episodes=1"])
  with pytest.raises(SystemExit, match="knows several datasets"):
    command.main(flags(folders, tmp_path, policy="two", suite="pick,place"))
  with pytest.raises(SystemExit, match="knows several datasets"):
    command.main([*flags(folders, tmp_path), f"--baseline={folders / 'two'}"])
  assert not made_up.runs and not (tmp_path / "results.json").exists()


def test_an_existing_file_as_out_is_one_line(folders, made_up, tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(SystemExit, match="which is a file; expected a folder"):
    command.main(flags(folders, tmp_path / "file"))


def test_a_row_is_kept_when_a_later_one_is_interrupted_and_the_rest_is_measured_then(
  folders, made_up, tmp_path, capsys
):
  made_up.stop = "place"
  words = flags(folders, tmp_path, f"--baseline={folders / 'b'}", suite="pick,place")
  with pytest.raises(KeyboardInterrupt):
    command.main(words)
  assert f"What was measured is in {tmp_path}; the same command continues" in capsys.readouterr().err
  assert [*rows(tmp_path)] == [("pick", "this policy"), ("pick", "before")]
  made_up.stop, made_up.runs = None, []
  command.main(["run", *words])
  assert [suite for suite, _ in made_up.runs] == ["place", "place"] and len(rows(tmp_path)) == 4
  assert (tmp_path / "report.html").exists() and json.loads((tmp_path / "results.json").read_text())["finished"]
  made_up.runs = []
  command.main(words)
  assert not made_up.runs, "nothing is left to do"


def test_a_finished_run_is_gone_on_with(folders, made_up, tmp_path, capsys):
  command.main(flags(folders, tmp_path))
  made_up.runs = []
  command.main([*flags(folders, tmp_path), "--controls=shuffled,blind", "--episodes=6"])
  assert made_up.runs == [("pick", [4, 5]), ("pick", [*range(6)]), ("pick", [*range(6)])]
  found = rows(tmp_path)
  assert found["pick", "this policy"]["episodes"] == 6 and found["pick", "this policy"]["successes"] == 3
  assert found["pick", "this policy"]["fingerprint"]["seeds"] == "0..5"
  assert "4 of 6 episodes were measured before, kept" in capsys.readouterr().out
  made_up.runs = []
  command.main([*flags(folders, tmp_path), "--controls=shuffled,blind,random", "--episodes=8"])
  shuffled = rows(tmp_path)["pick", controls.NAMES["shuffled"]]["per_episode"]
  assert sorted(one["asked"] for one in shuffled) == sorted(one["told"] for one in shuffled)
  assert all(one["asked"] != one["told"] for one in shuffled) and len(shuffled) == 8
  assert [*rows(tmp_path)] == [
    ("pick", name) for name in ("this policy", *(controls.NAMES[x] for x in ("shuffled", "blind", "random")))
  ]


def test_a_folder_of_an_earlier_version_is_resumed(folders, made_up, tmp_path, capsys):
  earlier, key = earlier_results.rows("tabletop"), policy_folder.policy_hash(folders / "a")
  out = earlier_results.copy("tabletop", tmp_path / "out", key)
  command.main([*flags(folders, out), "--controls=shuffled", "--episodes=6"])
  assert made_up.runs[0] == ("pick", [4, 5]) and "4 of 6 episodes were measured before" in capsys.readouterr().out
  found = rows(out)["pick", "this policy"]
  assert found["per_episode"][:4] == earlier[0]["per_episode"] and found["nonfinite"] == 1
  assert [*found] == [*earlier[0]] and [*found["fingerprint"]] == [*earlier[0]["fingerprint"]]
  assert found["fingerprint"]["sources"].startswith(f"{earlier[0]['fingerprint']['sources']} ")
  assert rows(out)["pick", controls.NAMES["shuffled"]]["fingerprint"]["told"] == "another episode's instruction"
  with pytest.raises(SystemExit, match="(?s)replay: 8 against 4.*choose another --out"):
    command.main([*flags(folders, out), "--controls=shuffled", "--replan-steps=4"])


def test_only_what_was_measured_otherwise_is_refused(folders, made_up, tmp_path):
  command.main(flags(folders, tmp_path))
  before = (tmp_path / "results.json").read_bytes()
  for change, line in (
    ("--replay=4", "replay: 8 against 4"),
    ("--split=train", "split: heldout against train"),
    (f"--policy={folders / 'b'}", "policy.policy_hash"),
    ("--dtype=bfloat16", "dtype"),
  ):
    made_up.runs = []
    with pytest.raises(SystemExit, match=f"measured differently: got.*{line}.*choose another --out"):
      command.main([*flags(folders, tmp_path), change])
    assert not made_up.runs and (tmp_path / "results.json").read_bytes() == before


def test_a_damaged_results_file_is_named_and_all_is_measured_again(folders, made_up, tmp_path, caplog):
  command.main(flags(folders, tmp_path))
  content = (tmp_path / "results.json").read_bytes()
  (tmp_path / "results.json").write_bytes(content[: len(content) // 2])
  command.main(flags(folders, tmp_path))
  assert "results.json is damaged" in caplog.text and "all is measured again" in caplog.text
  assert len(made_up.runs) == 2 and (tmp_path / "results.json.damaged").exists() and len(rows(tmp_path)) == 1


def test_broken_episodes_are_told_and_repeated(folders, made_up, tmp_path, capsys):
  made_up.broken, made_up.spoilt = (2,), (0,)
  words = flags(folders, tmp_path, "--host")
  command.main(words)
  assert "0/3, 1 broke, 1 failed by a non-finite action  0 %" in capsys.readouterr().out
  one = rows(tmp_path)["pick", "this policy"]
  assert (one["successes"], one["episodes"], one["errors"], one["nonfinite"]) == (0, 3, 1, 1)
  assert sum(task["errors"] for task in one["tasks"].values()) == 1
  made_up.broken, made_up.spoilt, made_up.runs = (), (), []
  command.main(words)
  assert made_up.runs == [("pick", [2])]
  assert (rows(tmp_path)["pick", "this policy"]["successes"], rows(tmp_path)["pick", "this policy"]["errors"]) == (1, 0)


def test_where_everything_broke_there_is_no_rate_and_the_status_says_so(folders, made_up, tmp_path, capsys):
  made_up.broken = range(4)
  with pytest.raises(SystemExit, match="pick, this policy: no rate: all 4 episodes broke"):
    command.main(flags(folders, tmp_path, "--host", "--controls=shuffled"))
  printed = capsys.readouterr().out
  assert "no rate: all 4 episodes broke" in printed and "%" not in printed
  one = rows(tmp_path)["pick", "this policy"]
  assert one["rate"] is None and one["errors"] == 4 and len(rows(tmp_path)) == 1
  assert (tmp_path / "report.html").exists()


def test_two_evaluations_into_one_folder_are_refused(folders, made_up, tmp_path, monkeypatch):
  refused = pytest.raises(SystemExit, match=f"is being written: got process {os.getpid()} at work on it")
  with files.alone(tmp_path, inside=True), refused:
    command.main(flags(folders, tmp_path))
  assert not made_up.runs


@pytest.mark.parametrize("what", ["films", "pictures", "report"])
def test_what_fails_after_the_measurement_is_a_warning_and_is_made_by_the_next_run(
  folders, tmp_path, monkeypatch, caplog, what
):
  """For real, with states: two episodes, films and pictures."""

  def full(*_, **__):
    raise OSError("No space left on device")

  words = [word for word in flags(folders, tmp_path) if not word.startswith(("--films", "--episodes"))]
  words += ["--films=1", "--episodes=2"]
  where = {"films": (visualize, "write_mp4"), "pictures": (visualize, "looks"), "report": (report, "write")}[what]
  with monkeypatch.context() as patch:
    patch.setattr(*where, full)
    command.main(words)
  name = {"report": "report.html"}.get(what, what)
  assert f"{name} failed: OSError: No space left on device; the measured results are kept" in caplog.text
  assert rows(tmp_path)["pick", "this policy"]["episodes"] == 2
  assert len([*tmp_path.glob("*.mp4")]) == (what != "films") and not [*tmp_path.glob(".*")]
  if what == "films":
    command.main(words)  # the row is kept, its film made of the episode run again
    assert len([*tmp_path.glob("*.mp4")]) == 1 and "data:video/mp4" in (tmp_path / "report.html").read_text()


def test_a_baseline_of_other_settings_is_measured_and_they_are_told(folders, made_up, tmp_path, caplog):
  other = {**policies.CROPPING, "data": {**policies.CROPPING["data"], "crop_area": 0.8, "normalisation": "bounds"}}
  policy_folder.save_policy(
    tmp_path / "base",
    random_params(tiny()),
    config=other,
    tokenizers=text.EMBEDDED,
    statistics={"another_name": statistics.to_openvla(policies.stats())},
  )
  command.main(flags(folders, tmp_path / "out", f"--baseline={tmp_path / 'base'}"))
  assert "differ in their own settings: " in caplog.text and "preprocessing.crop_area: 0.9 against 0.8" in caplog.text
  assert "preprocessing.normalisation" in caplog.text and len(rows(tmp_path / "out")) == 2


def test_controls_that_change_nothing_are_named(folders, made_up, tmp_path, caplog):
  config = {**policies.CROPPING, "model": {**policies.CROPPING["model"], "anchor_rule": "random"}}
  policy_folder.save_policy(
    tmp_path / "random",
    random_params(tiny(anchor_rule="random")),
    config=config,
    tokenizers=text.EMBEDDED,
    statistics={"tabletop_pick": statistics.to_openvla(policies.stats())},
  )
  command.main([*flags(tmp_path, tmp_path / "out", "--controls=blind,random", policy="random")])
  assert "Controls skipped, because they change nothing in this policy: random" in caplog.text
  assert [*rows(tmp_path / "out")] == [("pick", "this policy"), ("pick", controls.NAMES["blind"])]
