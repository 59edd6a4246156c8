"""Checkpoint folders with the names that released ones have, made from the tiny golden weights."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from semanticvla_jax.convert.check.golden import fixtures, whole
from semanticvla_jax.convert.rules import engine

GOLDEN = Path(__file__).parent.parent / "golden"
STEP = "10"


def golden_config(name: str) -> dict:
  return json.loads((GOLDEN / name / "config.json").read_text())


def model_config(name: str, **fields) -> dict:
  """The model of a golden folder, sizes in full."""
  config = golden_config(name)
  inputs, outputs = (
    {k: x.shape for k, x in load_file(GOLDEN / name / f"{w}.safetensors").items()} for w in ("inputs", "outputs")
  )
  weights = fixtures.load(GOLDEN / name, "base_hf.safetensors" if name == "lora_checkpoint" else "weights.safetensors")
  proprio = inputs.get("predict0.proprio")
  if name == "openvla":
    own = dict(whole.OPENVLA)
  else:
    chunk, width = outputs["predict0.unnormalized_actions"]
    own = (whole.OFT if name == "oft" else whole.semantic_fields(config)) | dict(chunk=chunk, action_dim=width)
  own |= dict(num_views=config["config"]["num_images"], proprio_dim=None if proprio is None else proprio[-1])
  return dict(variant=fixtures.variant_of(config, weights)) | own | fields


def config(name: str, lora: dict | None = None, **fields) -> dict:
  return {"model": model_config(name, **fields), "lora": lora, "data": {"normalisation": "q99"}}


def norm_stats(name: str) -> dict:
  """Of a golden folder, random numbers, with the gripper in [0, 1] as a policy demands."""
  entries = golden_config(name)["norm_stats"]
  for entry in entries.values():
    action = entry["action"]
    for i in (i for i, masked in enumerate(action["mask"]) if not masked):
      for field, value in {"min": 0.0, "max": 1.0, "q01": 0.0, "q99": 1.0}.items():
        action[field][i] = value
  return entries


def sharded(folder: Path, tensors: dict, shards: int = 2) -> None:
  """Writes `tensors` as safetensors shards with their index."""
  folder.mkdir(parents=True, exist_ok=True)
  names, weight_map = sorted(tensors), {}
  for i in range(shards):
    file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
    part = {name: tensors[name] for name in names[i::shards]}
    save_file(part, folder / file)
    weight_map |= dict.fromkeys(part, file)
  content = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def openvla(folder: Path, change=lambda tensors: tensors, **json_fields) -> Path:
  """openvla-7b: shards, index, config.json with norm_stats, a tokenizer."""
  sharded(folder, change(load_file(GOLDEN / "openvla" / "weights.safetensors")))
  content = {"model_type": "openvla", "norm_stats": norm_stats("openvla")} | json_fields
  (folder / "config.json").write_text(json.dumps(content))
  (folder / "tokenizer.model").write_bytes(b"pieces")
  return folder


def oft(folder: Path, name: str = "oft") -> Path:
  """A merged fine-tune with companions: OpenVLA-OFT ("oft") or SemanticVLA ("full")."""
  sharded(folder, load_file(GOLDEN / name / "weights.safetensors"))
  for part in ("action_head", "proprio_projector"):
    state = {f"module.{k}": x for k, x in load_file(GOLDEN / name / f"{part}.safetensors").items()}
    save_file(state, folder / f"{part}--{STEP}_checkpoint.safetensors")
  (folder / "config.json").write_text(json.dumps({"model_type": "openvla", "norm_stats": {"base": {}}}))
  (folder / "dataset_statistics.json").write_text(json.dumps(norm_stats(name)))
  return folder


def adapted(root: Path) -> tuple[Path, Path]:
  """(base, fine-tune) of SemanticVLA, the adapter apart."""
  golden, base, tuned = GOLDEN / "lora_checkpoint", root / "base", root / "tuned"
  sharded(base, load_file(golden / "base_hf.safetensors"))
  (base / "config.json").write_text(json.dumps({"model_type": "openvla"}))
  tuned.mkdir()
  for path in golden.glob("*_checkpoint.safetensors"):
    shutil.copyfile(path, tuned / path.name)
  shutil.copytree(golden / "lora_adapter", tuned / "lora_adapter")
  (tuned / "dataset_statistics.json").write_text(json.dumps(norm_stats("lora_checkpoint")))
  return base, tuned


def random(shapes: dict, dtype=np.float32, seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def source_shapes(rules: list, target: dict) -> dict:
  """{key: shape} of the tensors that `rules` read for the parameters of `target`."""
  out = {}
  for entry in (entry for rule in rules for entry in engine.expand(rule, target)):
    own = entry.shape[1:] if entry.stacked else entry.shape
    shape = entry.rule.combine.source_shape() if entry.rule.pattern else own
    out |= {key: shape for keys in entry.keys for key in keys}
  return out
