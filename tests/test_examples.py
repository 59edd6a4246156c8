"""The examples run as they stand, and the package's door opens quickly."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import semanticvla_jax
from semanticvla_jax import __main__ as commands

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SLOW = ("custom_pruner", "finetune_on_my_robot")  # train


@pytest.mark.parametrize(
  "path", [pytest.param(x, id=x.stem, marks=[pytest.mark.slow] if x.stem in SLOW else []) for x in EXAMPLES]
)
def test_an_example_runs_and_is_short(path):
  assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
  result = runpy.run_path(str(path), run_name="example")["main"]()
  assert result is not None
  if path.stem == "custom_pruner":
    assert result["losses"][-1] < result["losses"][0] and result["kept"].shape == (16, 8)


def test_the_package_names_what_a_newcomer_needs_and_loads_it_when_asked():
  program = "import sys, semanticvla_jax as sv\nassert not {'jax', 'tensorflow'} & sys.modules.keys()\nprint(dir(sv))"
  said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
  assert "'Policy', 'VARIANTS', '__version__', 'build'" in said
  assert "tiny" in semanticvla_jax.VARIANTS and callable(semanticvla_jax.build)
  with pytest.raises(AttributeError, match="has no attribute 'Polciy'; it has Policy, build, VARIANTS"):
    semanticvla_jax.Polciy  # noqa: B018


def test_every_verb_is_a_command(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["semanticvla"])
  with pytest.raises(SystemExit) as ended:
    commands.main()
  listed = capsys.readouterr().out
  assert not ended.value.code
  root = Path(semanticvla_jax.__file__).parent
  for verb in commands.VERBS:
    place = root / verb.replace(".", "/")
    assert verb in listed and ((place / "__main__.py").exists() or place.with_suffix(".py").exists())


def test_a_misspelt_verb_is_one_line(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["semanticvla", "evalute"])
  with pytest.raises(SystemExit) as ended:
    commands.main()
  assert ended.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: verb: got 'evalute'; expected ") and line.endswith("(did you mean 'evaluate'?).")


def test_a_verb_gets_its_arguments():
  command = [sys.executable, "-m", "semanticvla_jax", "data", "--help"]
  run = subprocess.run(command, capture_output=True, text=True, check=True)
  assert "inspect" in run.stdout and "--data" in run.stdout
