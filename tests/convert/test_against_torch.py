"""PyTorch's classes on the source and ours on the policy say the same; where they do not, it is said."""

import checkpoints
import numpy as np
import pytest

from semanticvla_jax.convert import __main__
from semanticvla_jax.convert.check import against_torch


def test_without_torch_the_error_names_the_requirements(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  argv = ["verify", "--source", str(tmp_path), "--policy", str(tmp_path)]
  assert __main__.main(argv) == 1
  assert "requirements-parity.txt" in capsys.readouterr().err


def torch_libraries():
  pytest.importorskip("torch", reason="needs torch: run `make parity`")
  pytest.importorskip("transformers", reason="needs transformers: run `make parity`")


WANTED = {
  "openvla": {"dino", "siglip", "llm", "llm logits", "sparse_fuser/projector"},
  "oft": {"dino", "siglip", "llm", "sparse_fuser/projector", "proprio_projector", "coupler/all"},
  "full": {"dino", "siglip", "text", "llm", "coupler/trans", "coupler/rot", "coupler/grip", "proprio_projector"},
}


@pytest.mark.parity
@pytest.mark.parametrize("name", WANTED)
def test_every_stage_of_a_checkpoint(name, made, capsys):
  torch_libraries()
  folder, policy = made(name)
  argv = ["verify", "--source", str(folder), "--policy", str(policy), "--seed", "1"]
  assert __main__.main(argv) == 0, capsys.readouterr().out
  out = capsys.readouterr().out
  stages = {line.split("  ")[-1] for line in out.splitlines()[:-1]}
  assert stages >= WANTED[name] and ("dense_fuser/pair_0_first" in stages) == (name == "full")
  left = out.splitlines()[-1].split("not run: ")[1]
  assert left == ("dino_sa_pruner/queries" if name == "full" else "none")


@pytest.mark.parity
@pytest.mark.parametrize("lora", ["keep", "merge"])
def test_adapters(lora, adapted):
  torch_libraries()
  sources, policies, _ = adapted
  rows, _ = against_torch.verify(sources, policies[lora])
  assert max(row.error for row in rows) < against_torch.TOLERANCE
  by_name = {row.stage: row.error for row in rows}
  assert {"dino", "siglip", "text", "llm"} <= set(by_name)


@pytest.mark.parity
def test_another_checkpoint_fails(made, tmp_path, capsys):
  torch_libraries()
  _, policy = made("openvla")
  key = "language_model.model.layers.1.self_attn.v_proj.weight"
  other = checkpoints.openvla(tmp_path / "other", lambda tensors: tensors | {key: np.flip(tensors[key], 0).copy()})
  assert __main__.main(["verify", "--source", str(other), "--policy", str(policy)]) == 1
  out = capsys.readouterr().out
  assert "FAIL  llm" in out and "ok    dino" in out
  tower = checkpoints.random({"reg_token": (1, 4, 8)})
  checkpoints.save_file(tower, tmp_path / "tower.safetensors")
  with pytest.raises(ValueError, match="Source lacks weights of dino"):
    against_torch.verify([tmp_path / "tower.safetensors"], policy)
