"""openvla-7b and SigLIP's text tower as the base of a SemanticVLA: everything frozen is there, the rest is drawn."""

import checkpoints
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from configs import common, openvla
from semanticvla_jax import policy_folder
from semanticvla_jax.convert.plan import parameter_shapes
from semanticvla_jax.convert.rules.layouts import LAYOUTS
from semanticvla_jax.convert.to_orbax import Options, to_orbax
from semanticvla_jax.models.semanticvla import abstract_params, build, dummy_observation
from semanticvla_jax.train import init

BASE = checkpoints.config("openvla", vision_layer="last")
TEXT = dict(vocab=64, positions=16, width=BASE["model"]["variant"]["siglip"]["width"], depth=1, num_heads=2, mlp_dim=24)
VARIANT = BASE["model"]["variant"] | dict(text=TEXT, pairs=((0, 0),))
MODEL = dict(variant=VARIANT, keep=4, cues=3, chunk=4)
TRAINABLE = common.get_config().trainable + r"|.*/lora_[ab]"


def siglip(folder):
  """A SigLIP of another image size than the model's, as Hugging Face publishes it: both towers in one file."""
  target = {p: s for p, s in parameter_shapes(build(MODEL), build(MODEL)).items() if p.startswith("text/")}
  rules = [rule for rule in LAYOUTS["SigLIP, Hugging Face"].tower_rules(target) if rule.target.startswith("text/")]
  tensors = checkpoints.random(
    checkpoints.source_shapes(rules, target)
    | {
      "vision_model.embeddings.position_embedding.weight": (729, 8),
      "text_model.head.bias": (4,),
      "logit_scale": (1,),
    }
  )
  folder.mkdir()
  save_file(tensors, folder / "model.safetensors")
  return folder


def test_the_base_of_the_config_keeps_the_last_blocks():
  assert openvla.get_config("base").model.vision_layer == "last"
  assert openvla.get_config().model.vision_layer == "second_to_last"


def test_two_sources_make_a_whole_base(tmp_path):
  to_orbax([checkpoints.openvla(tmp_path / "openvla")], tmp_path / "base", BASE)
  report = to_orbax([siglip(tmp_path / "siglip")], tmp_path / "text", {"model": MODEL}, Options(only="text"))
  assert report["unused"]["vision_model.embeddings.position_embedding.weight"].startswith("another tower")
  assert policy_folder.read_policy_json(tmp_path / "text").metadata["parts"] == ["text"]
  found = {name: policy_folder.load_policy(tmp_path / name).params for name in ("base", "text")}
  bare = build(MODEL)
  wanted = abstract_params(bare, dummy_observation(bare))
  taken, drawn = init.assign_sources(wanted, found, TRAINABLE)
  parts = {path.split("/")[0] for path in taken["base"]}
  assert parts == {"dino", "siglip", "llm", "sparse_fuser"}  # the projector goes on from OpenVLA's
  assert {path.split("/")[0] for path in taken["text"]} == {"text"}
  new = set(flatten_dict(drawn, sep="/"))
  assert new and not any("lm_head" in path for path in taken["base"])
  assert not any(path.endswith("MultiHeadDotProductAttention_0/query/kernel") for path in new)


def test_a_base_without_the_text_tower_is_refused(tmp_path):
  to_orbax([checkpoints.openvla(tmp_path / "openvla")], tmp_path / "base", BASE)
  bare = build(MODEL)
  wanted = abstract_params(bare, dummy_observation(bare))
  with pytest.raises(ValueError, match=r"frozen parameters without values \(text/"):
    init.assign_sources(wanted, {"base": policy_folder.load_policy(tmp_path / "base").params}, TRAINABLE)


def test_only_names_a_tower_of_the_source(tmp_path):
  with pytest.raises(ValueError, match=r"--only: got 'text' of openvla.*; expected a source of single towers"):
    to_orbax([checkpoints.openvla(tmp_path / "openvla")], tmp_path / "policy", BASE, Options(only="text"))
