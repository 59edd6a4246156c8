"""Who may import whom: the arrows of the README's file tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict

from configs import common

ROOT = Path(__file__).parent.parent / "semanticvla_jax"
ANYWHERE = {"types", "errors", "files", "cli", "action_tokens"}
MAY_IMPORT = {
  **{part: set() for part in ANYWHERE},
  "models": set(),
  "data": set(),
  "envs": set(),
  "policy_folder": {"models"},
  "tabletop": {"data", "models"},
  "libero": {"data", "envs", "models", "policy_folder"},
  "demonstrate": {"data", "envs", "tabletop", "libero"},
  "convert": {"models", "data", "policy_folder"},
  "train": {"models", "data", "policy_folder"},
  "observation_dict": {"data"},
  "preparation": {"data", "observation_dict"},
  "inference": set(),
  "base_policy": {"preparation", "inference"},
  "exported": {"data", "preparation", "inference", "base_policy"},
  "policy": {
    "models",
    "data",
    "policy_folder",
    "observation_dict",
    "preparation",
    "inference",
    "base_policy",
    "exported",
  },
  "evaluate": {"models", "data", "envs", "tabletop", "libero", "policy_folder", "observation_dict", "policy", "serve"},
  "serve": {"observation_dict", "policy", "exported"},
  "quickstart": {"policy_folder", "evaluate"},
  "__main__": set(),
  "sources": {"tabletop"},
  "benchmark": {
    "models",
    "data",
    "envs",
    "tabletop",
    "libero",
    "policy_folder",
    "policy",
    "train",
    "evaluate",
    "serve",
  },
}
FORBIDDEN = {  # third-party packages that must not be imported when the module is
  "models": {"tensorflow", "tensorflow_datasets", "ml_collections", "torch", "orbax"},
  "envs": {"tensorflow", "tensorflow_datasets", "torch"},
  "tabletop": {"tensorflow", "tensorflow_datasets", "torch"},
  "libero": {"tensorflow", "tensorflow_datasets", "torch"},
  "policy": {"tensorflow", "tensorflow_datasets", "torch"},
  "data": {"torch"},
  "exported": {"flax", "orbax", "tensorflow", "tensorflow_datasets", "torch"},
  "train": {"torch"},
  "serve": {"tensorflow", "tensorflow_datasets", "ml_collections", "torch"},
  "benchmark": {"tensorflow", "tensorflow_datasets", "ml_collections", "torch", "transformers"},
}
COMMANDS_OF_TRAINING = {
  "train/__main__.py",
  "train/preflight.py",
  "train/image_server.py",
}  # which look a config's benchmark up in a table
OF_PYTORCH = "benchmark/peer.py"  # a module that is nothing without it
FILES = sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
  return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False):
  tree = ast.parse(path.read_text())
  nodes = tree.body if top_level_only else ast.walk(tree)
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
  if part(path) == "__init__":
    return
  inside = {name.split(".")[1] for name in imports(path) if name.startswith("semanticvla_jax.")}
  handed_in = {"sources"} if str(path.relative_to(ROOT)) in COMMANDS_OF_TRAINING else set()
  assert inside - {part(path)} - ANYWHERE - handed_in <= MAY_IMPORT[part(path)]


@pytest.mark.parametrize("benchmark", ["tabletop", "libero"])
def test_training_names_no_benchmark(benchmark):
  """Neither in its imports nor in the fields that every config shares; what makes examples is handed in."""
  for path in (ROOT / "train").rglob("*.py"):
    assert benchmark not in {part for name in imports(path) for part in name.split(".")}, path
  fields = flatten_dict(common.get_config("tiny").to_dict(), sep=".")
  assert {"data.suites", "data.starts", "data.askew", "train.grounding"}.isdisjoint(fields)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_stay_where_they_belong(path):
  named = {*imports(path, top_level_only=True)}
  outside = {name.split(".")[0] for name in named}
  if path.relative_to(ROOT).as_posix() != OF_PYTORCH:
    assert not outside & FORBIDDEN.get(part(path), set())
  assert "semanticvla_jax.benchmark.peer" not in named  # imported by functions, where it is asked for
  if path.name != "__main__.py":
    assert "configs" not in outside


@pytest.mark.parametrize("name", ["wire", "chunks", "contract", "client"])
def test_what_runs_on_a_robot_needs_no_jax(name):
  """A robot has numpy, msgpack and websockets."""
  code = f"import sys, semanticvla_jax.serve.{name}; print(*{{one.split('.')[0] for one in sys.modules}})"
  loaded = {*subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()}
  outside = loaded - {*sys.stdlib_module_names} - {"semanticvla_jax"}
  assert not outside & {"jax", "jaxlib", "flax", "tensorflow", "scipy", "PIL", "starlette", "sentencepiece"}


def without_encoding(path: Path):
  """Lines that read or write text in whatever the locale says."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
      continue
    attribute = node.func.attr if isinstance(node.func, ast.Attribute) else None
    owner = getattr(getattr(node.func, "value", None), "id", None)
    modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
    opened = (isinstance(node.func, ast.Name) and node.func.id == "open") or attribute == "open"
    if attribute in ("read_text", "write_text") or (opened and not binary and owner not in ("os", "Image", "ts", "av")):
      yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_text_file_is_utf8_whatever_the_locale():
  found = [line for path in FILES for line in without_encoding(path)]
  assert [line for line in found if "KvStore" not in line and not line.startswith("convert/io/orbax_reader.py")] == []


def test_private_names_of_jax_and_orbax_are_in_one_place():
  found = {
    path.relative_to(ROOT).as_posix() for path in FILES if any("_src" in name.split(".") for name in imports(path))
  }
  assert found == {"train/jax_internals.py"}
