"""Arguments in either spelling, and configs that are none."""

import shlex
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from semanticvla_jax.train import command_line


@pytest.fixture
def parse(monkeypatch):
  """What the command line says to a command with --config and two flags, in place of this process's own flags."""
  monkeypatch.setattr(sys, "argv", list(sys.argv))

  def run(*arguments):
    own = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", own)
    for name in ("profile-steps", "only_check"):
      flags.DEFINE_string(name, None, "", flag_values=own)
    config_flags.DEFINE_config_file("config", None, "", flag_values=own)
    command_line.parse(["train", *arguments])
    return own

  return run


def test_dashes_and_init_from(parse):
  own = parse("--config=configs/libero.py:lite@tiny", "--profile-steps=1:2", "--init-from=base", "--config.seed=3")
  assert own["profile-steps"].value == "1:2" and own.config.init_from == "base" and own.config.seed == 3


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=configs/no_such.py"], r"got configs/no_such.py, which .*expected a Python file.*name one"),
    (["--config=configs/libero.py:fulll@tiny"], "error: config argument: got 'fulll@tiny'; expected MODE@VARIANT"),
    (
      ["--config=configs/libero.py:full@tiny", "--config.optim.lrr=1"],
      r'--config: got .*Did you mean "lr".*; expected',
    ),
    (["--config=configs/libero.py:full@tiny", "--config.optm.lr=1"], r'got .*Did you mean "optim".*; expected'),
  ],
)
def test_what_is_no_config_is_told_in_one_line(parse, arguments, message):
  with pytest.raises(SystemExit, match=message) as ended:
    parse(*arguments)
  print(ended.value)
  assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)


def test_underscores_are_understood_too(parse):
  own = parse("--config=configs/libero.py:lite@tiny", "--profile_steps=1:2", "--init_from=base", "--only-check=x")
  assert (own["profile-steps"].value, own.config.init_from, own.only_check) == ("1:2", "base", "x")


def test_a_printed_config_read_back_as_flags_is_the_same(parse):
  config = parse("--config=configs/libero.py:lite@tiny", "--config.optim.lr=0.25", "--config.data.dir=a b").config
  lines = command_line.as_flags(config).splitlines()
  assert "--config.optim.lr=0.25" in lines and "--config.data.dir='a b'" in lines
  settable = [shlex.split(line)[0] for line in lines if not line.endswith(("=None", "=()"))]
  again = command_line.as_flags(parse("--config=configs/libero.py:lite@tiny", *settable).config)
  assert again.splitlines() == lines
