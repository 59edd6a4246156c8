"""OpenVLA-OFT with FiLM: the vision file alone has adapters, on the patch embeddings' convolutions too."""

import json

import checkpoints
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from semanticvla_jax import policy_folder
from semanticvla_jax.convert import openvla_layout, to_torch
from semanticvla_jax.convert.check import against_torch
from semanticvla_jax.convert.detect import recognize
from semanticvla_jax.convert.rules import semanticvla
from semanticvla_jax.convert.to_orbax import Options, to_orbax

RANK, SCALE = 4, 0.5
LORA = {"rank": RANK, "alpha": 2, "targets": "all_linear"}
CONFIG = checkpoints.config("oft", LORA, film=("dino", "siglip"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
  """(the folder, its vision file's tensors)."""
  folder = checkpoints.oft(tmp_path_factory.mktemp("film") / "tuned")
  golden = checkpoints.GOLDEN / "oft"
  own = {semanticvla.canonical(key): x for key, x in load_file(golden / "weights.safetensors").items()}
  own = {key: x for key, x in own.items() if key.startswith(("featurizer.", "fused_featurizer."))}
  own |= {semanticvla.canonical(key): x for key, x in load_file(golden / "film.safetensors").items()}
  own["fused_featurizer.attn_pool.latent"] = np.ones((1, 1, 4), np.float32)  # real files have the pooling head
  rng = np.random.default_rng(0)
  names = openvla_layout.backbone({key: x.shape for key, x in own.items()}, LORA)
  vision = {
    name: (rng.standard_normal(x.shape) * 0.1).astype(np.float32) if isinstance(x, openvla_layout.Zeros) else own[x]
    for name, x in names.items()
  }
  save_file(vision, folder / "vision_backbone--10_checkpoint.safetensors")
  return folder, vision


def folded(vision, layer):
  """W + scale·B·A of a layer in PyTorch's layout."""
  a, b = (vision[f"{layer}.lora_{ab}.default.weight"] for ab in "AB")
  weight = vision[f"{layer}.base_layer.weight"]
  return weight + SCALE * np.einsum("or,ri->oi", b.reshape(len(b), -1), a.reshape(len(a), -1)).reshape(weight.shape)


def test_film_and_the_convolutions_adapters(tuned, tmp_path):
  folder, vision = tuned
  source = recognize([folder])
  assert source.kind == "OpenVLA-OFT" and source.folded and source.adapter is None
  report = to_orbax([folder], tmp_path / "policy", CONFIG, Options(lora="merge"))
  files = policy_folder.load_policy(tmp_path / "policy")
  got = flatten_dict(files.params, sep="/")
  assert report["merged_adapters"] > 0 and not any(path.endswith("/lora_a") for path in got)
  for ours, theirs in (("dino", "featurizer"), ("siglip", "fused_featurizer")):
    root = f"vision_backbone.{theirs}"
    kernel = folded(vision, f"{root}.patch_embed.proj").transpose(2, 3, 1, 0)
    np.testing.assert_allclose(got[f"{ours}/embedding/kernel"], kernel, atol=1e-6)
    block = f"{ours}/Transformer/encoderblock_0"
    scale = vision[f"{root}.blocks.0.scale.weight"].T
    np.testing.assert_array_equal(got[f"{block}/film/scale/kernel"], scale)
    np.testing.assert_allclose(
      got[f"{block}/MlpBlock_0/Dense_0/kernel"], folded(vision, f"{root}.blocks.0.block.mlp.fc1").T, atol=1e-6
    )
  stored = load_file(checkpoints.GOLDEN / "oft" / "weights.safetensors")
  np.testing.assert_array_equal(got["sparse_fuser/projector/Dense_0/kernel"], stored["projector.fc1.weight"].T)


def test_adapters_of_half_a_model_cannot_be_kept(tuned, tmp_path):
  with pytest.raises(ValueError, match="Adapters cannot be kept"):
    to_orbax([tuned[0]], tmp_path / "policy", CONFIG)
  other = CONFIG | {"lora": LORA | {"rank": 8}}
  with pytest.raises(ValueError, match=r"adapters of rank \[4\]; expected 8"):
    to_orbax([tuned[0]], tmp_path / "policy", other, Options(lora="merge"))


@pytest.mark.parity
def test_both_sides_agree_and_the_pt_file_has_every_key(tuned, tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch: run `make parity`")
  pytest.importorskip("transformers", reason="needs transformers: run `make parity`")
  folder, vision = tuned
  to_orbax([folder], tmp_path / "policy", CONFIG, Options(lora="merge"))
  rows, _ = against_torch.verify([folder], tmp_path / "policy")
  assert {"dino", "siglip", "coupler/all"} <= {row.stage for row in rows}
  assert max(row.error for row in rows) < against_torch.TOLERANCE
  to_torch.to_torch(tmp_path / "policy", tmp_path / "back", to_torch.Options(companions="pt"), base=folder)
  state = torch.load(tmp_path / "back" / "vision_backbone--10_checkpoint.pt", weights_only=True)
  assert {key: tuple(x.shape) for key, x in state.items()} == {key: x.shape for key, x in vision.items()}
  assert not (tmp_path / "back" / "lora_adapter").exists()
  assert json.loads((tmp_path / "back" / "config.json").read_text())["semanticvla_jax"]["placeholder_adapters"]
