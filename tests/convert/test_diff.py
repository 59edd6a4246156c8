"""diff takes checkpoints of several paths on either side."""

import pytest

from semanticvla_jax.convert import __main__
from semanticvla_jax.convert.check import diff


@pytest.fixture
def asked(monkeypatch):
  """The sides that `compare.diff` is asked for."""
  sides = []
  monkeypatch.setattr(diff, "diff", lambda a, b: sides.append((a, b)) or [])
  return sides


@pytest.mark.parametrize(
  ("argv", "sides"),
  [
    (["x", "y"], ("x", "y")),
    (["--a", "x", "y", "--b", "z"], (["x", "y"], "z")),
    (["x", "--b", "y", "z"], ("x", ["y", "z"])),
  ],
)
def test_sides_by_place_and_by_name(argv, sides, asked):
  assert __main__.main(["diff", *argv]) == 0 and asked == [sides]


@pytest.mark.parametrize("argv", [["x"], ["x", "y", "z"], ["x", "y", "--b", "z"], ["--a", "x"], ["x", "--a", "y"]])
def test_other_numbers_of_sides_are_refused(argv, asked, capsys):
  assert __main__.main(["diff", *argv]) == 1 and not asked
  assert "expected two checkpoints" in capsys.readouterr().err


def test_a_fine_tune_apart_from_its_base(adapted, capsys):
  (base, tuned), policies, _ = adapted
  argv = ["diff", "--a", str(base), str(tuned), "--b", str(policies["keep"])]
  assert __main__.main(argv) == 0
  assert ", 0 different" in capsys.readouterr().out
