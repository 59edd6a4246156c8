"""What the release's loaders load strictly is there under the names that they ask for, and nothing else is."""

import json
import re

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from semanticvla_jax import policy_folder
from semanticvla_jax.convert import openvla_layout, to_torch
from semanticvla_jax.convert.rules import semanticvla
from semanticvla_jax.convert.to_orbax import Options, to_orbax

RELEASE = {"rank": 4, "alpha": 8, "targets": "release"}
MANIFESTS = {
  "semanticvla": ("full_size_keys.json", "vision_backbone_checkpoint", 1666, 64),
  "oft_film": ("full_size_keys_oft.json", "film_vision_backbone_file", 1311, 32),
}


def canonical_shapes(name):
  """The backbone of a real checkpoint as a conversion leaves it: adapters folded in, dead FiLM and text head gone."""
  file, part, count, _ = MANIFESTS[name]
  manifest = {key: tuple(shape) for key, shape in json.loads((checkpoints.GOLDEN / file).read_text())[part].items()}
  assert len(manifest) == count
  ours = {semanticvla.canonical(key): shape for key, shape in manifest.items() if ".lora_" not in key}
  dead = re.compile(r"featurizer\.blocks\.23\.(scale|shift)\..*|.*text_model\.head\..*")
  return manifest, {key: shape for key, shape in ours.items() if not dead.fullmatch(key)}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_name_and_shape_of_the_real_files(name):
  manifest, ours = canonical_shapes(name)
  lora = openvla_layout.loader_lora(None, ours)
  assert lora["rank"] == MANIFESTS[name][3]
  names = openvla_layout.backbone(ours, lora)
  got = {key: x.shape if isinstance(x, openvla_layout.Zeros) else ours[x] for key, x in names.items()}
  assert got == manifest
  # nothing twice or left out
  assert {x for x in names.values() if not isinstance(x, openvla_layout.Zeros)} == set(ours)


@pytest.mark.parametrize("key", ["featurizer.blocks.23.mlp.fc2.bias", "fused_featurizer.attn_pool.latent"])
def test_a_backbone_with_a_part_missing_is_refused(key):
  _, ours = canonical_shapes("semanticvla")
  del ours[key]
  with pytest.raises(ValueError, match=f"got none of {key}.*--base"):
    openvla_layout.backbone(ours, RELEASE)


def test_the_layers_that_the_loader_wraps():
  golden = checkpoints.GOLDEN / "lora_checkpoint"
  keys = {semanticvla.canonical(key) for key in load_file(golden / "base_hf.safetensors")}
  keys.add("language_model.lm_head.weight")  # of any real base
  wanted = json.loads((golden / "lora_adapter" / "adapter_config.json").read_text())
  got = openvla_layout.adapter_config(keys, RELEASE)
  assert got["target_modules"] == sorted(wanted["target_modules"])
  assert (got["r"], got["lora_alpha"]) == (wanted["r"], wanted["lora_alpha"])


def test_without_torch_the_error_says_so(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  with pytest.raises(ValueError, match="--companions=pt needs PyTorch"):
    to_torch.to_torch(tmp_path, tmp_path / "back", to_torch.Options(companions="pt"))
  with pytest.raises(ValueError, match="got 'onnx'; expected"):
    to_torch.to_torch(tmp_path, tmp_path / "back", to_torch.Options(companions="onnx"))


@pytest.mark.parity
def test_pt_files_have_the_keys_of_the_releases_own_and_come_back(adapted, tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch: run `make parity`")
  (base, tuned), policies, _ = adapted
  with pytest.raises(ValueError, match="whole vision backbone"):
    to_torch.to_torch(policies["merge"], tmp_path / "none", to_torch.Options(companions="pt"))
  back = tmp_path / "back"
  to_torch.to_torch(policies["merge"], back, to_torch.Options(companions="pt"), base=[base, tuned])
  states = {path.name: torch.load(path, weights_only=True) for path in back.glob("*.pt")}
  parts = ("vision_backbone", "action_head", "proprio_projector")
  assert set(states) == {f"{part}--10_checkpoint.pt" for part in parts}
  for name, state in states.items():
    wanted = load_file(tuned / name.replace(".pt", ".safetensors"))
    assert {key: tuple(x.shape) for key, x in state.items()} == {key: x.shape for key, x in wanted.items()}
    if not name.startswith("vision"):
      assert all(np.array_equal(state[key].numpy(), x) for key, x in wanted.items())
  vision = states["vision_backbone--10_checkpoint.pt"]
  stored = load_file(tuned / "vision_backbone--10_checkpoint.safetensors")
  layer = "vision_backbone.featurizer.blocks.0.block.mlp.fc1."
  a, b = (stored[f"{layer}lora_{ab}.default.weight"] for ab in "AB")
  folded = stored[f"{layer}base_layer.weight"] + 2 * b @ a  # alpha / rank
  np.testing.assert_allclose(vision[f"{layer}base_layer.weight"].numpy(), folded, atol=1e-6)
  assert not vision[f"{layer}lora_B.default.weight"].any()
  config = checkpoints.config("lora_checkpoint", RELEASE)
  to_orbax([back], tmp_path / "again", config)  # the zeros are known for what they are
  folders = policies["merge"], tmp_path / "again"
  hashes = [policy_folder.read_policy_json(folder).metadata["params_sha256"] for folder in folders]
  assert hashes[0] == hashes[1]


@pytest.mark.parity
def test_pt_files_with_the_adapters_apart(adapted, tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch: run `make parity`")
  (base, tuned), policies, _ = adapted
  back = tmp_path / "back"
  to_torch.to_torch(policies["keep"], back, to_torch.Options(companions="pt", lora="keep"), base=[base, tuned])
  vision = torch.load(back / "vision_backbone--10_checkpoint.pt", weights_only=True)
  stored = load_file(tuned / "vision_backbone--10_checkpoint.safetensors")
  assert {key: tuple(x.shape) for key, x in vision.items()} == {key: x.shape for key, x in stored.items()}
  dead = "attn_pool"  # SigLIP's pooling head, which this model does not run: its adapters are zeros here
  assert all(np.array_equal(vision[key].numpy(), x) for key, x in stored.items() if "lora" in key and dead not in key)
  assert (back / to_torch.ADAPTER).exists()
  to_orbax([back], tmp_path / "again", checkpoints.config("lora_checkpoint", RELEASE), Options(lora="keep"))
  folders = policies["keep"], tmp_path / "again"
  hashes = [policy_folder.read_policy_json(folder).metadata["params_sha256"] for folder in folders]
  assert hashes[0] == hashes[1]


@pytest.mark.parity
def test_bfloat16_and_empty_tensors_survive_the_pt_file(tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch: run `make parity`")
  arrays = checkpoints.random({"a": (3, 5), "empty": (0, 4), "scalar": ()})
  arrays |= {"half": arrays["a"].astype(ml_dtypes.bfloat16), "whole": np.arange(4)}
  checkpoints.save_file({key: np.asarray(x) for key, x in arrays.items()}, tmp_path / "x.safetensors")
  openvla_layout.to_pt(tmp_path / "x.safetensors", tmp_path / "x.pt")
  state = torch.load(tmp_path / "x.pt", weights_only=True)
  assert state["half"].dtype == torch.bfloat16 and state["empty"].shape == (0, 4)
  assert all(np.array_equal(state[key].float().numpy(), np.asarray(x, np.float32)) for key, x in arrays.items())
