"""Every stored tensor of the reference, through the one documented entry point."""

from pathlib import Path

import pytest

from semanticvla_jax.convert import golden
from semanticvla_jax.convert.__main__ import main

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = ["backbones", "id_pruner", "dense_fuser", "full", "full_aloha", "lora_checkpoint", "oft", "openvla"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_stored_tensor_agrees(folder, capsys):
  assert main(["verify-golden", str(GOLDEN / folder)]) == 0, capsys.readouterr().out
  assert "0 beyond 5e-05" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["full_size_keys.json", "full_size_keys_oft.json"])
def test_every_key_of_the_real_checkpoints_is_accounted_for(name, capsys):
  assert main(["verify-golden", str(GOLDEN / name)]) == 0
  assert "parameters mapped" in capsys.readouterr().out


def test_a_wrong_number_fails(monkeypatch, capsys):
  monkeypatch.setattr(golden, "TOLERANCE", 1e-12)
  assert main(["verify-golden", str(GOLDEN / "id_pruner")]) == 1
  assert "FAIL" in capsys.readouterr().out


def test_not_a_golden_folder(tmp_path, capsys):
  assert main(["verify-golden", str(tmp_path)]) == 1
  assert "expected a folder with config.json" in capsys.readouterr().err
