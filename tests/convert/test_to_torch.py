"""A policy goes back to the layout it came from, bit for bit, and inspect and diff read both formats."""

import hashlib
import json
import re
import shutil

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from semanticvla_jax import policy_folder
from semanticvla_jax.convert import __main__, to_torch
from semanticvla_jax.convert.check import diff
from semanticvla_jax.convert.detect import recognize
from semanticvla_jax.convert.to_orbax import Options, to_orbax

RELEASE = {"rank": 4, "alpha": 8, "targets": "release"}


@pytest.mark.parametrize("name", ["openvla", "oft", "full"])
def test_round_trip(name, made, tmp_path):
  folder, policy = made(name)
  report = to_torch.to_torch(policy, tmp_path / "back", to_torch.Options(shard=1_000_000))
  before, after = recognize([folder]), recognize([tmp_path / "back"])
  conversion = json.loads((policy / "conversion.json").read_text())
  assert set(before.tensors) - set(after.tensors) == set(conversion["unused"])
  assert not set(after.tensors) - set(before.tensors) and not report["from_base"]
  for key, tensor in after.tensors.items():
    assert tensor.dtype == before.tensors[key].dtype
    assert tensor.read().tobytes() == before.tensors[key].read().tobytes(), key
  assert after.statistics == before.statistics
  assert after.kind == ("OpenVLA fine-tune" if name == "openvla" else before.kind)
  names = [path.name for path in after.paths]
  assert sum(n.startswith("model-") for n in names) > 1
  assert ("action_head--10_checkpoint.safetensors" in names) == (name != "openvla")
  assert ("vision_backbone--10_checkpoint.safetensors" in names) == (name == "full")
  for path in after.paths:  # the reference reader agrees
    with safe_open(path, "np") as file:
      assert all(file.get_tensor(key).size for key in file.keys())  # noqa: SIM118
  to_orbax([tmp_path / "back"], tmp_path / "again", checkpoints.config(name))
  hashes = [policy_folder.read_policy_json(p).metadata["params_sha256"] for p in (policy, tmp_path / "again")]
  assert hashes[0] == hashes[1]


def layerless(names):
  """Names with the block number taken out."""
  return {re.sub(r"\.(blocks|layers)\.\d+\.", r".\1.N.", name) for name in names}


def test_names_are_the_official_ones(made, tmp_path):
  _, policy = made("full")
  to_torch.to_torch(policy, tmp_path / "back")
  golden = checkpoints.GOLDEN / "lora_checkpoint"
  official = layerless(load_file(golden / "base_hf.safetensors"))
  vision = load_file(golden / "vision_backbone--10_checkpoint.safetensors")
  vision = layerless(name.replace(".base_layer.", ".") for name in vision)
  for path in (tmp_path / "back").glob("*.safetensors"):
    names = layerless(load_file(path))
    if path.name.startswith("model-"):
      assert names <= official
    elif path.name.startswith("vision_backbone"):
      assert names <= vision and any("blocks.N.block." in name for name in names)
    else:
      assert all(name.startswith("module.") for name in names)


def test_the_base_gives_what_the_model_does_not_have(made, tmp_path):
  folder, policy = made("openvla")
  report = to_torch.to_torch(policy, tmp_path / "back", base=folder)
  before, after = recognize([folder]), recognize([tmp_path / "back"])
  assert len(report["from_base"]) == 30 and set(before.tensors) == set(after.tensors)
  assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"
  stored = {k: x for path in folder.glob("model-*") for k, x in load_file(path).items()}
  back = {k: x for path in (tmp_path / "back").glob("model-*") for k, x in load_file(path).items()}
  assert set(stored) == set(back) and all(np.array_equal(x, back[k]) for k, x in stored.items())


def test_bfloat16_survives(tmp_path):
  half = lambda tensors: {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}  # noqa: E731
  folder = checkpoints.openvla(tmp_path / "source", half)
  to_orbax([folder], tmp_path / "policy", checkpoints.config("openvla"))
  to_torch.to_torch(tmp_path / "policy", tmp_path / "back")
  rows = diff.diff(folder, tmp_path / "back")
  assert {row.note for row in rows} == {"", "only in the first"} and {row.maximum for row in rows} == {0.0, np.inf}


def test_adapters_are_folded_in_and_marked(adapted, tmp_path):
  sources, policies, _ = adapted
  config = checkpoints.config("lora_checkpoint", RELEASE)
  for name, policy in policies.items():
    to_torch.to_torch(policy, tmp_path / name)
    assert all(row.maximum == 0 and not row.note for row in diff.diff(policies["merge"], tmp_path / name))
  mark = json.loads((tmp_path / "keep" / "config.json").read_text())["semanticvla_jax"]
  assert mark["merged"] and mark["lora"] == RELEASE
  with pytest.raises(ValueError, match="Adapter on a merged base"):
    to_orbax([tmp_path / "keep", sources[1] / "lora_adapter"], tmp_path / "twice", config, Options(lora="merge"))


def test_adapters_kept_apart_come_back_bit_for_bit(adapted, tmp_path):
  sources, policies, _ = adapted
  report = to_torch.to_torch(policies["keep"], tmp_path / "back", to_torch.Options(lora="keep"))
  before, after = recognize(sources), recognize([tmp_path / "back"])
  assert after.kind == "SemanticVLA" and not after.folded and after.adapter["r"] == RELEASE["rank"]
  for key, tensor in after.tensors.items():
    assert tensor.read().tobytes() == before.tensors[key].read().tobytes(), key
  config = checkpoints.config("lora_checkpoint", RELEASE)
  for lora in ("keep", "merge"):
    to_orbax([tmp_path / "back"], tmp_path / lora, config, Options(lora=lora))
    hashes = [policy_folder.read_policy_json(p).metadata["params_sha256"] for p in (policies[lora], tmp_path / lora)]
    assert hashes[0] == hashes[1]
  assert report["merged_adapters"] == 0 and set(report["sha256"]) == set(report["files"])
  for name, digest in report["sha256"].items():
    assert hashlib.sha256((tmp_path / "back" / name).read_bytes()).hexdigest() == digest
  golden = checkpoints.GOLDEN / "lora_checkpoint"
  for name in (to_torch.ADAPTER, "vision_backbone--10_checkpoint.safetensors"):
    assert layerless(load_file(tmp_path / "back" / name)) <= layerless(load_file(golden / name))
  official = json.loads((golden / "lora_adapter" / "adapter_config.json").read_text())
  written = json.loads((tmp_path / "back" / "lora_adapter" / "adapter_config.json").read_text())
  assert {written[key] == official[key] for key in ("r", "lora_alpha", "peft_type", "init_lora_weights")} == {True}
  assert set(written["target_modules"]) <= set(official["target_modules"])


def test_adapters_that_cannot_be_kept(made, adapted, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="without any .* expected a policy with adapters"):
    to_torch.to_torch(made("full")[1], tmp_path / "back", to_torch.Options(lora="keep"))
  read = to_torch.PolicyFolder.read

  def trained_apart(self, path, layer=None):
    return read(self, path, layer) + (path.endswith("/key/lora_a"))

  monkeypatch.setattr(to_torch.PolicyFolder, "read", trained_apart)
  with pytest.raises(ValueError, match="which differ .* fold them in with --lora merge"):
    to_torch.to_torch(adapted[1]["keep"], tmp_path / "back", to_torch.Options(lora="keep", check=False))
  assert not list(tmp_path.iterdir())


def test_diff_says_where(made, tmp_path, capsys):
  folder, policy = made("openvla")

  def change(tensors):
    x = tensors["projector.fc1.weight"].copy()
    x[0, 0] += 1
    return tensors | {"projector.fc1.weight": x}

  other = checkpoints.openvla(tmp_path / "other", change)
  assert __main__.main(["diff", str(policy), str(folder)]) == 0
  assert "144 tensors, 144 equal, 0 different" in capsys.readouterr().out
  for a, b, name in ((policy, other, "sparse_fuser/projector/Dense_0/kernel"), (folder, other, "projector.fc1.weight")):
    (row,) = [row for row in diff.diff(a, b) if row.maximum > 0]
    assert row.name == name and row.maximum == pytest.approx(1, abs=1e-6) and 0 < row.relative


def test_inspect_reads_both_formats(made, tmp_path, capsys, monkeypatch):
  folder, policy = made("openvla")
  monkeypatch.setattr("semanticvla_jax.convert.io.orbax_reader.PolicyFolder.read", None)
  monkeypatch.setattr("semanticvla_jax.convert.io.direct_io.read", None)  # no weight is read
  assert __main__.main(["inspect", str(policy)]) == 0
  out = capsys.readouterr().out
  assert (
    "origin openvla-7b" in out and "llm/embed/embedding" in out and "652,344 parameters" in out and "['tiny']" in out
  )
  assert __main__.main(["inspect", str(folder)]) == 0
  out = capsys.readouterr().out
  assert "openvla-7b, 164 tensors" in out and "language_model.lm_head.weight" in out and "model_type: openvla" in out
  assert __main__.main(["inspect", str(tmp_path / "nowhere")]) == 1
  assert "does not exist" in capsys.readouterr().err


def test_a_tower_and_an_existing_target_are_refused(made, tmp_path):
  policy = shutil.copytree(made("openvla")[1], tmp_path / "policy")
  with pytest.raises(ValueError, match="Target exists"):
    to_torch.to_torch(policy, policy)
  path = policy / "metadata.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"parts": ["dino"]}))
  with pytest.raises(ValueError, match="single tower"):
    to_torch.to_torch(policy, tmp_path / "back")


def test_groups_that_the_release_lacks_are_refused(tmp_path):
  params = {"coupler": {name: {"out": {"bias": np.zeros(3, np.float32)}} for name in ("wrist", "fingers", "grip")}}
  folder = policy_folder.save_policy(tmp_path / "policy", params, config={"model": {}}, statistics={})
  with pytest.raises(ValueError, match="groups of its coupler: got fingers, wrist; expected some of trans, rot, grip"):
    to_torch.to_torch(str(folder), tmp_path / "back")


def test_action_tokens_that_the_release_would_misread_are_refused(tmp_path):
  params = {"llm": {"norm": {"scale": np.zeros(3, np.float32)}}}
  folder = policy_folder.save_policy(tmp_path / "policy", params, config={"model": {"codec": "fast"}}, statistics={})
  with pytest.raises(ValueError, match="its action tokens: got FAST's .model.codec='fast'.; expected OpenVLA's bins"):
    to_torch.to_torch(str(folder), tmp_path / "back")
