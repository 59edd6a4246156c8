"""How every command runs: its flags, UTF-8 on its streams, one line on stderr when it fails, its exit status."""

from __future__ import annotations

import argparse
import difflib
import inspect
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from semanticvla_jax.errors import refuse

TRACEBACK = "--traceback"  # understood by every command
COMPILED = "~/.cache/semanticvla_jax/compiled"  # programs that took a second or more to compile
_LONGEST = 400  # characters of a foreign message


def run(main: Callable[[list[str]], Any], argv: Sequence[str] | None = None, *, keep_compiled: bool = True) -> NoReturn:
  """Runs a command's `main` and ends the program with what it returns (None: 0).

  A ValueError is what a user can put right: its message is all that is printed. Of any other exception one line is
  printed, with the file that its traceback went to. Both end with status 1; a reader that closed the pipe and ^C end
  with the statuses that shells give them (141, 130). With --traceback among the words, the traceback is printed too.

  Args:
    main: takes the words of the command line.
    argv: these words; None for those of this process.
    keep_compiled: keeps compiled programs in COMPILED for the next run, unless the environment says otherwise
      (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE). False for what measures compilation.
  """
  words = [*sys.argv[1:]] if argv is None else [*argv]
  wants_traceback = TRACEBACK in words
  if wants_traceback:
    words.remove(TRACEBACK)
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word != TRACEBACK)]  # absl reads its flags there
  use_utf8()
  logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # it lists each kind of device that is not here
  _use_32_bits()
  if keep_compiled:
    _keep_compiled()
  threading.excepthook = _say_of_a_thread
  try:
    status = main(words)
    sys.stdout.flush()
  except SystemExit as leaving:
    status = leaving.code
    if wants_traceback and status and isinstance(leaving.__context__, Exception):  # a refusal that became a message
      traceback.print_exception(leaving.__context__)
    try:
      sys.stdout.flush()
    except BrokenPipeError:
      status = status or _without_output()
  except BrokenPipeError:
    status = _without_output()
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    status = 128 + signal.SIGINT
  except Exception as error:  # of any kind: the user gets one line
    if wants_traceback:
      traceback.print_exception(error)
    print(f"error: {describe(error)}", file=sys.stderr)
    status = 1
  if status:  # what threads and callbacks complain of while the program ends comes of the same cause
    threading.excepthook = sys.unraisablehook = lambda failed: None
  sys.exit(status)


def describe(error: Exception) -> str:
  """The message of a ValueError; of anything else its type, first line, and where its traceback was written."""
  if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
    return str(error)
  return f"{first_line(error)} (traceback: {_keep_traceback(error)})"


def first_line(error: BaseException) -> str:
  """The type and the first line of a message that others wrote."""
  line = next((line for line in str(error).splitlines() if line.strip()), "")
  return f"{type(error).__name__}: {line[:_LONGEST]}".removesuffix(": ")


def _say_of_a_thread(failed: threading.ExceptHookArgs) -> None:
  if failed.exc_value is not None:
    print(f"a thread failed: {first_line(failed.exc_value)}", file=sys.stderr)


def use_utf8() -> None:
  """Makes stdout and stderr UTF-8 under any locale; what cannot be encoded (half of a surrogate pair) is escaped."""
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _use_32_bits() -> None:
  """Sets JAX_ENABLE_X64 aside, which this package's numbers are not made for, and says so."""
  jax = sys.modules.get("jax")
  if jax is not None and jax.config.jax_enable_x64:
    jax.config.update("jax_enable_x64", False)
    print("JAX_ENABLE_X64 is set: this command computes in 32 bits all the same", file=sys.stderr)


def _keep_compiled() -> None:
  """Names the folder of jax's compilation cache, for this process and its children, where none is named."""
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  folder = os.path.expanduser(COMPILED)
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError:  # a home that cannot be written to: nothing is kept
    return
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  jax = sys.modules.get("jax")
  if jax is not None and jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", folder)


def make_importable(config: str) -> None:
  """Lets a config file, "…/configs/libero.py:lite", import from its own folder, from any working directory.

  The folder above its own comes first, so that `configs` is the config's own package. Its own folder comes last: a
  config may be called as an installed package is (configs/libero.py), and must not hide it. This repository's comes
  after both, for `from configs import common`.
  """
  match = re.fullmatch(r"(.*\.py)(:.*)?", config)
  if match is None:
    return
  folder = Path(match[1]).expanduser().resolve().parent
  if str(folder.parent) not in sys.path[:1]:
    sys.path.insert(0, str(folder.parent))
  root = Path(__file__).resolve().parents[1]
  for place in (folder, *([root] if (root / "configs" / "common.py").exists() else [])):
    if str(place) not in sys.path:
      sys.path.append(str(place))


def in_repository(path: str) -> str:
  """The path if it exists, else the same path in the repository that holds this package, if that exists."""
  found = Path(__file__).resolve().parents[1] / path
  return str(found) if not Path(path).exists() and found.exists() else path


def _keep_traceback(error: Exception) -> str:
  text = "".join(traceback.format_exception(error))
  try:
    descriptor, path = tempfile.mkstemp(prefix="semanticvla_jax_", suffix=".log")
    with open(descriptor, "w", encoding="utf-8") as file:
      file.write(text)
  except OSError:  # a full disk may be what this is about
    return f"not kept, no room for it; raised at {_where(error)}"
  return path


def _where(error: Exception) -> str:
  frames = traceback.extract_tb(error.__traceback__)
  return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "an unknown place"


def _without_output() -> int:
  """Lets what is still buffered go nowhere, or the interpreter complains at its end."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 128 + signal.SIGPIPE


class ArgumentParser(argparse.ArgumentParser):
  """argparse's parser for this package: flags are spelled with dashes, and `--max_steps` means `--max-steps`.

  The description, usually a module's docstring, keeps its line breaks.

  Args:
    prog: the command as it is typed.
    description: text above the list of flags.
    **options: of argparse.ArgumentParser.
  """

  def __init__(self, prog: str | None = None, description: str | None = None, **options: Any):
    text = None if description is None else inspect.cleandoc(description)
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter} | options
    super().__init__(prog=prog, description=text, **options)

  def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
    """Parses flags in either spelling; see argparse."""
    words = [*sys.argv[1:]] if args is None else [*args]
    return super().parse_known_args(dashed(words), namespace)


def dashed(argv: Sequence[str]) -> list[str]:
  """The same words with "-" for "_" in the names of flags, up to a bare "--"; values keep their underscores."""
  end = argv.index("--") if "--" in argv else len(argv)
  return [*map(_dashed, argv[:end]), *argv[end:]]


def _dashed(word: str) -> str:
  name, equals, value = word.partition("=")
  return name.replace("_", "-") + equals + value if re.fullmatch(r"--\w[\w-]*", name) else word


def subcommand(prog: str, description: str, commands: Mapping[str, str], argv: Sequence[str]) -> tuple[str, list[str]]:
  """Splits a command line into one of `commands` and the rest; prints the list of them and ends for --help or nothing.

  Args:
    prog: the command as it is typed.
    description: text above the list.
    commands: {name: one line of what it does}.
    argv: words of the command line. Where they begin with a flag, the name is "".

  Raises:
    ValueError: the first word is neither a flag nor one of `commands`.
  """
  if not argv or argv[0] in ("-h", "--help"):
    lines = [f"  {name:10} {what}" for name, what in commands.items()]
    usage = f"usage: {prog} {{{','.join(commands)}}} …   ({prog} COMMAND --help lists its flags)"
    print("\n".join([usage, "", inspect.cleandoc(description), "", "commands:", *lines]))
    sys.exit(0)
  if argv[0].startswith("-"):
    return "", [*argv]
  if argv[0] not in commands:
    (near,) = difflib.get_close_matches(argv[0], commands, 1, 0.0)
    raise refuse(prog, f"{argv[0]!r}", f"one of {', '.join(commands)}", f"choose one of them (did you mean {near!r}?)")
  return argv[0], [*argv[1:]]
