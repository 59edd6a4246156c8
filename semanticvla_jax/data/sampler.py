"""Which frame is the n-th training example: a pure function of the seed, so that training resumes anywhere.

Counter-based random numbers (Philox) give each epoch its own permutation of the candidate frames and each block of
examples its choice of datasets. Nothing depends on the number of hosts, and nothing has to be replayed to resume.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt64

from semanticvla_jax.errors import refuse

_PERMUTATION, _CHOICE = 0, 1  # random streams of one seed; images.py and rlds.py have the next two
_BLOCK = 4096  # examples whose datasets are drawn together


class IndexSampler:
  """An endless sequence of (dataset, candidate) pairs, addressable at any position.

  Each dataset is passed through in epochs, every candidate once an epoch, newly permuted. With several datasets, each
  example first draws its dataset with the given probabilities, as `sample_from_datasets` of the release does.

  Memory: 8 bytes a candidate for each permutation in use (two a dataset at most), plus `episodes`.
  """

  def __init__(
    self,
    episodes: Sequence[Int[np.ndarray, " _"]],
    probabilities: Sequence[float],
    seed: int,
    window: int | None = None,
  ):
    """Fixes the sequence.

    Args:
      episodes: per dataset, the episode (0, 1, ...) of each candidate frame.
      probabilities: per dataset, relative.
      seed: not negative.
      window: None permutes all candidates of a dataset. A number permutes the episodes instead and then the candidates
        inside each run of `window` episodes, so that reading touches few episodes at a time.

    Raises:
      ValueError: a dataset without candidates, a probability that is not positive, a negative seed, or a window
        below 1.
    """
    if not episodes or any(len(of) == 0 for of in episodes):
      raise refuse(
        "Nothing to order",
        f"{[len(of) for of in episodes]} candidates",
        "some in every dataset",
        "leave the empty one out",
      )
    if len(probabilities) != len(episodes) or not all(p > 0 for p in probabilities):
      raise refuse("Bad weights", f"{list(probabilities)}", f"{len(episodes)} positive numbers", "fix them")
    if seed < 0 or (window is not None and window < 1):
      raise refuse("Bad order", f"seed={seed}, window={window}", "seed >= 0 and window >= 1 or None", "fix them")
    self._episodes, self._seed, self._window = tuple(episodes), seed, window
    self._edges = np.cumsum(probabilities)[:-1] / np.sum(probabilities)
    self._before = [np.zeros(len(episodes), np.int64)]  # examples of each dataset before each block
    self._permutation = functools.lru_cache(2 * len(episodes))(self._permutation)
    self._block = functools.lru_cache(2)(self._block)

  def take(self, first: int, count: int) -> tuple[Int[np.ndarray, " count"], Int[np.ndarray, " count"]]:
    """Returns the datasets and the candidates of examples first, ..., first + count - 1."""
    blocks = range(first // _BLOCK, (first + count - 1) // _BLOCK + 1)
    start = blocks[0] * _BLOCK
    parts = zip(*(self._block(block) for block in blocks), strict=True)
    datasets, candidates = (np.concatenate(part)[first - start : first - start + count] for part in parts)
    return datasets, candidates

  def _bits(self, stream: int, count: int, *counter: int) -> UInt64[np.ndarray, " count"]:
    words = [0, *counter, 0, 0]
    return np.random.Philox(key=[self._seed, stream], counter=words[:4]).random_raw(count)

  def _choice(self, block: int) -> Int[np.ndarray, " n"]:
    if not len(self._edges):
      return np.zeros(_BLOCK, np.int64)
    uniform = (self._bits(_CHOICE, _BLOCK, block) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(self._edges, uniform, side="right")

  def _block(self, block: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    # How often each dataset was drawn before this block: its place in its own sequence of shuffled epochs. A resumed
    # run repeats only these draws of datasets, not those of frames.
    while len(self._before) <= block:
      drawn = np.bincount(self._choice(len(self._before) - 1), minlength=len(self._episodes))
      self._before.append(self._before[-1] + drawn)
    datasets = self._choice(block)
    candidates = np.empty(_BLOCK, np.int64)
    for dataset, size in enumerate(map(len, self._episodes)):
      rows = np.flatnonzero(datasets == dataset)
      position = self._before[block][dataset] + np.arange(len(rows))
      for epoch in np.unique(position // size):  # a small dataset may be passed through several times in one block
        here = position // size == epoch
        candidates[rows[here]] = self._permutation(dataset, int(epoch))[position[here] % size]
    return datasets, candidates

  def _permutation(self, dataset: int, epoch: int) -> Int[np.ndarray, " n"]:
    episodes = self._episodes[dataset]
    bits = self._bits(_PERMUTATION, len(episodes), epoch, dataset)
    if self._window is None:
      return np.argsort(bits, kind="stable")
    # Episodes are shuffled and taken in groups of `window`, frames are shuffled within a group, whose images fit the
    # cache.
    shuffled = np.argsort(self._bits(_PERMUTATION, int(episodes.max()) + 1, epoch, dataset, 1), kind="stable")
    rank = np.empty_like(shuffled)
    rank[shuffled] = np.arange(len(shuffled))
    return np.lexsort((bits, rank[episodes] // self._window))
