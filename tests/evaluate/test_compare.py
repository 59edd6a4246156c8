"""Two results side by side."""

import json

import pytest

from semanticvla_jax.evaluate import compare
from semanticvla_jax.evaluate.__main__ import main


def result(outcomes, suite="pick", **mark):
  mark = {"suite": suite, "replay": 8, "policy": {"policy_hash": str(outcomes), "dataset": suite}} | mark
  n, rate = len(outcomes), sum(outcomes) / len(outcomes)
  rows = [dict(seed=i, success=bool(x), error=False) for i, x in enumerate(outcomes)]
  return dict(kind="policy", suite=suite, successes=sum(outcomes), episodes=n, rate=rate, interval=[0.0, 1.0],
              fingerprint=mark, per_episode=rows)


def write(folder, *rows):
  folder.mkdir()
  (folder / "results.json").write_text(json.dumps({"results": rows}))
  return str(folder)


@pytest.mark.parametrize("counts, low, high", [  # Newcombe 1998, Table III, method 10
  ((36, 12, 2, 0), 0.0569, 0.3404),
  ((97, 3, 0, 0), -0.0124, 0.0846),
])
def test_paired_interval_of_the_paper(counts, low, high):
  assert compare.paired_interval(*counts) == pytest.approx((low, high), abs=6e-4)


def test_paired_interval_has_its_symmetries():
  low, high = compare.paired_interval(20, 7, 3, 10)
  assert compare.paired_interval(20, 3, 7, 10) == pytest.approx((-high, -low))
  assert low < 4 / 40 < high
  assert compare.paired_interval(9, 0, 0, 0)[1] < 0.31 and compare.paired_interval(0, 0, 9, 0)[0] >= -1
  with pytest.raises(ValueError, match="at least one episode"):
    compare.paired_interval(0, 0, 0, 0)


def test_the_table(tmp_path, capsys):
  a = write(tmp_path / "a", result([1, 1, 1, 0]), result([0, 0], "long"))
  b = write(tmp_path / "b", result([1, 0, 0, 0]))
  main(["compare", a, b])
  printed = capsys.readouterr().out
  assert "pick: 4 episodes of equal seeds" in printed and "A − B  +50.0 points" in printed
  assert "long: only A has it" in printed
  assert "solved by both 1, only A 2, only B 0, neither 1" in printed


def test_what_is_not_alike_is_refused_and_named(tmp_path, capsys):
  a, b = write(tmp_path / "a", result([1, 0])), write(tmp_path / "b", result([1, 1], replay=4))
  with pytest.raises(SystemExit, match="replay: 8 against 4"):
    main(["compare", a, b])
  main(["compare", a, b, "--anyway"])
  assert "NOT ALIKE" in capsys.readouterr().out


def test_what_is_compared_is_named_and_parts_of_fields_too(tmp_path, capsys):
  marks = [dict(preprocessing={"crop_area": 0.9, "image_size": size}, simulator={"mujoco": version, "bddl": "1.0.1"})
           for size, version in ((224, "3.8.1"), (96, "3.8.1"), (224, "3.2.3"))]
  marks[1] |= {"sources": "b"}
  a, b, c = (write(tmp_path / name, result([1, 0], **mark)) for name, mark in zip("abc", marks))
  main(["compare", a, b])
  printed = capsys.readouterr().out
  assert "compared:  preprocessing.image_size: 224 against 96" in printed and "NOT ALIKE" not in printed
  assert "noted:     sources: None against b" in printed
  with pytest.raises(SystemExit, match="simulator.mujoco: 3.8.1 against 3.2.3"):
    main(["compare", a, c])
  main(["compare", a, c, "--anyway"])
  assert "NOT ALIKE" in (printed := capsys.readouterr().out) and "bddl" not in printed


def test_what_is_no_result_is_refused(tmp_path):
  a = write(tmp_path / "a", result([1, 0]))
  (tmp_path / "text").write_text("no json")
  for other, message in ((tmp_path / "none", "does not exist"), (tmp_path / "text", "not evaluate's results.json"),
                         (write(tmp_path / "b", result([1], "long")), "expected one in common")):
    with pytest.raises(SystemExit, match=message):
      main(["compare", a, str(other)])
