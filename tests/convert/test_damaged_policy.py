"""A policy whose parameters are not those that were saved does not go back to PyTorch."""

import json
import shutil

import pytest

from semanticvla_jax.convert import __main__, to_torch
from semanticvla_jax.convert.io.orbax_reader import PolicyFolder


def test_the_hash_is_that_of_the_parameters(made, adapted):
  for policy in (made("openvla")[1], made("full")[1], adapted[1]["keep"]):
    PolicyFolder(policy).check_hash()


def test_another_policys_parameters_are_refused(made, tmp_path, capsys):
  policy = shutil.copytree(made("openvla")[1], tmp_path / "policy")
  path = policy / "metadata.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"params_sha256": "0" * 64}))
  with pytest.raises(ValueError, match=r"not what was saved.*expected 000000000000"):
    to_torch.to_torch(policy, tmp_path / "back")
  assert not (tmp_path / "back").exists()
  assert __main__.main(["to-torch", "--policy", str(policy), "--target", str(tmp_path / "back"), "--no-check"]) == 0


def test_a_flipped_byte_is_refused(made, tmp_path):
  policy = shutil.copytree(made("openvla")[1], tmp_path / "policy")
  path = max((p for p in (policy / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match="not what was saved"):
    to_torch.to_torch(policy, tmp_path / "back")
  assert not (tmp_path / "back").exists()
