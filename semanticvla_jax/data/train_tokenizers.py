"""Makes the two small SentencePiece models in `tokenizers/` (`python -m semanticvla_jax.data.train_tokenizers`).

They let the tabletop environment run without any download, with the special ids of the real ones: `tokenizer.model`
as Llama (unk 0, <s> 1, </s> 2, a "▁" piece), `spiece.model` as SigLIP (pad 0, </s> 1, unk 2). Each word of WORDS and
of the prompt is one token; any other text is spelled in letters, or in bytes (byte fallback).
"""

from __future__ import annotations

import io
import string

from semanticvla_jax.data import text

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "white", "black", "brown", "gray", "cyan")
SHAPES = ("cube", "ball", "cylinder", "peg", "bowl", "plate", "slot", "block", "box")
RELATIONS = ("left", "right", "front", "behind", "of", "the", "between", "next", "to")
VERBS = ("pick", "up", "place", "put", "push", "insert", "into", "in", "on", "and", "then", "lift", "move")
_OTHERS = """
  a at it from with both all top bottom middle back inside side under near center out stack slide open close turn off
  drawer cabinet stove basket tray rack wooden table caddy compartment microwave moka pot mug pan bottle wine cheese
  cream butter milk soup tomato sauce alphabet salad dressing ketchup barbecue chocolate pudding juice cookie cookies
  ramekin book bbq contain first second small large onto over away toward edge corner bin cup ring star disk button
  press touch reach drop rotate swap other one two three is that which grey magenta far against around
"""
WORDS = (*COLORS, *SHAPES, *RELATIONS, *VERBS, *_OTHERS.split())
_PROMPT = ("In", "What", "action", "should", "robot", "take")


def train_tokenizers() -> dict[str, bytes]:
  """Makes both models; the same bytes each time for one version of sentencepiece. Keys are file names."""
  words = [f"▁{word}" for word in dict.fromkeys((*WORDS, *_PROMPT))]
  plain = [f"▁{word}" for word in dict.fromkeys(word.lower() for word in (*WORDS, *_PROMPT))]
  lower = string.ascii_lowercase + string.digits
  llama = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "remove_extra_whitespaces": False}
  siglip = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
  return {
    "tokenizer.model": _train([*words, "Out"], lower + string.ascii_uppercase + string.punctuation, llama),
    "spiece.model": _train(plain, lower, siglip),
  }


def _train(words: list[str], letters: str, special_ids: dict) -> bytes:
  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([" ".join(letters)]),
    model_writer=model,
    model_type="char",
    vocab_size=511,  # at most, so that with the padding id after it an embedding of 512 rows is enough
    hard_vocab_limit=False,
    user_defined_symbols=words,
    required_chars=letters,
    byte_fallback=True,
    character_coverage=1.0,
    normalization_rule_name="identity",
    num_threads=1,
    minloglevel=2,
    **special_ids,
  )
  return model.getvalue()


if __name__ == "__main__":
  for name, model in train_tokenizers().items():
    (text.EMBEDDED / name).write_bytes(model)
