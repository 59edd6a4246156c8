"""LIBERO's scripted expert: its goals, its bookkeeping, one episode in the simulator, its command."""

import json

import libero_assets
import numpy as np
import pytest

from semanticvla_jax.data import rlds
from semanticvla_jax.demonstrate.__main__ import main
from semanticvla_jax.envs.subprocess_env import Process
from semanticvla_jax.libero import demonstrator, episode_files, expert, scene, simulator, suites
from semanticvla_jax.libero import expert_demonstrations as demonstrations

NAME = "libero_object_no_noops"
BDDL = """(define (problem LIBERO_Floor_Manipulation)
  (:objects
    butter_1 milk_1 - food
    basket_1 - basket
  )
  (:goal
    (And {})
  )
)"""
OPTIONS = demonstrations.Options(suites.Settings("libero_object"), (0, 3), episodes=4)


def test_the_goals_of_a_task():
  found = expert.goals(BDDL.format("(In butter_1 basket_1_contain_region) (On milk_1 basket_1)"))
  assert found == [("in", "butter_1", "basket_1_contain_region"), ("on", "milk_1", "basket_1")]


def test_goals_of_one_thing():
  found = expert.goals(BDDL.format("(Turnon stove_1) (Open desk_1_top_region) (In butter_1 basket_1)"))
  assert found == [("turnon", "stove_1", None), ("open", "desk_1_top_region", None), ("in", "butter_1", "basket_1")]


@pytest.mark.parametrize(
  "goal", ["(Open oven_1)", "(On stove_1 basket_1)", "(Close desk_1_top_region) (In butter_1 basket_1)", "(Turnon)", ""]
)
def test_what_the_expert_cannot_do_is_not_tried(goal):
  assert expert.goals(BDDL.format(goal)) is None


class Fingers(scene.Scene):
  """A gripper at rest whose fingers come 7 mm nearer with each step, until they meet something."""

  grip, attitude = np.zeros(3), np.eye(3)

  def __init__(self, meets):
    self.meets, self.steps = meets, 0

  @property
  def opening(self):
    return max(0.08 - 0.007 * self.steps, self.meets)


@pytest.mark.parametrize(("meets", "steps"), [(0.07, 8), (0.01, 11), (-1.0, 16)], ids=["box", "rim", "nothing"])
def test_fingers_close_until_they_stand_still(meets, steps):
  gripper = Fingers(meets)
  for action in expert.Expert(gripper, [], np.random.default_rng(0))._close(np.zeros(3)):
    gripper.steps += 1
    assert action[6] == expert.CLOSE and not action[:3].any()
  assert gripper.steps == steps


@libero_assets.installed
def test_the_tasks_that_the_expert_can_do():
  assert demonstrations.able("libero_object") == demonstrations.able("libero_spatial") == [*range(10)]
  assert demonstrations.able("libero_goal") == [*range(10)]
  assert demonstrations.able("libero_10") == [0, 1, 2, 4, 5, 6, 7, 8]


def collection(tmp_path, outcomes):
  found = demonstrations._Collection(OPTIONS, tmp_path, None)
  found.outcomes = {0: {}, 3: outcomes}
  found.outcomes[0] = dict.fromkeys(range(4), True)
  return found


def test_one_more_attempt_for_each_that_failed(tmp_path):
  found = collection(tmp_path, {0: True, 1: None, 2: False})
  assert found._next(0) == (3, 3) and found._next(3) == (3, 4) and found._next(3) is None


def test_a_task_that_cannot_reach_the_bar_is_given_up(tmp_path):
  found = collection(tmp_path, {0: True, 1: False})
  assert found._next(None) == (3, 2)
  assert collection(tmp_path, {0: True, 1: False, 2: False})._next(None) is None


def test_the_attempts_of_a_finished_task_do_not_depend_on_how_many_were_made():
  outcomes = {2: True, 0: True, 1: False, 3: True, 4: True}
  assert demonstrations._used(outcomes, 2) == [0, 1, 2]
  assert demonstrations._used(outcomes, 9) == [0, 1, 2, 3, 4]


def rows(count):
  shapes = {"observation/state": 8, "observation/joint_state": 7}
  pictures = {name: np.full((16, 16, 3), 90, np.uint8) for name in episode_files.VIEWS}
  return [{name: np.zeros(width, np.float32) for name, width in shapes.items()} | pictures for _ in range(count)]


def stored(folder, outcomes):
  """Episodes of 5 actions, as an earlier call left them."""
  for task, ends in outcomes.items():
    for attempt, success in enumerate(ends):
      actions = np.random.default_rng(attempt).uniform(-1, 1, (5, 7))
      seen = rows(5) if success else []
      episode_files.store(episode_files.path(folder, 1000 * task + attempt), seen, actions)


@libero_assets.installed
def test_a_task_below_the_bar_is_named_and_left_out(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(demonstrations, "_facts", lambda options: {"suite": "libero_object"})
  waiting = tmp_path / f".{NAME}.expert"
  waiting.mkdir()
  stored(waiting, {0: [True, False, True, True, True], 3: [False, True, False, True]})
  main(["--expert", "--suite=libero_object", "--tasks=0,3", "--episodes=4", f"--out={tmp_path}"])
  names = [suites.tasks("libero_object")[task].name for task in (0, 3)]
  printed = capsys.readouterr().out
  assert f"{names[0]}: 4 of 5" in printed and f"{names[1]}: 2 of 4" in printed and "left out: below 80%" in printed
  facts = json.loads((tmp_path / NAME / "1.0.0" / "demonstrations.json").read_text())
  assert facts["left_out"] == [names[1]] and facts["frames"] == 20
  assert facts["tasks"][names[0]] == {"success": 4, "attempts": 5, "kept_attempts": [0, 2, 3, 4]}
  dataset = rlds.load(str(tmp_path), NAME)
  assert np.bincount(dataset.episodes).tolist() == [5] * 4 and not waiting.exists()


class Scripted(Process):
  """Stands in for a simulator: of task 3 every other attempt fails."""

  def __init__(self, asked):
    self.asked = asked

  def ask(self, name, task, attempt, look):
    self.asked.append((name, task, attempt, look))
    return demonstrator.Recording([], np.zeros((5, 7)), task != 3 or attempt % 2 == 1)

  def close(self):
    pass


@libero_assets.installed
@pytest.mark.parametrize("workers", [1, 3])
def test_a_check_renders_and_writes_nothing(tmp_path, monkeypatch, capsys, workers):
  asked = []
  monkeypatch.setattr(simulator, "start", lambda settings, make: Scripted(asked))
  flags = ["--suite=libero_object", "--tasks=0,3", "--episodes=4", f"--workers={workers}", "--check"]
  main(["libero", "--expert", *flags, f"--out={tmp_path / 'out'}"])
  printed = capsys.readouterr().out
  names = [suites.tasks("libero_object")[task].name for task in (0, 3)]
  assert f"{names[0]}: 4 of 4 attempts succeeded (100%)\n" in printed and "nothing written" in printed
  assert f"{names[1]}: " in printed and "left out: below 80%" in printed
  assert {name for name, *_ in asked} == {"demonstrate"} and not any(look for *_, look in asked)
  assert len({(task, attempt) for _, task, attempt, _ in asked}) == len(asked)
  assert not (tmp_path / "out").exists()


class Recording(Scripted):
  """Stands in for a simulator that draws; attempt 4 fails."""

  def ask(self, name, task, attempt, look):
    self.asked.append((name, task, attempt, look))
    actions = np.random.default_rng(attempt).uniform(-1, 1, (5, 7))
    return demonstrator.Recording(rows(5), actions, attempt != 4)


def records(folder):
  """The bytes of each episode of a dataset."""
  import tensorflow as tf

  return [*tf.data.TFRecordDataset(sorted(map(str, folder.glob("1.0.0/*.tfrecord*")))).as_numpy_iterator()]


@libero_assets.installed
def test_episodes_are_added_to_a_finished_dataset(tmp_path, monkeypatch, capsys):
  facts = {"suite": "libero_object", "simulator": {"size": 16}}
  monkeypatch.setattr(demonstrations, "_facts", lambda options: facts)
  waiting, asked = tmp_path / f".{NAME}.expert", []
  waiting.mkdir()
  stored(waiting, {2: [True, False, True, True, True], 5: [True] * 4})
  words = ["libero", "--expert", "--suite=libero_object", f"--out={tmp_path}", "--workers=1"]
  main([*words, "--tasks=2,5", "--episodes=4"])
  before, table = records(tmp_path / NAME), tmp_path / NAME / "1.0.0" / "demonstrations.json"
  tasks_before = json.loads(table.read_text())["tasks"]
  monkeypatch.setattr(simulator, "start", lambda settings, make: Recording(asked))
  main([*words, "--tasks=2,5,7", "--episodes=5"])
  after, tasks = records(tmp_path / NAME), json.loads(table.read_text())["tasks"]
  assert after[:4] == before[:4] and after[5:9] == before[4:] and len(after) == 15
  names = [suites.tasks("libero_object")[task].name for task in (2, 5, 7)]
  assert [tasks[name]["kept_attempts"] for name in names] == [[0, 2, 3, 4, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5]]
  assert tasks[names[0]]["attempts"] == tasks_before[names[0]]["attempts"] + 1 == 6
  wanted = [(2, 5), (5, 4), (5, 5), *((7, attempt) for attempt in range(6))]
  assert sorted((task, attempt) for _, task, attempt, _ in asked) == wanted
  assert not waiting.exists() and rlds.load(str(tmp_path), NAME).actions.shape == (75, 7)


@libero_assets.installed
@pytest.mark.parametrize(
  ("facts", "flags", "message"),
  [
    ({}, ["--tasks=2", "--episodes=4"], "Dataset exists.*raise --episodes"),
    ({}, ["--tasks=2", "--episodes=3"], "Dataset exists.*with 4 episodes of each task, --episodes=3"),
    ({}, ["--tasks=3", "--episodes=9"], "has other tasks.*add them to --tasks"),
    ({"seed": 1}, ["--tasks=2", "--episodes=9"], "made differently.*seed.*choose another --name"),
  ],
)
def test_a_finished_dataset_that_cannot_become_what_is_asked_for_stays(tmp_path, monkeypatch, facts, flags, message):
  monkeypatch.setattr(demonstrations, "_facts", lambda options: {"suite": "libero_object", "seed": 0})
  waiting = tmp_path / f".{NAME}.expert"
  waiting.mkdir()
  stored(waiting, {2: [True] * 4})
  words = ["libero", "--expert", "--suite=libero_object", f"--out={tmp_path}"]
  main([*words, "--tasks=2", "--episodes=4"])
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  monkeypatch.setattr(demonstrations, "_facts", lambda options: {"suite": "libero_object", "seed": 0} | facts)
  with pytest.raises(SystemExit, match=message):
    main([*words, *flags])
  assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@libero_assets.installed
def test_episodes_of_a_task_that_falls_below_the_bar_are_not_lost(tmp_path, monkeypatch):
  facts = {"suite": "libero_object", "simulator": {"size": 16}}
  monkeypatch.setattr(demonstrations, "_facts", lambda options: facts)
  waiting = tmp_path / f".{NAME}.expert"
  waiting.mkdir()
  stored(waiting, {2: [True] * 4, 5: [True] * 4})
  words = ["libero", "--expert", "--suite=libero_object", "--tasks=2,5", f"--out={tmp_path}", "--workers=1"]
  main([*words, "--episodes=4"])
  before = records(tmp_path / NAME)

  class Failing(Recording):
    def ask(self, name, task, attempt, look):
      found = super().ask(name, task, attempt, look)
      return found if task == 2 else found._replace(success=False)

  monkeypatch.setattr(simulator, "start", lambda settings, make: Failing([]))
  with pytest.raises(SystemExit, match=r"below the bar: got \['pick_up_the_tomato_sauce.*lower --bar"):
    main([*words, "--episodes=5"])
  assert records(tmp_path / NAME) == before and waiting.exists()


class Replaying(Scripted):
  """Stands in for a simulator in which attempt 2 fails when its actions are done again."""

  def ask(self, name, task, attempt, actions):
    self.asked.append((name, task, attempt, actions))
    return attempt != 2


@libero_assets.installed
def test_the_episodes_of_a_dataset_are_done_again(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(suites, "assets_hash", lambda folder: "then")
  waiting, asked = tmp_path / f".{NAME}.expert", []
  waiting.mkdir()
  stored(waiting, {2: [True] * 4, 5: [True, False, True, True, True]})
  main(["--expert", "--suite=libero_object", "--tasks=2,5", "--episodes=4", "--noise=0.2", f"--out={tmp_path}"])
  monkeypatch.setattr(suites, "assets_hash", lambda folder: "now")
  started = lambda settings, make: (asked.append((settings.seed, make.keywords["variety"].noise)), Replaying(asked))[1]  # noqa: E731
  monkeypatch.setattr(simulator, "start", started)
  main(["libero", "--expert", f"--replay={tmp_path / NAME}", "--workers=1"])
  printed = capsys.readouterr().out
  names = [suites.tasks("libero_object")[task].name for task in (2, 5)]
  assert f"{names[0]}: 3 of 4 replays" in printed and f"{names[1]}: 3 of 4 replays succeeded (75%)" in printed
  assert f"{tmp_path / NAME}: 6 of 8 replays" in printed and "recorded with assets then; here now" in printed
  began, *did = asked
  assert began == (0, 0.2) and [one[:3] for one in did] == [
    ("replay", task, attempt) for task, attempts in ((2, (0, 1, 2, 3)), (5, (0, 2, 3, 4))) for attempt in attempts
  ]
  for _, _, attempt, actions in did:
    np.testing.assert_array_equal(actions, np.random.default_rng(attempt).uniform(-1, 1, (5, 7)).astype(np.float32))
  with pytest.raises(SystemExit, match=r"demonstrations.json: got FileNotFoundError.*; name a dataset of"):
    main(["libero", "--expert", f"--replay={tmp_path / 'none'}"])


@libero_assets.installed
def test_no_dataset_where_no_task_reaches_the_bar(tmp_path, monkeypatch):
  monkeypatch.setattr(demonstrations, "_facts", lambda options: {"suite": "libero_object"})
  waiting = tmp_path / f".{NAME}.expert"
  waiting.mkdir()
  stored(waiting, {3: [False, False]})
  with pytest.raises(SystemExit, match="No task reaches the bar: .*0 of 2.*--bar"):
    main(["--expert", "--suite=libero_object", "--tasks=3", "--episodes=4", f"--out={tmp_path}"])
  assert waiting.exists() and not (tmp_path / NAME).exists()


@libero_assets.installed
@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--suite=libero_10", "--tasks=3"], "bottom drawer.*put, open, turn on.*--tasks=0,1"),
    (["--suite=libero_object", "--tasks=10"], "numbers from 0 to 9"),
    (["--suite=libero_object", "--bar=0"], "a bar in"),
    (["--suite=libero_object", "--episodes=0"], "episodes=0"),
    (["--suite=libero_object", "--start=0.5"], "start=0.5.*0 to 0.1"),
    (["--suite=libero_object", "--name=mine"], "starts with 'libero'"),
    (["--suite=libero_objects"], "suite"),
  ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, flags, message):
  with pytest.raises(SystemExit, match=f"(?i){message}") as refused:
    main(["--expert", f"--out={tmp_path}", *flags])
  assert str(refused.value).startswith("error: ") and "\n" not in str(refused.value)
  assert not any(tmp_path.iterdir())


@pytest.mark.sim
def test_an_episode_succeeds_is_written_and_repeats(tmp_path, capsys):
  assets = libero_assets.assets()
  flags = ["--suite=libero_object", "--tasks=6", "--episodes=1", "--workers=1", "--size=64", f"--assets={assets}"]
  main(["libero", "--expert", *flags, f"--out={tmp_path}"])
  dataset = rlds.load(str(tmp_path), NAME)
  assert dataset.instruction(0) == "pick up the butter and place it in the basket"
  assert 60 < len(dataset.actions) < 200
  assert dataset.actions[0, 6] != dataset.actions[len(dataset.actions) // 2, 6]  # it closes the gripper
  main(["libero", "--expert", f"--replay={tmp_path / NAME}", "--workers=1", f"--assets={assets}"])
  assert f"{tmp_path / NAME}: 1 of 1 replays succeeded" in capsys.readouterr().out


@pytest.mark.sim
def test_a_drawer_is_opened_a_plate_pushed_and_a_knob_turned(tmp_path, capsys):
  flags = ["--suite=libero_goal", "--tasks=0,5,7", "--episodes=1", "--bar=0.5", f"--assets={libero_assets.assets()}"]
  main(["libero", "--expert", *flags, "--check", f"--out={tmp_path}"])
  printed = capsys.readouterr().out
  for name in ("the_middle_drawer_of_the_cabinet", "the_plate_to_the_front_of_the_stove", "turn_on_the_stove"):
    assert f"{name}: 1 of 1 attempts" in printed
