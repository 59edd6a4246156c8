"""One entry in the table of layouts is all that a new source needs."""

import numpy as np
import pytest
import test_towers as towers
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from semanticvla_jax import policy_folder
from semanticvla_jax.convert import settings_files
from semanticvla_jax.convert.check import against_torch
from semanticvla_jax.convert.detect import recognize
from semanticvla_jax.convert.rules import layouts, vit
from semanticvla_jax.convert.rules.layouts import LAST, LAYOUTS, Layout, Tower
from semanticvla_jax.convert.to_orbax import Options, to_orbax

HUGGING_FACE = "SigLIP, Hugging Face"
RENAMED = Layout(  # a tower that nobody publishes: other beginnings of keys, one weight under another name
  "SigLIP, made up",
  mark=r"eye\.embeddings\..*",
  towers=(Tower("siglip/", "eye.", vit.hf_siglip, "encoder.layers.{i}.", {r"(head|post_layernorm)\..*": LAST}),),
  unused={r"version": "a number that no model reads"},
  canonical=lambda key: key.replace(".linear_out.", ".fc2."),
  config="tower",
  model_types=("made_up",),
)


def renamed(tensors):
  eye = {key.replace("vision_model.", "eye."): x for key, x in tensors.items() if key.startswith("vision_model.")}
  return {key.replace(".fc2.", ".linear_out."): x for key, x in eye.items()} | {"version": np.ones(1, np.float32)}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
  """(the tower under its made-up names, the policy that Hugging Face's names make of the same numbers)."""
  monkeypatch.setitem(LAYOUTS, RENAMED.name, RENAMED)
  (tmp_path / "known").mkdir()
  (tmp_path / "made_up").mkdir()
  path, stored = towers.write(tmp_path / "known", HUGGING_FACE)
  save_file(renamed(stored), tmp_path / "made_up" / "model.safetensors")
  to_orbax([path], tmp_path / "policy", towers.CONFIG, Options(only="siglip"))
  return tmp_path / "made_up", tmp_path / "policy"


def test_a_source_is_added_by_one_entry(made_up, tmp_path):
  source, known = made_up
  (source / "config.json").write_text('{"model_type": "made_up", "hidden_act": "gelu_pytorch_tanh"}')
  report = to_orbax([source], tmp_path / "new", towers.CONFIG)
  new, old = (policy_folder.load_policy(folder) for folder in (tmp_path / "new", known))
  assert report["kind"] == new.metadata["origin"] == RENAMED.name and new.metadata["parts"] == ["siglip"]
  assert new.metadata["params_sha256"] == old.metadata["params_sha256"]
  assert {reason for key, reason in report["unused"].items() if key != "version"} == {LAST}
  assert report["carried"] and new.config["model"]["siglip_gelu"] == "tanh"  # its config.json is read too
  assert flatten_dict(new.params).keys() == flatten_dict(old.params).keys()


def test_without_the_entry_it_is_refused_and_of_two_layouts_none_is_guessed(made_up, tmp_path, monkeypatch):
  source, _ = made_up
  monkeypatch.setitem(LAYOUTS, "another", Layout("another", RENAMED.mark, RENAMED.towers))
  with pytest.raises(ValueError, match=r"Ambiguous source: .* with SigLIP, made up, another;"):
    recognize([source])
  for name in (RENAMED.name, "another"):
    monkeypatch.delitem(LAYOUTS, name)
  with pytest.raises(ValueError, match=r"Unknown source: .* with keys such as \['eye\.embeddings"):
    recognize([source])


@pytest.mark.parity
def test_pytorch_computes_the_same_with_it(made_up, tmp_path):
  pytest.importorskip("torch", reason="needs torch: run `make parity`")
  pytest.importorskip("transformers", reason="needs transformers: run `make parity`")
  source, _ = made_up
  to_orbax([source], tmp_path / "new", towers.CONFIG)
  rows, left = against_torch.verify([source], tmp_path / "new")
  assert [row.stage for row in rows] == ["siglip"] and rows[0].error < against_torch.TOLERANCE and not left


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_entries_are_complete(layout):
  assert layout.config in settings_files.CONFIGS or (not layout.config and layout.fixed)
  assert bool(layout.model_types) == bool(layout.config)
  assert {tower.name for tower in layout.towers} <= settings_files.TABLES.keys()
  assert layout.mark or layout is layouts.OPENVLA_FINE_TUNE


@pytest.mark.parametrize("kind", towers.EXPECTED)
def test_no_two_layouts_of_towers_look_alike(kind):
  assert [layout.name for layout in layouts.single_towers(towers.tensors(kind))] == [kind]
  assert not layouts.single_towers([])
