"""The order of examples: complete epochs, addressable anywhere, balanced between datasets."""

import numpy as np
import pytest

from semanticvla_jax.data import sampler


def episodes(*lengths: int) -> np.ndarray:
  return np.repeat(np.arange(len(lengths)), lengths)


def test_each_epoch_holds_every_candidate_once_and_epochs_differ():
  sequence = sampler.IndexSampler([episodes(3, 4, 3)], [1.0], seed=0)
  epochs = sequence.take(0, 30)[1].reshape(3, 10)
  assert (np.sort(epochs) == np.arange(10)).all()
  assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("window", [None, 2])
def test_any_position_can_be_taken_alone(window):
  of = [episodes(30, 40, 50, 20), episodes(5, 6, 7)]
  whole = np.stack(sampler.IndexSampler(of, [3.0, 1.0], 5, window).take(0, 10_000))
  fresh = sampler.IndexSampler(of, [3.0, 1.0], 5, window)
  for first, count in ((9_000, 1_000), (4_095, 2), (0, 1), (4_096, 4_096)):
    np.testing.assert_array_equal(np.stack(fresh.take(first, count)), whole[:, first : first + count])


def test_datasets_are_drawn_by_their_weights_each_in_its_own_epochs():
  of = [episodes(700), episodes(300)]
  datasets, candidates = sampler.IndexSampler(of, [7.0, 3.0], seed=1).take(0, 20_000)
  assert abs((datasets == 0).mean() - 0.7) < 0.01
  counts = np.bincount(candidates[datasets == 1], minlength=300)
  assert counts.max() - counts.min() <= 1


def test_seeds_differ_and_repeat():
  one, two, again = (sampler.IndexSampler([episodes(50)], [1.0], seed).take(0, 50)[1] for seed in (0, 1, 0))
  np.testing.assert_array_equal(one, again)
  assert not np.array_equal(one, two)


def test_window_keeps_to_few_episodes_at_a_time():
  of = episodes(*[10] * 12)
  epoch = sampler.IndexSampler([of], [1.0], seed=0, window=3).take(0, 120)[1]
  assert sorted(epoch) == list(range(120))
  groups = of[epoch].reshape(4, 30)
  assert all(len(set(group)) == 3 for group in groups)
  assert any((np.diff(group) != 0).sum() > 5 for group in groups)  # mixed, not one episode after the other
  assert set(groups[0]) != {0, 1, 2}


def test_known_sequence():
  """Pins the numbers, so that a resumed run of an older version keeps its order."""
  drawn = sampler.IndexSampler([episodes(6)], [1.0], seed=0).take(0, 12)[1]
  assert drawn.tolist() == [0, 2, 1, 5, 4, 3, 0, 1, 5, 3, 2, 4]


def test_errors():
  for bad in (
    lambda: sampler.IndexSampler([episodes(0)], [1.0], 0),
    lambda: sampler.IndexSampler([], [], 0),
    lambda: sampler.IndexSampler([episodes(3)], [0.0], 0),
    lambda: sampler.IndexSampler([episodes(3)], [1.0, 1.0], 0),
    lambda: sampler.IndexSampler([episodes(3)], [1.0], -1),
    lambda: sampler.IndexSampler([episodes(3)], [1.0], 0, window=0),
  ):
    with pytest.raises(ValueError, match=r"got .*; expected"):
      bad()
