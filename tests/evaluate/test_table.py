import itertools
import json
import pathlib

import pytest

from semanticvla_jax.evaluate import table, table_report, table_rows
from semanticvla_jax.evaluate.table_report import Found, Rate

ROOT = pathlib.Path(__file__).parents[2]


def dry_run(capsys, *flags):
  table.main([*flags, "--dry-run"])
  return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_every_row_is_a_config():
  from configs import tables

  named = {entry.row for entries in table_rows.TABLES.values() for entry in entries}
  named |= {*table_rows.PARAMETERS_OF, *table_rows.PARAMETERS_OF.values()}
  assert named <= {*tables.ROWS}


def test_rows_run_once_and_after_those_that_they_take_parameters_of():
  rows = [entry.row for entry in table_rows.entries(["5", "6", "2"])]
  assert len({*rows}) == len(rows) and {"full", "table6_none", "pd_vla"} <= {*rows}
  for row, source in table_rows.PARAMETERS_OF.items():
    assert row not in rows or rows.index(source) < rows.index(row)
  assert next(entry.row for entry in table_rows.entries(["robustness"])) == "oft"
  with pytest.raises(ValueError, match="--table: got 7; expected some of 2, 4, 5, 6, baselines, robustness"):
    table_rows.entries(["7"])


def test_all_rows_have_the_same_base_and_budget(capsys):
  lines = dry_run(capsys, "--table=6", "--steps=40", "--seeds=2", "--calls=0", "--out=x")
  trained = [line for line in lines if "semanticvla_jax.train" in line]
  assert len(trained) == 8  # four rows, two seeds
  own = ("--config=", "--workdir=", "--config.seed=")
  common = [[word for word in line if not word.startswith(own)] for line in trained]
  assert all(words == common[0] for words in common) and "--config.train.steps=40" in common[0]
  assert sorted({word for line in trained for word in line if "seed=" in word}) == [
    "--config.seed=7",
    "--config.seed=8",
  ]


def test_rows_without_training_take_the_dense_rows_parameters_seed_by_seed(capsys):
  lines = dry_run(capsys, "--table=5", "--row=fastv_k2", "--seeds=2", "--calls=0", "--out=x")
  free = [line for line in lines if any("fastv_k2@small64" in word for word in line)]
  assert [f"--config.init_from=x/rows/oft/seed_{seed}/policy" in line for seed, line in enumerate(free)] == [True, True]
  assert all("--config.train.steps=0" in line for line in free)
  assert sum("oft@small64" in word for line in lines for word in line) == 2  # trained, though not asked for


def test_action_tokens_are_fitted_before_a_row_that_speaks_them(capsys):
  lines = dry_run(capsys, "--table=baselines", "--row=fast_unconstrained", "--data-dir=d", "--calls=0", "--out=x")
  fit, train, _, free, *_ = lines
  assert fit[3] == "fit-tokenizer" and {"--data-dir=d", "--name=tabletop_place", "--vocab=256"} <= {*fit}
  assert fit[-1].replace("--out", "--config.data.action_tokens") in train  # the same file
  assert "--config.init_from=x/rows/fast/seed_0/policy" in free and "--config.train.steps=0" in free


def test_the_noise_of_lightvla_ends_with_the_training(capsys):
  lines = dry_run(capsys, "--table=baselines", "--row=lightvla", "--steps=40", "--calls=0", "--out=x")
  assert sum("--config.model.decoder_pruner.noise_steps=40" in line for line in lines) == 1


def test_robustness_measures_controls_and_changed_layouts(capsys):
  lines = dry_run(capsys, "--table=robustness", "--row=full", "--calls=0", "--out=x")
  assert lines[3] == [*lines[2], "--controls=shuffled,blind"] and "--split=unseen" in lines[4]
  assert lines[:3] == dry_run(capsys, "--table=4", "--row=full", "--calls=0", "--out=x")  # kept, whichever came first
  words = ("--size=7b", "--suite=libero_object", "--base=b", "--data-dir=d")
  lines = dry_run(capsys, "--table=robustness", "--row=full", "--calls=0", *words)
  assert "--suite=libero_pro" in lines[3] and "--trials=26" in lines[3]


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--suite=libero_object"], "--suite with --size=small64: got libero_object; expected a suite of the tabletop"),
    (["--size=7b"], "--size=7b: got no --base; expected a folder"),
    (["--row=nothing"], r"--row: got \['nothing'\]; expected some of table6_none, table6_fuser"),
    (["--seeds=0"], "--seeds: got 0; expected at least 1"),
  ],
)
def test_bad_flags_are_refused(flags, message):
  with pytest.raises(ValueError, match=message):
    table.main(["--table=6", "--dry-run", *flags])


def test_a_stage_runs_once_and_says_why_it_failed(tmp_path):
  stage = table.Stage("help", ["semanticvla_jax.evaluate.table_rows"])
  seconds = table.run(tmp_path, stage)
  (tmp_path / "help.log").unlink()
  assert table.run(tmp_path, stage) == seconds and not (tmp_path / "help.log").exists()
  with pytest.raises(table.StageFailed, match=r"other failed: .*No module named semanticvla_jax.nothing"):
    table.run(tmp_path, table.Stage("other", ["semanticvla_jax.nothing"]))
  assert not (tmp_path / "other.json").exists()


def test_rates_are_pooled_over_seeds():
  assert Rate([192, 128], [256, 256]).text() == "62.5 % (58–67 %, seeds 75 50)"
  assert Rate([256], [256]).text() == "100 % (99–100 %)"
  assert Rate([], []).text() == "–"


def test_the_best_trade_offs_are_those_no_other_beats():
  points = {"dense": (8.0, 97.0), "pruned": (2.0, 97.0), "small": (1.0, 50.0), "bad": (3.0, 90.0)}
  assert table_report.undominated(points) == ["pruned", "small"]
  for a, b in itertools.permutations(["pruned", "small"]):  # of equals none is left out
    assert {*table_report.undominated({a: (1.0, 5.0), b: (1.0, 5.0)})} == {a, b}


def test_the_plot_shows_every_row(tmp_path):
  rates = {"success": Rate([3], [4])}
  found = {name: Found(rates, 1, [0.1], ["0" * 16], "cpu", flops, 1.0) for name, flops in (("a", 1e9), ("b", 2e9))}
  table_report.draw(found, tmp_path / "pareto.png")
  assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_table_end_to_end(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  flags = ["--table=5", "--row=fastv_k2", "--size=tiny", "--steps=2", "--episodes=2", "--calls=2"]
  flags += ["--demonstrations=2", f"--out={tmp_path}"]
  table.main(flags)
  printed = capsys.readouterr().out
  assert "2 of 2 done" in printed and "## Table 5" in printed
  found = json.loads((tmp_path / "tables.json").read_text())
  assert {*found} == {"oft", "fastv_k2"}
  dense, pruned = found["oft"], found["fastv_k2"]
  assert dense["steps"] == 2 and pruned["steps"] is None
  assert pruned["flops"] < dense["flops"] and pruned["hashes"] != dense["hashes"]
  assert (tmp_path / "pareto.png").exists() and "| FastV, 1/8 from layer 2 on |" in (tmp_path / "tables.md").read_text()
  before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("rows/*/*/*.log")}
  table.main(flags)  # nothing is trained or measured again
  assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("rows/*/*/*.log")} == before
