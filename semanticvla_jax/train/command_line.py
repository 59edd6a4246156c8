"""How the commands of this folder read their arguments: either spelling, and one line about what is wrong."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from semanticvla_jax import cli
from semanticvla_jax.errors import refuse

PARSING = "Error whilst parsing config file"  # ml_collections' words before a traceback of the config file


def parse(argv: list[str]) -> list[str]:
  """The `flags_parser` of absl's `app.run`, for commands with a --config; exits with one line about a bad one."""
  sys.argv = spelled(argv)  # ml_collections looks for --config.… there
  for name, following in zip(sys.argv, [*sys.argv[1:], ""]):
    if name.startswith("--config=") or name == "--config":
      cli.make_importable(name.partition("=")[2] or following)
  try:
    rest = flags.FLAGS(sys.argv)
    if flags.FLAGS["config"].value is not None:
      flags.FLAGS["config"].value.keys()  # a file that cannot be loaded says so when it is read
    return rest
  except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
    sys.exit(f"error: {explain(error)}")
  except flags.Error as error:
    sys.exit(f"error: {explain(error) if PARSING in str(error) else error} (--help lists the flags)")


def spelled(argv: list[str]) -> list[str]:
  """The words with every flag as it is defined: either spelling of --profile-steps means it, and `--init-from=DIR` is
  `--config.init_from=DIR`."""
  names = {name.replace("_", "-"): name for name in flags.FLAGS} | {"init-from": "config.init_from"}
  out = []
  for i, word in enumerate(argv):
    name, equals, value = word.partition("=")
    dashed = name.removeprefix("--").replace("_", "-")
    if name.startswith("--") and "--" not in argv[:i] and dashed in names:
      word = f"--{names[dashed]}{equals}{value}"
    out.append(word)
  return out


def as_flags(config: Any) -> str:
  """Every field of a config as the flag that sets it, one line each, sorted: "--config.optim.lr=0.0005"."""
  lines = [f"--config.{name}={_value(value)}" for name, value in _fields(config)]
  return "\n".join(sorted(lines))


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _fields(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _value(value: Any) -> str:
  """A value as it is typed in a shell."""
  return shlex.quote(value if isinstance(value, str) else repr(value))


def explain(error: Exception) -> str:
  """What is wrong with a config, in one line of four parts."""
  text = str(error.args[0] if error.args else error).replace("\\n", "\n")
  lines = [line.strip(" '\"\\") for line in text.splitlines() if line.strip()] or [type(error).__name__]
  if isinstance(error, OSError):
    named = next((word.partition("=")[2] for word in sys.argv if word.startswith("--config=")), None)
    return str(
      refuse(
        "--config",
        f"{named}, which cannot be loaded ({lines[-1]})",
        "a Python file with get_config",
        "name one of configs/, such as configs/libero.py:lite@7b",
      )
    )
  if PARSING in text:  # a traceback; its last line is what the file said
    return lines[-1].removeprefix("ValueError: ")
  got = ": ".join(lines).rstrip(".?")
  return str(refuse("--config", got, "fields and values as in configs/common.py", "correct --config.FIELD=VALUE"))
