"""Who may import whom inside the converter, how long its files are, and that no private name of a library is used."""

import ast
from pathlib import Path

import pytest

from semanticvla_jax import convert

ROOT = Path(convert.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
COMMANDS = {"__main__", "to_orbax", "to_torch", "fold"}
STEPS = {"adapter", "detect", "openvla_layout", "plan", "settings", "settings_files"}
MAY_IMPORT = {
  "rules": {"check.torch_names"},  # a layout names the function that renames its tensors for PyTorch's class
  "io": set(),
  "check": {"rules", "io"} | STEPS,
  **dict.fromkeys(sorted(STEPS), {"rules", "io"} | STEPS),
  **dict.fromkeys(sorted(COMMANDS), {"rules", "io", "check"} | STEPS | COMMANDS),
}


def imported(path):
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_rooms(path):
  room = path.relative_to(ROOT).parts[0].removesuffix(".py")
  names = [name.split(".")[2:] for name in imported(path) if name.startswith("semanticvla_jax.convert.")]
  others = [name for name in names if name[0] != room and name not in (["rules"], ["io"], ["check"])]
  allowed = MAY_IMPORT.get(room, set())
  assert not [name for name in others if name[0] not in allowed and ".".join(name[:2]) not in allowed]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_use_public_names(path):
  assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
  assert not [name for name in imported(path) if "_src" in name.split(".")]
