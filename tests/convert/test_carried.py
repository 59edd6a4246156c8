"""Tokenizers of several places come together, what is lacking is said, and processor files go through a policy."""

import json

import checkpoints
import pytest

from semanticvla_jax.convert import to_torch
from semanticvla_jax.convert.to_orbax import Options, table, to_orbax

PROCESSOR = ("preprocessor_config.json", "tokenizer_config.json", "added_tokens.json", "processing_prismatic.py")


def test_tokenizers_of_the_source_and_of_a_folder_come_together(tmp_path):
  source, folder = checkpoints.oft(tmp_path / "source", "full"), tmp_path / "tokenizers"
  said = []
  report = to_orbax([source], tmp_path / "none", checkpoints.config("full"), say=said.append)
  lacking = [line for line in said if line.startswith("WARNING: no ")]
  assert len(lacking) == len(report["warnings"]) == 2 and "tokenizer.model" in lacking[0] and "spiece" in lacking[1]
  assert sum("WARNING: no " in line for line in table(report)) == 2
  (source / "tokenizer.model").write_bytes(b"of the source")
  folder.mkdir()
  (folder / "spiece.model").write_bytes(b"given")
  report = to_orbax([source], tmp_path / "both", checkpoints.config("full"), Options(tokenizers=folder))
  inside = {path.name: path.read_bytes() for path in (tmp_path / "both" / "tokenizers").iterdir()}
  assert inside == {"tokenizer.model": b"of the source", "spiece.model": b"given"} and not report["warnings"]


def test_processor_files_come_back_without_a_base(tmp_path):
  source = checkpoints.openvla(tmp_path / "source")
  for name in PROCESSOR:
    (source / name).write_text(f"{name}")
  (source / "notes.txt").write_text("")
  to_orbax([source], tmp_path / "policy", checkpoints.config("openvla"))
  report = to_torch.to_torch(tmp_path / "policy", tmp_path / "back")
  assert sorted(p.name for p in (tmp_path / "policy" / "source_files").iterdir()) == sorted(PROCESSOR)
  assert all((tmp_path / "back" / name).read_text() == name for name in PROCESSOR)
  assert report == json.loads((tmp_path / "back" / "conversion.json").read_text())
  assert report["statistics"] == ["tiny"] and report["dtypes"] == {"float32": sum(report["files"].values())}


def test_a_folder_without_tokenizers_is_refused(tmp_path):
  config = checkpoints.config("openvla")
  with pytest.raises(ValueError, match="No tokenizers"):
    to_orbax([checkpoints.openvla(tmp_path / "s")], tmp_path / "p", config, Options(tokenizers=tmp_path))


def test_folded_adapters_are_in_the_report(adapted):
  report = adapted[2]
  names = report["mapped"]["llm/layers/mlp/up_proj/kernel"]
  assert sum(".lora_A." in name for name in names) == sum(".lora_B." in name for name in names) == 2  # layers
  assert len(names) == 6
