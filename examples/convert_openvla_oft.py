"""Converts an OpenVLA-OFT checkpoint and asks the policy for actions: `python examples/convert_openvla_oft.py`.

The checkpoint is random and tiny, but its files and tensor names are those of the release. For a real one, --source is
the folder that `hf download` made, --config is `configs/openvla_oft.py:libero`, and --tokenizers is not needed.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from semanticvla_jax import VARIANTS, Policy
from semanticvla_jax.convert.__main__ import main as convert
from semanticvla_jax.data import text

CONFIG = f"{Path(__file__).resolve().parents[1] / 'configs' / 'openvla_oft.py'}:libero@tiny"
TINY = VARIANTS["tiny"]
# The tensors of each part and their axes. d: width, m: width of the MLP, p: pixels of a patch's side.
# A name that ends in "+" is a layer: a weight with these axes and a bias with the first.
ENCODER = "pos_embed 1 64 d, patch_embed.proj+ d 3 p p, norm+ d"  # timm's names, as in the blocks
BLOCK = "norm1+ d, attn.qkv+ 3d d, attn.proj+ d d, norm2+ d, mlp.fc1+ m d, mlp.fc2+ d m"
DINO, DINO_BLOCK = "cls_token 1 1 d, reg_token 1 registers d", "ls1.scale_factor d, ls2.scale_factor d"
LLAMA = "model.embed_tokens.weight vocab d, model.norm.weight d, lm_head.weight vocab d"  # transformers' names
LAYER = ", ".join(f"self_attn.{x}_proj.weight d d" for x in "qkvo") + """, mlp.gate_proj.weight m d,
  mlp.up_proj.weight m d, mlp.down_proj.weight d m, input_layernorm.weight d, post_attention_layernorm.weight d"""
PROJECTOR, PROPRIO = "fc1+ m both, fc2+ d m, fc3+ d d", "fc1+ d 8, fc2+ d d"  # a state of 8 numbers
HEAD, HEAD_BLOCK = "layer_norm1+ 7d, fc1+ d 7d, layer_norm2+ d, fc2+ 7 d", "ffn.0+ d, ffn.1+ d d"


def random(prefix: str, table: str, width: int, depth: int = 1, **sizes) -> dict[str, np.ndarray]:
  """{tensor: random numbers} of a table; "*" in the prefix means every block."""
  sizes |= {"d": width, "3d": 3 * width, "7d": 7 * width, "m": sizes.get("mlp_dim"), "p": TINY["patch"]}
  rng, out = np.random.default_rng(0), {}
  for i in range(depth if "*" in prefix else 1):
    for name, *axes in map(str.split, table.split(",")):
      key, shape = prefix.replace("*", str(i)) + name, tuple(sizes.get(axis) or int(axis) for axis in axes)
      layer = key.removesuffix("+")
      shapes = {key: shape} if layer == key else {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
      out |= {part: rng.normal(0, 0.2, axes).astype(np.float32) for part, axes in shapes.items()}
  return out


def write_checkpoint(folder: Path) -> None:
  """The merged model, the two fine-tuned heads in files of their own, config.json and the statistics of the data."""
  dino, siglip, llm = TINY["dino"], TINY["siglip"], TINY["llm"]
  first, second = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
  d, both = llm["width"], dino["width"] + siglip["width"]  # both: the patches of both encoders, concatenated
  model = random(first, f"{ENCODER}, {DINO}", **dino) | random(f"{first}blocks.*.", f"{BLOCK}, {DINO_BLOCK}", **dino)
  model |= random(second, ENCODER, **siglip) | random(f"{second}blocks.*.", BLOCK, **siglip)
  model |= random("projector.", PROJECTOR, d, both=both, mlp_dim=4 * both)
  model |= random("language_model.", LLAMA, **llm) | random("language_model.model.layers.*.", LAYER, **llm)
  head = random("module.model.", HEAD, d) | random("module.model.mlp_resnet_blocks.*.", HEAD_BLOCK, d, depth=2)
  save_file(model, folder / "model.safetensors")  # the release's heads are .pt files, which need torch to be read
  for name, tensors in {"action_head": head, "proprio_projector": random("module.", PROPRIO, d)}.items():
    save_file(tensors, folder / f"{name}--150000_checkpoint.safetensors")
  (folder / "config.json").write_text(json.dumps({"model_type": "openvla"}))
  low, high = [-0.5] * 6 + [0], [0.5] * 6 + [1]  # six displacements, and the gripper, which is not scaled
  limits = {"mean": low, "std": high, "min": low, "max": high, "q01": low, "q99": high}
  state = {name: [*x, x[0]] for name, x in limits.items()}
  statistics = {"libero_spatial_no_noops": {"action": limits | {"mask": [True] * 6 + [False]}, "proprio": state}}
  (folder / "dataset_statistics.json").write_text(json.dumps(statistics))


def main() -> np.ndarray:
  """Returns the converted policy's answer to one observation."""
  with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as target:
    write_checkpoint(Path(source))
    flags = {"source": source, "target": f"{target}/policy", "config": CONFIG, "tokenizers": text.EMBEDDED}
    assert convert(["to-orbax", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    frame = np.random.default_rng(1).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    observation = {"full_image": frame, "wrist_image": frame, "state": np.zeros(8), "task_description": "open the box"}
    actions = Policy.load(flags["target"]).infer(observation)["actions"]
  print(f"{len(actions)} actions, the first {np.array2string(actions[0], precision=3)}")
  return actions


if __name__ == "__main__":
  main()
