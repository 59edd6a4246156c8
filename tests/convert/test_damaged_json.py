"""JSON files and configs of the wrong kind are errors that name them, not tracebacks."""

import json

import checkpoints
import pytest

from semanticvla_jax.convert import __main__
from semanticvla_jax.convert.detect import recognize

DAMAGED = {
  "dataset_statistics.json": ([1], r"dataset_statistics.json is damaged: got list"),
  "config.json": ([], r"config.json is damaged: got list"),
  "model.safetensors.index.json": ({"weight_map": {"x": 3}}, "no weight_map of names"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_another_kind_of_json(name, tmp_path):
  content, message = DAMAGED[name]
  folder = checkpoints.openvla(tmp_path / "source")
  (folder / name).write_text(json.dumps(content))
  with pytest.raises(ValueError, match=message):
    recognize([folder])


@pytest.mark.parametrize("stats", [[1], {"tiny": 3}, {"tiny": {"action": [1]}}, {"tiny": {"action": {"q01": 3}}}])
def test_norm_stats_of_another_kind(stats, tmp_path):
  folder = checkpoints.openvla(tmp_path / "source", norm_stats=stats)
  with pytest.raises(ValueError, match=r"config.json: (got norm_stats of list|tiny does not hold statistics)"):
    recognize([folder])


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("x.json", "{}", "No config"),
    ("x.py", "def f(): pass", "is not a config: got no get_config"),
    ("x.py", "def f(:", "cannot be run: got SyntaxError"),
    ("x.py", "import nowhere_at_all", "cannot be run: got ModuleNotFoundError"),
  ],
)
def test_configs_that_are_none(name, text, message, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr("sys.path", [*__import__("sys").path])
  (tmp_path / name).write_text(text)
  argv = ["to-orbax", "--source", str(tmp_path), "--target", str(tmp_path / "p"), "--config", str(tmp_path / name)]
  assert __main__.main(argv) == 1
  assert message in capsys.readouterr().err
