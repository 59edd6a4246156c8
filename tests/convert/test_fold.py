"""A policy's adapters are folded in as loading folds them, in a new folder or in place, and never in half."""

import errno
import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import RELEASE
from flax.traverse_util import flatten_dict

from semanticvla_jax import files, policy_folder
from semanticvla_jax.convert import __main__, fold
from semanticvla_jax.convert.io import swap
from semanticvla_jax.models import lora


def numbers(files_):
  return {path: np.asarray(x) for path, x in flatten_dict(files_.params, sep="/").items()}


def contents(folder):
  return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def policy(adapted, tmp_path):
  """A policy with adapters, tokenizers, files of its source and notes of someone."""
  folder = shutil.copytree(adapted[1]["keep"], tmp_path / "policy")
  for name in ("tokenizers/tokenizer.model", "source_files/preprocessor_config.json", "notes.md"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(name)
  return folder


def test_a_new_folder_holds_the_merge_and_the_old_one_stays(policy, tmp_path, adapted):
  before = contents(policy)
  metadata = fold.fold(policy, tmp_path / "folded")
  assert contents(policy) == before
  kept, folded = policy_folder.load_policy(policy), policy_folder.load_policy(tmp_path / "folded")  # hashes are checked
  wanted = flatten_dict(jax.tree.map(np.asarray, lora.merge(kept.params, 4, 8.0)), sep="/")
  got = numbers(folded)
  assert got.keys() == wanted.keys()
  for path, x in wanted.items():
    assert got[path].dtype == x.dtype and got[path].tobytes() == x.tobytes(), path
  merged = policy_folder.load_policy(adapted[1]["merge"])  # as the converter makes it
  assert folded.metadata["params_sha256"] == merged.metadata["params_sha256"]
  assert folded.metadata["lora"] == merged.metadata["lora"] == RELEASE and folded.metadata == metadata
  assert folded.metadata["merged"] and folded.metadata["parameters"] == merged.metadata["parameters"]
  assert folded.config == kept.config | {"lora": None} and folded.statistics == kept.statistics
  new = contents(tmp_path / "folded")
  same = {p for p in before if p.parts[0] != "params" and p.name not in ("config.json", "metadata.json")}
  assert len(same) >= 5 and all(new[p] == before[p] for p in same)


def test_in_place_and_a_second_time_there_is_nothing_to_do(policy, tmp_path, capsys):
  fold.fold(policy, tmp_path / "wanted")
  assert __main__.main(["fold", "--policy", str(policy)]) == 0
  assert "73 adapters of rank 4, alpha 8.0 folded in" in capsys.readouterr().out
  folded, wanted = (numbers(policy_folder.load_policy(path)) for path in (policy, tmp_path / "wanted"))
  assert folded.keys() == wanted.keys()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["policy", "wanted"]
  before = contents(policy)
  assert __main__.main(["fold", "--policy", str(policy)]) == 0
  assert "has no adapters: nothing to fold" in capsys.readouterr().out and contents(policy) == before


def test_types_of_the_weights_are_kept(adapted, tmp_path):
  kept = policy_folder.load_policy(adapted[1]["keep"])
  half = lambda path, x: x if path[-1].key.startswith("lora_") else x.astype(ml_dtypes.bfloat16)  # noqa: E731
  params = jax.tree_util.tree_map_with_path(half, jax.tree.map(np.asarray, kept.params))
  policy_folder.save_policy(tmp_path / "half", params, config=kept.config, statistics=kept.statistics)
  fold.fold(tmp_path / "half")
  wanted = flatten_dict(jax.tree.map(np.asarray, lora.merge(params, 4, 8.0)), sep="/")
  for path, x in numbers(policy_folder.load_policy(tmp_path / "half")).items():
    assert x.dtype == ml_dtypes.bfloat16 and x.tobytes() == wanted[path].tobytes(), path


@pytest.mark.parametrize("at", ["a write", "the exchange"])
def test_a_failure_leaves_the_old_folder_whole(at, policy, tmp_path, monkeypatch):
  def broken(*args, **kwargs):
    raise OSError("the disk is gone")

  before = contents(policy)
  monkeypatch.setattr(*((fold, "_copy_rest") if at == "a write" else (swap, "exchange")), broken)
  with pytest.raises(OSError, match="the disk is gone"):
    fold.fold(policy)
  assert contents(policy) == before and [p.name for p in tmp_path.iterdir()] == ["policy"]


KILLED = """
import os, sys
from semanticvla_jax.convert import fold
from semanticvla_jax.convert.io import swap
if sys.argv[2] == "before":
  fold._copy_rest = lambda *_: os.kill(os.getpid(), 9)
else:  # a system without the call, killed between two renames
  swap._renameat2 = None
  from pathlib import Path
  real = Path.rename
  def once(self, target):
    real(self, target)
    os.kill(os.getpid(), 9)
  Path.rename = once
fold.fold(sys.argv[1])
"""


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_kill_leaves_the_old_folder_whole_and_the_next_run_folds_it(when, policy):
  before, said = contents(policy), []
  done = subprocess.run([sys.executable, "-c", KILLED, str(policy), when], capture_output=True)
  assert done.returncode == -9, done.stderr.decode()
  assert contents(policy if when == "before" else swap.aside(policy)) == before
  assert fold.fold(policy, say=said.append)["merged"] and any("did not finish" in line for line in said)
  assert policy_folder.load_policy(policy).config["lora"] is None


def test_one_run_at_a_time(policy):
  with files.alone(policy), pytest.raises(ValueError, match="is being written"):
    fold.fold(policy)


def test_policies_that_cannot_be_folded(policy, tmp_path):
  with pytest.raises(ValueError, match="Target exists"):
    fold.fold(policy, tmp_path)
  with pytest.raises(ValueError, match="No policy"):
    fold.fold(tmp_path / "nowhere")
  config, metadata = (json.loads((policy / name).read_text()) for name in ("config.json", "metadata.json"))
  (policy / "config.json").write_text(json.dumps(config | {"lora": None}))
  with pytest.raises(ValueError, match="adapters and no `lora`"):
    fold.fold(policy)
  (policy / "config.json").write_text(json.dumps(config | {"lora": RELEASE | {"rank": 8}}))
  with pytest.raises(ValueError, match="rank 4; expected 8"):
    fold.fold(policy)
  (policy / "config.json").write_text(json.dumps(config))
  (policy / "metadata.json").write_text(json.dumps(metadata | {"params_sha256": "0" * 64}))
  before = contents(policy)
  with pytest.raises(ValueError, match="not what was saved"):
    fold.fold(policy)
  assert contents(policy) == before


@pytest.mark.parametrize("call", ["the system's", "three renames"])
def test_folders_change_names(call, tmp_path, monkeypatch):
  def unknown(*_):
    swap.ctypes.set_errno(errno.EINVAL)
    return -1

  if call == "three renames":
    monkeypatch.setattr(swap, "_renameat2", unknown)
  for name in "ab":
    (tmp_path / name).mkdir()
    (tmp_path / name / "is").write_text(name)
  swap.exchange(tmp_path / "a", tmp_path / "b")
  assert [(tmp_path / name / "is").read_text() for name in "ab"] == ["b", "a"]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
