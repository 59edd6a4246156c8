"""The command for LIBERO and its folder, with a point for a simulator: what is checked, recorded and gone on with."""

import functools
import json
import types
from pathlib import Path

import earlier_results
import libero_assets
import numpy as np
import policies
import pytest
from point import FOLDER, Point

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics
from semanticvla_jax.envs.subprocess_env import Process
from semanticvla_jax.evaluate import controls, libero, visualize
from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.evaluate.film_recorder import FilmRecorder
from semanticvla_jax.evaluate.rollout_pool import EpisodeLog, EpisodeResult
from semanticvla_jax.policy import Policy

pytestmark = [pytest.mark.sim, libero_assets.skipped]


class Half(Policy):
  """Walks in even episodes, stands in odd ones; what `odd` names gives no numbers."""

  replan_steps, config, image_size = 8, {"model": {}}, 32
  bare = types.SimpleNamespace(prunes_by_instruction=False)
  metadata = {"chunk": 8, "policy_hash": "h", "folder": "f"}

  def __init__(self, odd=()):
    self.odd = odd

  def infer_batch(self, observations):
    return [{"actions": self.actions(one["episode"])} for one in observations]

  def actions(self, episode):
    actions = np.zeros((8, 7), np.float32)
    actions[:, 0] = np.nan if episode in self.odd else 0.25 * (episode % 2 == 0)
    return actions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  entries = {name: statistics.to_openvla(policies.stats()) for name in ("libero_goal", "libero_spatial")}
  place = tmp_path_factory.mktemp("policies") / "a"
  return policy_folder.save_policy(place, {"x": np.zeros(1)}, config=policies.CONFIG, statistics=entries)


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
  """Runs the command; `run.trouble` is the point's, `run.policy` acts, `run.started` are the simulators' suites."""

  def command(*words, suite="libero_goal", out="out"):
    flags = [f"--policy={folder}", f"--suite={suite}", "--tasks=0,1", "--trials=2", "--workers=1", "--films=0"]
    log, command.started = tmp_path / "log", []
    log.unlink(missing_ok=True)
    main([*flags, *words, f"--out={tmp_path / out}"])

  def start(settings, beginnings, timeout):
    command.started.append(settings.suite)
    make = functools.partial(Point, str(tmp_path / "log"), command.trouble)
    return Process(make, {"PYTHONPATH": FOLDER}, 60.0)

  command.trouble, command.policy, command.started, command.out = {}, Half(), [], tmp_path / "out"
  monkeypatch.setattr(libero.policy_folder, "policy_hash", lambda folder: "h")
  monkeypatch.setattr(libero, "load", lambda args, suite: command.policy)
  monkeypatch.setattr(libero.simulator, "start", start)
  monkeypatch.setattr(libero.suites, "find_assets", lambda given=None: Path("assets"))
  monkeypatch.setattr(libero.suites, "assets_hash", lambda folder: "0" * 16)
  monkeypatch.setattr(libero.suites, "missing_assets", lambda task, folder: [])
  return command


def begun(run):
  path = run.out.parent / "log"
  return [int(line) for line in path.read_text().split()] if path.exists() else []


def rows(run):
  found = json.loads((run.out / "results.json").read_text())
  return {(one["suite"], one["name"]): one for one in found["results"]}


MAIN = ("libero_goal", "this policy")


@pytest.mark.parametrize(
  "wrong, message",
  [
    ("--suite=libero_goal,libero_object", r"no statistics of libero_object"),
    ("--suite=libero_goal,libero_gaol", "gaol"),
    ("--suite=libero_goal,libero_goal", "name none twice"),
    ("--suite=libero_goal,pick", "suites of one"),
    ("--controls=shuffled --tasks=3", "in 2 of 2 episodes"),
    ("--controls=shufled", "shufled"),
    ("--films=-2", "--films: got -2"),
    ("--workers=0", "--workers: got 0"),
    ("--replay=0", "--replan-steps: got 0"),
    ("--replay=99", "replan_steps=99; expected 1 to 8"),
    ("--timeout=0", "--timeout: got 0"),
    ("--split=train", "--split: got a flag of the tabletop with suites of LIBERO"),
    ("--trials=51", "expected 1 to 50"),
    ("--tasks=10", "expected numbers from 0 to 9"),
    ("--metrics=nowhere", "nowhere, which does not exist"),
    ("--dataset=bridge", "bridge"),
    ("--max-steps=0", "max_steps=0"),
  ],
)
def test_wrong_flags_end_the_command_before_a_simulator_starts(run, wrong, message):
  with pytest.raises(SystemExit, match=message) as ended:
    run(*wrong.split())
  assert "\n" not in ended.value.code and not run.started


def test_recorded_actions_have_no_controls(tmp_path):
  with pytest.raises(SystemExit, match="with --recorded; expected a policy"):
    main(["--recorded=x", "--suite=libero_goal", "--controls", f"--out={tmp_path}"])


def test_missing_first_states_of_the_second_suite_are_told_first(run, monkeypatch):
  whole = libero.suites.first_states
  short = lambda task: whole(task)[: 1 if "spatial" in str(task.bddl) else 50]  # noqa: E731
  monkeypatch.setattr(libero.suites, "first_states", short)
  with pytest.raises(SystemExit, match="got trial 1 of task 0 of libero_spatial; expected 0 to 0"):
    run(suite="libero_goal,libero_spatial")
  assert not run.started


def test_more_trials_and_controls_are_run_in_addition(run):
  run()
  assert begun(run) == [0, 1, 50, 51] and rows(run)[MAIN]["successes"] == 2
  run("--trials=3", "--controls=shuffled")
  assert begun(run)[:2] == [2, 52] and sorted(begun(run)[2:]) == [0, 1, 2, 50, 51, 52]
  assert rows(run)[MAIN]["episodes"] == 6
  run("--trials=4", "--controls=shuffled")
  assert sorted(begun(run)) == [3, 3, 53, 53], "shuffled episodes keep what they were told"
  told = rows(run)["libero_goal", controls.NAMES["shuffled"]]["per_episode"]
  assert sorted(one["told"] for one in told) == sorted(one["asked"] for one in told) and len(told) == 8
  assert all(one["told"] != one["asked"] for one in told)
  run("--trials=4", "--controls=shuffled")
  assert not begun(run) and (run.out / "report.html").exists()


def test_a_folder_of_an_earlier_version_is_resumed(run):
  earlier = earlier_results.rows("libero")
  earlier_results.copy("libero", run.out, "h")
  run("--controls=shuffled")
  assert not begun(run), "nothing is left to do"
  run("--trials=3", "--controls=shuffled")
  assert begun(run)[:2] == [2, 52]
  found = rows(run)[MAIN]
  old = {one["seed"]: one for one in earlier[0]["per_episode"]}
  assert {one["seed"]: one for one in found["per_episode"] if one["seed"] in old} == old and found["nonfinite"] == 1
  assert [*found] == [*earlier[0]] and [*found["fingerprint"]] == [*earlier[0]["fingerprint"]]
  with pytest.raises(SystemExit, match="(?s)replay: 8 against 4.*choose another --out"):
    run("--replan-steps=4")


def test_broken_episodes_are_repeated_and_told(run, capsys):
  run.trouble = {50: "raise"}
  run()
  printed = capsys.readouterr().out
  assert "1/3, 1 broke  33.3 %" in printed and "3/4, 1 succeeded (50 % of 2, 1 broke)" in printed
  found = json.loads((run.out / "results.json").read_text())
  assert "the physics exploded" in found["broken"]["libero_goal_policy"]["50"] and rows(run)[MAIN]["errors"] == 1
  run.trouble = {}
  run()
  assert begun(run) == [50] and (rows(run)[MAIN]["successes"], rows(run)[MAIN]["errors"]) == (2, 0)


def test_numbers_that_are_none_are_failures_of_the_policy_and_in_the_rate(run, capsys):
  run.policy = Half(odd=(0,))
  run()
  one = rows(run)[MAIN]
  assert (one["successes"], one["episodes"], one["errors"], one["nonfinite"]) == (1, 4, 0, 1)
  assert "1/4, 1 failed by a non-finite action  25.0 %" in capsys.readouterr().out
  run()
  assert not begun(run), "a failure is not repeated"


@pytest.mark.parametrize("words", [("--tasks=0", "--trials=1"), ()])
def test_where_all_broke_there_is_no_rate_and_what_there_is_is_written(run, words, capsys):
  run.trouble = dict.fromkeys((0, 1, 50, 51), "raise")
  with pytest.raises(SystemExit, match=r"no rate: all \d episodes broke") as ended:
    run(*words)
  assert ended.value.code and "no rate: all" in capsys.readouterr().out
  assert rows(run)[MAIN]["rate"] is None and rows(run)[MAIN]["errors"] >= 1
  assert json.loads((run.out / "results.json").read_text())["broken"]["libero_goal_policy"]
  run.trouble = {}
  run(*words)
  assert rows(run)[MAIN]["errors"] == 0


def test_the_first_suite_stays_when_the_second_is_interrupted(run, capsys):
  class Stopping(Half):
    def actions(self, episode):
      if run.started[-1] == "libero_spatial":
        raise KeyboardInterrupt
      return super().actions(episode)

  run.policy = Stopping()
  with pytest.raises(KeyboardInterrupt):
    run(suite="libero_goal,libero_spatial")
  assert f"What was measured is in {run.out}; the same command continues" in capsys.readouterr().err
  assert [*rows(run)] == [MAIN]
  run.policy = Half()
  run(suite="libero_goal,libero_spatial")
  assert begun(run) == [0, 1, 50, 51] and len(rows(run)) == 2


def test_rows_of_another_command_stay_in_the_folder(run):
  run()
  run(suite="libero_spatial")
  assert [*rows(run)] == [("libero_spatial", "this policy"), MAIN]


@pytest.mark.parametrize("name", ["results.json", "libero_goal_fingerprint.json"])
@pytest.mark.parametrize("how", ["cut", "empty"])
def test_damaged_files_are_named_and_made_again_from_the_others(run, name, how, caplog):
  run()
  path = run.out / name
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
  run()
  assert f"{path} is damaged" in caplog.text and not begun(run)
  assert json.loads(path.read_text()) and rows(run)[MAIN]["successes"] == 2


def test_a_damaged_line_costs_its_episode_a_run(run, caplog):
  run()
  path = run.out / "libero_goal_policy.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")
  run()
  assert begun(run) == [1] and str(path) in caplog.text and rows(run)[MAIN]["episodes"] == 4


def test_episodes_of_which_nobody_knows_how_they_were_measured_are_set_aside(run, caplog):
  run()
  (run.out / "results.json").unlink()
  (run.out / "libero_goal_fingerprint.json").write_text("{")
  run()
  assert begun(run) == [0, 1, 50, 51] and "kept as libero_goal_policy.jsonl.damaged" in caplog.text
  assert len((run.out / "libero_goal_policy.jsonl.damaged").read_text().splitlines()) == 4


def test_what_was_measured_otherwise_is_refused_and_stays(run):
  run()
  before = (run.out / "results.json").read_bytes()
  for words, line in (
    (["--replay=4"], "replay: 8 against 4"),
    (["--max-steps=5"], "max_steps: 300 against 5"),
    (["--protocol=openpi"], "protocol: openvla against openpi"),
  ):
    with pytest.raises(SystemExit, match=f"(?s){line}.*choose another --out"):
      run(*words)
  assert (run.out / "results.json").read_bytes() == before and not begun(run)


def test_a_second_suite_that_was_measured_otherwise_is_refused_before_the_first_begins(run, monkeypatch):
  run()
  for words, line in (["--max-steps=5"], "max_steps: 300 against 5"), (["--protocol=openpi"], "openvla against openpi"):
    with pytest.raises(SystemExit, match=line):
      run(*words, suite="libero_spatial,libero_goal")
    assert not run.started
  monkeypatch.setattr(libero.policy_folder, "policy_hash", lambda folder: "another")
  with pytest.raises(SystemExit, match="policy_hash: h against another"):
    run(suite="libero_spatial,libero_goal")
  assert not run.started


def test_other_lines_in_the_folder_are_left_alone(run):
  run.out.mkdir()
  (run.out / "metrics.jsonl").write_text('{"step": 1}\nnot an episode\n')
  run()
  assert (run.out / "metrics.jsonl").read_text() == '{"step": 1}\nnot an episode\n' and len(rows(run)) == 1


def test_films_that_fail_cost_no_episode(run, monkeypatch, caplog):
  monkeypatch.setattr(visualize, "film", lambda *_: np.zeros((300, 64, 64, 3), np.uint8))
  monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
  run("--films=2")
  assert rows(run)[MAIN]["episodes"] == 4 and "No ffmpeg that works" in caplog.text
  assert caplog.text.count("Films failed: ") == 1 and not [*run.out.glob("*.mp4")]
  assert (run.out / "report.html").exists()
  monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
  run("--films=2", "--trials=3")
  assert begun(run) == [2, 52] and len([*run.out.glob("*.mp4")]) == 2


def record(seed, success, **more):
  return EpisodeResult(seed, success, 20, None, "pick up the red cube", "pick up the red cube", 0, 1.0)._replace(**more)


def seen(count):
  return [policies.observation(i, 32) for i in range(count)]


def outcomes(recorder):
  return [(film.seed, film.success) for film in recorder.shown()]


@pytest.fixture
def quick(monkeypatch):
  """Films of a frame."""
  monkeypatch.setattr(visualize, "film", lambda *_: np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.parametrize(
  "success, shown",
  [
    ([1] * 8, [(0, True), (1, True), (2, True), (3, True)]),
    ([0] * 8, [(0, False), (1, False), (2, False), (3, False)]),
    ([0, 0, 0, 0, 1, 0, 0, 0], [(4, True), (0, False), (1, False), (2, False)]),
    ([1, 1, 1, 1, 1, 0, 0, 0], [(0, True), (1, True), (5, False), (6, False)]),
    ([1, 0], [(0, True), (1, False)]),
  ],
)
def test_films_are_as_many_as_asked_for_half_of_each_kind_where_there_are(tmp_path, quick, success, shown):
  recorder = FilmRecorder(tmp_path, "libero_goal", 4, 8)
  for seed, done in enumerate(success):
    recorder(record(seed, bool(done)), seen(2))
  assert outcomes(recorder) == shown == outcomes(FilmRecorder(tmp_path, "libero_goal", 4, 8))
  assert len([*tmp_path.glob("*.mp4")]) == len(shown), "no other films lie about"


@pytest.mark.parametrize("content", [b"", b'[{"path": "libero_g', b"{}", b'[{"path": 3}]', b"\xff"])
def test_a_damaged_list_of_films_is_made_again_from_the_films(tmp_path, quick, content, caplog):
  recorder, records = FilmRecorder(tmp_path, "libero_goal", 2, 8), EpisodeLog(tmp_path / "libero_goal_policy.jsonl")
  for one in (record(3, True), record(5, False)):
    records.add(one)
    recorder(one, seen(2))
  (tmp_path / "libero_goal_films.json").write_bytes(content)
  assert outcomes(FilmRecorder(tmp_path, "libero_goal", 2, 8)) == [(3, True), (5, False)]
  assert "libero_goal_films.json is damaged" in caplog.text


def test_films_that_are_gone_or_cut_are_left_out_and_named(tmp_path, quick, caplog):
  recorder = FilmRecorder(tmp_path, "libero_goal", 4, 8)
  for seed in range(3):
    recorder(record(seed, True), seen(2))
  (tmp_path / "libero_goal_0_done.mp4").unlink()
  (tmp_path / "libero_goal_1_done.mp4").write_bytes(b"cut")
  again = FilmRecorder(tmp_path, "libero_goal", 4, 8)
  assert outcomes(again) == [(2, True)] and "libero_goal_0_done.mp4, libero_goal_1_done.mp4" in caplog.text
  again(record(1, True), seen(2))
  assert outcomes(again) == [(1, True), (2, True)]


@pytest.mark.parametrize("cut", [0, 10, 2000])
def test_damaged_moments_are_named_and_taken_of_the_next_episode(tmp_path, quick, cut, caplog):
  path = tmp_path / "libero_goal_moments.npz"
  FilmRecorder(tmp_path, "libero_goal", 2, 8)(record(0, True), seen(2))
  path.write_bytes(path.read_bytes()[:cut])
  recorder = FilmRecorder(tmp_path, "libero_goal", 2, 8)
  assert f"{path} is damaged" in caplog.text and not path.exists()
  assert recorder.looked(Half(), []) == []
  recorder(record(4, False), seen(2))
  assert recorder._kept()["seed"] == 4


def test_an_action_that_is_no_number_is_filmed_as_a_failure_and_a_broken_episode_is_not(tmp_path, quick):
  recorder = FilmRecorder(tmp_path, "libero_goal", 4, 8)
  recorder(record(0, False, nonfinite=True), seen(1))
  recorder(record(1, False, error="it broke"), seen(1))
  assert outcomes(recorder) == [(0, False)]
