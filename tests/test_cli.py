"""A command that fails says so in one line, whatever it was; streams are UTF-8 under any locale."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from semanticvla_jax import cli

PROGRAM = "from semanticvla_jax import cli\ndef main(argv):\n  {}\ncli.run(main)"


def ended(body: str, **options) -> subprocess.CompletedProcess:
  command = [sys.executable, "-c", PROGRAM.format(body)]
  return subprocess.run(command, capture_output=True, timeout=60, **options)


def test_what_a_user_can_put_right_is_its_message_alone():
  run = ended("raise ValueError('got 1; expected 2')")
  assert (run.returncode, run.stderr) == (1, b"error: got 1; expected 2\n")


@pytest.mark.parametrize("body", ["raise OSError(28, 'full')", "raise RuntimeError('a\\nb')", "1 / 0", "{}['x']"])
def test_anything_else_is_one_line_that_names_its_traceback(body):
  run = ended(body)
  (line,) = run.stderr.decode().splitlines()
  assert run.returncode == 1 and line.startswith("error: ")
  assert "Traceback" in Path(line.rpartition("traceback: ")[2].rstrip(")")).read_text(encoding="utf-8")


@pytest.mark.parametrize(
  "body",
  [
    "raise ValueError('got 1; expected 2')",
    "1 / 0",
    "import sys\n  try:\n    1 / 0\n  except ZeroDivisionError as error:\n    sys.exit(str(error))",
  ],
)
def test_the_traceback_is_printed_where_it_is_asked_for(body):
  command = [sys.executable, "-c", PROGRAM.format(body), "--traceback"]
  run = subprocess.run(command, capture_output=True, timeout=60, text=True)
  assert run.returncode == 1 and "Traceback (most recent call last)" in run.stderr
  assert run.stderr.splitlines()[-1].startswith(("error: ", "division by zero"))


def test_a_message_over_several_lines_is_cut_to_its_first():
  assert cli.first_line(zipfile.BadZipFile("\nnot a zip\nfile")) == "BadZipFile: not a zip"
  assert cli.first_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(("body", "status"), [("return 3", 3), ("return None", 0), ("import sys; sys.exit(4)", 4)])
def test_statuses_pass(body, status):
  assert ended(body).returncode == status


def test_an_interruption_is_said_and_has_its_status():
  run = ended("raise KeyboardInterrupt")
  assert (run.returncode, run.stderr) == (130, b"interrupted\n")


@pytest.mark.parametrize("ending", ["pass", "import sys; sys.exit(0)"])
def test_a_closed_pipe_is_no_traceback(ending):
  body = PROGRAM.format(f"[print('x' * 4000) for _ in range(100)]; {ending}")
  with subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
  assert process.returncode == 141


@pytest.mark.parametrize(
  "variables",
  [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX"}],
)
def test_streams_are_utf8_under_any_locale(variables, tmp_path):
  program = tmp_path / "program.py"
  program.write_text(PROGRAM.format("print('95 % → “grün” \\ud800')"), encoding="utf-8")
  run = subprocess.run([sys.executable, program], capture_output=True, timeout=60, env=variables)
  assert (run.returncode, run.stdout.decode()) == (0, "95 % → “grün” \\ud800\n")


def test_a_path_of_the_repository_is_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert Path(cli.in_repository("configs/common.py")) == Path(__file__).parents[1] / "configs" / "common.py"
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "common.py").write_text("")
  assert cli.in_repository("configs/common.py") == "configs/common.py"
  assert cli.in_repository("nowhere.py") == "nowhere.py"


def test_a_config_imports_from_its_own_repository_and_hides_no_installed_package(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
  for file in ("site/installed/__init__.py", "mine/configs/installed.py", "mine/configs/sibling.py"):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("")
  cli.make_importable(str(tmp_path / "mine" / "configs" / "installed.py") + ":lite")
  assert importlib.util.find_spec("installed").origin == str(tmp_path / "site" / "installed" / "__init__.py")
  assert importlib.util.find_spec("sibling").origin == str(tmp_path / "mine" / "configs" / "sibling.py")
  assert sys.path[0] == str(tmp_path / "mine")


def test_flags_are_spelled_with_dashes_and_underscores_mean_the_same(capsys):
  parser = cli.ArgumentParser("it", "Reads flags.\n\n  kept as it is\n\nand more")
  parser.add_argument("--max-steps", type=int)
  parser.add_argument("--data-dir")
  for words in (["--max-steps=3", "--data-dir", "a_b"], ["--max_steps", "3", "--data_dir=a_b"]):
    args = parser.parse_args(words)
    assert (args.max_steps, args.data_dir) == (3, "a_b")
  with pytest.raises(SystemExit):
    parser.parse_args(["--help"])
  printed = capsys.readouterr().out
  assert "--max-steps MAX_STEPS" in printed and "--max_steps" not in printed and "\n  kept as it is" in printed
  assert cli.dashed(["--a_b=c_d", "e_f", "--", "--g_h"]) == ["--a-b=c_d", "e_f", "--", "--g_h"]


def test_subcommands_are_listed_and_a_misspelt_one_names_the_nearest(capsys):
  commands = {"run": "measures", "compare": "compares two results"}
  assert cli.subcommand("it", "Does it.", commands, ["compare", "a", "b"]) == ("compare", ["a", "b"])
  assert cli.subcommand("it", "Does it.", commands, ["--policy=x"]) == ("", ["--policy=x"])
  for words in ([], ["--help"], ["-h"]):
    with pytest.raises(SystemExit) as listed:
      cli.subcommand("it", "Does it.", commands, words)
    printed = capsys.readouterr().out
    assert not listed.value.code and all(f"  {name:10} {what}" in printed for name, what in commands.items())
  with pytest.raises(ValueError, match="got 'comprae'; expected one of run, compare; .*did you mean 'compare'"):
    cli.subcommand("it", "Does it.", commands, ["comprae", "a"])


@pytest.mark.parametrize(
  ("variables", "place"),
  [({}, ".cache/semanticvla_jax/compiled"), ({"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, "/elsewhere")],
)
@pytest.mark.parametrize("before", ["import jax", "pass"])
def test_compiled_programs_are_kept_where_the_user_says_or_in_their_cache(before, variables, place, tmp_path):
  """Whether jax was imported before the command or is by it, and by children that it starts."""
  program = f"{before}\nimport os, sys\nfrom semanticvla_jax import cli\ndef main(argv):\n  import jax\n"
  program += "  print(jax.config.jax_compilation_cache_dir, os.environ['JAX_COMPILATION_CACHE_DIR'])\ncli.run(main)"
  clean = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
  variables = clean | {"HOME": str(tmp_path)} | variables
  run = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, text=True, env=variables)
  expected = place if place.startswith("/") else str(tmp_path / place)
  assert run.stdout.split() == [expected, expected], run.stderr
