"""Masks of the objects that a LIBERO task names, and shards and grounding of LIBERO through the command."""

import json
import types

import libero_assets
import numpy as np
import policies
import pytest

from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.evaluate.rollout_pool import EpisodeLog
from semanticvla_jax.libero import objects, simulator, suites


def test_a_part_stands_for_its_object_and_a_region_of_the_table_for_none():
  environment = types.SimpleNamespace(
    objects_dict={"plate_1": 0, "plate_10": 0, "akita_black_bowl_1": 0},
    fixtures_dict={"wooden_cabinet_1": 0, "flat_stove_1": 0},
    obj_of_interest=["wooden_cabinet_1_top_region", "main_table_stove_front_region", "plate_10", "wooden_cabinet_1"],
  )
  assert objects.named(environment) == ["wooden_cabinet_1", "plate_10"]


@pytest.mark.sim
def test_masks_show_the_objects_and_change_no_frame(monkeypatch):
  monkeypatch.setenv("LIBERO_ASSETS", libero_assets.assets())
  found = {}
  for wanted in (True, False):
    process = simulator.start(suites.Settings("libero_object", size=128, objects=wanted))
    try:
      first = process.reset(0)
      found[wanted] = [first, process.step(np.array([0.5, 0, -0.5, 0, 0, 0, 1.0]))[0], process.observe()]
    finally:
      process.close()
  for with_, without in zip(*found.values()):
    masks = {name for name in with_ if name.startswith(simulator.MASK)}
    assert masks == {"objects/image", "objects/wrist_image"} and with_.keys() - masks == without.keys()
    assert all(np.array_equal(with_[name], without[name]) for name in without)
    mask = with_["objects/image"]
    assert mask.shape == (128, 128) and mask.dtype == bool and 0.01 < mask.mean() < 0.3


@pytest.mark.sim
def test_shards_with_grounding_merge(tmp_path, monkeypatch):
  """A tiny policy with random parameters, two episodes of one task, a few steps."""
  monkeypatch.setenv("LIBERO_ASSETS", libero_assets.assets())
  folder = policies.saved_for_libero(tmp_path / "policy")
  words = [f"--policy={folder}", "--suite=libero_object", "--tasks=3", "--trials=2", "--workers=1", "--max-steps=9"]
  for i in (0, 1):
    main(["run", *words, "--films=1", "--grounding", f"--shard={i}/2", f"--out={tmp_path / str(i)}"])
  main(["merge", str(tmp_path / "0"), str(tmp_path / "1"), f"--out={tmp_path / 'merged'}"])
  row = json.loads((tmp_path / "merged" / "results.json").read_text())["results"][0]
  assert [(one["seed"], one["steps"]) for one in row["per_episode"]] == [(150, 9), (151, 9)] and "shard" not in row
  assert [one["grounding"]["image"]["queries"] for one in row["per_episode"]] == [2, 2]
  assert 0 < row["grounding"]["image"]["chance"] < 0.5 and row["fingerprint"]["seeds"] == "150..151"
  assert {*EpisodeLog(tmp_path / "merged" / "libero_object_policy.jsonl").found} == {150, 151}
  assert len((tmp_path / "merged" / "libero_object_policy_grounding.jsonl").read_text().splitlines()) == 2
  assert len([*(tmp_path / "merged").glob("*.mp4")]) == 2
  mark = json.loads((tmp_path / "merged" / "libero_object_fingerprint.json").read_text())
  assert (
    mark == row["fingerprint"] and len(json.loads((tmp_path / "merged" / "libero_object_films.json").read_text())) == 2
  )
  page = (tmp_path / "merged" / "report.html").read_text()
  assert "<h2>Grounding</h2>" in page and "libero_object: kept patches" in page
