"""Arms that stand off their path: reproducible on any number of hosts, and nothing else of an example changes."""

import dataclasses

import jax
import numpy as np
from toy_rlds import assert_equal, batches

from semanticvla_jax.data import loader


def driven(dataset):
  """Proprioception of an arm that moves 2 cm a unit of its commands, where `episode` draws states at random."""
  before = np.roll(dataset.actions[:, :3], 1, axis=0)
  return np.concatenate([np.cumsum(0.02 * before, axis=0), dataset.proprio[:, 3:]], axis=1).astype(np.float32)


def test_jitter_moves_the_arm_and_its_answer_reproducibly(dataset, other, tokenizers):
  dataset, other = (dataclasses.replace(one, proprio=driven(one)) for one in (dataset, other))
  mixture, jitter = [(dataset, 1.0), (other, 1.0)], loader.Jitter(0.01, 0.02)
  plain, moved = (batches(mixture, tokenizers, 3, jitter=each) for each in (loader.Jitter(), jitter))
  assert_equal(batches(mixture, tokenizers, 1, jitter=jitter, start_step=2)[0], moved[2])
  halves = [batches(mixture, tokenizers, 1, jitter=jitter, rows=np.arange(4 * i, 4 * i + 4))[0] for i in (0, 1)]
  assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *halves), moved[0])
  for a, b in zip(plain, moved):
    np.testing.assert_array_equal(a.observation.images, b.observation.images)
    np.testing.assert_array_equal(a.actions[:, :, 3:], b.actions[:, :, 3:])
    np.testing.assert_array_equal(a.observation.proprio[:, 6:], b.observation.proprio[:, 6:])
    assert (a.actions[:, 0, :3] != b.actions[:, 0, :3]).mean() > 0.5  # some are at their limits
    assert (a.observation.proprio[:, :6] != b.observation.proprio[:, :6]).mean() > 0.8
