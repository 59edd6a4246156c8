"""Single towers under the names of everyone who publishes them, converted and compared."""

import checkpoints
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from semanticvla_jax import policy_folder
from semanticvla_jax.convert.check import against_torch
from semanticvla_jax.convert.plan import parameter_shapes
from semanticvla_jax.convert.rules.layouts import LAYOUTS
from semanticvla_jax.convert.to_orbax import to_orbax
from semanticvla_jax.models.semanticvla import build

CONFIG = checkpoints.config("full")
MODEL = build(CONFIG["model"])
ATTENTION = "Transformer/encoderblock_1/MultiHeadDotProductAttention_0"
RELEASED = {
  "q_proj": "attention.query",
  "k_proj": "attention.key",
  "v_proj": "attention.value",
  "o_proj": "output.dense",
}
SPARE = {  # what published files hold beyond our towers
  "SigLIP, Hugging Face": {
    "logit_scale": (1,),
    "vision_model.post_layernorm.bias": (4,),
    "vision_model.head.probe": (1, 1, 4),
    "text_model.head.bias": (4,),
  },
  "SigLIP, timm": {"attn_pool.latent": (1, 1, 4), "norm.weight": (4,)},
  "DINOv2, timm": {"norm.weight": (4,)},
  "DINOv2, Hugging Face": {"embeddings.mask_token": (1, MODEL.dino.width), "layernorm.bias": (4,)},
  "Llama, Hugging Face": {"lm_head.weight": (4, 4), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)},
  "SigLIP, big_vision": {"img/MAPHead_0/probe": (1, 1, 4), "txt/head/bias": (4,), "t": (1,), "b": (1,)},
}


def prefixes_of(kind):
  return tuple(tower.ours for tower in LAYOUTS[kind].towers)


def tensors(kind):
  """Random weights under the names of transformers 5, timm or big_vision."""
  prefixes = prefixes_of(kind)
  target = parameter_shapes(MODEL, MODEL)
  target = {path: shape for path, shape in target.items() if path.startswith(prefixes) and "/film/" not in path}
  shapes = checkpoints.source_shapes(LAYOUTS[kind].tower_rules(target), target)
  if kind == "DINOv2, Hugging Face":
    n, width = MODEL.dino.num_patches, MODEL.dino.width
    shapes |= {"embeddings.position_embeddings": (1, n + 1, width), "embeddings.cls_token": (1, 1, width)}
  out = checkpoints.random(shapes, seed=3)
  return {key: 0.2 * x for key, x in out.items()} | checkpoints.random(SPARE[kind])


def write(path, kind):
  """The file as it is published."""
  stored = tensors(kind)
  if kind == "SigLIP, big_vision":
    names = {key: key.replace("siglip/", "params/img/").replace("text/", "params/txt/") for key in stored}
    np.savez(path / "siglip.npz", **{names[key]: x for key, x in stored.items()})
    return path / "siglip.npz", stored
  if kind == "DINOv2, Hugging Face":  # released files carry the names of transformers 4
    for new, old in RELEASED.items():
      stored = {key.replace(f"attention.{new}", f"attention.{old}"): x for key, x in stored.items()}
  save_file(stored, path / "model.safetensors")
  return path / "model.safetensors", stored


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
  known = {}

  def make(kind):
    if kind not in known:
      root = tmp_path_factory.mktemp("tower")
      path, stored = write(root, kind)
      known[kind] = path, stored, root / "policy", to_orbax([path], root / "policy", CONFIG)
    return known[kind]

  return make


def heads(weight, n):
  """(n·c, d) → (d, n, c)"""
  return weight.T.reshape(weight.shape[1], n, -1)


EXPECTED = {  # our parameter: the same numbers, written out
  "SigLIP, Hugging Face": {
    "siglip/embedding/kernel": lambda t: t["vision_model.embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
    f"siglip/{ATTENTION}/key/kernel": lambda t: heads(
      t["vision_model.encoder.layers.1.self_attn.k_proj.weight"], MODEL.siglip.num_heads
    ),
    "text/pos_embedding": lambda t: t["text_model.embeddings.position_embedding.weight"][None],
    "text/Encoder_0/encoderblock_0/MlpBlock_0/Dense_1/bias": lambda t: t["text_model.encoder.layers.0.mlp.fc2.bias"],
  },
  "SigLIP, timm": {
    "siglip/pos_embedding": lambda t: t["pos_embed"],
    f"siglip/{ATTENTION}/value/kernel": lambda t: heads(
      np.split(t["blocks.1.attn.qkv.weight"], 3)[2], MODEL.siglip.num_heads
    ),
    f"siglip/{ATTENTION}/out/kernel": lambda t: t["blocks.1.attn.proj.weight"].T.reshape(
      MODEL.siglip.num_heads, -1, MODEL.siglip.width
    ),
  },
  "DINOv2, timm": {
    "dino/Transformer/encoderblock_0/ls2": lambda t: t["blocks.0.ls2.gamma"],
    "dino/reg": lambda t: t["reg_token"],
    f"dino/{ATTENTION}/query/kernel": lambda t: heads(
      np.split(t["blocks.1.attn.qkv.weight"], 3)[0], MODEL.dino.num_heads
    ),
  },
  "DINOv2, Hugging Face": {
    "dino/cls": lambda t: t["embeddings.cls_token"] + t["embeddings.position_embeddings"][:, :1],
    "dino/pos_embedding": lambda t: t["embeddings.position_embeddings"][:, 1:],
    f"dino/{ATTENTION}/key/kernel": lambda t: heads(
      t["encoder.layer.1.attention.attention.key.weight"], MODEL.dino.num_heads
    ),
  },
  "Llama, Hugging Face": {
    "llm/layers/mlp/gate_proj/kernel": lambda t: np.stack(
      [t[f"model.layers.{i}.mlp.gate_proj.weight"].T for i in range(MODEL.llm.depth)]
    ),
    "llm/embed/embedding": lambda t: t["model.embed_tokens.weight"],
  },
  "SigLIP, big_vision": {
    "siglip/embedding/kernel": lambda t: t["siglip/embedding/kernel"],
    "text/Embed_0/embedding": lambda t: t["text/Embed_0/embedding"],
  },
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_tower_is_converted(kind, towers):
  _, stored, policy, report = towers(kind)
  files = policy_folder.load_policy(policy)
  got = flatten_dict(files.params, sep="/")
  assert report["kind"] == kind == files.metadata["origin"]
  assert files.metadata["parts"] == [prefix.rstrip("/") for prefix in prefixes_of(kind)]
  assert len(report["unused"]) == len([key for key in SPARE[kind] if key not in ("t", "b")])
  for path, make in EXPECTED[kind].items():
    np.testing.assert_array_equal(got[path], make(stored))


@pytest.mark.parity
@pytest.mark.parametrize("kind", EXPECTED)
def test_a_tower_says_what_pytorchs_class_says(kind, towers):
  pytest.importorskip("torch", reason="needs torch: run `make parity`")
  pytest.importorskip("transformers", reason="needs transformers: run `make parity`")
  path, _, policy, _ = towers(kind)
  rows, left = against_torch.verify([path], policy)
  assert [row.stage for row in rows] == [prefix.rstrip("/") for prefix in prefixes_of(kind)] and not left
  assert max(row.error for row in rows) < against_torch.TOLERANCE
