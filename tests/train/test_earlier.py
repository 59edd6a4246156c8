"""What version 0.1.0 left on disk in November 2026 is read: its training resumes, its policy acts as it did.

How it was written is in tests/earlier_training.py.
"""

import json

import earlier_training as earlier
import jax
import numpy as np
import pytest
from small_runs import losses_of

from semanticvla_jax import Policy
from semanticvla_jax.train import __main__ as command

TOLERANCE = 1e-4  # another processor or compiler rounds otherwise; one wrong array changes the first digits


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """(a copy of the folder, what that version computed from it)."""
  folder = earlier.unpack(tmp_path_factory.mktemp("earlier"))
  return folder, json.loads((folder / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_an_earlier_training_resumes(stored, monkeypatch, caplog):
  folder, expected = stored
  device = jax.devices()[:1]
  monkeypatch.setattr(command.sharding.jax, "devices", lambda: device)
  with caplog.at_level("INFO"):
    command.train(earlier.make_config(folder / "data"), folder / "run")
  assert f"resumed from step {earlier.SAVED}" in caplog.text and "earlier version" not in caplog.text
  assert losses_of(folder / "run") == {earlier.STEPS: pytest.approx(expected["loss"], rel=TOLERANCE)}


def test_an_earlier_policy_acts_as_it_did(stored):
  folder, expected = stored
  actions = Policy.load(folder / "policy").infer(earlier.observation())["actions"]
  np.testing.assert_allclose(actions, expected["actions"], rtol=0, atol=TOLERANCE)
