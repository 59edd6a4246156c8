"""FAST's codec on the host: what is lost, what the pairs merge, and the file."""

import itertools
import json

import numpy as np
import pytest

from semanticvla_jax import action_tokens
from semanticvla_jax.action_tokens import ActionTokenizer
from semanticvla_jax.data import fit_action_tokens


def smooth(n=300, k=8, seed=0):
  """Chunks that begin anywhere and move at a steady pace, with a gripper that is 0 or 1."""
  rng = np.random.default_rng(seed)
  start, pace = rng.normal(0, 0.4, (n, 1, 7)), rng.normal(0, 0.05, (n, 1, 7))
  actions = (start + pace * np.arange(k)[:, None]).clip(-1, 1).astype(np.float32)
  actions[:, :, 6] = rng.integers(0, 2, (n, 1))
  return actions


@pytest.mark.parametrize("k, a", [(1, 7), (8, 7), (25, 14)])
def test_any_chunk_comes_back_within_the_bound(k, a):
  rng = np.random.default_rng(k)
  rough = np.concatenate([rng.uniform(-1.2, 1.2, (50, k, a)), rng.choice([-1, 1], (50, k, a))]).astype(np.float32)
  tokenizer = ActionTokenizer(k, a)
  error = np.abs(tokenizer.decode(tokenizer.encode(rough)) - rough.clip(-1, 1)).max()
  assert 0.05 * np.sqrt(k) <= tokenizer.error_bound < 0.0501 * np.sqrt(k) + 1e-3
  assert 0.01 < error <= tokenizer.error_bound


def test_a_constant_chunk_is_its_mean_and_nothing_else():
  tokenizer = ActionTokenizer(8, 2)
  found = tokenizer.coefficients(np.full((1, 8, 2), [0.5, -1], np.float32))[0]
  assert found.tolist() == [14, -28] + [0] * 14  # 10 · √8 · 0.5 = 14.1, and no frequency above


def test_encoding_merges_as_one_pair_after_the_other_would():
  actions = smooth()
  tokenizer = fit_action_tokens.fit(actions, "bounds_q99", vocab=200)
  ranks = {pair: i for i, pair in enumerate(tokenizer.merges)}

  def one_by_one(row):
    while found := [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(row)) if pair in ranks]:
      rank, at = min(found)
      row = [*row[:at], tokenizer.symbols + rank, *row[at + 2 :]]
    return row

  rough = np.random.default_rng(1).uniform(-1, 1, (20, 8, 7)).astype(np.float32)
  for chunks in (actions[:50], rough):
    symbols = (tokenizer.coefficients(chunks) + tokenizer.largest).tolist()
    encoded = [[token for token in row if token >= 0] for row in tokenizer.encode(chunks).tolist()]
    assert encoded == [one_by_one(row) for row in symbols]


def test_fitted_tokens_say_the_same_in_fewer_and_are_a_function_of_the_data():
  actions = smooth()
  plain, fitted = ActionTokenizer(8, 7), fit_action_tokens.fit(actions, "bounds_q99", vocab=300)
  assert fitted == fit_action_tokens.fit(actions, "bounds_q99", vocab=300) and fitted.size == 300
  np.testing.assert_array_equal(fitted.decode(fitted.encode(actions)), plain.decode(plain.encode(actions)))
  found = fit_action_tokens.summary(fitted, actions)
  assert found["tokens_mean"] < 28 and found["tokens_most"] < 56 == found["numbers"]
  assert found["error_largest"] <= found["error_bound"]
  most = "zeros" if (0,) * 16 in {piece[-16:] for piece in fitted.pieces} else "something else"
  assert most == "zeros", "the frequencies that a steady movement lacks"


def test_labels_end_with_stop():
  tokenizer = fit_action_tokens.fit(smooth(), "bounds_q99", vocab=100)
  actions = smooth(5, seed=3)
  labels, tokens = tokenizer.labels(actions, 448, 2), tokenizer.encode(actions)
  assert labels.shape == (5, 57) and labels.dtype == np.int32
  for row, said in zip(labels, tokens):
    own = said[said >= 0]
    assert row.tolist() == [*(447 - own).tolist(), 2] + [-1] * (56 - len(own))


def test_the_file_gives_the_same_tokenizer_and_nothing_else_is_read(tmp_path):
  tokenizer = fit_action_tokens.fit(smooth(), "bounds", vocab=90)
  path = tmp_path / "action_tokens.json"
  path.write_text(json.dumps(tokenizer.to_json()), encoding="utf-8")
  assert action_tokens.load(path) == tokenizer
  good = tokenizer.to_json()
  bad = {
    "holds no action tokens": [[], {}, good | {"kind": "bins"}],
    "is damaged": [good | {"chunk": 0}, good | {"merges": [[0, 57]]}, good | {"merges": 3}, good | {"scale": 1e6}],
  }
  for words, values in bad.items():
    for value in values:
      path.write_text(json.dumps(value), encoding="utf-8")
      with pytest.raises(ValueError, match=words):
        action_tokens.load(path)
  path.write_text("{", encoding="utf-8")
  with pytest.raises(ValueError, match="is not JSON"):
    action_tokens.load(path)
  with pytest.raises(ValueError, match=r"No action tokens in .*; expected action_tokens.json"):
    action_tokens.load(tmp_path / "other.json")


def test_chunks_that_no_tokenizer_encodes():
  tokenizer = ActionTokenizer(8, 7)
  with pytest.raises(ValueError, match=r"got actions of shape \(4, 7\); expected finite ones of shape \(8, 7\)"):
    tokenizer.encode(np.zeros((1, 4, 7), np.float32))
  with pytest.raises(ValueError, match="some not finite"):
    tokenizer.encode(np.full((1, 8, 7), np.nan, np.float32))
  with pytest.raises(ValueError, match=r"got \[1\] coefficients; expected 56"):
    tokenizer.decode(np.array([[3, -1]]))
  with pytest.raises(ValueError, match="at least 57 tokens, one for each coefficient"):
    fit_action_tokens.fit(smooth(), "bounds_q99", vocab=56)
