"""Which benchmark a suite belongs to, what the help lists, and that nothing is made for a suite that does not exist."""

import pytest

from semanticvla_jax.evaluate import run
from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.evaluate.benchmarks import BENCHMARKS, of_suites


@pytest.mark.parametrize(
  "words, got, nearest",
  [
    ("libero_objct", "libero_objct", "'libero_object'"),
    ("object", "object", r"'libero_object'\?\)\.$"),
    ("pick,plcae", "plcae", "'place'"),
    ("goals", "goals", "'goal'"),
    ("xyz", "xyz", "'"),
    ("pick,", "", "'"),
    ("my_libero", "my_libero", "'libero_"),
  ],
)
def test_a_suite_that_does_not_exist_is_refused_with_the_nearest_of_all_benchmarks(
  words, got, nearest, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  known = ", ".join(suite for benchmark in BENCHMARKS.values() for suite in benchmark.suites)
  message = f"--suite: got '{got}'; expected one of {known}; choose one of them .did you mean {nearest}"
  with pytest.raises(SystemExit, match=message) as ended:
    main(["--policy=nowhere", f"--suite={words}"])
  assert "\n" not in ended.value.code and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  "words, message",
  [
    ("pick,pick", "expected each suite once; name none twice"),
    ("pick,libero_goal", r"got \['pick'\] of the tabletop and \['libero_goal'\] of LIBERO; expected suites of one"),
  ],
)
def test_suites_are_checked_together(words, message):
  with pytest.raises(ValueError, match=message):
    of_suites(words)
  assert of_suites("pick, place") == ("tabletop", ["pick", "place"])
  assert of_suites("libero_10") == ("libero", ["libero_10"])


def test_the_help_lists_the_subcommands_and_the_flags_of_all_benchmarks(capsys):
  printed = []
  for words in (["--help"], ["run", "--help"]):
    with pytest.raises(SystemExit) as ended:
      main(words)
    assert not ended.value.code
    printed.append(" ".join(capsys.readouterr().out.split()))
  for command in ("run", "merge", "compare", "table", "choices", "clutter", "coupling", "cues", "doctor"):
    assert f" {command} " in printed[0]
  assert all(title in printed[1] for title in ("flags of every benchmark", "flags of the tabletop", "flags of LIBERO"))
  assert "--episodes EPISODES number of episodes per suite (default: 100)" in printed[1]
  assert "--trials TRIALS number of episodes per task (default: 50" in printed[1] and "--replan-steps" in printed[1]
  assert "--replay" not in printed[1] and "_steps" not in printed[1]


def test_a_misspelt_subcommand_names_the_nearest():
  known = "run, merge, compare, table, choices, clutter, coupling, cues, doctor"
  with pytest.raises(ValueError, match=f"got 'comprae'; expected one of {known}; .*did you mean 'compare'"):
    main(["comprae", "a", "b"])


def test_a_flag_has_two_spellings_and_an_earlier_name():
  for words in (["--replan-steps=3"], ["--replan_steps", "3"], ["--replay=3"]):
    assert run.arguments(["--policy=x", "--suite=pick", *words])[1].replan_steps == 3
  assert run.arguments(["--policy=x", "--suite=libero_goal", "--max_steps=5"])[1].max_steps == 5


def test_controls_without_a_value_are_the_benchmarks():
  all_controls = ["shuffled", "blind", "random", "uniform", "centre"]
  for suite, expected in (("pick", all_controls), ("libero_goal", ["shuffled"])):
    for words, controls in ((["--controls"], expected), ([], []), (["--controls=blind"], ["blind"])):
      assert run.arguments(["--policy=x", f"--suite={suite}", *words])[1].controls == controls


def test_flags_of_another_benchmark_are_refused_and_defaults_are_its_own():
  _, args = run.arguments(["--policy=x", "--suite=pick"])
  assert args.episodes == 100 and args.host is False and not hasattr(args, "trials")
  with pytest.raises(ValueError, match=r"--max-steps: got a flag of LIBERO with suites of the tabletop \(pick\)"):
    run.arguments(["--policy=x", "--suite=pick", "--max_steps=3"])
