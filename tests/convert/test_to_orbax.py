"""Checkpoints become policy folders bit for bit, or nothing is written and the reason is said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from semanticvla_jax import policy_folder
from semanticvla_jax.convert import __main__
from semanticvla_jax.convert import to_orbax as module
from semanticvla_jax.convert.detect import recognize
from semanticvla_jax.convert.plan import make_plan, parameter_shapes, unused
from semanticvla_jax.convert.rules import engine, semanticvla
from semanticvla_jax.convert.to_orbax import Options, to_orbax
from semanticvla_jax.models import lora
from semanticvla_jax.models.semanticvla import build

RELEASE = {"rank": 4, "alpha": 8, "targets": "release"}


def expected(sources, model_config):
  """The same parameters through the in-memory engine."""
  source, model = recognize(sources), build(model_config)
  arrays = {key: tensor.read() for key, tensor in source.tensors.items()}
  return engine.convert(semanticvla.rules_for(model), unused(model), arrays, parameter_shapes(model, model))


def assert_holds(files, wanted):
  got = flatten_dict(files.params, sep="/")
  assert set(got) == set(wanted)
  for path, x in wanted.items():
    assert got[path].dtype == x.dtype and np.asarray(got[path]).tobytes() == np.ascontiguousarray(x).tobytes(), path


@pytest.mark.parametrize("name", ["openvla", "oft", "full"])
def test_a_checkpoint_becomes_a_policy(name, tmp_path):
  folder = (checkpoints.openvla if name == "openvla" else lambda f: checkpoints.oft(f, name))(tmp_path / "source")
  config = checkpoints.config(name)
  report = to_orbax([folder], tmp_path / "policy", config)
  files = policy_folder.load_policy(tmp_path / "policy")  # the hash that was made while writing is the one read back
  assert_holds(files, expected([folder], config["model"]))
  assert list(files.statistics) == ["tiny"] and files.config["lora"] is None and files.metadata["merged"]
  assert files.metadata["step"] == (None if name == "openvla" else 10)
  assert (files.tokenizers is not None) == (name == "openvla")
  assert report == json.loads((tmp_path / "policy" / "conversion.json").read_text())
  assert not report["dtype_changes"] and not report["not_finite"] and report["peak_rss_bytes"] > 0
  assert len(report["sources"]) == (2 if name == "openvla" else 4)
  assert {len(digest) for digest in report["sources"].values()} == {64} and all(report["unused"].values())
  assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_adapters_are_kept_or_folded_in(adapted):
  _, policies, report = adapted
  kept, merged = (policy_folder.load_policy(policies[name]) for name in ("keep", "merge"))
  assert kept.config["lora"] == RELEASE and kept.metadata["merged"] is False
  assert merged.config["lora"] is None and merged.metadata["merged"]
  assert merged.metadata["lora"] == RELEASE and report["merged_adapters"] == 73
  assert_holds(merged, flatten_dict(jax.tree.map(np.asarray, lora.merge(kept.params, 4, 8.0)), sep="/"))
  with pytest.raises(ValueError, match="already merged"):
    lora.merge(merged.params, 4, 8.0)


def test_shards_with_the_adapter_inside_are_not_merged_twice(tmp_path):
  base, tuned = checkpoints.adapted(tmp_path)
  for path in base.glob("model*"):
    path.rename(tuned / path.name)
  config = checkpoints.config("lora_checkpoint", RELEASE)
  with pytest.raises(ValueError, match="Adapters cannot be kept"):
    to_orbax([tuned], tmp_path / "policy", config)
  report = to_orbax([tuned], tmp_path / "policy", config, Options(lora="merge"))
  files = policy_folder.load_policy(tmp_path / "policy")
  assert report["merged_adapters"] == 66 and "lora_adapter/*" in report["unused"]
  stored = load_file(checkpoints.GOLDEN / "lora_checkpoint" / "base_hf.safetensors")
  stored = stored["language_model.model.layers.1.mlp.up_proj.weight"]
  np.testing.assert_array_equal(files.params["llm"]["layers"]["mlp"]["up_proj"]["kernel"][1], stored.T)


def test_an_adapter_on_a_merged_base_is_refused(tmp_path):
  base, tuned = checkpoints.adapted(tmp_path)
  mark = {"semanticvla_jax": {"merged": True, "lora": {"rank": 4, "alpha": 8.0}}}
  (base / "config.json").write_text(json.dumps(mark))
  config = checkpoints.config("lora_checkpoint", RELEASE)
  with pytest.raises(ValueError, match="Adapter on a merged base"):
    to_orbax([base, tuned], tmp_path / "policy", config, Options(lora="merge"))
  (tuned / "config.json").write_text(json.dumps({"model_type": "openvla"}))  # a newer one without a mark
  with pytest.raises(ValueError, match="Adapter on a merged base"):
    to_orbax([base, tuned], tmp_path / "policy", config, Options(lora="merge"))
  shutil.rmtree(tuned / "lora_adapter")  # the vision file has adapters still
  for sources in ([base, tuned], [*sorted(base.glob("model-*")), tuned]):
    with pytest.raises(ValueError, match="Adapter on a merged base"):
      to_orbax(sources, tmp_path / "policy", config, Options(lora="merge"))


@pytest.mark.parametrize("change", [{"rank": 8}, {"alpha": 16}])
def test_an_adapter_of_another_rank_or_alpha_is_refused(change, tmp_path):
  config = checkpoints.config("lora_checkpoint", RELEASE | change)
  with pytest.raises(ValueError, match=r"Adapter and config differ.*--config\.lora\.(rank=4|alpha=8)"):
    to_orbax(checkpoints.adapted(tmp_path), tmp_path / "policy", config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype, tmp_path):
  as_half = lambda tensors: {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}  # noqa: E731
  folder = checkpoints.openvla(tmp_path / "source", as_half if dtype == "float32" else lambda tensors: tensors)
  config = checkpoints.config("openvla")
  report = to_orbax([folder], tmp_path / "policy", config, Options(dtype=dtype))
  assert len(report["dtype_changes"]) == 1
  wanted = {k: x.astype(ml_dtypes.bfloat16).astype(dtype) for k, x in expected([folder], config["model"]).items()}
  assert_holds(policy_folder.load_policy(tmp_path / "policy"), wanted)
  if dtype == "float32":
    to_orbax([folder], tmp_path / "kept", config)
    assert_holds(policy_folder.load_policy(tmp_path / "kept"), expected([folder], config["model"]))


def test_layers_of_different_types_are_refused_unless_cast(tmp_path):
  def change(tensors):
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    return tensors | {key: tensors[key].astype(np.float16)}

  folder = checkpoints.openvla(tmp_path / "source", change)
  with pytest.raises(ValueError, match=r"llm/layers/mlp/up_proj/kernel.*float16.*--dtype"):
    to_orbax([folder], tmp_path / "policy", checkpoints.config("openvla"))


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_quantised_weights_are_refused_unless_cast(dtype, tmp_path):
  key = "projector.fc1.weight"
  folder = checkpoints.openvla(tmp_path / "source", lambda tensors: tensors | {key: tensors[key].astype(dtype)})
  with pytest.raises(ValueError, match=r"Dense_0/kernel is quantised: got (int8|float8_e4m3fn).*--dtype"):
    to_orbax([folder], tmp_path / "policy", checkpoints.config("openvla"))
  to_orbax([folder], tmp_path / "policy", checkpoints.config("openvla"), Options(dtype="bfloat16"))


def test_nan_and_inf_are_reported(tmp_path):
  def change(tensors):
    x = tensors["projector.fc1.weight"].copy()
    x[0, :2], x[1, 0] = np.nan, np.inf
    return tensors | {"projector.fc1.weight": x}

  report = to_orbax([checkpoints.openvla(tmp_path / "s", change)], tmp_path / "policy", checkpoints.config("openvla"))
  assert report["not_finite"] == {"sparse_fuser/projector/Dense_0/kernel": 3}


def without(key):
  return lambda tensors: {k: x for k, x in tensors.items() if k != key}


BAD = {
  "missing": (without("projector.fc1.weight"), r"\+ sparse_fuser/projector/Dense_0/kernel.*needs projector.fc1.weight"),
  "extra": (
    lambda t: t | {"projector.fc9.weight": np.zeros(3, np.float32)},
    r"- projector.fc9.weight \(3,\): no param",
  ),
  "shape": (lambda t: t | {"projector.fc1.bias": np.zeros(3, np.float32)}, r"! projector.fc1.bias: got shape \(3,\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_source_that_does_not_fit_is_listed_and_nothing_written(what, tmp_path):
  change, message = BAD[what]
  folder = checkpoints.openvla(tmp_path / "source", change)
  with pytest.raises(engine.Mismatch, match=message):
    to_orbax([folder], tmp_path / "policy", checkpoints.config("openvla"))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_statistics_are_required(tmp_path):
  folder = checkpoints.openvla(tmp_path / "source", norm_stats={})
  with pytest.raises(ValueError, match=r"No statistics.*--no-statistics"):
    to_orbax([folder], tmp_path / "policy", checkpoints.config("openvla"))
  to_orbax([folder], tmp_path / "policy", checkpoints.config("openvla"), Options(need_statistics=False))
  assert policy_folder.read_policy_json(tmp_path / "policy").statistics == {}


def test_a_target_that_exists_is_refused(tmp_path):
  (tmp_path / "policy").mkdir()
  with pytest.raises(ValueError, match="Target exists"):
    to_orbax([tmp_path], tmp_path / "policy", checkpoints.config("openvla"))


def test_a_target_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="Target cannot be written"):
    to_orbax([checkpoints.openvla(tmp_path / "source")], tmp_path / "file" / "policy", checkpoints.config("openvla"))


def test_a_source_damaged_after_the_plan_leaves_nothing(tmp_path, monkeypatch):
  folder = checkpoints.openvla(tmp_path / "source")

  def cut(*args, **kwargs):
    plan = make_plan(*args, **kwargs)
    os.truncate(folder / "model-00002-of-00002.safetensors", 20_000)
    return plan

  monkeypatch.setattr(module, "make_plan", cut)
  with pytest.raises(ValueError, match="became shorter"):
    to_orbax([folder], tmp_path / "policy", checkpoints.config("openvla"))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


KILLED = """
import os, sys
sys.path[:0] = sys.argv[3:]
import checkpoints
from semanticvla_jax.convert import to_orbax
seen = to_orbax._Watch.seen
def last(self, path, piece):
  seen(self, path, piece)
  if path.startswith("siglip/"):
    os.kill(os.getpid(), 9)
to_orbax._Watch.seen = last
to_orbax.to_orbax([sys.argv[1]], sys.argv[2], checkpoints.config("openvla"))
"""


def test_a_kill_leaves_no_half_policy_and_the_next_run_is_whole(tmp_path):
  folder, policy = checkpoints.openvla(tmp_path / "source"), tmp_path / "policy"
  here = str(Path(__file__).parent)
  done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(policy), here], capture_output=True)
  assert done.returncode == -9, done.stderr.decode()
  assert not policy.exists() and (tmp_path / ".policy.partial").exists()
  to_orbax([folder], policy, checkpoints.config("openvla"))
  assert_holds(policy_folder.load_policy(policy), expected([folder], checkpoints.model_config("openvla")))
  assert not (tmp_path / ".policy.partial").exists()


def test_a_single_tower(made, tmp_path):
  stored = load_file(checkpoints.GOLDEN / "openvla" / "weights.safetensors")
  prefix = "vision_backbone.featurizer."
  tower = {
    k.removeprefix(prefix).replace("scale_factor", "gamma"): x for k, x in stored.items() if k.startswith(prefix)
  }
  save_file(tower, tmp_path / "model.safetensors")
  config = checkpoints.config("openvla")
  to_orbax([tmp_path / "model.safetensors"], tmp_path / "tower", config)
  whole = {p: x for p, x in expected([made("openvla")[0]], config["model"]).items() if "dino/" in p}
  files = policy_folder.load_policy(tmp_path / "tower")
  assert_holds(files, whole)
  assert files.metadata["parts"] == ["dino"] and files.metadata["origin"] == "DINOv2, timm"


def test_the_command_line(tmp_path, capsys):
  config = __main__.load_config("configs/openvla_oft.py:film@tiny", ["lora.rank=4", "data.mixture=mine"])
  assert config["lora"]["rank"] == 4 and config["data"]["mixture"] == "mine" and config["model"]["variant"] == "tiny"
  for change in ("lora.rnak=4", "lora.rank"):
    with pytest.raises(ValueError, match=r"--config\.lora\.r"):
      __main__.load_config("configs/openvla_oft.py", [change])
  source = checkpoints.openvla(tmp_path / "source")
  argv = [
    "to-orbax",
    "--source",
    str(source),
    "--target",
    str(tmp_path / "p"),
    "--config",
    "configs/openvla.py:libero@tiny",
  ]
  assert __main__.main(argv) == 1
  assert "source and model do not cover each other" in capsys.readouterr().err
  for spelled in (["--config.data.batch_sise=4"], ["--set", "data.batch_sise=4"]):  # either reaches the config
    assert __main__.main([*argv, *spelled]) == 1
    assert "--config.data.batch_sise=4: got" in capsys.readouterr().err


@pytest.mark.parity
def test_companions_of_pytorch(tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch: run `make parity`")
  folder = checkpoints.oft(tmp_path / "source")
  wanted = expected([folder], checkpoints.model_config("oft"))
  for path in folder.glob("*_checkpoint.safetensors"):
    torch.save({k: torch.from_numpy(x) for k, x in load_file(path).items()}, path.with_suffix(".pt"))
    path.unlink()
  to_orbax([folder], tmp_path / "policy", checkpoints.config("oft"))
  assert_holds(policy_folder.load_policy(tmp_path / "policy"), wanted)


def test_a_source_that_cannot_be_hashed_is_heard_of(monkeypatch, tmp_path):
  """Whatever stops the thread that hashes: nobody waits for it for ever."""

  def broken(path):
    raise MemoryError("no room for a block")

  monkeypatch.setattr(module, "sha256", broken)
  with pytest.raises(MemoryError, match="no room"):
    module._hashes([tmp_path / "shard"]).result(timeout=10)
