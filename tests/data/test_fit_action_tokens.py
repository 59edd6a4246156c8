"""`python -m semanticvla_jax.data fit-tokenizer` on small datasets."""

import json

import numpy as np
import pytest
from toy_rlds import NAME

from semanticvla_jax import action_tokens
from semanticvla_jax.data import __main__ as command
from semanticvla_jax.data import fit_action_tokens


def test_the_command_writes_the_tokens_and_says_what_they_save(data_dir, tmp_path, capsys):
  words = ["fit-tokenizer", f"--data-dir={data_dir}", f"--name={NAME},tabletop_other", "--vocab=80", "--cache-dir="]
  first, again = tmp_path / "first.json", tmp_path / "again.json"
  for path in (first, again):
    command.main([*words, f"--out={path}"])
  assert first.read_bytes() == again.read_bytes()
  tokenizer, facts = action_tokens.load(first), json.loads(first.read_text(encoding="utf-8"))
  assert (tokenizer.chunk, tokenizer.action_dim, tokenizer.normalisation) == (8, 7, "bounds_q99")
  assert tokenizer.size <= 80 and facts["datasets"] == [NAME, "tabletop_other"]
  fit = facts["fit"]
  assert fit["chunks"] == 2 * (5 + 2 + 8 + 3)  # of episodes of 12, 9, 5, 15 and 10 frames
  assert fit["tokens_mean"] < fit["tokens_most"] <= 56 and fit["error_largest"] <= fit["error_bound"]
  assert f"tokens per chunk: mean {fit['tokens_mean']:.1f}, most {fit['tokens_most']}" in capsys.readouterr().out


def test_chunks_are_the_normalized_ones_of_training_spread_over_all_datasets(dataset, other):
  whole = fit_action_tokens.chunks([dataset, other], 8)
  some = fit_action_tokens.chunks([dataset, other], 8, most=4)
  assert whole.shape == (36, 8, 7) and np.abs(whole).max() <= 1
  np.testing.assert_array_equal(some, whole[[0, 11, 23, 35]])
  assert len(fit_action_tokens.chunks([dataset], 4, "pad")) == 12 + 9 + 5 + 15 + 10


def test_what_no_tokenizer_can_be_fitted_to(dataset, data_dir, tmp_path):
  with pytest.raises(ValueError, match="0 chunks to fit to"):
    fit_action_tokens.chunks([dataset], 8, most=0)
  place = [f"--data-dir={data_dir}", f"--name={NAME}", f"--out={tmp_path / 'tokens.json'}"]
  with pytest.raises(SystemExit, match="error: Action tokens: got 12 tokens of chunks of 8 .* at least 57 tokens"):
    command.main(["fit-tokenizer", *place, "--vocab=12"])
  assert not (tmp_path / "tokens.json").exists()
