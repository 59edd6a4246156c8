"""The folder of a report: one run at a time, whole files, what is damaged is named."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from semanticvla_jax import files
from semanticvla_jax.evaluate import folder, report
from semanticvla_jax.evaluate.results import Row, summary
from semanticvla_jax.evaluate.rollout import Episodes

MARK = {
  "suite": "pick",
  "split": "heldout",
  "replay": 8,
  "policy": {"policy_hash": "p", "folder": "here"},
  "seeds": "0..3",
  "episodes": 4,
  "sources": "a",
}


def episodes(seeds, error=(), spoilt=(), told=None) -> Episodes:
  """Even seeds succeed."""
  seeds = np.array([*seeds], np.int64)
  broke, bad = np.isin(seeds, [*error]), np.isin(seeds, [*spoilt])
  said = ["red cube" if seed % 2 else "blue ball" for seed in seeds]
  success = (seeds % 2 == 0) & ~broke & ~bad
  return Episodes(seeds, success, np.full(len(seeds), 5, np.int32), broke, said, told or said, nonfinite=bad)


def row(name="this policy", kind="policy", suite="pick", runs=None, **mark) -> Row:
  runs = episodes(range(4)) if runs is None else runs
  return Row(name, kind, suite, summary(runs, str), MARK | mark, runs)


def results(out, **options) -> folder.ResultsFile:
  return folder.ResultsFile(out, "command", "all is measured again", **options)


def held(out) -> dict:
  return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("below", ["", "more", "more/of/it"])
def test_a_file_where_the_folder_belongs_is_said_in_one_line(tmp_path, below):
  (tmp_path / "file").write_text("kept")
  refused = pytest.raises(ValueError, match=r"file, which is a file; expected a folder; choose another --out")
  with refused as error, folder.alone(tmp_path / "file" / below):
    pytest.fail("entered")
  assert "\n" not in str(error.value) and (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files, "write", full)
  refused = pytest.raises(ValueError, match="cannot be written: got .*No space left.*choose another --out")
  with refused, folder.alone(tmp_path / "out"):
    pytest.fail("entered")
  (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
  with pytest.raises(ValueError, match="cannot be written: got .*link"), folder.alone(tmp_path / "link"):
    pytest.fail("entered")


def test_two_evaluations_into_one_folder_cannot_mix(tmp_path):
  code = (
    "import pathlib, sys; from semanticvla_jax.evaluate import folder\n"
    f"with folder.alone(pathlib.Path({str(tmp_path)!r})): pass"
  )
  with folder.alone(tmp_path):
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert other.returncode and f"got process {os.getpid()} at work on it" in other.stderr
  with folder.alone(tmp_path):
    pass
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("content", [b"[1, 2]\n", b"\xff\xfe\x00\n", b'3\n{"step": 1}\n', b"no json\n{}\n", None])
def test_metrics_that_cannot_be_read_are_named_before_anything_runs(tmp_path, content):
  path = tmp_path / "metrics.jsonl"
  path.mkdir() if content is None else path.write_bytes(content)
  with pytest.raises(ValueError, match="metrics.jsonl") as error:
    folder.metrics(str(path))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/ffmpeg", __file__])
def test_a_missing_ffmpeg_is_a_warning(program, monkeypatch, caplog, tmp_path):
  folder.warn_without_ffmpeg()
  assert not caplog.text
  monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program)
  folder.warn_without_ffmpeg()
  assert "No ffmpeg that works" in caplog.text and "there will be results" in caplog.text
  with pytest.raises((OSError, RuntimeError)):
    folder.write_film(tmp_path / "film.mp4", np.zeros((400, 64, 64, 3), np.uint8))
  assert not [*tmp_path.iterdir()], "nothing half written"


def test_a_film_appears_whole(tmp_path):
  folder.write_film(tmp_path / "film.mp4", np.zeros((3, 32, 32, 3), np.uint8))
  assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"] and (tmp_path / "film.mp4").stat().st_size > 200


def test_a_row_is_on_disk_when_it_is_there_and_the_next_run_finds_it(tmp_path, capsys):
  one = results(tmp_path, more=lambda: {"broken": {"x": 1}})
  one.add(row(runs=episodes(range(4), error=[1], spoilt=[2])))
  found = held(tmp_path)
  assert (found["finished"], found["broken"]) == (False, {"x": 1})
  (only,) = found["results"]
  assert (only["successes"], only["episodes"], only["errors"], only["nonfinite"]) == (1, 3, 1, 1)
  assert [one["nonfinite"] for one in only["per_episode"]] == [False, False, True, False]
  assert "1/3, 1 broke, 1 failed by a non-finite action  33.3 %" in capsys.readouterr().out
  again = results(tmp_path)
  key = ("pick", "policy", "this policy")
  assert again.before(key).error.tolist() == [False, True, False, False]
  again.add(row("before", "baseline"))
  assert [one["name"] for one in held(tmp_path)["results"]] == ["before", "this policy"], "nothing found is lost"
  again.write(finished=True)
  assert held(tmp_path)["finished"]


def test_what_an_earlier_version_wrote_is_read(tmp_path):
  results(tmp_path).add(row())
  old = held(tmp_path)
  del old["finished"], old["results"][0]["nonfinite"]
  for one in old["results"][0]["per_episode"]:
    del one["nonfinite"]
  (tmp_path / "results.json").write_text(json.dumps(old))
  (found,) = results(tmp_path).found.values()
  assert found.summary["nonfinite"] == 0 and not found.episodes.nonfinite.any() and found.episodes.retries is None


@pytest.mark.parametrize("content", [b'{"results": [{"na', b"", b"[]", b'{"results": [{}], "seconds": {}}', b"\xff"])
def test_a_damaged_results_file_is_named_and_set_aside(tmp_path, content, caplog):
  (tmp_path / "results.json.damaged").write_text("an earlier one")
  (tmp_path / "results.json").write_bytes(content)
  assert not results(tmp_path).found
  assert f"{tmp_path / 'results.json'} is damaged" in caplog.text and "all is measured again" in caplog.text
  assert (tmp_path / "results.json.damaged_1").read_bytes() == content
  assert (tmp_path / "results.json.damaged").read_text() == "an earlier one"


KEY = ("pick", "policy", "this policy")


def test_what_was_measured_otherwise_is_refused_with_its_fields(tmp_path):
  results(tmp_path).add(row())
  for change, line in (
    ({"replay": 4}, "replay: 8 against 4"),
    ({"split": "unseen"}, "split: heldout against unseen"),
    ({"policy": {"policy_hash": "q"}}, "policy.policy_hash: p against q"),
  ):
    with pytest.raises(ValueError, match=f"measured differently.*{line}.*choose another --out"):
      results(tmp_path).check({KEY: MARK | change}, range(4))
  elsewhere = {"policy": {"policy_hash": "p", "folder": "there"}, "sources": "b", "seeds": "0..9", "episodes": 10}
  results(tmp_path).check({KEY: MARK | elsewhere}, range(10))
  assert folder.merged(MARK, MARK | elsewhere, tmp_path)["sources"] == "a b"


def test_a_report_that_holds_more_than_is_asked_for_is_not_made_smaller(tmp_path):
  one = results(tmp_path)
  one.add(row())
  one.add(row("before", "baseline"))
  results(tmp_path).check({KEY: MARK, ("pick", "baseline", "before"): MARK}, range(4))
  with pytest.raises(ValueError, match="Report exists: .*pick, 'before'"):
    results(tmp_path).check({KEY: MARK}, range(4))
  results(tmp_path).check({KEY: MARK}, range(5))  # there is something to measure; what is there stays
  results(tmp_path).check({("place", "policy", "this policy"): MARK}, range(4))
  with pytest.raises(ValueError, match="got seed 0 and 1 more of pick, 'this policy'.*widen"):
    results(tmp_path).check({KEY: MARK}, range(2, 6))


class Runner:
  def __init__(self):
    self.asked = []

  def run(self, seeds, told=None, progress=None):
    self.asked.append(([*seeds], told))
    if progress is not None:
      progress(len(seeds), 0)
    return episodes(seeds, told=told)


def test_only_what_an_earlier_run_lacks_is_run():
  inner, told = Runner(), []
  runner = folder.Resumed(inner, episodes(range(4), error=[1]), "pick")
  found = runner.run(range(6), progress=lambda *numbers: told.append(numbers))
  assert inner.asked == [([1, 4, 5], None)] and told == [(6, 2)]
  assert found.seeds.tolist() == [*range(6)] and found.success.tolist() == [True, False] * 3 and not found.error.any()
  assert folder.Resumed(Runner(), None, "pick").run([3]).seeds.tolist() == [3]
  whole = folder.Resumed(inner, episodes(range(4)), "pick")
  assert whole.run([2, 0]).seeds.tolist() == [2, 0] and len(inner.asked) == 1


def test_episodes_that_were_told_something_else_are_run_again():
  inner = Runner()
  folder.Resumed(inner, episodes([0, 1], told=["a", "b"]), "pick").run([0, 1], ["a", "c"])
  assert inner.asked == [([1], ["c"])]


def test_what_fails_afterwards_is_a_warning(caplog):
  def work():
    raise OSError("No space left on device")

  assert folder.afterwards("pictures", work, []) == []
  assert "pictures failed: OSError: No space left on device; the measured results are kept" in caplog.text
  with pytest.raises(KeyboardInterrupt):
    folder.afterwards("pictures", lambda: (_ for _ in ()).throw(KeyboardInterrupt), [])


def test_a_page_that_cannot_be_written_leaves_the_results_unfinished(tmp_path, monkeypatch, caplog, capsys):
  one = results(tmp_path)
  one.add(row())
  assert folder.write_page(tmp_path, one, title="t") and held(tmp_path)["finished"]
  assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
  monkeypatch.setattr(report, "write", lambda *_, **__: (_ for _ in ()).throw(OSError("No space")))
  one.write()
  assert not folder.write_page(tmp_path, one, title="t") and not held(tmp_path)["finished"]
  assert "report.html failed: OSError: No space" in caplog.text
