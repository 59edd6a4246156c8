"""A report is one file that says what was measured, and the command that writes it measures what it says."""

import html.parser
import json
import re

import numpy as np
import policies
import pytest
from helpers import random_params, tiny

from semanticvla_jax import checkpoint
from semanticvla_jax.data import statistics, text
from semanticvla_jax.evaluate import controls, protocol, report
from semanticvla_jax.evaluate.__main__ import choose, main, task
from semanticvla_jax.evaluate.rollout import Episodes, OnDevice
from semanticvla_jax.evaluate.visualize import Tile

SUCCESS = {"policy": [1, 1, 1, 0], "baseline": [0, 1, 0, 0], "control": [0, 0, 0, 0]}


def row(kind: str, name: str) -> report.Row:
  n = 4
  said = ["pick up the red cube", "pick up the <b>blue</b> ball"] * 2
  told = said if kind != "control" else said[::-1]
  episodes = Episodes(np.arange(n), np.array(SUCCESS[kind], bool), np.full(n, 12), np.zeros(n, bool), said, told)
  mark = {"split": "heldout", "seeds": "0..3"}
  return report.Row(name, kind, "pick", protocol.summary(episodes, task), mark, episodes)


@pytest.fixture
def page(tmp_path):
  (tmp_path / "film.mp4").write_bytes(b"film")
  tile = Tile("kept 8 of 64 patches", np.zeros((8, 8, 3), np.uint8))
  path = report.write(
    tmp_path / "report.html", title="A & B",
    rows=[row("policy", "this policy"), row("baseline", "before"), row("control", controls.NAMES["shuffled"])],
    films=[report.Film(tmp_path / "film.mp4", "pick up the <b>blue</b> ball", True, 12, 3)],
    scenes=[report.Scene("first step", [("pick up the red cube", "told", [[tile, tile]])], [tile])],
    metrics=[{"step": step, "loss": 1 / step, "lr": 1.0, "success/pick": 0.5} for step in range(1, 100)],
    command="python -m semanticvla_jax.evaluate --policy='a b'", seconds={"evaluate": 12.3},
  )
  return path.read_text()


class Reader(html.parser.HTMLParser):
  """Text, and where the page points to."""

  def __init__(self, page):
    super().__init__()
    self.words, self.links, self.tags = [], [], []
    self.feed(page)
    self.text = re.sub(r"\s+", " ", " ".join(self.words))

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [value for key, value in attrs if key in ("src", "href")]

  def handle_data(self, data):
    self.words.append(data)


def test_a_report_says_it_in_the_first_lines(page):
  found = Reader(page)
  first = found.text[found.text.index("A & B", 20) :][:400]
  assert "3 of 4 episodes of pick end with the task done" in first and "(30–95 %" in first
  assert "before fine-tuning 1 of 4" in first and "told another episode's instruction, 0 of 4" in first
  for heading in ("What the robot was told", "What it looked at", "What it did: It did.", "Success", "Controls",
                  "By task", "Episodes", "Where it looks", "Training", "How it was measured", "The same again"):
    assert heading in found.text, heading
  assert "pick up the <b>blue</b> ball" in found.text, "escaped"
  assert "75 %" in found.text and "evaluate 12 s" in found.text


def test_a_report_needs_no_other_file(page):
  found = Reader(page)
  assert found.links and all(link.startswith(("data:", "#")) for link in found.links)
  names = r"https?://(www\.w3\.org|purl\.org|matplotlib\.org|creativecommons\.org)\S*"  # of namespaces, inside the SVG
  assert "http" not in re.sub(names, "", page)
  assert found.tags.count("video") == 2 and page.count('<i class=yes') == 4 and page.count("<i class=no") == 8


def test_what_is_missing_is_left_out(tmp_path):
  page = report.write(tmp_path / "report.html", title="t", rows=[row("policy", "p")]).read_text()
  text = Reader(page).text
  for heading in ("Controls", "Episodes", "Where it looks", "Training", "What it looked at", "before"):
    assert heading not in text.replace("Controls the", ""), heading
  assert "Success" in text and "By task" in text


def test_metrics_of_a_killed_training_are_read(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 2.0}\n\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
  assert [line["step"] for line in report.read_metrics(path)] == [1, 2]
  path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
  with pytest.raises(ValueError, match="line 2: got 'not json'"):
    report.read_metrics(path)
  with pytest.raises(ValueError, match="does not exist"):
    report.read_metrics(tmp_path / "none.jsonl")


def test_films_show_both_outcomes():
  assert choose(np.array([0, 1, 1, 0, 1, 1], bool), 4) == [1, 2, 0, 3]
  assert choose(np.array([1, 1, 1, 1, 0], bool), 4) == [0, 1, 2, 4]
  assert choose(np.zeros(5, bool), 3) == [0, 1, 2] and choose(np.ones(5, bool), 3) == [0, 1, 2]
  assert choose(np.array([0, 1], bool), 1) == [1]


def test_a_task_has_no_colours():
  assert task("pick up the red cube and place it in the blue bowl") == "pick up the cube and place it in the bowl"
  assert task("pick up the orange ball left of the purple bowl") == "pick up the ball left of the bowl"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("policies")
  for seed in (0, 1):
    checkpoint.save_policy(
      root / str(seed), random_params(tiny(), seed), config=policies.CROPPING, tokenizers=text.EMBEDDED,
      statistics={"tabletop_pick": statistics.to_openvla(policies.stats())},
    )
  return root


def test_the_command_measures_and_reports(folders, tmp_path, capsys):
  flags = [f"--policy={folders / '0'}", "--suite=pick", "--episodes=4", "--films=0"]
  main([*flags, f"--baseline={folders / '1'}", "--controls=shuffled", f"--out={tmp_path / 'report'}"])
  printed = capsys.readouterr().out
  assert "this policy" in printed and "before" in printed and str(tmp_path / "report" / "report.html") in printed
  found = json.loads((tmp_path / "report" / "results.json").read_text())
  results = {one["kind"]: one for one in found["results"]}
  assert [*results] == ["policy", "baseline", "control"]
  assert results["policy"]["episodes"] == 4 and len(results["policy"]["per_episode"]) == 4
  marks = {kind: one["fingerprint"] for kind, one in results.items()}
  assert marks["policy"]["policy"]["policy_hash"] == checkpoint.policy_hash(folders / "0")
  assert marks["baseline"]["policy"]["policy_hash"] == checkpoint.policy_hash(folders / "1")
  assert marks["control"]["told"] == "another episode's instruction" and "evaluate" in found["seconds"]
  asked = [one["asked"] for one in results["control"]["per_episode"]]
  told = [one["told"] for one in results["control"]["per_episode"]]
  assert sorted(asked) == sorted(told) and all(a != b for a, b in zip(asked, told))
  assert Reader((tmp_path / "report" / "report.html").read_text()).text.count("0..3") >= 1

  with pytest.raises(SystemExit, match="Report exists"):
    main([*flags, f"--out={tmp_path / 'report'}"])
  short = {**policies.CROPPING, "model": {**policies.CROPPING["model"], "chunk": 4}}
  checkpoint.save_policy(
    folders / "short", random_params(tiny(chunk=4)), config=short, tokenizers=text.EMBEDDED,
    statistics={"tabletop_pick": statistics.to_openvla(policies.stats())},
  )
  with pytest.raises(SystemExit, match="replay: 8 against 4"):
    main([*flags, f"--baseline={folders / 'short'}", f"--out={tmp_path / 'other'}"])


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ("--episodes=0", "at least 1"), ("--policy=nowhere", "does not exist"), ("--suite=pik", "did you mean 'pick'"),
    ("--controls=middle", r"got \['middle'\]; expected some of"),
    ("--dtype=float7", "got dtype='float7'; expected one of"),
    ("--seed=-1", "Seed -1 is outside split 'heldout'"), ("--seed=499999997", "Seed 500000000 is outside split"),
  ],
)  # fmt: skip
def test_wrong_flags_end_the_command_before_an_episode_runs(wrong, message, folders, tmp_path, monkeypatch):
  monkeypatch.setattr(OnDevice, "run", lambda *_, **__: pytest.fail("an episode ran"))
  with pytest.raises(SystemExit, match=message):
    main([f"--policy={folders / '0'}", "--suite=pick", "--episodes=4", f"--out={tmp_path / 'other'}", wrong])
