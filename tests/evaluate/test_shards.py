"""Shares of an evaluation: which episodes, what their folders note, and that they merge into the evaluation as a whole.

The tabletop runs for real, with a tiny policy, in programs that all runs here share.
"""

import json
import shutil
import signal
import subprocess
import sys
import time

import policies
import pytest
from helpers import random_params, tiny

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics, text
from semanticvla_jax.evaluate import __main__ as command
from semanticvla_jax.evaluate import controls, run, shards
from semanticvla_jax.evaluate.shards import Shard

EPISODES, SHARDS, SUITE = 10, 4, "pick"
WORDS = ["--suite=pick", f"--episodes={EPISODES}", "--films=0", "--controls=shuffled", "--grounding"]
FILMED = 2  # shards that make a film


@pytest.mark.parametrize(("numbers", "count"), [(range(100), 16), ([*range(150, 170), *range(50, 57)], 4), ([7, 3], 2)])
def test_shares_are_disjoint_and_balanced_over_tasks(numbers, count):
  tasks = [number // 50 for number in numbers]
  found = [Shard(i, count).share(numbers, tasks) for i in range(count)]
  assert sorted(number for share in found for number in share) == sorted(numbers)
  for one in (None, *set(tasks)):
    sizes = [sum(one in (None, number // 50) for number in share) for share in found]
    assert max(sizes) - min(sizes) <= 1
  positions = [[*numbers].index(number) for number in found[0]]
  assert positions == sorted(positions), "in the order of the evaluation"
  again = [*reversed(numbers)]
  assert {*Shard(0, count).share(again, [number // 50 for number in again])} == {*found[0]}


@pytest.mark.parametrize("wrong", ["3", "16/16", "-1/4", "1/0", "a/b", "1/2/3", "", "0.5/2"])
def test_what_is_no_shard_is_refused_with_both_ends(wrong):
  expected = "0/16 to 15/16" if wrong == "16/16" else "K/N with K from 0 to N-1"
  with pytest.raises(ValueError, match=f"--shard: got '{wrong}'; expected {expected}.*counted from 0"):
    run.arguments(["--policy=x", "--suite=pick", f"--shard={wrong}"])


def test_both_ends_are_shards_and_have_folders_of_their_own():
  for words in ("0/16", "15/16", "0/1"):
    _, args = run.arguments(["--policy=a/policy", "--suite=libero_goal", f"--shard={words}"])
    assert str(args.shard) == words and args.out == f"runs/a_libero_goal/shard_{words.replace('/', '_of_')}"
  assert run.arguments(["--policy=x", "--suite=pick"])[1].shard is None


def test_more_shards_than_episodes_are_refused():
  with pytest.raises(ValueError, match="--shard: got 2/5 of 4 episodes; expected at most 4 shards"):
    Shard(2, 5).share(range(4))


def rows(out):
  return json.loads((out / "results.json").read_text())["results"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """The evaluation in one piece, and its shards: one was interrupted before its control, and run again."""
  root = tmp_path_factory.mktemp("shards")
  entry = {"tabletop_pick": statistics.to_openvla(policies.stats())}
  policy_folder.save_policy(
    root / "policy", random_params(tiny(), 0), config=policies.CROPPING, tokenizers=text.EMBEDDED, statistics=entry
  )
  words = [f"--policy={root / 'policy'}", *WORDS]
  command.main(["run", *words, f"--out={root / 'whole'}"])
  for i in range(SHARDS):
    mine = ["run", *words, f"--shard={i}/{SHARDS}", f"--out={root / str(i)}", f"--films={int(i < FILMED)}"]
    if i == 2:
      with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(controls, "each", _interrupt)
        command.main(mine)
      value = json.loads((root / "2" / "results.json").read_text())
      assert len(value["results"]) == 1 and not value["finished"]
      value["results"][0]["per_episode"].pop()  # as if it had been interrupted within the row
      (root / "2" / "results.json").write_text(json.dumps(value))
    command.main(mine)
  return root


def _interrupt(*_, **__):
  raise KeyboardInterrupt


def folders(root):
  return [str(root / str(i)) for i in range(SHARDS)]


def merge(root, out, *paths):
  command.main(["merge", *map(str, paths or folders(root)), f"--out={out}"])


def test_merged_shards_are_the_evaluation_in_one_piece(measured, tmp_path, capsys):
  merge(measured, tmp_path / "merged", *reversed(folders(measured)))
  whole, found = rows(measured / "whole"), rows(tmp_path / "merged")
  assert [one["name"] for one in found] == ["this policy", controls.NAMES["shuffled"]]
  assert found == whole, "episode by episode, with fingerprint and summary"
  assert json.loads((tmp_path / "merged" / "results.json").read_text())["finished"]
  films = {path.name for i in folders(measured) for path in (measured / i).glob("*.mp4")}
  assert len(films) == FILMED and films == {path.name for path in (tmp_path / "merged").glob("*.mp4")}
  page = (tmp_path / "merged" / "report.html").read_text()
  assert page.count("data:video/mp4") == FILMED and "shard" not in page.split("How it was measured")[0]
  command.main(["run", f"--policy={measured / 'policy'}", *WORDS, f"--out={tmp_path / 'merged'}"])
  assert f"{EPISODES} of {EPISODES} episodes were measured before, kept" in capsys.readouterr().out


def test_grounding_is_measured_beside_the_same_successes(measured, tmp_path):
  words = [word for word in WORDS if word != "--grounding"]
  command.main(["run", f"--policy={measured / 'policy'}", *words, f"--out={tmp_path}"])
  with_, without = rows(measured / "whole"), rows(tmp_path)
  for one, other in zip(with_, without):
    figures = one.pop("grounding")
    assert [*figures] == ["image", "wrist_image"] and figures["image"]["episodes"] == EPISODES
    assert figures["image"]["kept"] == pytest.approx(figures["wrist_image"]["kept"])
    for view in figures.values():
      assert 0 < view["chance"] < view["kept"] and 0 <= view["on_objects"] <= 1 and 0 <= view["objects_kept"] <= 1
    assert [*one["per_episode"][0].pop("grounding")] == ["image", "wrist_image"]
    for episode in one["per_episode"][1:]:
      assert episode.pop("grounding")["image"]["queries"] == -(-max(episode["steps"], 1) // 8)
    assert one == other, "the fingerprint too"
  assert "<h2>Grounding</h2>" not in (tmp_path / "report.html").read_text()
  page = (measured / "0" / "report.html").read_text()
  assert "<h2>Grounding</h2>" in page and "the outline of the objects" in page


def test_a_folder_measured_without_grounding_is_gone_on_with(measured, tmp_path):
  words = [
    f"--policy={measured / 'policy'}",
    "--suite=pick",
    f"--episodes={EPISODES}",
    "--films=0",
    f"--out={tmp_path}",
  ]
  command.main(["run", *words])
  command.main(["run", *words, "--grounding"])
  assert rows(tmp_path)[0] == rows(measured / "whole")[0]


def test_a_shard_says_that_it_is_one(measured, capsys):
  one = rows(measured / "3")
  assert [(row["shard"], row["of_episodes"], row["episodes"]) for row in one] == [("3/4", EPISODES, 2)] * 2
  assert one[0]["fingerprint"] == rows(measured / "whole")[0]["fingerprint"]
  assert "in <b>shard 3/4 of 10 episodes</b>, counted from 0" in (measured / "3" / "report.html").read_text()
  command.main(["run", f"--policy={measured / 'policy'}", *WORDS, "--shard=3/4", f"--out={measured / '3'}"])
  assert "shard 3/4 of 10 episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--shard=1/4"], "got results of shard 3/4; expected shard 1/4"),
    ([], "got results of shard 3/4; expected no shard"),
    (["--shard=3/4", "--episodes=12"], "holds shard 3/4 of another evaluation: got 12 episodes of pick, 0 to 11"),
  ],
)
def test_a_folder_keeps_its_share(measured, words, message):
  before = (measured / "3" / "results.json").read_bytes()
  with pytest.raises(SystemExit, match=message) as ended:
    command.main(["run", f"--policy={measured / 'policy'}", *WORDS, *words, f"--out={measured / '3'}"])
  assert "\n" not in ended.value.code and (measured / "3" / "results.json").read_bytes() == before


def test_a_folder_of_no_shard_becomes_none(measured):
  with pytest.raises(SystemExit, match="got results of no shard; expected none, or those of shard 0/4"):
    command.main(["run", f"--policy={measured / 'policy'}", *WORDS, "--shard=0/4", f"--out={measured / 'whole'}"])
  assert not (measured / "whole" / shards.FILE).exists()


def changed(root, tmp_path, name, change):
  """A copy of a shard whose results.json (or shard.json) is changed."""
  copy = tmp_path / name
  shutil.copytree(root / name, copy)
  for file in ("results.json", shards.FILE):
    value = json.loads((copy / file).read_text())
    change(file, value)
    (copy / file).write_text(json.dumps(value))
  return [*(path for path in folders(root) if not path.endswith(f"/{name}")), copy]


def _lose_an_episode(file, value):
  if file == "results.json":
    value["results"][0]["per_episode"].pop(0)


def _lose_a_row(file, value):
  if file == "results.json":
    value["results"].pop()


def _other_simulator(file, value):
  if file == "results.json":
    value["results"][1]["fingerprint"]["versions"]["jax"] = "0.1"


def _one_of_another(file, value):
  if file == "results.json":
    value["results"][0]["per_episode"][0]["seed"] = 99


def _twice(file, value):
  if file == "results.json":
    value["results"][0]["per_episode"].append(value["results"][0]["per_episode"][0])


def _without_grounding(file, value):
  if file == "results.json":
    for one in value["results"][0]["per_episode"]:
      one.pop("grounding")


def _unfinished(file, value):
  if file == "results.json":
    value["finished"] = False


def _share_of_another(file, value):
  """The share of shard 0, episodes and all, under another number."""
  if file == shards.FILE:
    value["episodes"][SUITE]["whole"].append(10)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      _lose_an_episode,
      "/1: got no episode [0-9]+ of pick, 'this policy'; expected all [23] episodes .*shard 1/4 again",
    ),
    (_lose_a_row, "/1: got no row of pick, .told another episode's instruction.; expected the rows of all shards"),
    (
      _other_simulator,
      "/1: got pick, .told.*measured differently than in .*/0: versions.jax: .* against 0.1; expected",
    ),
    (_one_of_another, "/1: got no episode"),
    (_twice, "got episode [0-9]+ twice in .*/1; expected each episode once"),
    (
      _without_grounding,
      "/1: got pick, 'this policy', with --grounding in one of it and .*/0; expected in both or none",
    ),
    (_unfinished, "/1: got results that are not finished; expected all of them; run shard 1/4 again, which goes on"),
    (_share_of_another, "/1: got a share of other episodes of pick than in .*/0; expected the same"),
  ],
)
def test_what_makes_no_whole_is_refused(measured, tmp_path, change, message):
  paths = changed(measured, tmp_path, "1", change)
  with pytest.raises(SystemExit, match=message) as ended:
    merge(measured, tmp_path / "out", *paths)
  assert "\n" not in ended.value.code and not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
  ("choose", "message"),
  [
    (lambda found: found[:2] + found[3:], "Shards: got 3 of 4, without 2/4; expected all of them"),
    (lambda found: [*found, found[1]], "Shards: got shard 1/4 in both .*/1 and .*/1; expected each once"),
    (lambda found: [*found, found[0][:-1] + "whole"], "whole: got no shard.json; expected a folder that evaluate run"),
    (lambda found: [*found, "nowhere"], "nowhere: got no shard.json"),
  ],
)
def test_folders_that_are_not_all_shards_once_are_refused(measured, tmp_path, choose, message):
  with pytest.raises(SystemExit, match=message) as ended:
    merge(measured, tmp_path / "out", *choose(folders(measured)))
  assert "\n" not in ended.value.code and not (tmp_path / "out").exists()


def test_shards_of_another_number_and_a_folder_with_results_are_refused(measured, tmp_path):
  other = changed(measured, tmp_path, "0", lambda file, value: value.update(shard="0/3") if "shard" in value else None)
  with pytest.raises(SystemExit, match=r"/0: got shard 0/3 .*/1: 1/4.*; expected one of 4"):
    merge(measured, tmp_path / "out", *other)
  for out in (measured / "whole", measured / "0"):
    with pytest.raises(SystemExit, match="--out: got .*; expected a(nother| new) folder"):
      merge(measured, out)


@pytest.mark.processes
def test_a_shard_that_is_killed_goes_on_when_it_is_run_again(measured, tmp_path):
  """Two shards as separate commands; one is killed with SIGKILL between two rows."""
  command_line = [sys.executable, "-m", "semanticvla_jax.evaluate", "run", f"--policy={measured / 'policy'}", *WORDS]
  shard = lambda i: [*command_line, f"--shard={i}/2", f"--out={tmp_path / str(i)}"]  # noqa: E731
  killed, written = subprocess.Popen(shard(1)), tmp_path / "1" / "results.json"
  while not written.exists() and killed.poll() is None:
    time.sleep(0.02)
  killed.kill()
  assert killed.wait(60) == -signal.SIGKILL and not json.loads(written.read_text())["finished"]
  with pytest.raises(SystemExit, match="Shards: got 1 of 2, without 0/2"):
    merge(measured, tmp_path / "out", tmp_path / "1")
  again = subprocess.run(shard(1), check=True, capture_output=True, text=True, timeout=600).stdout
  assert "5 of 5 episodes were measured before, kept" in again
  subprocess.run(shard(0), check=True, timeout=600)
  merge(measured, tmp_path / "out", tmp_path / "0", tmp_path / "1")
  assert rows(tmp_path / "out") == rows(measured / "whole")
