"""A report is one file that says what was measured, and the command that writes it measures what it says."""

import html.parser
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import policies
import pytest
from helpers import random_params, tiny

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics, text
from semanticvla_jax.evaluate import controls, report
from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.evaluate.results import Row, summary
from semanticvla_jax.evaluate.rollout import Episodes, OnDevice
from semanticvla_jax.evaluate.tabletop import task
from semanticvla_jax.evaluate.tabletop_films import choose
from semanticvla_jax.evaluate.visualize import Tile

SUCCESS = {"policy": [1, 1, 1, 0], "baseline": [0, 1, 0, 0], "control": [0, 0, 0, 0]}


def row(kind: str, name: str) -> Row:
  n = 4
  said = ["pick up the red cube", "pick up the <b>blue</b> ball"] * 2
  told = said if kind != "control" else said[::-1]
  episodes = Episodes(np.arange(n), np.array(SUCCESS[kind], bool), np.full(n, 12), np.zeros(n, bool), said, told)
  mark = {"split": "heldout", "seeds": "0..3"}
  return Row(name, kind, "pick", summary(episodes, task), mark, episodes)


@pytest.fixture
def page(tmp_path):
  (tmp_path / "film.mp4").write_bytes(b"film")
  tile = Tile("kept 8 of 64 patches", np.zeros((8, 8, 3), np.uint8))
  shown = report.Page(
    title="A & B",
    rows=[row("policy", "this policy"), row("baseline", "before"), row("control", controls.NAMES["shuffled"])],
    films=[report.Film(tmp_path / "film.mp4", "pick up the <b>blue</b> ball", True, 12, 3)],
    scenes=[report.Scene("first step", [("pick up the red cube", "told", [[tile, tile]])], [tile])],
    metrics=[{"step": step, "loss": 1 / step, "lr": 1.0, "success/pick": 0.5} for step in range(1, 100)],
    command="python -m semanticvla_jax.evaluate --policy='a b'",
    seconds={"evaluate": 12.3},
  )
  return report.write(tmp_path / "report.html", shown).read_text()


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
  for heading in (
    "What the robot was told",
    "What it looked at",
    "What it did: It did.",
    "Success",
    "Controls",
    "By task",
    "Episodes",
    "Where it looks",
    "Training",
    "How it was measured",
    "Command",
  ):
    assert heading in found.text, heading
  assert "pick up the <b>blue</b> ball" in found.text, "escaped"
  assert "75 %" in found.text and "evaluate 12 s" in found.text


def test_a_report_needs_no_other_file(page):
  found = Reader(page)
  assert found.links and all(link.startswith(("data:", "#")) for link in found.links)
  names = r"https?://(www\.w3\.org|purl\.org|matplotlib\.org|creativecommons\.org)\S*"  # of namespaces, inside the SVG
  assert "http" not in re.sub(names, "", page)
  assert found.tags.count("video") == 2 and page.count("<i class=yes") == 4 and page.count("<i class=no") == 8


def test_what_is_missing_is_left_out(tmp_path):
  page = report.write(tmp_path / "report.html", report.Page("t", [row("policy", "p")])).read_text()
  text = Reader(page).text
  for heading in ("Controls", "Episodes", "Where it looks", "Training", "What it looked at", "before"):
    assert heading not in text.replace("Controls the", ""), heading
  assert "Success" in text and "By task" in text


def crowded_row(kind, name, suite, success, broke=(), nonfinite=()):
  n, long = len(success), "put both the cream cheese box and the butter into the basket and close the drawer"
  flags = [np.isin(np.arange(n), [*which]) for which in (broke, nonfinite)]
  said = [("pick up the cube", long)[i % 2] for i in range(n)]
  success = np.array(success, bool) & ~flags[0] & ~flags[1]
  episodes = Episodes(np.arange(n), success, np.full(n, 12), flags[0], said, said, nonfinite=flags[1])
  mark = {"split": "heldout", "seeds": "0..3", "policy": {"folder": "/data/" + 30 * "a_long_name"}}
  return Row(name, kind, suite, summary(episodes, str), mark, episodes)


@pytest.fixture
def crowded(tmp_path):
  """Several suites, errors, actions that are not finite, a suite with nothing that counts, films that are missing."""
  rows = [
    crowded_row("policy", "this policy", "pick", [1] * 512, nonfinite=[7]),
    crowded_row("baseline", "before", "pick", [0, 1]),
    crowded_row("policy", "this policy", "a_suite_with_a_name_that_is_long", [1] * 48, range(10), [20, 21]),
    crowded_row("policy", "recorded actions", "libero_object", [1] * 4, range(4)),
    crowded_row("baseline", "before", "libero_object", []),
    crowded_row("control", controls.NAMES["blind"], "pick", [0, 1, 1], [0]),
  ]
  (tmp_path / "empty.mp4").write_bytes(b"")
  films = [report.Film(tmp_path / name, "pick", True, 12, 3) for name in ("none.mp4", "empty.mp4")]
  scenes = [report.Scene("first step", [("pick", "told", [])], []), report.Scene("half way", [], [])]
  metrics = [{"step": step, "loss": 1 / step} for step in range(1, 30)]
  return report.write(tmp_path / "report.html", report.Page("t", rows, films, scenes, metrics))


class Tables(html.parser.HTMLParser):
  """The tables of a page: rows of cells (tag, classes, columns, label), those of a head apart; checks closing tags."""

  EMPTY = ("meta", "img", "br", "path", "use")

  def __init__(self, page):
    super().__init__()
    self.open, self.found, self.inside_head = [], [], False
    self.feed(re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    assert not self.open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    if tag not in self.EMPTY:
      self.open.append(tag)
    if tag == "table":
      self.found.append({"head": [], "body": []})
    if tag == "tr":
      self.found[-1]["head" if "thead" in self.open else "body"].append([])
    if tag in ("td", "th"):
      rows = self.found[-1]["head" if "thead" in self.open else "body"]
      rows[-1].append((tag, attrs.get("class", "").split(), int(attrs.get("colspan", 1)), attrs.get("data-label")))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_every_number_stands_under_its_heading(page, crowded):
  tables = [*Tables(page).found, *Tables(crowded.read_text(encoding="utf-8")).found]
  assert sum(bool(table["head"]) for table in tables) == 8
  for table in tables:
    head = table["head"][0] if table["head"] else table["body"][0]
    for row in table["body"]:
      assert sum(columns for _, _, columns, _ in row) == len(head)
      for (_, named, _, _), (_, classes, columns, label) in zip(head, row):
        if table["head"] and columns == 1:
          assert classes == named and (label or named == ["bar"] or named == ["name"])


def narrow_rules(style):
  """(selector, declarations) of all that holds on narrow screens."""
  style = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
  for part in style.split("@media")[1:]:
    body = part[part.index("{") + 1 :]
    for selectors, declarations in re.findall(r"([^{}]+)\{([^{}]*)\}", body):
      yield from ((selector.strip(), declarations) for selector in selectors.split(","))


def test_what_a_narrow_screen_hides_is_hidden_with_its_heading(page):
  """Only whole heads are: then each cell says itself what it is."""
  style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
  rules = [*narrow_rules(style)]
  assert rules and {selector for selector, said in rules if re.search(r"display:\s*none", said)} == {"thead"}
  shown = [said for selector, said in rules if selector == ".rates td.number::after"]
  assert shown and "attr(data-label)" in shown[0]


def test_nothing_has_a_width_that_a_phone_has_not(page):
  style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
  widths = re.findall(r"(?<![\w-])(?:min-)?width:\s*(\d+)px", re.sub(r"@media[^{]*", "", style))
  assert all(int(width) <= 120 for width in widths)
  fixed = re.findall(r"minmax\((\d+)px", style)  # wider ones are min(…, 100 %)
  assert all(int(width) <= 120 for width in fixed) and not re.findall(r"<svg[^>]* width=\"\d+\"", page)


def test_the_style_goes_with_the_package():
  project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
  packaged = project["tool"]["setuptools"]["package-data"]["semanticvla_jax.evaluate"]
  assert all(Path(report.__file__).with_name(name).exists() for name in packaged) and "report.css" in packaged


def test_a_row_without_an_episode_that_counts_says_why(crowded):
  text = Reader(crowded.read_text(encoding="utf-8")).text
  assert "No episode of libero_object can be counted: all 4 broke" in re.sub(" +", " ", text)
  assert "– – – all 4 broke –" in re.sub(" +", " ", text) and "0–100 %" not in text
  assert "none was run" in text


def test_what_left_a_rate_stands_beside_it_and_100_percent_is_all(crowded):
  text = re.sub(" +", " ", Reader(crowded.read_text(encoding="utf-8")).text)
  assert "99.8 % 99–99.97 % 511 of 512 1 failed by a non-finite action" in text
  assert "95 % 83–99 % 36 of 38 10 broke and are not counted, 2 failed by a non-finite action" in text
  assert "100 % 34–100 % 2 of 2 1 broke and is not counted" in text


def test_missing_films_and_pictures_leave_the_rest_standing(crowded):
  text = Reader(crowded.read_text(encoding="utf-8")).text
  assert "The film none.mp4 is missing: No such file" in text and "The film empty.mp4 is missing: it is empty" in text
  for heading in ("Success", "Controls", "By task", "Episodes", "Where it looks", "Training", "How it was measured"):
    assert heading in text


def test_dots_tell_four_outcomes_apart(crowded):
  page = crowded.read_text(encoding="utf-8")
  counts = {kind: page.count(f"<i class={kind} ") for kind in ("yes", "no", "error", "spoilt")}
  assert counts == {"yes": 511 + 1 + 36 + 2, "no": 1, "error": 10 + 4 + 1, "spoilt": 1 + 2}


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


def test_a_task_has_no_colors():
  assert task("pick up the red cube and place it in the blue bowl") == "pick up the cube and place it in the bowl"
  assert task("pick up the orange ball left of the purple bowl") == "pick up the ball left of the bowl"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("policies")
  for seed in (0, 1):
    policy_folder.save_policy(
      root / str(seed),
      random_params(tiny(), seed),
      config=policies.CROPPING,
      tokenizers=text.EMBEDDED,
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
  assert marks["policy"]["policy"]["policy_hash"] == policy_folder.policy_hash(folders / "0")
  assert marks["baseline"]["policy"]["policy_hash"] == policy_folder.policy_hash(folders / "1")
  assert marks["control"]["told"] == "another episode's instruction" and "evaluate" in found["seconds"]
  asked = [one["asked"] for one in results["control"]["per_episode"]]
  told = [one["told"] for one in results["control"]["per_episode"]]
  assert sorted(asked) == sorted(told) and all(a != b for a, b in zip(asked, told))
  assert Reader((tmp_path / "report" / "report.html").read_text()).text.count("0..3") >= 1

  with pytest.raises(SystemExit, match="Report exists"):
    main([*flags, f"--out={tmp_path / 'report'}"])
  short = {**policies.CROPPING, "model": {**policies.CROPPING["model"], "chunk": 4}}
  policy_folder.save_policy(
    folders / "short",
    random_params(tiny(chunk=4)),
    config=short,
    tokenizers=text.EMBEDDED,
    statistics={"tabletop_pick": statistics.to_openvla(policies.stats())},
  )
  with pytest.raises(SystemExit, match="replay: 8 against 4"):
    main([*flags, f"--baseline={folders / 'short'}", f"--out={tmp_path / 'other'}"])


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ("--episodes=0", "at least 1"),
    ("--policy=nowhere", "does not exist"),
    ("--suite=pik", "did you mean 'pick'"),
    ("--controls=middle", r"got \['middle'\]; expected some of"),
    ("--dtype=float7", "got dtype='float7'; expected one of"),
    ("--seed=-1", "Seed -1 is outside split 'heldout'"),
    ("--seed=499999997", "Seed 500000000 is outside split"),
  ],
)
def test_wrong_flags_end_the_command_before_an_episode_runs(wrong, message, folders, tmp_path, monkeypatch):
  monkeypatch.setattr(OnDevice, "run", lambda *_, **__: pytest.fail("an episode ran"))
  with pytest.raises(SystemExit, match=message):
    main([f"--policy={folders / '0'}", "--suite=pick", "--episodes=4", f"--out={tmp_path / 'other'}", wrong])
