"""FAST action tokens: a chunk of actions as a few integers (Pertsch et al. 2025, arXiv 2501.09747). Pure numpy.

    normalized actions [k a] ─ clip to [-1, 1] ─ DCT-II along time, orthonormal ─ round(scale · x)
      ─ coefficients in order of frequency, all dimensions of each [k·a] ─ byte-pair encoding ─► tokens

The symbols are all coefficients that clipped actions can have: |DCT(x)| ≤ √k, so that they cover every chunk.
Each is a token; a merge is one more token for two neighbors. Hence every sequence of tokens of the right total length
is a chunk. Merges are fitted to a dataset by `data.fit_action_tokens`; the model decodes by `models.fast`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from semanticvla_jax.errors import refuse

NAME = "action_tokens.json"  # of the file in a policy's folder of tokenizers
KIND = "fast"
SCALE = 10.0  # the paper's
FIXED_POINT = 1 << 18  # the inverse DCT is a product of integers: the same numbers on every device
MOST = 8000  # chunk · scale, for which its sums fit in 32 bits
_FIELDS = ("chunk", "action_dim", "scale", "normalisation", "merges")


@functools.lru_cache
def dct(k: int) -> Float[np.ndarray, "{k} {k}"]:
  """The orthonormal DCT-II over k steps, f64[frequency, step]; its transpose is its inverse."""
  frequency, step = np.arange(k)[:, None], np.arange(k)
  basis = np.cos(np.pi * (step + 0.5) * frequency / k) * math.sqrt(2 / k)
  basis[0] = math.sqrt(1 / k)
  return basis


def first_of_pairs(hits: Bool[np.ndarray, "*b n"]) -> Bool[np.ndarray, "*b n"]:
  """Of each run of hits the first, third, …: where a pair of two equal tokens overlaps with itself, from the left."""
  at = np.arange(hits.shape[-1])
  before = np.maximum.accumulate(np.where(hits, -1, at), axis=-1)  # the last position that is not a hit
  return hits & ((at - before) % 2 == 1)


@dataclasses.dataclass(frozen=True)
class ActionTokenizer:
  """A FAST codec of chunks of one length.

  Attributes:
    chunk, action_dim: k and a.
    normalisation: of the actions it was fitted to, a mode of data.statistics.
    merges: pairs of tokens, in order; pair i is token `symbols` + i, and its members come before it.
    scale: coefficients are rounded to 1 / scale.
  """

  chunk: int
  action_dim: int
  normalisation: str = "bounds_q99"
  merges: tuple[tuple[int, int], ...] = ()
  scale: float = SCALE

  @property
  def numbers(self) -> int:
    """Coefficients of a chunk, k·a: the most tokens that one can have."""
    return self.chunk * self.action_dim

  @property
  def largest(self) -> int:
    """The largest absolute coefficient of actions in [-1, 1]."""
    return int(np.round(self.scale * math.sqrt(self.chunk)))

  @property
  def symbols(self) -> int:
    """Different coefficients, the tokens before any merge: token t < symbols is the coefficient t - largest."""
    return 2 * self.largest + 1

  @property
  def size(self) -> int:
    """Number of tokens."""
    return self.symbols + len(self.merges)

  @property
  def error_bound(self) -> float:
    """How far a decoded number can be from the encoded one, clipped to [-1, 1].

    Each of k coefficients is off by at most 1/2 / scale, and a row of the inverse DCT has the length 1: √k / 2 / scale.
    Its fixed-point entries, and float32, add little (a share of k · scale / FIXED_POINT, 0.0003 for chunks of 8).
    """
    return math.sqrt(self.chunk) / 2 / self.scale * (1 + self.chunk * self.scale / FIXED_POINT) + 1e-6

  @functools.cached_property
  def pieces(self) -> tuple[tuple[int, ...], ...]:
    """The coefficients of each token."""
    found = [(symbol - self.largest,) for symbol in range(self.symbols)]
    for left, right in self.merges:
      found.append(found[left] + found[right])
    return tuple(found)

  @functools.cached_property
  def lengths(self) -> Int[np.ndarray, " size"]:
    """How many coefficients each token has, i32."""
    return np.array([len(piece) for piece in self.pieces], np.int32)

  @functools.cached_property
  def table(self) -> Int[np.ndarray, "size longest"]:
    """The coefficients of each token, i32, with 0 behind them."""
    longest = int(self.lengths.max())
    return np.array([piece + (0,) * (longest - len(piece)) for piece in self.pieces], np.int32)

  @functools.cached_property
  def inverse(self) -> Int[np.ndarray, "k k"]:
    """The inverse DCT i32[step, frequency] in fixed point."""
    return np.round(dct(self.chunk).T * FIXED_POINT).astype(np.int32)

  @property
  def unit(self) -> np.float32:
    """What a product of `inverse` and coefficients is multiplied by."""
    return np.float32(1 / (FIXED_POINT * self.scale))

  def coefficients(self, actions: Float[np.ndarray, "b k a"]) -> Int[np.ndarray, "b n"]:
    """Normalized actions, clipped to [-1, 1] → their coefficients, i32, in the order in which they are encoded.

    Raises:
      ValueError: chunks of another shape, or numbers that are not finite.
    """
    if actions.shape[1:] != (self.chunk, self.action_dim) or not np.isfinite(actions).all():
      raise refuse(
        "Action tokens",
        f"actions of shape {actions.shape[1:]}" + (", some not finite" if not np.isfinite(actions).all() else ""),
        f"finite ones of shape {(self.chunk, self.action_dim)}",
        "fit the tokenizer for this chunk: python -m semanticvla_jax.data fit-tokenizer",
      )
    clipped = np.clip(actions.astype(np.float64), -1, 1)
    rounded = np.round(self.scale * np.einsum("ft,bta->bfa", dct(self.chunk), clipped)).astype(np.int32)
    return rounded.clip(-self.largest, self.largest).reshape(len(actions), -1)

  def encode(self, actions: Float[np.ndarray, "b k a"]) -> Int[np.ndarray, "b n"]:
    """Normalized actions → tokens, i32, with -1 behind them; see `coefficients` for errors."""
    tokens = self.coefficients(actions) + self.largest
    while True:
      rank = self._ranks[tokens[:, :-1], tokens[:, 1:]]  # -1, the padding, is the table's last row
      best = rank.min(axis=1, keepdims=True, initial=len(self.merges))
      if (best == len(self.merges)).all():
        return tokens
      hits = first_of_pairs((rank == best) & (best < len(self.merges)))
      tokens[:, :-1] = np.where(hits, self.symbols + best, tokens[:, :-1])
      tokens[:, 1:][hits] = -1
      tokens = np.take_along_axis(tokens, np.argsort(tokens < 0, axis=1, kind="stable"), axis=1)

  def decode(self, tokens: Int[np.ndarray, "b n"]) -> Float[np.ndarray, "b k a"]:
    """Tokens, with -1 behind them → normalized actions, f32.

    Raises:
      ValueError: a row is not a whole chunk.
    """
    rows = [[number for token in row if token >= 0 for number in self.pieces[token]] for row in tokens.tolist()]
    if lengths := {len(row) for row in rows} - {self.numbers}:
      raise refuse("Action tokens", f"{sorted(lengths)} coefficients", f"{self.numbers}", "pass whole chunks")
    spectrum = np.array(rows, np.int32).reshape(-1, self.chunk, self.action_dim)
    return np.einsum("tf,bfa->bta", self.inverse, spectrum).astype(np.float32) * self.unit

  def labels(self, actions: Float[np.ndarray, "b k a"], vocab: int, stop: int) -> Int[np.ndarray, "b k*a+1"]:
    """Normalized actions → what a language model is to say: ids, `stop`, and -1 behind that; i32.

    Args:
      vocab: ids of its tokenizer; token t is the id vocab - 1 - t.
    """
    tokens = np.pad(self.encode(actions), ((0, 0), (0, 1)), constant_values=-1)
    ids = np.where(tokens < 0, -1, vocab - 1 - tokens)
    ids[np.arange(len(ids)), (tokens >= 0).sum(axis=1)] = stop
    return ids.astype(np.int32)

  @functools.cached_property
  def _ranks(self) -> Int[np.ndarray, "s s"]:
    """The number of the merge of two tokens, `len(merges)` where there is none; a last row and column for padding."""
    table = np.full((self.size + 1, self.size + 1), len(self.merges), np.int32)
    for i, (left, right) in enumerate(self.merges):
      table[left, right] = i
    return table

  def to_json(self) -> dict:
    """The tokenizer as JSON values."""
    values = {name: getattr(self, name) for name in _FIELDS}
    return {"kind": KIND} | values | {"merges": [[*pair] for pair in self.merges]}


def from_json(value: Any, where: str) -> ActionTokenizer:
  """What `to_json` gave, perhaps with additional keys. Raises ValueError for anything else."""
  if not isinstance(value, Mapping) or value.get("kind") != KIND or not {*_FIELDS} <= {*value}:
    got = sorted(value) if isinstance(value, Mapping) else type(value).__name__
    raise refuse(
      f"{where} holds no action tokens", got, f"kind={KIND!r} and {_FIELDS}", "write it with data fit-tokenizer"
    )
  whole = lambda x, least: isinstance(x, int) and not isinstance(x, bool) and x >= least  # noqa: E731
  fits = whole(value["chunk"], 1) and whole(value["action_dim"], 1) and isinstance(value["scale"], (int, float))
  fits = fits and 0 < value["scale"] <= MOST / value["chunk"]
  merges = value["merges"] if isinstance(value["merges"], Sequence) else [None]
  fits = fits and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in merges)
  if fits:
    pairs = tuple((left, right) for left, right in merges)
    sizes, scale = (value["chunk"], value["action_dim"]), float(value["scale"])
    made = ActionTokenizer(*sizes, str(value["normalisation"]), pairs, scale)
    known = range(made.symbols, made.size)  # a pair's members are tokens before it
    if all(whole(token, 0) and token < own for pair, own in zip(pairs, known) for token in pair):
      return made
  raise refuse(
    f"{where} is damaged",
    "sizes or merges that fit no tokenizer",
    f"chunk · scale up to {MOST}, and pairs of earlier tokens",
    "write it again with data fit-tokenizer",
  )


def load(path: str | os.PathLike) -> ActionTokenizer:
  """Reads the file of `data fit-tokenizer`, local or gs://.

  Raises:
    ValueError: no such file, or something else in it.
  """
  path = epath.Path(path).expanduser()
  if not path.is_file():
    raise refuse(f"No action tokens in {path}", "no file", NAME, "write it with data fit-tokenizer, or copy it there")
  try:
    value = json.loads(path.read_bytes())
  except ValueError as error:
    raise refuse(f"{path} is not JSON", f"{error}", "action tokens", "write it with data fit-tokenizer") from error
  return from_json(value, f"{path}")
