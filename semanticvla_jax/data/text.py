"""From an instruction to fixed-length ids: the prompt of the language model and the text of the ID-Pruner."""

from __future__ import annotations

import os
import pathlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Int32

from semanticvla_jax.errors import refuse

PRUNER_TEXTS = ("question", "prompt")
# Words of the ID-Pruner's question that name nothing to look at, for `Tokenizers.stop`.
STOP_WORDS = (
  *("what", "action", "should", "the", "robot", "take", "to", "in", "out", "on", "into", "of", "and", "it"),
  *("pick", "up", "place", "put", "push", "insert"),
)
EMBEDDED = pathlib.Path(__file__).parent / "tokenizers"  # small models for the tabletop environment, no download

_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"), " ")  # white space to the eye, not to str.split
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tidy(instruction: str) -> str:
  """An instruction in the one form that every part reads: runs of Unicode white space are a blank, none at the ends.

  Line ends, no-break spaces, zero-width spaces and byte order marks count as white space.
  """
  return " ".join(instruction.translate(_INVISIBLE).split())


def question(instruction: str) -> str:
  """The sentence the release gives the ID-Pruner in training (`datasets.py:78`)."""
  return f"What action should the robot take to {tidy(instruction).lower()}?"


def prompt(instruction: str) -> str:
  """The language model's prompt; in evaluation the release gives it to the ID-Pruner too (`openvla_utils.py:800`)."""
  return f"In: {question(instruction)}\nOut:"


def canonical(text: str) -> str:
  """Lower-cases, strips ASCII punctuation and collapses white space, as SigLIP's tokenizer does."""
  return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()


def short(sentence: str, most: int = 80) -> str:
  """A sentence as messages quote it: cut where it is long."""
  return repr(sentence) if len(sentence) <= most else f"{sentence[:most]!r}… ({len(sentence):,} characters)"


class Tokenizers(NamedTuple):
  """The tokenizers of one policy, with the lengths it was compiled for.

  Attributes:
    language: SentencePiece model of the language model (Llama: 32,000 pieces).
    siglip: SentencePiece model of the SigLIP text tower, or None for a policy without an ID-Pruner.
    prompt_length: t.
    instruction_length: m; the released text tower has 64 positions.
    pruner_text: "question" (released training) or "prompt" (released evaluation: also contains the words in and out).
  """

  language: Any
  siglip: Any | None
  prompt_length: int = 64
  instruction_length: int = 64
  pruner_text: str = "question"

  @property
  def pad_id(self) -> int:
    """The id after the last piece, 32000 for Llama: the model's embedding needs at least pad_id + 1 rows."""
    return self.language.vocab_size()

  def prompt(self, instructions: Sequence[str]) -> tuple[Int32[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Tokenizes prompts: `<s>`, the prompt, the empty token ("▁", 29871 for Llama), then padding, masked False.

    These are the ids the release predicts from, in training and in evaluation (`modeling_prismatic.py:1102-1105`).

    Raises:
      ValueError: a prompt does not fit.
    """
    empty = self.language.piece_to_id("▁")
    rows = []
    for instruction in instructions:
      ids = [self.language.bos_id(), *self.language.encode(prompt(instruction))]
      rows.append(ids if ids[-1] == empty else [*ids, empty])
    return _pad(rows, self.prompt_length, self.pad_id, instructions, "prompt")

  def instruction(self, instructions: Sequence[str]) -> tuple[Int32[np.ndarray, "b m"], Bool[np.ndarray, "b m"]]:
    """Tokenizes the ID-Pruner's text: the sentence, `</s>`, padding; mask = ids != `</s>`.

    Padding is `</s>` too (id 1), so the mask leaves out the end of the sentence with the padding, as in the release
    (`mm_sampler.py:109`).

    Raises:
      ValueError: a sentence does not fit, or this policy has no SigLIP tokenizer.
    """
    if self.siglip is None:
      raise refuse(
        "No SigLIP tokenizer",
        "an instruction for the ID-Pruner",
        "spiece.model in the checkpoint folder",
        "copy it there from google/siglip-so400m-patch14-384",
      )
    write = question if self.pruner_text == "question" else prompt
    end = self.siglip.eos_id()
    rows = [[*self.siglip.encode(canonical(write(instruction))), end] for instruction in instructions]
    ids, _ = _pad(rows, self.instruction_length, end, instructions, "instruction")
    return ids, ids != end

  def stop(self, words: Sequence[str] = STOP_WORDS) -> tuple[int, ...]:
    """The ids of words that cannot be cues, for `model.cue_stop`; words of several pieces are left out.

    Raises:
      ValueError: this policy has no SigLIP tokenizer.
    """
    if self.siglip is None:
      raise refuse("Stop words", "a policy without SigLIP's tokenizer", "one with an ID-Pruner", "leave cue_stop at ()")
    pieces = [self.siglip.encode(canonical(word)) for word in words]
    return tuple(sorted({ids[0] for ids in pieces if len(ids) == 1}))


def files(folder: str | os.PathLike) -> dict[str, epath.Path]:
  """{name: path} of the SentencePiece files of a folder, local or gs://; empty where it does not exist."""
  return {path.name: path for path in sorted(epath.Path(folder).expanduser().glob("*.model"))}


def load(
  source: str | os.PathLike | Mapping[str, epath.Path] = EMBEDDED,
  *,
  prompt_length: int = 64,
  instruction_length: int = 64,
  pruner_text: str = "question",
) -> Tokenizers:
  """Loads `tokenizer.model` (language model) and, where there is one, `spiece.model` (SigLIP).

  Args:
    source: their folder, local or gs://; or {name: path}.
    prompt_length, instruction_length, pruner_text: see Tokenizers.

  Raises:
    ValueError: `tokenizer.model` is missing or has no "▁" piece, `spiece.model` has an end-of-sentence id other than 1,
      or `pruner_text` is unknown.
  """
  found = source if isinstance(source, Mapping) else files(source)
  if pruner_text not in PRUNER_TEXTS:
    raise refuse("Unknown pruner text", f"{pruner_text!r}", f"one of {PRUNER_TEXTS}", "fix the config")
  if "tokenizer.model" not in found:
    raise refuse(
      "No tokenizer",
      f"{sorted(found) or 'none'} in {'the files passed' if source is found else source}",
      "tokenizer.model (the SentencePiece file, not tokenizer.json)",
      "copy it from the base checkpoint",
    )
  language = _sentencepiece(found["tokenizer.model"])
  if language.is_unknown(language.piece_to_id("▁")) or language.bos_id() < 0:
    raise refuse(
      f"{found['tokenizer.model']} is not a Llama tokenizer",
      "no '▁' piece or no <s>",
      "both",
      "copy the file from the base checkpoint",
    )
  siglip = _sentencepiece(found["spiece.model"]) if "spiece.model" in found else None
  if siglip is not None and siglip.eos_id() != 1:
    raise refuse(
      f"{found['spiece.model']} is not a SigLIP tokenizer",
      f"</s> = {siglip.eos_id()}",
      "1",
      "copy the file from the SigLIP checkpoint",
    )
  return Tokenizers(language, siglip, prompt_length, instruction_length, pruner_text)


def _sentencepiece(path: epath.Path) -> Any:
  import sentencepiece

  return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


def _pad(
  rows: list[list[int]], length: int, value: int, instructions: Sequence[str], what: str
) -> tuple[Int32[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
  ids, mask = np.full((len(rows), length), value, np.int32), np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    if len(row) > length:
      raise refuse(
        "Instruction does not fit",
        f"{len(row)} {what} tokens for {short(instructions[i])}",
        f"at most {length}",
        f"raise {what}_length or shorten the instruction",
      )
    ids[i, : len(row)], mask[i, : len(row)] = row, True
  return ids, mask
