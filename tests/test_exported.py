"""A policy as one file: the same actions without models or Flax, for any batch size, and what is refused."""

import json
import subprocess
import sys
import zipfile

import jax
import numpy as np
import policies
import pytest
from flax.traverse_util import flatten_dict

from semanticvla_jax import exported
from semanticvla_jax.action_tokens import ActionTokenizer
from semanticvla_jax.exported import ExportedPolicy
from semanticvla_jax.models import serving
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.policy import Policy

SEEN = [policies.observation(i, prompt=("pick up the red cube", "pick up the green ball")[i % 2]) for i in range(3)]


@pytest.fixture(scope="module")
def policy():
  return policies.policy(batch_sizes=(1, 3))


@pytest.fixture(scope="module")
def path(policy, tmp_path_factory):
  path = tmp_path_factory.mktemp("exported") / "policy.svla"
  policy.export(path)
  return path


def test_the_file_gives_the_same_actions_to_the_last_bit(policy, path):
  loaded = ExportedPolicy.load(path, batch_sizes=(1, 3))
  np.testing.assert_array_equal(loaded.infer(SEEN[0])["actions"], policy.infer(SEEN[0])["actions"])
  ours, theirs = ([one["actions"] for one in p.infer_batch(SEEN)] for p in (loaded, policy))
  np.testing.assert_array_equal(ours, theirs)
  facts = loaded.metadata
  assert facts.pop("exported_by") and facts == policy.metadata
  assert json.loads(zipfile.ZipFile(path).read("policy.json"))["platforms"] == ["cpu", "cuda", "tpu"]


def test_it_runs_without_models_flax_or_tensorflow(policy, path, tmp_path):
  np.save(tmp_path / "actions.npy", policy.infer(SEEN[0])["actions"])
  np.savez(tmp_path / "seen.npz", **{key.replace("/", "|"): x for key, x in SEEN[0].items()})
  program = """
import sys
for name in ("flax", "orbax", "tensorflow", "semanticvla_jax.models", "semanticvla_jax.policy"):
  sys.modules[name] = None
import numpy as np
from semanticvla_jax.exported import ExportedPolicy
seen = {key.replace("|", "/"): x for key, x in np.load(sys.argv[2]).items()}
np.testing.assert_array_equal(ExportedPolicy.load(sys.argv[1]).infer(seen)["actions"], np.load(sys.argv[3]))
"""
  words = [sys.executable, "-c", program, path, tmp_path / "seen.npz", tmp_path / "actions.npy"]
  done = subprocess.run(words, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_what_is_no_exported_policy_is_refused(path, tmp_path):
  text = tmp_path / "text"
  text.write_text("hello")
  for bad in (text, tmp_path / "nothing"):
    with pytest.raises(ValueError, match="what cannot be read .*; expected a file that Policy.export wrote"):
      ExportedPolicy.load(bad)
  later, settings = tmp_path / "later", json.loads(zipfile.ZipFile(path).read("policy.json"))
  for change, message in (
    ({"format": 99}, f"format 99; expected at most {exported.FORMAT}"),
    ({"platforms": ["tpu"]}, r"programs for \['tpu'\]; expected one for cpu"),
  ):
    with zipfile.ZipFile(later, "w") as archive:
      archive.writestr("policy.json", json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
      ExportedPolicy.load(later)


def test_sizes_that_are_none_are_refused(path):
  for bad in ((0,), (1.5,), 3, "12"):
    with pytest.raises(ValueError, match="batch_sizes=.*; expected a tuple of positive integers"):
      ExportedPolicy.load(path, batch_sizes=bad)
  with pytest.raises(ValueError, match="remember=-1; expected a number of sentences, 0 or more"):
    ExportedPolicy.load(path, remember=-1)


OPENVLA = dict(coupler=None, dino_pruner=None, siglip_pruner=None, dense_fuser=None, film=(), mask="causal")


FAST = dict(codec=ActionTokenizer(8, 7, merges=((28, 28),)), decoding="constrained")


@pytest.mark.parametrize(
  "kind", ["fast", "int8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("openvla", "fp8"))]
)
def test_other_programs_are_exported_too(kind, policy, tmp_path):
  """Action tokens with a cache, without a text tower to remember anything of, and kernels of eight bits."""
  if kind in ("openvla", "fast"):
    fields = OPENVLA | (FAST if kind == "fast" else {})
    ours = policies.policy(config=policies.CONFIG | {"model": policies.CONFIG["model"] | fields}, batch_sizes=(1,))
  else:
    config = policies.CONFIG | {"model": policies.CONFIG["model"] | serving.layout("cpu")}
    params = serving.quantize(serving.lay_out(flatten_dict(policy.params, sep="/")), kind)
    model = serving.Quantized(build(config["model"]), kind)
    ours = Policy(model, params, policy.stats, policy.tokenizers, config)
  ours.export(tmp_path / "policy.svla", platforms=("cpu",))
  loaded = ExportedPolicy.load(tmp_path / "policy.svla")
  np.testing.assert_array_equal(loaded.infer(SEEN[0])["actions"], ours.infer(SEEN[0])["actions"])


def test_a_kernel_for_gpus_is_not_exported(tmp_path, monkeypatch):
  monkeypatch.setattr(serving, "verify_attention", lambda *_: None)
  model = policies.CONFIG["model"] | serving.layout("cuda", "triton")
  ours = policies.policy(config=policies.CONFIG | {"model": model})
  assert ours.metadata["attention"] == "triton"
  with pytest.raises(ValueError, match="export: got attention='triton'; expected 'xla'"):
    ours.export(tmp_path / "policy.svla")
  assert not [*tmp_path.iterdir()]


def test_a_failed_export_leaves_nothing(policy, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r"platforms=\('abacus',\); expected some of"):
    policy.export(tmp_path / "policy.svla", platforms=("abacus",))

  with pytest.raises(ValueError, match="a folder that does not exist; expected an existing one"):
    policy.export(tmp_path / "nowhere" / "policy.svla")

  def full(*args, **options):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(jax.export, "export", full)
  with pytest.raises(OSError, match="No space left"):
    policy.export(tmp_path / "policy.svla")
  assert not [*tmp_path.iterdir()]
