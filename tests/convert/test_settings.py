"""What a source's own files say of how it computes is carried into the policy, or refused by name."""

import json

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_towers as towers

from semanticvla_jax import policy_folder
from semanticvla_jax.convert import __main__, settings, to_torch
from semanticvla_jax.convert.check import against_torch
from semanticvla_jax.convert.detect import recognize
from semanticvla_jax.convert.to_orbax import to_orbax
from semanticvla_jax.models import llama, masks
from semanticvla_jax.models.semanticvla import DEFAULTS, build

CONFIG = checkpoints.config("openvla")
IMAGE = CONFIG["model"]["variant"]["image"]
TEXT = dict(model_type="llama", pad_token_id=32000, torch_dtype="bfloat16", vocab_size=32064)
REAL = dict(  # openvla-7b's own, but for the size of the images
  architectures=["OpenVLAForActionPrediction"],
  arch_specifier="no-align+fused-gelu-mlp",
  auto_map={"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
  hf_llm_id="meta-llama/Llama-2-7b-hf",
  image_resize_strategy="resize-naive",
  image_sizes=[IMAGE, IMAGE],
  llm_backbone_id="llama2-7b-pure",
  llm_max_length=2048,
  n_action_bins=256,
  output_projector_states=False,
  pad_to_multiple_of=64,
  pad_token_id=32000,
  text_config=TEXT,
  timm_model_ids=["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
  timm_override_act_layers=[None, None],
  torch_dtype="bfloat16",
  transformers_version="4.40.1",
  use_fused_vision_backbone=True,
  vision_backbone_id="dinosiglip-vit-so-224px",
)
MEANS, STDS = [[0.484375, 0.455078125, 0.40625], [0.5] * 3], [[0.228515625, 0.2236328125, 0.224609375], [0.5] * 3]
PROCESSOR = dict(
  image_resize_strategy="resize-naive",
  input_sizes=[[3, IMAGE, IMAGE]] * 2,
  interpolations=["bicubic", "bicubic"],
  means=MEANS,
  stds=STDS,
  tvf_crop_params=[{"output_size": [IMAGE, IMAGE]}] * 2,
  tvf_do_letterbox=False,
  tvf_letterbox_fill=None,
  tvf_normalize_params=[{"inplace": False, "mean": m, "std": s} for m, s in zip(MEANS, STDS)],
  tvf_resize_params=[{"antialias": True, "interpolation": 3, "max_size": None, "size": [IMAGE, IMAGE]}] * 2,
  use_fused_vision_backbone=True,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """An openvla-7b with its real configuration; what makes it say other things."""
  folder = checkpoints.openvla(tmp_path_factory.mktemp("settings") / "source")
  stats = json.loads((folder / "config.json").read_text())["norm_stats"]

  def make(processor=(), text=(), **changes):
    content = REAL | {"norm_stats": stats, "text_config": TEXT | dict(text)} | changes
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | dict(processor)))
    return folder

  return make


def carried(folder, config=CONFIG):
  return settings.carry(recognize([folder]), config)


def test_the_real_configuration_passes_and_leaves_the_config_alone(source):
  new, lines = carried(source())
  assert new == CONFIG and not lines


def test_the_variant_of_the_real_size_is_what_the_classes_default_to():
  model = build({"variant": "7b", "coupler": None, "mask": "causal", "chunk": 1})
  assert (model.llm.eps, model.llm.theta, model.llm.num_heads) == (1e-6, 1e4, 32)
  assert (model.siglip.gelu, model.spoken_vocab, DEFAULTS["siglip_gelu"]) == ("erf", 32000, "erf")


CARRIED = {  # what the file says: where in the model's config, and the value there
  "rope_theta": (dict(text={"rope_theta": 1e6}), ("variant", "llm", "theta"), 1e6),
  "rope_parameters": (
    dict(text={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("variant", "llm", "theta"),
    5e5,
  ),
  "rope_scaling of the default kind": (
    dict(text={"rope_scaling": {"type": "default"}, "rope_theta": 2e4}),
    ("variant", "llm", "theta"),
    2e4,
  ),
  "rms_norm_eps": (dict(text={"rms_norm_eps": 1e-5}), ("variant", "llm", "eps"), 1e-5),
  "an activation of SigLIP": (dict(timm_override_act_layers=[None, "gelu_tanh"]), ("siglip_gelu",), "tanh"),
}


@pytest.mark.parametrize("what", CARRIED)
def test_what_the_model_has_a_field_for_is_carried(what, source):
  changes, place, value = CARRIED[what]
  new, lines = carried(source(**changes))
  found = new["model"]
  for name in place:
    found = found[name]
  assert found == value and len(lines) == 1 and f"{'.'.join(place)}={value!r}" in lines[0]
  assert CONFIG["model"]["variant"]["llm"]["theta"] == 1e4  # the caller's config is not changed


def test_the_defaults_of_the_classes_are_carried_too(source):
  variant = CONFIG["model"]["variant"]
  other = {**CONFIG["model"], "variant": variant | {"llm": variant["llm"] | dict(eps=1e-5, theta=5e5)}}
  new, lines = carried(source(), {**CONFIG, "model": other})
  assert (new["model"]["variant"]["llm"]["eps"], new["model"]["variant"]["llm"]["theta"]) == (1e-6, 1e4)
  assert len(lines) == 2 and all("the default where text_config of" in line for line in lines)


def images(name, i, value):
  """PROCESSOR's list of a name with another value for one encoder."""
  return {name: [value if j == i else x for j, x in enumerate(PROCESSOR[name])]}


REFUSED = {  # what the file says: what the error says of it
  "yarn": (dict(text={"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "rope_type='yarn' .rope_scaling of"),
  "linear": (dict(text={"rope_scaling": {"type": "linear", "factor": 2.0}}), "rope_type='linear'"),
  "llama3": (
    dict(text={"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}),
    r"rope_type='llama3' \(rope_parameters of text_config",
  ),
  "one a layer type": (dict(text={"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}), "rope_type={'full_att"),
  "partial": (dict(text={"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
  "hidden_act": (dict(text={"hidden_act": "gelu"}), "hidden_act='gelu'.* expected hidden_act 'silu'"),
  "gqa": (dict(text={"num_key_value_heads": 1}), "num_key_value_heads=1.* expected num_key_value_heads 2"),
  "heads": (dict(text={"num_attention_heads": 4}), "num_attention_heads=4.* expected num_attention_heads 2"),
  "head_dim": (dict(text={"head_dim": 128}), "head_dim=128"),
  "attention_bias": (dict(text={"attention_bias": True}), "attention_bias=True"),
  "mlp_bias": (dict(text={"mlp_bias": True}), "mlp_bias=True"),
  "tied": (dict(text={"tie_word_embeddings": True}), "tie_word_embeddings=True"),
  "another decoder": (dict(text={"model_type": "gemma"}), "model_type='gemma'"),
  "another backbone": (dict(llm_backbone_id="mistral-v0.1-7b-pure"), "llm_backbone_id='mistral-v0.1-7b-pure'"),
  "letterbox": (dict(image_resize_strategy="letterbox"), "image_resize_strategy='letterbox'.* 'resize-naive'"),
  "bins": (dict(n_action_bins=128), "n_action_bins=128.* expected n_action_bins 256"),
  "padding": (dict(pad_to_multiple_of=128), "pad_to_multiple_of=128"),
  "pad id": (dict(pad_token_id=0, text={"pad_token_id": 0}), "pad_token_id=0"),
  "max length": (dict(llm_max_length=16), "llm_max_length=16.* expected llm_max_length 64 or more"),
  "projector": (dict(arch_specifier="no-align+gelu-mlp"), "arch_specifier='no-align"),
  "one encoder": (dict(use_fused_vision_backbone=False), "use_fused_vision_backbone=False"),
  "order of encoders": (dict(timm_model_ids=REAL["timm_model_ids"][::-1]), "timm_model_ids="),
  "image sizes": (dict(image_sizes=[384, 384]), r"image_sizes=\[384, 384\]"),
  "quick_gelu": (dict(timm_override_act_layers=[None, "quick_gelu"]), r"hidden_act='quick_gelu' \(timm_override"),
  "DINOv2's GELU": (dict(timm_override_act_layers=["gelu_tanh", None]), "hidden_act='gelu_tanh'.* 'gelu'"),
  "quantised": (dict(quantization_config={"load_in_4bit": True}), "quantization_config="),
  "the processor's strategy": (dict(processor={"image_resize_strategy": "resize-crop"}), "disagree.*resize-crop"),
  "the processor's letterbox": (dict(processor={"tvf_do_letterbox": True}), "tvf_do_letterbox=True"),
  "means": (dict(processor=images("means", 1, [0.48, 0.45, 0.4]) | {"tvf_normalize_params": None}), "mean=.*means of"),
  "stds": (dict(processor=images("stds", 0, [0.5] * 3) | {"tvf_normalize_params": None}), "std=.0.5, 0.5, 0.5.*stds"),
  "tvf_normalize_params": (
    dict(processor=images("tvf_normalize_params", 0, {"mean": [0.5] * 3, "std": STDS[0]}) | {"means": None}),
    "mean=.*tvf_normalize_params of",
  ),
  "tvf_resize_params": (dict(processor=images("tvf_resize_params", 0, {"size": [384, 384]})), "size=.*tvf_resize"),
  "tvf_crop_params": (dict(processor=images("tvf_crop_params", 1, {"output_size": 20})), "size=.* and 20 .tvf_crop"),
  "not a number": (dict(text={"rms_norm_eps": "1e-5"}), "damaged: got rms_norm_eps='1e-5'; expected a value"),
  "no object": (dict(text_config=[1]), "damaged: got text_config"),
  "another class": (dict(model_type="llava"), "of another model: got model_type 'llava'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_model_does_not_do_is_refused_by_name(what, source):
  changes, message = REFUSED[what]
  with pytest.raises(ValueError, match=message) as caught:
    carried(source(**changes))
  assert "\n" not in str(caught.value)


DISAGREE = {
  "eps beside its text_config": dict(rms_norm_eps=1e-5, text={"rms_norm_eps": 1e-6}),
  "theta beside a text_config without": dict(rope_theta=1e6),
  "theta twice": dict(text={"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
  "padding": dict(pad_token_id=0),
  "means twice": dict(processor=images("means", 0, [0.5] * 3)),
}


@pytest.mark.parametrize("what", DISAGREE)
def test_files_that_disagree_are_refused(what, source):
  with pytest.raises(ValueError, match="The source's own files disagree: got .* and .*; expected one value"):
    carried(source(**DISAGREE[what]))


def test_a_base_and_its_fine_tune_must_agree(source, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "openvla", "text_config": {"rms_norm_eps": 1e-5}}))
  new, _ = settings.carry(recognize([source(), tmp_path / "config.json"]), CONFIG)
  assert new["model"]["variant"]["llm"]["eps"] == 1e-5  # the base leaves it out
  with pytest.raises(ValueError, match="disagree"):
    settings.carry(recognize([source(text={"rms_norm_eps": 1e-6}), tmp_path / "config.json"]), CONFIG)


def test_a_config_beside_files_that_are_named_alone_counts_where_it_is_theirs(source):
  folder, said = source(text={"rope_theta": 1e6}), []
  new, _ = settings.carry(recognize(sorted(folder.glob("model-*.safetensors"))), CONFIG)
  assert new["model"]["variant"]["llm"]["theta"] == 1e6
  source(model_type="siglip")
  new, _ = settings.carry(recognize(sorted(folder.glob("model-*.safetensors"))), CONFIG, None, said.append)
  assert new == CONFIG and any("belongs to another model" in line for line in said)


def plain(config):
  return json.loads(json.dumps(config))


def positions(config):
  """The decoder's states of a policy's config on fixed numbers: parameters of a seed, so that settings alone differ."""
  sizes = build(config["model"]).llm
  block = llama.Block(sizes.num_heads, sizes.mlp_dim, sizes.eps, sizes.theta)
  x, valid = jax.random.normal(jax.random.key(0), (1, 5, sizes.width)) * 1e-3, jnp.ones((1, 5), bool)
  args = x, masks.positions(valid), masks.attention_mask(valid, jnp.zeros(5, bool), "causal"), None, 0
  return np.asarray(block.apply(block.init(jax.random.key(1), *args), *args)[0])


@pytest.mark.parity
def test_a_policy_computes_with_what_was_carried_and_verify_sees_a_difference(source, tmp_path, capsys):
  pytest.importorskip("torch", reason="needs torch: run `make parity`")
  pytest.importorskip("transformers", reason="needs transformers: run `make parity`")
  folder, policy = source(text={"rope_theta": 3.0, "rms_norm_eps": 1e-2}), tmp_path / "policy"
  report = to_orbax([folder], policy, CONFIG)
  config = policy_folder.read_policy_json(policy).config
  assert len(report["carried"]) == 2 and np.abs(positions(config) - positions(CONFIG)).max() > 1e-3
  argv = ["verify", "--source", str(folder), "--policy", str(policy)]
  assert __main__.main(argv) == 0
  for changes in ({"rope_theta": 1e4}, {"hidden_act": "gelu"}, {"rope_scaling": {"type": "linear", "factor": 9.0}}):
    source(text={"rope_theta": 3.0, "rms_norm_eps": 1e-2} | changes)
    capsys.readouterr()
    assert __main__.main(argv) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert any(line.endswith("FAIL  llm") for line in failed) and len(failed) >= 2, changes
  back = tmp_path / "back"
  source(text={"rope_theta": 3.0, "rms_norm_eps": 1e-2})
  to_torch.to_torch(policy, back)
  assert plain(settings.carry(recognize([back]), CONFIG)[0]) == config
  bare = json.loads((policy / "conversion.json").read_text()) | {"source_config": {}}
  (policy / "conversion.json").write_text(json.dumps(bare))  # as of a policy that was trained here
  to_torch.to_torch(policy, tmp_path / "bare")
  assert plain(settings.carry(recognize([tmp_path / "bare"]), CONFIG)[0]) == config
  assert against_torch.verify([tmp_path / "bare"], policy)[0][0].error < against_torch.TOLERANCE


TOWERS = {  # kind: (config.json, preprocessor_config.json), what comes of it
  "tanh": ("SigLIP, Hugging Face", {"model_type": "siglip", "vision_config": {}}, {}, ("siglip_gelu", "tanh")),
  "erf": (
    "SigLIP, Hugging Face",
    {"model_type": "siglip_vision_model", "hidden_act": "gelu"},
    {},
    ("siglip_gelu", "erf"),
  ),
  "quick_gelu": ("SigLIP, Hugging Face", {"vision_config": {"hidden_act": "quick_gelu"}}, {}, "hidden_act='quick"),
  "text": ("SigLIP, Hugging Face", {"text_config": {"layer_norm_eps": 1e-5}}, {}, "layer_norm_eps=1e-05 .text_config"),
  "siglip mean": ("SigLIP, Hugging Face", {}, {"image_mean": [0.485, 0.456, 0.406]}, "mean=.*preprocessor_config"),
  "rescale": ("SigLIP, Hugging Face", {}, {"rescale_factor": 1 / 127.5}, "rescale_factor="),
  "no normalisation": ("SigLIP, Hugging Face", {}, {"do_normalize": False}, "do_normalize=False"),
  "dino": ("DINOv2, Hugging Face", {"hidden_act": "gelu_new"}, {}, "hidden_act='gelu_new'"),
  "dino eps": ("DINOv2, Hugging Face", {"layer_norm_eps": 1e-5}, {}, "layer_norm_eps=1e-05"),
  "dino std": ("DINOv2, Hugging Face", {}, {"image_std": [0.5] * 3}, "std="),
  "dino released": (
    "DINOv2, Hugging Face",
    {"model_type": "dinov2_with_registers"},
    {
      "image_mean": [0.485, 0.456, 0.406],
      "image_std": [0.229, 0.224, 0.225],
      "rescale_factor": 0.00392156862745098,
      "do_center_crop": True,
      "crop_size": {"height": 224, "width": 224},
      "size": {"shortest_edge": 256},
    },
    None,
  ),
  "timm": ("SigLIP, timm", {"model_args": {"act_layer": "gelu_tanh"}}, {}, ("siglip_gelu", "tanh")),
  "timm mean": ("DINOv2, timm", {"pretrained_cfg": {"mean": [0.5] * 3}}, {}, "mean=.*pretrained_cfg"),
  "big_vision": ("SigLIP, big_vision", {}, {}, ("siglip_gelu", "tanh")),
  "llama": ("Llama, Hugging Face", {"rope_scaling": {"type": "dynamic"}}, {}, "rope_type='dynamic'"),
  "llama gqa": ("Llama, Hugging Face", {"model_type": "llama", "num_key_value_heads": 1}, {}, "num_key_value_heads=1"),
  "mistral": ("Llama, Hugging Face", {"model_type": "mistral"}, {}, "model_type 'mistral'"),
}


@pytest.mark.parametrize("what", TOWERS)
def test_towers_say_it_too(what, tmp_path):
  kind, config, processor, wanted = TOWERS[what]
  towers.write(tmp_path, kind)
  if kind != "SigLIP, big_vision":
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
  if isinstance(wanted, str):
    with pytest.raises(ValueError, match=wanted):
      carried(tmp_path, towers.CONFIG)
    return
  new, _ = carried(tmp_path, towers.CONFIG)
  if wanted is None:
    assert new == towers.CONFIG
  else:
    assert new["model"].get(wanted[0], DEFAULTS[wanted[0]]) == wanted[1]
