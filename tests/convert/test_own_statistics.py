"""A fine-tune needs statistics of its own, and ones that fit its model."""

import json

import checkpoints
import numpy as np
import pytest

from semanticvla_jax import policy_folder
from semanticvla_jax.convert.to_orbax import Options, to_orbax


def rewritten(folder, change):
  """The folder with another first entry in dataset_statistics.json."""
  path = folder / "dataset_statistics.json"
  content = json.loads(path.read_text())
  change(content["tiny"])
  path.write_text(json.dumps(content))
  return folder


def test_norm_stats_of_the_base_are_not_those_of_a_fine_tune(tmp_path):
  folder = checkpoints.oft(tmp_path / "source")
  (folder / "dataset_statistics.json").unlink()
  config = {"model_type": "openvla", "norm_stats": checkpoints.norm_stats("oft")}
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"No statistics: got OpenVLA-OFT without.*are its base's.*--no-statistics"):
    to_orbax([folder], tmp_path / "policy", checkpoints.config("oft"))
  to_orbax([folder], tmp_path / "policy", checkpoints.config("oft"), Options(need_statistics=False))
  assert policy_folder.read_policy_json(tmp_path / "policy").statistics == {}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda entry: entry.pop("proprio"), "proprio: got no statistics; expected width 8"),
    (lambda entry: entry["action"]["q99"].__setitem__(1, np.nan), "action dimension 1: got .*nan; expected finite"),
    (lambda entry: [x.append(0.5) for x in entry["action"].values()], "action: got width 8; expected 7"),
  ],
)
def test_statistics_that_do_not_fit_the_model_are_refused(change, message, tmp_path):
  folder = rewritten(checkpoints.oft(tmp_path / "source"), change)
  with pytest.raises(ValueError, match=rf"'tiny' cannot be used[\s\S]*{message}[\s\S]*--no-statistics"):
    to_orbax([folder], tmp_path / "policy", checkpoints.config("oft"))
  assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_one_good_entry_is_enough_and_the_others_are_said(tmp_path):
  folder = checkpoints.oft(tmp_path / "source")
  good = checkpoints.norm_stats("oft")["tiny"]
  (folder / "dataset_statistics.json").write_text(json.dumps({"good": good, "bad": {"action": good["action"]}}))
  said = []
  to_orbax([folder], tmp_path / "policy", checkpoints.config("oft"), say=said.append)
  assert [line for line in said if line.startswith("WARNING") and "'bad'" in line and "proprio" in line]
