"""The command for LIBERO: its flags, what it keeps, what it refuses; and the harness proven in the real simulator."""

import json

import libero_assets
import numpy as np
import policies
import pytest
import serving

from semanticvla_jax import policy_folder
from semanticvla_jax.data import datasets, robot, statistics
from semanticvla_jax.evaluate import compare, fingerprint, libero, libero_checks, run
from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.evaluate.film_recorder import FilmRecorder
from semanticvla_jax.evaluate.rollout_pool import EpisodeLog, EpisodeResult
from semanticvla_jax.libero import hdf5, suites
from semanticvla_jax.policy import Policy


def arguments(*more):
  _, args = run.arguments(["--policy=x", "--suite=libero_goal", "--out=x", *more])
  return args


@libero_assets.installed
def test_episodes_by_task_and_trial():
  assert libero.seeds(arguments("--tasks=3,1", "--trials=2"), "libero_goal") == [150, 151, 50, 51]
  assert len(libero.seeds(arguments(), "libero_90")) == 90 * 50
  for wrong in ("--tasks=10", "--tasks=0,x", "--tasks=0,-1", "--tasks="):
    with pytest.raises(ValueError, match="expected numbers from 0 to 9 of libero_goal, such as 0,3"):
      libero.seeds(arguments(wrong), "libero_goal")
  for wrong in ("--trials=51", "--trials=0"):
    with pytest.raises(ValueError, match="expected 1 to 50"):
      libero.seeds(arguments(wrong), "libero_goal")


def test_protocols_choose_the_seed_and_flags_the_rest():
  one = libero.settings(arguments("--protocol=openpi", "--seeding=environment", "--max_steps=9"), "libero_goal")
  assert (one.seed, one.seeding, one.max_steps, one.rotation) == (7, "environment", 9, 180)
  with pytest.raises(ValueError, match="rotation=90"):
    libero.settings(arguments("--rotation=90"), "libero_goal")


def test_a_policy_or_recorded_actions_but_not_both(tmp_path):
  for words in (["--policy=x", "--recorded=y"], []):
    with pytest.raises(SystemExit, match="one of --policy and --recorded"):
      main(["--suite=libero_goal", f"--out={tmp_path / 'out'}", *words])
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  "names, suite, chosen",
  [
    (["libero_object_no_noops", "libero_goal_no_noops"], "libero_goal", "libero_goal_no_noops"),
    (["libero_goal", "other"], "libero_goal", "libero_goal"),
    (["libero_4_task_suites_no_noops"], "libero_10", "libero_4_task_suites_no_noops"),
    (["libero_object_no_noops"], "libero_goal", None),
    (["bridge_orig"], "libero_goal", None),
    (["libero_4_task_suites_no_noops"], "libero_90", None),
    ([], "libero_goal", None),
  ],
)
def test_statistics_of_the_suite_are_chosen_and_others_refused(names, suite, chosen):
  if chosen is None:
    with pytest.raises(ValueError, match=f"no statistics of {suite}.*choose with --dataset"):
      libero_checks.dataset_for(names, suite)
  else:
    assert libero_checks.dataset_for(names, suite) == chosen


def test_a_policy_of_another_suite_is_refused_by_the_command(tmp_path):
  entries = {"libero_object_no_noops": statistics.to_openvla(policies.stats())}
  folder = policy_folder.save_policy(tmp_path / "p", {"x": np.zeros(1)}, config=policies.CONFIG, statistics=entries)
  with pytest.raises(SystemExit, match=r"got those of \['libero_object_no_noops'\]"):
    main([f"--policy={folder}", "--suite=libero_goal", f"--out={tmp_path / 'out'}"])


def test_tasks_whose_sentences_are_too_long_are_named():
  libero_checks.check_sentences(policies.policy(), "libero_goal", {0: "open the drawer", 3: "close it"})
  long = "grab the bowl " * 12
  message = r"^Sentences of libero_goal_lan: got too long ones in tasks \[3, 5\] \(Instruction does not fit.*--tasks"
  with pytest.raises(ValueError, match=message):
    libero_checks.check_sentences(policies.policy(), "libero_goal_lan", {0: "open it", 3: long, 5: long})


def test_a_gripper_with_other_values_is_refused_by_the_command(tmp_path):
  entries = {"libero_object_no_noops": statistics.to_openvla(policies.stats())}
  spec = datasets.spec("libero_object_no_noops")
  own = spec._replace(gripper=spec.grippers[0]._replace(command=(0.0, 1.0)))
  config = policies.CONFIG | {robot.KEY: {"libero_object_no_noops": robot.of(own).to_json()}}
  folder = policy_folder.save_policy(tmp_path / "p", {"x": np.zeros(1)}, config=config, statistics=entries)
  with pytest.raises(SystemExit, match=r"another robot: got the grippers .*expected -1 open .*trained on LIBERO"):
    main([f"--policy={folder}", "--suite=libero_object", f"--out={tmp_path / 'out'}"])


def test_a_misspelt_control_is_told_before_anything_is_loaded(tmp_path):
  with pytest.raises(SystemExit, match=r"got \['shufled'\]; expected some of .*choose among them"):
    main(["--policy=nowhere", "--suite=libero_goal", "--controls=shufled", f"--out={tmp_path / 'out'}"])


def test_a_report_has_a_place_unless_told():
  def place(*words):
    return run.arguments(["--suite=libero_goal,libero_10", *words])[1].out

  assert place("--policy=policies/oft/") == "runs/oft_libero_goal_libero_10"
  assert place("--policy=runs/scripted/policy") == "runs/scripted_libero_goal_libero_10"
  assert place("--recorded=x") == "runs/recorded_libero_goal_libero_10" and place("--policy=x", "--out=y") == "y"


def seen(count):
  return [policies.observation(i, 32, "pick up the red cube") for i in range(count)]


def test_films_of_either_outcome_and_moments_survive_an_interruption(tmp_path):
  def record(seed, success, error=None):
    return EpisodeResult(seed, success, 20, error, "pick up the red cube", "pick up the red cube", 0, 1.0)

  recorder = FilmRecorder(tmp_path, "libero_goal", 2, 8)
  recorder(record(0, False), seen(4))
  recorder(record(1, False), seen(4))  # one failure is enough of two films
  recorder(record(2, False, "it broke"), seen(4))
  again = FilmRecorder(tmp_path, "libero_goal", 2, 8)
  again(record(3, True), seen(3))
  shown = [(film.seed, film.success, film.path.exists()) for film in again.shown()]
  assert shown == [(3, True, True), (0, False, True)]
  scenes = again.looked(policies.policy(), ["pick up the red cube", "push the bowl"])
  assert [scene.moment for scene in scenes] == ["episode 3, first frame", "episode 3, half way"]
  assert [told for told, _, _ in scenes[0].looks] == ["pick up the red cube", "push the bowl"]


def test_tracebacks_of_what_broke_are_kept(tmp_path):
  records = EpisodeLog(tmp_path / "libero_goal_policy.jsonl")
  for seed, error in ((1, None), (2, "ArithmeticError: the physics exploded")):
    records.add(EpisodeResult(seed, False, 20, error, "do it", "do it", 2, 1.0))
  EpisodeLog(tmp_path / "libero_goal_shuffled.jsonl").add(EpisodeResult(1, True, 20, None, "do it", "sit", 0, 1.0))
  assert libero.broken(tmp_path) == {"libero_goal_policy": {2: "ArithmeticError: the physics exploded"}}


def test_what_was_measured_otherwise_is_not_gone_on_with(tmp_path):
  one = libero.LiberoRun.__new__(libero.LiberoRun)
  one._out, one.suite = tmp_path, "libero_goal"
  mark = {"replay": 8, "simulator": {"mujoco": "3.8.1"}, "seeds": (1, 2), "first_states": "a", "sources": "x"}
  mark |= {"policy": {"policy_hash": "p", "folder": "here"}}
  one.claim("policy", mark)
  assert one.claim("policy", mark)["sources"] == "x"
  with pytest.raises(ValueError, match="simulator.mujoco: 3.8.1 against 3.2.3"):
    one.claim("policy", mark | {"simulator": {"mujoco": "3.2.3"}})
  with pytest.raises(ValueError, match="policy.policy_hash: p against q"):
    one.claim("policy", mark | {"policy": {"policy_hash": "q", "folder": "here"}})
  more = mark | {"seeds": (1, 2, 3), "episodes": 3, "first_states": "b", "sources": "y"}
  assert one.claim("policy", more | {"policy": {"policy_hash": "p", "folder": "there"}})["sources"] == "x y"


@pytest.mark.sim
def test_a_policy_goes_through_the_whole_command(tmp_path, monkeypatch):
  """A tiny one with random parameters, two tasks, a few steps: films, overlays, controls, fingerprint."""
  monkeypatch.setenv("LIBERO_ASSETS", libero_assets.assets())
  folder = policies.saved_for_libero(tmp_path / "policy")
  out = tmp_path / "out"
  words = ["--suite=libero_object", "--tasks=0,1", "--trials=1", "--workers=1", "--max-steps=8", "--films=2"]
  main([f"--policy={folder}", *words, "--controls=shuffled,random", f"--out={out}"])
  rows = json.loads((out / "results.json").read_text())["results"]
  assert [row["kind"] for row in rows] == ["policy", "control", "control"]
  for row in rows:
    assert (row["episodes"], row["errors"], row["successes"]) == (2, 0, 0)
    assert [(one["seed"], one["steps"], one["retries"]) for one in row["per_episode"]] == [(0, 8, 0), (50, 8, 0)]
  told = [(one["asked"], one["told"]) for one in rows[1]["per_episode"]]
  assert told[0] == told[1][::-1] and told[0][0] != told[0][1]
  mark = rows[0]["fingerprint"]
  assert (mark["policy"]["dataset"], mark["preprocessing"]["crop_area"], mark["chunk"]) == (
    "libero_object_no_noops",
    0.9,
    8,
  )
  assert rows[2]["fingerprint"]["model_changes"] == {"anchor_rule": "random"}
  page = (out / "report.html").read_text()
  assert len([*out.glob("*.mp4")]) == page.count("data:video/mp4") - 1 == 2  # one is shown at the top too
  assert len([*out.glob("*_looks_*.png")]) == 2 and page.count("data:image/png") >= 16


@pytest.mark.sim
def test_a_served_policy_does_what_its_folder_does(tmp_path, monkeypatch):
  monkeypatch.setenv("LIBERO_ASSETS", libero_assets.assets())
  folder = policies.saved_for_libero(tmp_path / "policy")
  words = ["--suite=libero_object", "--tasks=0", "--trials=1", "--workers=1", "--max-steps=12", "--films=1"]
  rows = []
  with serving.serving(Policy.load(folder, batch_sizes=(1,))) as (_, port):
    for number, policy in enumerate((folder, f"ws://127.0.0.1:{port}")):
      main([f"--policy={policy}", *words, f"--out={tmp_path / str(number)}"])
      rows += json.loads((tmp_path / str(number) / "results.json").read_text())["results"]
  own, served = rows
  differ = fingerprint.differences(own["fingerprint"], served["fingerprint"])
  assert set(differ) <= {"served", "policy.folder"} and "served" in differ
  assert (served["episodes"], served["errors"]) == (1, 0)
  first, second = ([*(tmp_path / name).glob("*.mp4")] for name in "01")
  assert first[0].read_bytes() == second[0].read_bytes()  # the robot moved alike


@pytest.mark.sim
def test_recorded_actions_do_through_the_whole_command_what_they_did_when_recorded(tmp_path, monkeypatch, capsys):
  """Two tasks at once, interrupted and gone on with; then the result is compared with itself, and with another."""
  monkeypatch.setenv("LIBERO_ASSETS", libero_assets.assets())
  folder = libero_assets.demonstrations()
  words = [f"--recorded={folder}", "--suite=libero_object", "--tasks=0,1", "--trials=1", "--workers=2", "--films=1"]
  main([*words, f"--out={tmp_path / 'a'}"])
  result = json.loads((tmp_path / "a" / "results.json").read_text())["results"][0]
  assert result["successes"] == result["episodes"] == 2 and result["errors"] == 0
  lengths = [
    len(hdf5.read(next(folder.rglob(f"{name}_demo.hdf5")))[0].moving)
    for name in (
      "pick_up_the_alphabet_soup_and_place_it_in_the_basket",
      "pick_up_the_cream_cheese_and_place_it_in_the_basket",
    )
  ]
  if suites.versions()["mujoco"] == libero_assets.RECORDED_WITH:  # elsewhere objects fall a few steps sooner or later
    assert np.abs(np.array([one["steps"] for one in result["per_episode"]]) - lengths).max() <= 1
  assert result["fingerprint"]["renderer"].startswith("egl") and len(result["fingerprint"]["assets"]) == 16
  assert (tmp_path / "a" / "report.html").stat().st_size > 20_000 and [*(tmp_path / "a").glob("*.mp4")]
  (tmp_path / "a" / "results.json").rename(tmp_path / "whole.json")
  lines = (tmp_path / "a" / "libero_object_policy.jsonl").read_text().splitlines()
  (tmp_path / "a" / "libero_object_policy.jsonl").write_text(lines[0] + "\n")
  main([*words, f"--out={tmp_path / 'a'}"])
  again = json.loads((tmp_path / "a" / "results.json").read_text())["results"][0]
  assert [one | {"seconds": 0} for one in again["per_episode"]] == [
    one | {"seconds": 0} for one in result["per_episode"]
  ]
  assert again["fingerprint"] == result["fingerprint"]
  assert "2/2, 2 succeeded" in capsys.readouterr().out
  other = dict(result, fingerprint=result["fingerprint"] | {"quaternion": "positive_w"})
  assert any("A − B" in line for line in compare.compare(result, again))
  with pytest.raises(ValueError, match="quaternion: robosuite against positive_w"):
    compare.compare(result, other)
