"""Errors of translation and rotation against the expert, and how they go together."""

import numpy as np
import policies
import pytest

from semanticvla_jax.evaluate import coupling
from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.tabletop import physics


def made_up(same: float) -> coupling.Errors:
  """Errors of 20 episodes of 30 actions, of which a share is common to both."""
  rng = np.random.default_rng(0)
  common, a, b = rng.normal(size=(3, 600))
  errors = [5 + same**0.5 * common + (1 - same) ** 0.5 * x for x in (a, b)]
  return coupling.Errors(errors[0] / 1000, np.radians(errors[1]), np.repeat(np.arange(20), 30))


@pytest.mark.parametrize("same", [0.0, 0.7])
def test_the_correlation_is_pearson_s_with_an_interval_round_it(same):
  value, (low, high) = coupling.correlation(made_up(same))
  assert low < value < high and high - low < 0.25
  assert abs(value - same) < 0.1
  given = made_up(same)
  means = f"translation {1000 * given.translation.mean():.2f} mm, rotation {np.degrees(given.rotation.mean()):.2f} deg"
  assert coupling.line(given).startswith(f"600 actions of 20 episodes: {means}")


@pytest.mark.slow
def test_a_policy_is_compared_with_the_expert(tmp_path, capsys):
  found = coupling.errors(policies.policy(), "align", "heldout", range(2))
  assert set(found.episode) == {0, 1} and len(found.episode) > 50
  assert 0.001 < found.translation.mean() < 10 * physics.TRANSLATION and found.rotation.min() >= 0
  folder = policies.saved_for_libero(tmp_path / "policy")
  main(["coupling", f"--policy={folder}", "--suite=align", "--episodes=2"])
  assert "of 2 episodes: translation" in capsys.readouterr().out


def test_what_cannot_be_measured():
  with pytest.raises(SystemExit, match="did you mean 'align'"):
    main(["coupling", "--policy=nowhere", "--suite=algin"])
