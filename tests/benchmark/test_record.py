"""What a result records of its making, and which results are compared."""

import copy
import json

import pytest

from semanticvla_jax.benchmark import __main__ as command
from semanticvla_jax.benchmark import compare, record

SETTINGS = {"row": ["full"], "size": "tiny", "dtype": "float32", "prompt": 32, "batch": [1], "calls": 3, "seed": 0}


@pytest.fixture
def result(capsys):
  made = record.Result("latency", SETTINGS)
  made.models["full"] = {"variant": "tiny", "keep": 8, "num_views": 2}
  made.add("full program p50", 12.5, "ms")
  made.note("a note")
  assert "full program p50" in capsys.readouterr().out
  return made.to_json()


def written(folder, name, result):
  path = folder / name
  path.write_text(json.dumps(result))
  return str(path)


def test_a_record_says_how_figures_were_made(result):
  made = result["record"]
  assert result["figures"]["full program p50"] == {"value": 12.5, "unit": "ms"} and result["notes"] == ["a note"]
  assert made["settings"] == SETTINGS and made["models"]["full"]["keep"] == 8
  assert made["device"]["platform"] == "cpu" and made["device"]["count"] == 8 and made["cpu"]["cores"] >= 1
  assert {"python", "jax", "jaxlib", "flax"} <= made["versions"].keys() and made["cpu"]["model"]
  assert made["commit"] is None or (len(made["commit"]) == 40 and isinstance(made["dirty"], bool))


def test_figures_are_printed_beside_each_other_with_their_ratio(result, tmp_path, capsys):
  other = copy.deepcopy(result)
  other["figures"]["full program p50"]["value"] = 25.0
  other["figures"]["new"] = {"value": 1, "unit": "s"}
  other["record"] |= {"commit": "0" * 40, "versions": {**other["record"]["versions"], "jax": "9.9"}}
  paths = [written(tmp_path, name, x) for name, x in (("a", result), ("b", other))]
  found = compare.compare(paths, (), print)
  assert found["ratios"] == {"full program p50": 2.0, "new": None}
  printed = capsys.readouterr().out
  assert "12.50" in printed and "2.000" in printed and "versions.jax" in printed


@pytest.mark.parametrize(
  "change, named",
  [
    ({"verb": "train"}, "verb"),
    ({"settings": {"prompt": 40}}, "settings.prompt"),
    ({"settings": {"batch": [8]}}, "settings.batch"),
    ({"settings": {"dtype": "bfloat16"}}, "settings.dtype"),
    ({"models": {"full": {"num_views": 1}}}, "models.full.num_views"),
    ({"device": {"kind": "other"}}, "device.kind"),
  ],
)
def test_results_that_were_not_measured_alike_are_refused_by_name(result, change, named):
  other = copy.deepcopy(result)
  for field, value in change.items():
    if field == "verb":
      other["verb"] = value
    elif field == "models":
      other["record"]["models"]["full"] |= value["full"]
    else:
      other["record"][field] |= value
  with pytest.raises(ValueError, match=f"not measured alike: got .*{named}.*; expected the same in both; ") as refused:
    compare.require_alike(result, other)
  assert "\n" not in str(refused.value)
  if named == "device.kind":
    assert compare.require_alike(result, other, compare.DEVICES)


def test_padding_may_differ_where_devices_may(result):
  other = copy.deepcopy(result)
  other["record"]["models"]["full"]["token_multiple"] = 8
  assert len(compare.require_alike(result, other, compare.DEVICES)) == 1
  with pytest.raises(ValueError, match="token_multiple"):
    compare.require_alike(result, other)


def test_calls_and_seeds_are_listed_and_not_refused(result):
  other = copy.deepcopy(result)
  other["record"]["settings"] |= {"calls": 500}
  assert compare.require_alike(result, other) == ["settings.calls: 3 against 500"]


@pytest.mark.parametrize("text", ["", "[]", '{"verb": "latency"}'])
def test_other_files_are_refused(tmp_path, text):
  path = tmp_path / "other.json"
  path.write_text(text)
  with pytest.raises(ValueError, match="benchmark compare: got .*; expected a file that a verb wrote with --out"):
    compare.compare([str(path), str(path)], (), print)


@pytest.mark.parametrize("words", [["latncy"], ["--out=x"], ["compare", "missing", "missing"]])
def test_command_lines_that_cannot_be_read_are_one_line(words):
  with pytest.raises(ValueError) as refused:
    command.main(words)
  assert "\n" not in str(refused.value) and "expected" in str(refused.value)
