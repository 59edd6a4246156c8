"""The table and the picture of success against distractors, from a results.json."""

import numpy as np
import pytest
from PIL import Image

from semanticvla_jax import files
from semanticvla_jax.evaluate import results
from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.evaluate.rollout import Episodes


def row(name: str, suite: str, successes: int, kept: float | None) -> results.Row:
  """Ten episodes of a suite, with the share of the named objects' area kept in both views."""
  success = np.arange(10) < successes
  view = {"queries": 1, "on_objects": 0.3, "chance": 0.1, "objects_kept": kept, "kept": 0.25}
  seen = None if kept is None else [{"image": view, "wrist_image": {"queries": 0}}] * 10
  episodes = Episodes(
    np.arange(10), success, np.full(10, 5), np.zeros(10, bool), ["x"] * 10, ["x"] * 10, grounding=seen
  )
  kind = "policy" if name == "this policy" else "control"
  return results.Row(name, kind, suite, results.summary(episodes), {}, episodes)


def write(folder, rows: list[results.Row]) -> None:
  files.write_json(folder / "results.json", results.to_json(rows, "evaluate", {}) | {"finished": True})


def test_a_line_for_each_number_and_row(tmp_path, capsys):
  rows = [row("this policy", "place_clutter8", 7, 0.75), row("this policy", "place_clutter0", 10, 0.9)]
  write(tmp_path, [*rows, row("keeps random patches", "place_clutter8", 1, None), row("this policy", "pick", 3, None)])
  main(["clutter", str(tmp_path), f"--plot={tmp_path / 'clutter.png'}"])
  lines = capsys.readouterr().out.splitlines()
  assert lines[2] == "| 0 | this policy | 10/10  100 %  (72–100 %) | 90.0 % (90.0–90.0 %) | – |"
  assert lines[3] == "| 8 | this policy | 7/10  70.0 %  (40–89 %) | 75.0 % (75.0–75.0 %) | – |"
  assert lines[4] == "| 8 | keeps random patches | 1/10  10.0 %  (2–40 %) | – | – |" and len(lines) == 5
  picture = np.asarray(Image.open(tmp_path / "clutter.png").convert("RGB"))
  assert picture.shape == (330, 880, 3) and picture.std() > 10


def test_what_cannot_be_read_is_refused(tmp_path):
  with pytest.raises(SystemExit, match="expected results of evaluate run"):
    main(["clutter", str(tmp_path)])
  write(tmp_path, [row("this policy", "pick", 3, None)])
  with pytest.raises(SystemExit, match="got no suite place_clutter…; expected at least one"):
    main(["clutter", str(tmp_path)])
