"""Every stored tensor of the reference, through the one documented entry point."""

import json
import re
import shutil
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from semanticvla_jax.convert.__main__ import main
from semanticvla_jax.convert.check import golden, key_coverage
from semanticvla_jax.convert.check.golden import fixtures, whole
from semanticvla_jax.convert.rules import semanticvla
from semanticvla_jax.models.semanticvla import build

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = ["backbones", "id_pruner", "dense_fuser", "full", "full_aloha", "lora_checkpoint", "oft", "openvla"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_stored_tensor_agrees(folder, capsys):
  assert main(["verify-golden", str(GOLDEN / folder)]) == 0, capsys.readouterr().out
  assert "0 beyond 5e-05" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["full_size_keys.json", "full_size_keys_oft.json"])
def test_every_key_of_the_real_checkpoints_is_accounted_for(name, capsys):
  assert main(["verify-golden", str(GOLDEN / name)]) == 0
  assert "parameters mapped" in capsys.readouterr().out


def test_a_wrong_number_fails(monkeypatch, capsys):
  monkeypatch.setattr(golden, "TOLERANCE", 1e-12)
  assert main(["verify-golden", str(GOLDEN / "id_pruner")]) == 1
  assert "FAIL" in capsys.readouterr().out


def test_not_a_golden_folder(tmp_path, capsys):
  assert main(["verify-golden", str(tmp_path)]) == 1
  assert "expected a folder with config.json" in capsys.readouterr().err


def remove(name):
  return lambda folder: (folder / name).unlink()


def write(name, text):
  return lambda folder: (folder / name).write_text(text)


def change(entry, value):
  """Sets, or with None removes, an entry of config.json, given as a path of keys."""

  def edit(folder):
    config = json.loads((folder / "config.json").read_text())
    part = config
    for key in entry[:-1]:
      part = part[key]
    if value is None:
      del part[entry[-1]]
    else:
      part[entry[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))

  return edit


def rename_an_output(folder):
  outputs = load_file(folder / "outputs.safetensors")
  save_file({name.replace("similarity", "likeness"): x for name, x in outputs.items()}, folder / "outputs.safetensors")


@pytest.mark.parametrize(
  ("name", "edit", "message"),
  [
    ("id_pruner", remove("outputs.safetensors"), "outputs.safetensors, which cannot be read.*copy the folder whole"),
    ("id_pruner", write("weights.safetensors", "no"), "weights.safetensors, which cannot be read.*expected a safetens"),
    ("id_pruner", write("config.json", "{"), "config.json, which is not JSON.*expected an object"),
    ("id_pruner", write("config.json", "[]"), "got a list in .*expected an object"),
    ("id_pruner", write("config.json", "{}"), "got config.json with keys .*expected one that identifies the folder"),
    ("id_pruner", change(["cases", "low_temp", "temp"], None), "got no 'temp' in .*kind 'id_pruner'.*complete config"),
    ("id_pruner", rename_an_output, "stored outputs .* nothing was compared with .*likeness.*rename them"),
    ("full", change(["config", "dino"], None), "got no 'dino' in .*complete config.json"),
    ("full", change(["config", "llama", "num_key_value_heads"], 2), "got num_key_value_heads = 2 .*expected 4"),
    ("full", change(["config", "num_action_tokens"], 6), "got num_action_tokens = 6 .*expected 3"),
    ("full", change(["fused_featurizer_cfg", "vision_topk"], 5), r"got \[5, 6\] queries and kept patches"),
    ("full", change(["featurizer_cfg", "use_mm_sampler"], True), "use_mm_sampler of featurizer_cfg = True"),
    ("lora_checkpoint", remove("vision_backbone--10_checkpoint.safetensors"), "got 0 files vision_backbone--"),
  ],
)
def test_a_broken_folder_says_what_is_wrong(name, edit, message, tmp_path):
  folder = tmp_path / name
  shutil.copytree(GOLDEN / name, folder)
  edit(folder)
  with pytest.raises(ValueError, match=message):
    golden.verify(folder)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "No such file"),
    ("{}", r"got .* without 'action_head' \(keys \[\]\); expected the layout of full_size_keys.json"),
    ('{"base_hf_state_dict": {}}', "without 'action_head'"),
  ],
)
def test_a_broken_list_of_keys_says_what_is_wrong(content, message, tmp_path, capsys):
  path = tmp_path / "keys.json"
  if content is not None:
    path.write_text(content)
  assert main(["verify-golden", str(path)]) == 1
  assert re.search(message, capsys.readouterr().err)


# The switches that a folder's config.json may carry, and the fields of the model that they stand for.
OFF = dict(use_film=False, use_reg=False, use_mm_sampler=False, num_vision_queries=-1, vision_topk=-1, text_topk=-1)
SAMPLER = dict(use_mm_sampler=True, vision_topk=9, text_topk=0, temp=0.5)
SIZES = dict(queries=6, vision_topk=6, text_topk=3)
NO_PRUNERS = dict(film=(), dino_pruner=None, siglip_pruner=None)


@pytest.mark.parametrize(
  ("switches", "fuses", "fields"),
  [
    ({}, True, dict(film=("dino",), dino_pruner="sa", siglip_pruner="id", keep=6, cues=3, vision_layer="last")),
    ({}, False, dict(dense_fuser=None, vision_layer="second_to_last")),
    (dict(featurizer_cfg=OFF, fused_featurizer_cfg=OFF), True, NO_PRUNERS | dict(dense_fuser="variant")),
    (
      dict(featurizer_cfg=OFF | dict(use_reg=True, num_vision_queries=4), fused_featurizer_cfg=OFF),
      True,
      dict(dino_pruner="sa", siglip_pruner=None, keep=4),
    ),
    (
      dict(fused_featurizer_cfg=OFF | dict(use_film=True, use_reg=True)),
      True,
      dict(film=("dino", "siglip"), siglip_pruner="sa", keep=6),
    ),
    (
      dict(featurizer_cfg=OFF, fused_featurizer_cfg=OFF | SAMPLER),
      True,
      dict(dino_pruner=None, siglip_pruner="id", keep=9, cues=0, temperature=0.5),
    ),
  ],
)
def test_switches_decide_the_parts(switches, fuses, fields):
  found = fixtures.encoder_fields(switches, SIZES, fuses)
  assert {name: found[name] for name in fields} == fields


def test_sizes_come_from_the_folder():
  weights = {
    "featurizer.blocks.0.mlp.fc1.weight": np.zeros((28, 8)),
    "featurizer.blocks.0.ls1.gamma": np.zeros(8),
    "featurizer.reg_token": np.zeros((1, 7, 8)),
    "fused_featurizer.blocks.0.mlp.fc1.weight": np.zeros((29, 8)),
  }
  c = dict(embed_dim=8, depth=2, num_heads=2)
  dino, siglip = (fixtures.vit_sizes(c, weights, f"{name}.") for name in ("featurizer", "fused_featurizer"))
  assert (dino["registers"], dino["mlp_dim"], dino["layer_scale"]) == (7, 28, 1.0)
  assert siglip["mlp_dim"] == 29 and not {"registers", "layer_scale"} & set(siglip)
  assert fixtures.pairs_of({"pairs": []}) == fixtures.pairs_of({}) == ()


def test_token_ids_come_from_the_folder():
  constants = dict(empty_token=7, pad_token_llm=60, pad_token_text=0, ACTION_TOKEN_BEGIN_IDX=40, STOP_INDEX=2)
  special = fixtures.ids_of({"constants": constants})
  assert special == fixtures.Ids(empty=7, pad=60, text_pad=0, first_action=41) and fixtures.ids_of({}) == fixtures.Ids()
  with pytest.raises(ValueError, match="got STOP_INDEX = 3 .*expected 2"):
    fixtures.ids_of({"constants": {"STOP_INDEX": 3}})

  ids, mask = whole._prompt({"predict0.input_ids": np.array([[1, 5]])}, "predict0", special)
  assert ids.tolist() == [[1, 5, 7]] and mask.all()
  labels = [[-100] * 3 + [41, 2], [-100] * 2 + [45, 2, -100]]
  rows = {"input_ids": [[1, 5, 7, 41, 2], [1, 7, 45, 2, 60]], "labels": labels}
  ids, mask = whole._prompt({f"train.{name}": np.array(x) for name, x in rows.items()}, "train", special)
  assert ids.tolist() == [[1, 5, 7], [1, 7, 60]] and mask.tolist() == [[True] * 3, [True, True, False]]

  bins = whole._bins({"constants": dict(ACTION_DIM=9, n_action_bins=256, action_token_ids=[100, 355])})
  assert bins == whole.Bins(tokens=9, vocab=356, ids=slice(100, 357))


def test_every_case_of_an_adapted_model_is_compared():
  config = fixtures.read_json(GOLDEN / "lora_checkpoint" / "config.json")
  actions, stats = np.zeros((1, 8, 7), np.float32), "unnormalized_actions"
  outputs = {f"predict{i}.{name}": actions[0] for i in (0, 3) for name in (stats, f"{stats}_after_merge")}
  outputs |= {"train.normalized_actions": actions, "train.loss_l1": np.float32(0)}
  assert whole._cases(outputs) == ["predict0", "predict3", "train"]
  inputs = {"train.actions": actions}
  found = [
    name
    for case in whole._cases(outputs)
    for name, *_ in whole._adapted_case(case, config, inputs, outputs, actions, actions)
  ]
  assert set(outputs) < set(found) and set(found) - set(outputs) == {"train.normalized_actions (merged)"}


def other_folder(pairs: list, views: int, switches: dict) -> tuple:
  """(config, weights, inputs, outputs) of a whole model of sizes and ids that no stored folder has; random numbers."""
  c = dict(
    img=12,
    patch=4,
    num_images=views,
    queries=5,
    vision_topk=5,
    text_topk=2,
    pairs=pairs,
    num_action_tokens=3,
    dino=dict(embed_dim=12, depth=3, num_heads=3),
    siglip=dict(embed_dim=8, depth=2, num_heads=2),
    text=dict(
      vocab_size=20,
      max_position_embeddings=6,
      hidden_size=10,
      num_hidden_layers=1,
      num_attention_heads=2,
      intermediate_size=14,
    ),
    llama=dict(vocab_size=70, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=18),
  )
  constants = dict(empty_token=7, pad_token_llm=60, pad_token_text=0, ACTION_TOKEN_BEGIN_IDX=40, STOP_INDEX=2)
  stats = {"action": {name: [float(x)] * 7 for name, x in dict(q01=-1, q99=1, min=-1, max=1, mean=0, std=1).items()}}
  config = {"config": c, "constants": constants, "norm_stats": {"any": stats}} | switches
  headers = {f"{name}.blocks.0.mlp.fc1.weight": np.zeros((22, 1)) for name in ("featurizer", "fused_featurizer")}
  headers |= {"featurizer.reg_token": np.zeros((1, 2, 12)), "featurizer.blocks.0.ls1.gamma": np.zeros(12)}
  fields = whole.semantic_fields(config) | dict(chunk=3, action_dim=7, proprio_dim=4, num_views=views)
  model = build(dict(variant=fixtures.variant_of(config, headers)) | fields)
  shapes = checkpoints.source_shapes(semanticvla.rules_for(model), key_coverage.shapes_of(model))
  inputs = checkpoints.random({"predict0.pixel_values": (1, 6 * views, 12, 12), "predict0.proprio": (1, 4)}, seed=1)
  inputs |= {"predict0.input_ids": np.array([[1, 9, 11]]), "predict0.instruction_ids": np.array([[5, 3, 8, 0, 0, 0]])}
  return config, checkpoints.random(shapes), inputs, {"predict0.unnormalized_actions": np.zeros((3, 7), np.float32)}


@pytest.mark.parametrize(
  ("pairs", "views", "switches", "kept", "tokens"),
  [
    ([[0, 0], [2, 1]], 3, {}, 5, 2 + 5),
    ([], 1, dict(featurizer_cfg=OFF, fused_featurizer_cfg=OFF), None, 9),
  ],
)
def test_a_folder_of_other_sizes_and_switches(pairs, views, switches, kept, tokens):
  config, weights, inputs, outputs = other_folder(pairs, views, switches)
  model = whole._model(config, weights, inputs, outputs, **whole.semantic_fields(config))
  assert model.dino.registers == 2 and model.dino.mlp_dim == 22 and (model.dense_fuser is None) == (not pairs)
  params = whole._params(model, weights)
  seen = {name: np.shape(x) for name, x in whole._whole(model, params, config, inputs, outputs, "predict0")}
  assert seen["normalized_actions"] == (1, 3, 7) and seen["unnormalized_actions"] == (3, 7)
  assert seen[f"image{views - 1}.llm_tokens"] == (1, tokens, 16)
  assert seen["visual_and_proprio_tokens"] == (1, views * tokens + 1, 16)
  assert seen["llm_input_embeddings"] == (1, views * tokens + 1 + 4 + 9 + 1, 16)  # proprio; <s> … 7; 3 × 3; </s>
  assert seen.get("image0.dino_queries") == (None if kept is None else (1, kept, 12))
  assert ("text_projected" in seen) == (kept is not None)
