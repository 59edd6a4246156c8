"""Which words become cues under other ways to choose them."""

from collections import Counter

import policies
import pytest

from semanticvla_jax.data import text
from semanticvla_jax.evaluate import cues
from semanticvla_jax.evaluate.__main__ import main

PROMPTS = ("pick up the red cube", "put the ball in the bowl")


def test_the_share_of_words_that_name_something():
  said = cues.words_text(Counter({"the": 5, "red": 2, "cube": 1, "bowl": 1, "reddish": 1}))
  assert said.startswith("40% of cues name a color, shape or container (the 50%, red 20%")


def test_stop_words_are_no_cues():
  policy = policies.policy()
  observations = [policies.observation(i, prompt=prompt) for i, prompt in enumerate(PROMPTS)]
  changed = cues.chosen(policy.variant(**cues.ROWS["stop words, max"](policy)), observations)
  assert sum(changed.values()) == sum(cues.chosen(policy, observations).values())
  naming = sum(count for word, count in changed.items() if cues.NAMING.fullmatch(word))
  assert naming >= 0.6 * sum(changed.values()), changed  # two or three of three words name something


def test_ids_of_stop_words():
  tokenizers = policies.tokenizers()
  ids = tokenizers.stop(("the", "cube", "The", "zyzzyva"))
  assert [tokenizers.siglip.id_to_piece(i).replace("\u2581", "") for i in ids] in (["the", "cube"], ["cube", "the"])
  assert 10 < len(tokenizers.stop()) <= len(text.STOP_WORDS)
  with pytest.raises(ValueError, match="Stop words: got a policy without SigLIP's tokenizer"):
    tokenizers._replace(siglip=None).stop()


def test_a_policy_that_is_not_there():
  with pytest.raises(SystemExit, match="error: .*nowhere"):
    main(["cues", "--policy=nowhere"])
