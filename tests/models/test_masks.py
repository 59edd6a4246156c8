import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.models import masks

# [ s | v q | p p . | O O e ] with one padded prompt position
VALID = np.array([[1, 1, 1, 1, 1, 0, 1, 1, 1]], bool)
BLOCK = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1], bool)


def test_block_mask_is_the_drawing():
  allowed = np.asarray(masks.attention_mask(jnp.asarray(VALID), jnp.asarray(BLOCK), "block"))[0]
  drawn = """
    1 . . . . . . . .
    1 1 . . . . . . .
    1 1 1 . . . . . .
    1 1 1 1 . . . . .
    1 1 1 1 1 . . . .
    ? ? ? ? ? ? ? ? ?
    1 1 1 1 1 . 1 1 1
    1 1 1 1 1 . 1 1 1
    1 1 1 1 1 . 1 1 1"""
  rows = [line.split() for line in drawn.strip().split("\n")]
  for query, row in enumerate(rows):
    if "?" not in row:
      assert "".join("1" if x else "." for x in allowed[query]) == "".join(row)


def test_full_and_causal():
  full, causal = (
    np.asarray(masks.attention_mask(jnp.asarray(VALID), jnp.asarray(BLOCK), k))[0] for k in ("full", "causal")
  )
  assert (full == VALID).all()
  assert (causal == np.tri(9, dtype=bool) & VALID).all()


def test_positions_skip_padding():
  assert masks.positions(jnp.asarray(VALID)).tolist() == [[0, 1, 2, 3, 4, 4, 5, 6, 7]]


def test_unknown_kind():
  with pytest.raises(ValueError, match=r"got 'bidirectional'.*model\.mask"):
    masks.attention_mask(jnp.asarray(VALID), jnp.asarray(BLOCK), "bidirectional")
