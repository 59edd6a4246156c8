"""A checkpoint is recognized from its files; what is damaged, incomplete or ambiguous is refused and listed."""

import json
import pickle
import struct

import checkpoints
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from semanticvla_jax.convert import __main__
from semanticvla_jax.convert.detect import describe, recognize
from semanticvla_jax.convert.io import torch_files


def test_openvla(tmp_path):
  source = recognize([checkpoints.openvla(tmp_path / "openvla")])
  assert source.kind == "openvla-7b" and len(source.paths) == 2 and source.statistics_file.name == "config.json"
  stored = load_file(checkpoints.GOLDEN / "openvla" / "weights.safetensors")
  assert len(source.tensors) == len(stored)
  for tensor in source.tensors.values():
    np.testing.assert_array_equal(tensor.read(), stored[tensor.name])


def test_openvla_fine_tune_brings_its_own_statistics(tmp_path):
  folder = checkpoints.openvla(tmp_path / "tuned")
  (folder / "dataset_statistics.json").write_text(json.dumps({"suite": checkpoints.norm_stats("openvla")["tiny"]}))
  source = recognize([folder])
  assert source.kind == "OpenVLA fine-tune" and list(source.statistics) == ["suite"]


def test_openvla_oft(tmp_path):
  source = recognize([checkpoints.oft(tmp_path / "oft")])
  assert source.kind == "OpenVLA-OFT" and "action_head.model.fc1.weight" in source.tensors
  assert list(source.statistics) == ["tiny"]  # not those of the base in config.json


def test_semanticvla_with_its_base(tmp_path):
  source = recognize(checkpoints.adapted(tmp_path))
  assert source.kind == "SemanticVLA" and source.has_adapters and not source.folded
  assert source.tensors["vision_queries"].file.name.startswith("vision_backbone--")
  assert source.tensors["projector.fc1.weight"].file.name.startswith("non_lora_trainables--")
  assert any("projector.fc1.weight" in name for name in source.superseded)


def test_an_adapter_beside_the_shards_is_in_them_already(tmp_path):
  base, tuned = checkpoints.adapted(tmp_path)
  for path in base.glob("model*"):
    path.rename(tuned / path.name)
  source = recognize([tuned])
  assert source.folded
  assert not any(".lora_A." in key for key in source.tensors if key.startswith("language_model"))
  assert not recognize([tuned], merged=False).folded


TOWERS = {
  "SigLIP, Hugging Face": {"vision_model.embeddings.patch_embedding.bias": (4,), "logit_scale": (1,)},
  "DINOv2, Hugging Face": {"embeddings.register_tokens": (1, 4, 8), "embeddings.cls_token": (1, 1, 8)},
  "DINOv2, timm": {"reg_token": (1, 4, 8), "cls_token": (1, 1, 8)},
  "SigLIP, timm": {"attn_pool.latent": (1, 1, 8), "pos_embed": (1, 4, 8)},
  "Llama, Hugging Face": {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4)},
}


@pytest.mark.parametrize("kind", TOWERS)
def test_towers(kind, tmp_path):
  save_file(checkpoints.random(TOWERS[kind]), tmp_path / "model.safetensors")
  assert recognize([tmp_path]).kind == kind


def test_big_vision(tmp_path):
  np.savez(tmp_path / "siglip.npz", **{"params/img/embedding/bias": np.zeros(4), "params/txt/head/bias": np.zeros(4)})
  source = recognize([tmp_path / "siglip.npz"])
  assert source.kind == "SigLIP, big_vision" and source.prefixes == ("siglip/", "text/")


def test_all_dtypes_come_back_bit_for_bit(tmp_path):
  dtypes = [d for d in torch_files.DTYPES.values() if d.kind != "V" or d.itemsize]
  arrays = {str(d): np.arange(6).reshape(2, 3).astype(d) for d in dtypes}
  arrays |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.asarray(3.0, np.float32)}
  save_file(arrays, tmp_path / "x.safetensors")
  tensors = {tensor.name: tensor for tensor in torch_files.open_file(tmp_path / "x.safetensors")}
  assert set(tensors) == set(arrays)
  for name, x in arrays.items():
    got = tensors[name].read()
    assert got.dtype == x.dtype and got.shape == x.shape and got.tobytes() == x.tobytes()


def test_a_missing_shard_is_named(tmp_path):
  folder = checkpoints.openvla(tmp_path / "openvla")
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(ValueError, match=r"Incomplete.*expected model-00002-of-00002.safetensors too"):
    recognize([folder])
  (folder / "model.safetensors.index.json").unlink()
  with pytest.raises(ValueError, match=r"Incomplete.*no index.*missing: \[2\]"):
    recognize([folder])


def test_shards_without_an_index_are_enough(tmp_path):
  folder = checkpoints.openvla(tmp_path / "openvla")
  (folder / "model.safetensors.index.json").unlink()
  assert recognize([folder]).kind == "openvla-7b"


def test_an_index_that_does_not_match_its_shards(tmp_path):
  folder = checkpoints.openvla(tmp_path / "openvla")
  path = folder / "model.safetensors.index.json"
  content = json.loads(path.read_text())
  content["weight_map"]["nowhere.weight"] = "model-00001-of-00002.safetensors"
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="does not match its shards: got no nowhere.weight"):
    recognize([folder])


@pytest.mark.parametrize("keep", [4, 100, -8])
def test_a_truncated_shard(keep, tmp_path):
  folder = checkpoints.openvla(tmp_path / "openvla")
  path = folder / "model-00001-of-00002.safetensors"
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors.*truncated.*download"):
    recognize([folder])


def write_header(path, header, data=b"\0" * 16):
  text = json.dumps(header).encode() if isinstance(header, dict) else header
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
  "header, message",
  [
    ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, "inconsistent header.*expected 16 bytes"),
    ({"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}}, "inconsistent header"),
    ({"x": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, "truncated"),
    (
      {
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
      },
      "inconsistent header.*inside the tensor before",
    ),
    ({"x": {"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}}, "damaged header"),
    ({"x": {"shape": [2]}}, "damaged header"),
    ({"x": 3}, "damaged header"),
    (b"not json", "damaged header"),
  ],
)
def test_a_header_that_is_inconsistent_or_damaged(header, message, tmp_path):
  write_header(tmp_path / "x.safetensors", header)
  with pytest.raises(ValueError, match=message):
    torch_files.open_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", ["U32", "U16", "U64", "F8_E8M0", "F4", "C64"])
def test_a_type_that_is_not_read_is_no_damage(dtype, tmp_path, capsys):
  header = {"__metadata__": {"format": "pt"}, "layer.qweight": {"dtype": dtype, "shape": [2], "data_offsets": [0, 8]}}
  write_header(tmp_path / "x.safetensors", header)
  assert __main__.main(["inspect", str(tmp_path)]) == 1
  said = capsys.readouterr().err
  assert f"got layer.qweight of {dtype}; expected one of F64" in said and "damaged" not in said and "again" not in said


def test_a_type_of_a_later_safetensors_is_named_with_its_tensor(tmp_path):
  write_header(tmp_path / "x.safetensors", {"layer.w": {"dtype": "I4", "shape": [2], "data_offsets": [0, 1]}})
  with pytest.raises(ValueError, match=r"or a type that is newer than this package: got KeyError: 'I4' \(layer.w\)"):
    torch_files.open_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no archive"])
def test_a_damaged_npz_is_named(content, tmp_path):
  (tmp_path / "x.npz").write_bytes(content)
  with pytest.raises(ValueError, match=r"x.npz cannot be opened: got .*; expected arrays"):
    torch_files.open_file(tmp_path / "x.npz")
  np.savez(tmp_path / "y.npz", **{"img/x": np.array([{}], object)})
  with pytest.raises(ValueError, match=r"y.npz cannot be opened: got ValueError"):
    torch_files.open_file(tmp_path / "y.npz")


def test_two_steps_are_ambiguous(tmp_path):
  folder = checkpoints.oft(tmp_path / "oft")
  (folder / "action_head--20_checkpoint.safetensors").write_bytes(
    (folder / "action_head--10_checkpoint.safetensors").read_bytes()
  )
  with pytest.raises(ValueError, match=r"Ambiguous.*--10_checkpoint.*--20_checkpoint"):
    recognize([folder])


def test_companions_of_two_steps_are_ambiguous(tmp_path):
  folder = checkpoints.oft(tmp_path / "oft")
  (folder / "action_head--10_checkpoint.safetensors").rename(folder / "action_head--20_checkpoint.safetensors")
  with pytest.raises(ValueError, match=r"Ambiguous.*action_head--20.*one step, not of 10 and 20"):
    recognize([folder])


def test_the_state_of_training_is_ignored_and_listed(tmp_path):
  folder = checkpoints.openvla(tmp_path / "openvla")
  names = ("optimizer.pt", "rng_state.pth", "rng_state_0.pth", "scheduler.pt", "training_args.bin")
  for name in names:
    (folder / name).write_bytes(b"")
  source = recognize([folder])
  assert source.kind == "openvla-7b" and [path.name for path in source.ignored] == [*names]
  assert any(line.endswith(", ".join(names)) for line in describe(source))


@pytest.mark.parametrize("indexed", [True, False])
def test_a_pointer_of_git_lfs_says_what_it_is(indexed, tmp_path):
  folder = checkpoints.openvla(tmp_path / "openvla")
  (folder / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  if not indexed:
    (folder / "model.safetensors.index.json").unlink()
  with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors is not fetched.*git lfs pull"):
    recognize([folder])


def test_two_sets_of_weights_are_ambiguous(tmp_path):
  folder = checkpoints.openvla(tmp_path / "openvla")
  save_file({"x": np.zeros(1)}, folder / "more.safetensors")
  with pytest.raises(ValueError, match=r"Ambiguous.*more.safetensors"):
    recognize([folder])


@pytest.mark.parametrize("keep", [("adapter",), ("featurizer.", "fused_featurizer.")])
def test_an_incomplete_source_lists_what_was_found(keep, tmp_path):
  if keep == ("adapter",):
    _, tuned = checkpoints.adapted(tmp_path)
    with pytest.raises(ValueError, match=r"Incomplete.*action_head--10.*base model too"):
      recognize([tuned])
    return
  folder = checkpoints.openvla(tmp_path / "x", lambda t: {k: x for k, x in t.items() if "featurizer." in k})
  with pytest.raises(ValueError, match=r"Incomplete.*model-00001.*with featurizer"):
    recognize([folder])


def test_unknown_empty_and_absent_sources(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    recognize([tmp_path / "nowhere"])
  with pytest.raises(ValueError, match="Empty source"):
    recognize([tmp_path])
  save_file({"some.weight": np.zeros(1)}, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"Unknown source.*some.weight"):
    recognize([tmp_path])


def test_a_weight_under_two_names_is_refused(tmp_path):
  twice = {"language_model.lm_head.weight": np.zeros(2), "module.language_model.lm_head.weight": np.zeros(2)}
  save_file(twice, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="a weight twice"):
    recognize([tmp_path])


@pytest.mark.parity
def test_pytorch_files(tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch: run `make parity`")
  state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16) * 1.5}
  torch.save(state, tmp_path / "x.pt")
  a, b = torch_files.open_file(tmp_path / "x.pt")
  np.testing.assert_array_equal(a.read(), state["a"].numpy())
  assert str(b.dtype) == "bfloat16" == str(b.read().dtype) and (b.read() == 1.5).all()
  torch.save({"model": state}, tmp_path / "nested.pt")
  with pytest.raises(ValueError, match="is not a state dict"):
    torch_files.open_file(tmp_path / "nested.pt")
  (tmp_path / "short.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:300])
  with pytest.raises(ValueError, match="cannot be opened"):
    torch_files.open_file(tmp_path / "short.pt")


@pytest.mark.parity
def test_types_of_pytorch_that_numpy_does_not_know(tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch: run `make parity`")
  x = torch.tensor([0.5, -2.0, 448.0])
  torch.save({"a": x.to(torch.float8_e4m3fn), "b": x.to(torch.float8_e5m2)}, tmp_path / "x.pt")
  a, b = torch_files.open_file(tmp_path / "x.pt")
  assert (str(a.dtype), str(b.dtype)) == ("float8_e4m3fn", "float8_e5m2")
  np.testing.assert_array_equal(a.read().astype(np.float32), [0.5, -2.0, 448.0])
  for name, y in {"sparse": x.to_sparse(), "half": torch.zeros(2, dtype=torch.complex32)}.items():
    torch.save({"layer.w": y}, tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match=r"of a type that is not read: got layer.w of "):
      torch_files.open_file(tmp_path / f"{name}.pt")


class Malicious:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, "w")


@pytest.mark.parity
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch: run `make parity`")
  trace = tmp_path / "executed"
  torch.save({"x": torch.zeros(1), "evil": Malicious(str(trace))}, tmp_path / "zip.pt")
  trace.unlink(missing_ok=True)
  with pytest.raises(ValueError, match="refused.*more than tensors"):
    torch_files.open_file(tmp_path / "zip.pt")
  (tmp_path / "raw.pt").write_bytes(pickle.dumps({"evil": Malicious(str(trace))}))
  trace.unlink(missing_ok=True)
  with pytest.raises(ValueError, match="raw.pt"):
    torch_files.open_file(tmp_path / "raw.pt")
  assert not trace.exists()


def test_without_torch_the_error_says_so(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  (tmp_path / "x.pt").write_bytes(b"")
  with pytest.raises(ValueError, match=r"PyTorch is needed to read x.pt.*pip install torch"):
    torch_files.open_file(tmp_path / "x.pt")
