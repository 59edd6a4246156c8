"""Conversions that several tests look at, made once; not to be changed."""

import checkpoints
import pytest

from semanticvla_jax.convert.to_orbax import Options, to_orbax

RELEASE = {"rank": 4, "alpha": 8, "targets": "release"}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
  """name of a golden folder → (its checkpoint, the policy made from it)."""
  known = {}

  def make(name):
    if name not in known:
      root = tmp_path_factory.mktemp(name)
      write = checkpoints.openvla if name == "openvla" else lambda folder: checkpoints.oft(folder, name)
      folder = write(root / "source")
      to_orbax([folder], root / "policy", checkpoints.config(name))
      known[name] = folder, root / "policy"
    return known[name]

  return make


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
  """((base, fine-tune), {"keep": policy, "merge": policy}, report of the merge)."""
  root = tmp_path_factory.mktemp("adapted")
  sources, config = checkpoints.adapted(root), checkpoints.config("lora_checkpoint", RELEASE)
  reports = {lora: to_orbax(sources, root / lora, config, Options(lora=lora)) for lora in ("keep", "merge")}
  return sources, {lora: root / lora for lora in reports}, reports["merge"]
