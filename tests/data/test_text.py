"""The prompt, the two tokenizers and their small embedded models."""

import shutil

import numpy as np
import pytest

from semanticvla_jax.data import text, train_tokenizers

INSTRUCTION = "Pick up the red cube and place it on the blue plate"


@pytest.fixture(scope="module")
def tokenizers():
  return text.load(prompt_length=48, instruction_length=32)


def test_templates():
  assert text.question("Open the Drawer") == "What action should the robot take to open the drawer?"
  assert text.prompt("Open the Drawer") == "In: What action should the robot take to open the drawer?\nOut:"
  assert text.canonical("  Put, the\tRED-cube... on  it?\nNow! ") == "put the redcube on it now"


def test_prompt_ids(tokenizers):
  ids, mask = tokenizers.prompt([INSTRUCTION, "lift the peg"])
  assert ids.shape == mask.shape == (2, 48) and ids.dtype == np.int32
  language = tokenizers.language
  pieces = [language.id_to_piece(int(i)) for i in ids[0][mask[0]]]
  words = "▁What ▁action ▁should ▁the ▁robot ▁take ▁to ▁pick ▁up ▁the ▁red ▁cube ▁and ▁place ▁it ▁on ▁the ▁blue ▁plate"
  want = f"<s> ▁In : {words} ? <0x0A> Out : ▁"
  assert pieces == want.split()
  assert ids[0, 0] == 1
  for row in range(2):
    n = mask[row].sum()
    assert mask[row, :n].all() and not mask[row, n:].any()
    assert (ids[row, n:] == tokenizers.pad_id).all()
    assert ids[row, n - 1] == language.piece_to_id("▁")
  assert tokenizers.pad_id == language.vocab_size() < 512


def test_instruction_ids_mask_out_the_end_with_the_padding(tokenizers):
  ids, mask = tokenizers.instruction([INSTRUCTION])
  words = text.canonical(text.question(INSTRUCTION)).split()
  assert [tokenizers.siglip.id_to_piece(int(i)) for i in ids[0][mask[0]]] == [f"▁{word}" for word in words]
  n = len(words)
  assert (ids[0, n:] == 1).all() and not mask[0, n:].any()  # </s> and padding are the same id


def test_pruner_text(tokenizers):
  prompt = tokenizers._replace(pruner_text="prompt")
  ids, mask = prompt.instruction(["lift the peg"])
  pieces = [tokenizers.siglip.id_to_piece(int(i)) for i in ids[0][mask[0]]]
  assert " ".join(pieces) == "▁in ▁what ▁action ▁should ▁the ▁robot ▁take ▁to ▁lift ▁the ▁peg ▁out"


def test_words_are_single_tokens_and_anything_else_can_be_written(tokenizers):
  for model in (tokenizers.language, tokenizers.siglip):
    split = [word for word in train_tokenizers.WORDS if len(model.encode(f"the {word} the")) != 3]
    assert not split
    strange = "zigzag é ☃ 42"
    assert model.decode(model.encode(strange)) == strange
    assert model.unk_id() not in model.encode(strange)


def test_special_ids(tokenizers):
  language, siglip = tokenizers.language, tokenizers.siglip
  assert (language.unk_id(), language.bos_id(), language.eos_id()) == (0, 1, 2)
  assert siglip.eos_id() == 1
  assert siglip.vocab_size() <= 512


def test_training_is_deterministic_and_made_the_shipped_files():
  models = train_tokenizers.train_tokenizers()
  assert models == train_tokenizers.train_tokenizers()
  import sentencepiece

  for name, model in models.items():
    made = sentencepiece.SentencePieceProcessor(model_proto=model)
    shipped = sentencepiece.SentencePieceProcessor(model_file=str(text.EMBEDDED / name))
    pieces = [[one.id_to_piece(i) for i in range(one.vocab_size())] for one in (made, shipped)]
    assert pieces[0] == pieces[1]


def test_errors(tokenizers, tmp_path):
  with pytest.raises(ValueError, match=r"got 67 prompt tokens for 'put put.*expected at most 48; raise prompt_length"):
    tokenizers.prompt(["put " * 51 + "it"])
  with pytest.raises(ValueError, match="expected at most 32; raise instruction_length"):
    tokenizers.instruction(["put " * 51 + "it"])
  with pytest.raises(ValueError, match="No tokenizer: got"):
    text.load(tmp_path)
  with pytest.raises(ValueError, match="Unknown pruner text"):
    text.load(pruner_text="answer")
  shutil.copy(text.EMBEDDED / "tokenizer.model", tmp_path)
  alone = text.load(tmp_path)
  assert alone.siglip is None
  with pytest.raises(ValueError, match="No SigLIP tokenizer"):
    alone.instruction(["lift it"])
  shutil.copy(text.EMBEDDED / "tokenizer.model", tmp_path / "spiece.model")
  with pytest.raises(ValueError, match="got </s> = 2; expected 1"):
    text.load(tmp_path)
  shutil.copy(text.EMBEDDED / "spiece.model", tmp_path / "tokenizer.model")
  with pytest.raises(ValueError, match="is not a Llama tokenizer"):
    text.load(tmp_path)


@pytest.mark.parametrize("space", ["  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2009 ", "\u2028", "\u200b", "\x0b"])
def test_white_space_of_any_kind_is_one_blank_for_both_towers(tokenizers, space):
  plain = "pick up the red cube"
  spaced = space + space.join(plain.split()) + space
  assert text.tidy(spaced) == plain and text.prompt(spaced) == text.prompt(plain)
  for one, other in ((tokenizers.prompt, tokenizers.prompt), (tokenizers.instruction, tokenizers.instruction)):
    for a, b in zip(one([spaced]), other([plain])):
      np.testing.assert_array_equal(a, b)
  assert text.tidy("\ufeffpick  up.") == "pick up." and text.tidy(" \u200b\n") == ""


def test_a_long_sentence_is_not_quoted_whole(tokenizers):
  with pytest.raises(ValueError, match="Instruction does not fit") as error:
    tokenizers.prompt(["go left " * 100_000])
  assert len(str(error.value)) < 400 and "(800,000 characters)" in str(error.value)
