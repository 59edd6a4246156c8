"""Arguments in either spelling, and configs that are none."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from semanticvla_jax.train import command_line


@pytest.fixture
def parse(monkeypatch):
  """What the command line says to a command with --config and --profile_steps, in place of this process's own flags."""
  own = flags.FlagValues()
  monkeypatch.setattr(flags, "FLAGS", own)
  flags.DEFINE_string("profile_steps", None, "", flag_values=own)
  config_flags.DEFINE_config_file("config", None, "", flag_values=own)
  monkeypatch.setattr(sys, "argv", list(sys.argv))

  def run(*arguments):
    command_line.parse(["train", *arguments])
    return own

  return run


def test_dashes_and_init_from(parse):
  own = parse("--config=configs/libero.py:lite@tiny", "--profile-steps=1:2", "--init-from=base", "--config.seed=3")
  assert own.profile_steps == "1:2" and own.config.init_from == "base" and own.config.seed == 3


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=configs/no_such.py"], r"got configs/no_such.py, which .*expected a Python file.*name one"),
    (["--config=configs/libero.py:fulll@tiny"], "error: config argument: got 'fulll@tiny', expected MODE@VARIANT"),
    (["--config=configs/libero.py:full@tiny", "--config.optim.lrr=1"], r'--config: got .*Did you mean "lr".* Expected'),
    (["--config=configs/libero.py:full@tiny", "--config.optm.lr=1"], r'got .*Did you mean "optim".* Expected'),
  ],
)
def test_what_is_no_config_is_told_in_one_line(parse, arguments, message):
  with pytest.raises(SystemExit, match=message) as ended:
    parse(*arguments)
  print(ended.value)
  assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)
