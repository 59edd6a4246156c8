"""Adapters that are not plain LoRA are refused by the field that says so, however they come in; the rest passes."""

import json
import shutil

import checkpoints
import numpy as np
import pytest
from conftest import RELEASE
from safetensors.numpy import load_file, save_file

from semanticvla_jax.convert import adapter
from semanticvla_jax.convert.check import against_torch
from semanticvla_jax.convert.detect import recognize
from semanticvla_jax.convert.plan import Options, make_plan
from semanticvla_jax.convert.to_orbax import to_orbax

CONFIG = checkpoints.config("lora_checkpoint", RELEASE)
OTHERS = {
  "peft_type": "LOHA",
  "init_lora_weights": "pissa",
  "use_rslora": True,
  "use_dora": True,
  "use_qalora": True,
  "lora_bias": True,
  "fan_in_fan_out": True,
  "bias": "all",
  "rank_pattern": {"q_proj": 8},
  "alpha_pattern": {"q_proj": 8},
  "layer_replication": [[0, 2], [1, 2]],
  "modules_to_save": ["lm_head"],
  "trainable_token_indices": [3],
  "target_parameters": ["experts.gate_up_proj"],
  "alora_invocation_tokens": [1, 2],
  "corda_config": {"corda_method": "ipm"},
  "arrow_config": {"top_k": 3},
  "megatron_config": {"hidden_size": 8},
  "of_a_later_release": 0.5,
}
PLAIN = {
  "init_lora_weights": True,
  "lora_dropout": 0.1,
  "inference_mode": False,
  "base_model_name_or_path": "openvla/openvla-7b",
  "task_type": "CAUSAL_LM",
  "revision": "main",
  "peft_version": "0.19.0",
  "layers_to_transform": [0, 1],
  "exclude_modules": ["lm_head"],
  "qalora_group_size": 16,
  "use_qalora": False,
  "corda_config": None,
  "loftq_config": {},
  "of_a_later_release": None,
}


@pytest.fixture
def source(tmp_path):
  """What makes ((base, fine-tune), its adapter_config.json with other values)."""

  def make(**changes):
    base, tuned = checkpoints.adapted(tmp_path)
    path = tuned / "lora_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return base, tuned

  return make


@pytest.mark.parametrize("field", OTHERS)
def test_an_adapter_of_another_kind_is_refused_by_the_field(field, source, tmp_path):
  with pytest.raises(ValueError, match=rf"of another kind: got {field}=.*adapter_config.json; expected .*merge"):
    to_orbax(source(**{field: OTHERS[field]}), tmp_path / "policy", CONFIG)
  assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("value", ["pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "Pissa", 3, ["pissa"]])
def test_initializations_that_change_the_base_are_refused(value):
  assert adapter.problems_of({"init_lora_weights": value})


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initializations_that_leave_the_base_alone_pass(value):
  assert not adapter.problems_of({"init_lora_weights": value})


def test_fields_that_change_nothing_pass(source):
  adapter.check(recognize(source(**PLAIN)))
  golden = json.loads((checkpoints.GOLDEN / "lora_checkpoint" / "lora_adapter" / "adapter_config.json").read_text())
  assert not adapter.problems_of(golden)  # a file that peft wrote


def as_folder(base, tuned):
  """The adapter as peft saves it: its two files alone."""
  return [base, tuned / "lora_adapter"]


def as_file(base, tuned):
  return [base, tuned / "lora_adapter" / "adapter_model.safetensors"]


def beside_the_companions(base, tuned):
  for path in (tuned / "lora_adapter").iterdir():
    path.rename(tuned / path.name)
  (tuned / "lora_adapter").rmdir()
  return [base, tuned]


def among_the_weights(base, tuned):
  """Matrices in the vision file alone, with the language part in the shards."""
  for path in base.glob("model*"):
    shutil.copyfile(path, tuned / path.name)
  return [tuned]


@pytest.mark.parametrize("way", [as_folder, as_file, beside_the_companions, among_the_weights])
def test_however_the_adapter_comes_in(way, source):
  found = recognize(way(*source(init_lora_weights="pissa_niter_4")))
  with pytest.raises(ValueError, match=r"got init_lora_weights='pissa_niter_4' in .*adapter_config.json"):
    adapter.check(found)


def test_what_is_in_the_shards_already_is_not_read(source, tmp_path):
  base, tuned = source(use_rslora=True)
  among_the_weights(base, tuned)
  path = next(tuned.glob("vision_backbone--*"))
  save_file({key: x for key, x in load_file(path).items() if ".lora_" not in key}, path)
  said = []
  to_orbax([tuned], tmp_path / "policy", CONFIG, say=said.append)
  assert any("use_rslora=True" in line and "in the shards already" in line for line in said)


def test_modules_saved_in_full_replace_the_bases(source):
  base, tuned = source(modules_to_save=["projector"])
  for path in tuned.glob("non_lora*"):
    path.unlink()
  path = tuned / "lora_adapter" / "adapter_model.safetensors"
  own = np.full_like(load_file(checkpoints.GOLDEN / "lora_checkpoint" / "base_hf.safetensors")["projector.fc1.bias"], 7)
  with pytest.raises(ValueError, match=r"modules_to_save=\['projector'\] and none of their tensors"):
    adapter.check(recognize([base, tuned]))
  save_file(load_file(path) | {"base_model.model.projector.fc1.bias": own}, path)
  found = recognize([base, tuned])
  adapter.check(found)
  np.testing.assert_array_equal(found.tensors["projector.fc1.bias"].read(), own)


def test_a_file_without_rank_or_alpha_means_pefts_defaults(source):
  base, tuned = source()
  path = tuned / "lora_adapter" / "adapter_config.json"
  path.write_text(json.dumps({"peft_type": "LORA", "r": 4}))
  plan = make_plan(recognize([base, tuned]), CONFIG["model"], RELEASE, Options(lora="merge"))
  assert plan.adapter.alpha == 8
  with pytest.raises(ValueError, match="got lora_alpha=8 in adapter_config.json; expected 16"):
    make_plan(recognize([base, tuned]), CONFIG["model"], RELEASE | {"alpha": 16}, Options(lora="merge"))
  path.unlink()
  with pytest.raises(ValueError, match="without adapter_config.json; expected that file"):
    recognize([base, tuned])


@pytest.mark.parity
def test_verify_refuses_it_too(source, adapted):
  pytest.importorskip("torch", reason="needs torch: run `make parity`")
  pytest.importorskip("transformers", reason="needs transformers: run `make parity`")
  with pytest.raises(ValueError, match="got init_lora_weights='olora'"):
    against_torch.verify(source(init_lora_weights="olora"), adapted[1]["keep"])


@pytest.mark.parity
def test_an_adapter_of_pytorchs_own_format_is_read(source):
  torch = pytest.importorskip("torch", reason="needs torch: run `make parity`")
  base, tuned = source()
  wanted = {key: x.read() for key, x in recognize([base, tuned]).tensors.items()}
  path = tuned / "lora_adapter" / "adapter_model.safetensors"
  torch.save({key: torch.from_numpy(x) for key, x in load_file(path).items()}, path.with_suffix(".bin"))
  path.unlink()
  found = recognize([base, tuned])
  assert not found.folded and found.adapter["r"] == 4
  assert all(np.array_equal(x.read(), wanted[key]) for key, x in found.tensors.items())
