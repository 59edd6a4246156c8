"""Fits FAST's action tokens to datasets: byte-pair encoding over the DCT coefficients of their chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from semanticvla_jax.action_tokens import MOST, SCALE, ActionTokenizer, first_of_pairs
from semanticvla_jax.data import rlds, statistics, trajectories
from semanticvla_jax.errors import refuse

VOCAB = 1024  # tokens, the paper's
EXAMPLES = 20_000  # chunks that are looked at, at most


def chunks(
  datasets: Sequence[rlds.Dataset], chunk: int, trajectory_end: str = "cut", most: int = EXAMPLES
) -> Float[np.ndarray, "n k a"]:
  """Normalized chunks of training examples, spread evenly over all datasets; f32, at most `most` of them.

  Raises:
    ValueError: datasets of different robots or normalizations, or without an example.
  """
  if most < 1:
    raise refuse("Action tokens", f"{most} chunks to fit to", "at least 1", "raise --examples")
  kinds = {one.name: (len(one.spec.absolute), one.spec.mode) for one in datasets}
  if len({*kinds.values()}) > 1:
    raise refuse(
      "Action tokens", f"(action dims, normalisation) {kinds}", "the same for all", "fit a tokenizer for each"
    )
  starts = [dataset.starts(chunk, trajectory_end) for dataset in datasets]
  total = sum(map(len, starts))
  chosen, first, found = np.linspace(0, total - 1, min(most, total)).astype(int), 0, []
  for dataset, frames in zip(datasets, starts):
    frames, first = frames[chosen[(chosen >= first) & (chosen < first + len(frames))] - first], first + len(frames)
    absolute = np.array(dataset.spec.absolute)
    actions, _ = trajectories.windows(dataset.actions, frames, dataset.ends[frames], chunk, absolute)
    found.append(statistics.normalize(actions, dataset.statistics.action, mode=dataset.spec.mode))
  return np.concatenate(found)


def fit(
  actions: Float[np.ndarray, "n k a"], normalisation: str, vocab: int = VOCAB, scale: float = SCALE
) -> ActionTokenizer:
  """A tokenizer of at most `vocab` tokens whose merges shorten these chunks most, greedily; a function of them alone.

  The most frequent pair of neighbors becomes a token, of equally frequent ones that of the smallest tokens, until there
  are `vocab`, or no pair occurs twice (as the published fit). Merges never cross from one chunk to the next.

  Raises:
    ValueError: a chunk or vocabulary that no tokenizer can have.
  """
  _, k, a = actions.shape
  plain = ActionTokenizer(k, a, normalisation, scale=scale)
  if not (0 < scale <= MOST / k and vocab >= plain.symbols):
    raise refuse(
      "Action tokens",
      f"{vocab} tokens of chunks of {k} at scale {scale:g}",
      f"chunk · scale up to {MOST}, and at least {plain.symbols} tokens, one for each coefficient",
      "change --vocab, --chunk or --scale",
    )
  end = vocab  # between chunks
  tokens = np.pad(plain.coefficients(actions) + plain.largest, ((0, 0), (0, 1)), constant_values=end).ravel()
  merges = []
  while plain.symbols + len(merges) < vocab:
    pairs = tokens[:-1] * (vocab + 1) + tokens[1:]
    counts = np.bincount(pairs, minlength=(vocab + 1) ** 2).reshape(vocab + 1, vocab + 1)[:vocab, :vocab]
    left, right = divmod(int(counts.argmax()), vocab)
    if counts[left, right] < 2:
      break
    hits = pairs == left * (vocab + 1) + right
    hits = np.append(first_of_pairs(hits) if left == right else hits, False)
    tokens[hits] = plain.symbols + len(merges)
    tokens = tokens[~np.roll(hits, 1)]
    merges.append((left, right))
  return dataclasses.replace(plain, merges=tuple(merges))


def summary(tokenizer: ActionTokenizer, actions: Float[np.ndarray, "n k a"]) -> dict:
  """What a tokenizer makes of chunks, as JSON values: tokens per chunk, compression, errors in normalized units."""
  tokens = tokenizer.encode(actions)
  spoken: Int[np.ndarray, " n"] = (tokens >= 0).sum(axis=1)
  error = np.abs(tokenizer.decode(tokens) - actions.clip(-1, 1))
  return {
    "chunks": len(actions),
    "vocabulary": tokenizer.size,
    "tokens_mean": round(float(spoken.mean()), 3),
    "tokens_most": int(spoken.max()),
    "numbers": tokenizer.numbers,
    "compression": round(float(tokenizer.numbers / spoken.mean()), 3),
    "error_mean": round(float(error.mean()), 5),
    "error_largest": round(float(error.max()), 5),
    "error_bound": round(tokenizer.error_bound, 5),
  }


def describe(found: dict) -> str:
  """A summary in plain text."""
  return (
    f"{found['vocabulary']} tokens, fitted to {found['chunks']} chunks of {found['numbers']} numbers\n"
    f"tokens per chunk: mean {found['tokens_mean']:.1f}, most {found['tokens_most']}; "
    f"{found['compression']:.2f} times fewer than numbers\n"
    f"error of encoding and decoding in [-1, 1]: mean {found['error_mean']:.4f}, "
    f"largest {found['error_largest']:.4f}, bound {found['error_bound']:.4f}"
  )
