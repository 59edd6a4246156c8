"""FAST's action tokens in the model: what each id means, and what was said as actions (arXiv 2501.09747).

The last ids of the language model's tokenizer are the tokens, as OpenVLA's bins are: token t is the id vocab - 1 - t.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.action_tokens import ActionTokenizer
from semanticvla_jax.errors import refuse

STOP = 2  # </s>
SPECIAL = 3  # ids of <unk>, <s> and </s>, which no action token may take
CODECS = ("bins", "fast")


def from_config(c: Mapping[str, Any]) -> ActionTokenizer | None:
  """The codec of a resolved model config that passed `check`, None for OpenVLA's bins or a coupler.

  "fast" alone has no merges, a token for each coefficient: whoever knows the fitted tokenizer sets that as the field.
  """
  if c["codec"] == "bins":
    return None
  return ActionTokenizer(c["chunk"], c["action_dim"]) if c["codec"] == "fast" else c["codec"]


def check(c: Mapping[str, Any], extra_rows: int) -> None:
  """Raises ValueError unless codec, decoding and sizes of a resolved model config fit together.

  Args:
    extra_rows: of the language model's embedding, beyond the ids of the tokenizer.
  """
  codec, decoding = c["codec"], c["decoding"]
  if codec not in CODECS and not isinstance(codec, ActionTokenizer):
    _refuse("codec", codec, f"one of {CODECS}, or a fitted ActionTokenizer", "set model.codec to one of them")
  if codec == "bins":
    if decoding == "constrained":
      _refuse("decoding", decoding, "another one with codec='bins', whose chunks are always whole", "use 'greedy'")
    return
  if c["coupler"] is not None:
    _refuse("codec", "fast", f"'bins' with coupler={c['coupler']!r}, which speaks no tokens", "set model.coupler=None")
  if decoding not in ("constrained", "greedy"):
    _refuse("decoding", decoding, "'constrained' or 'greedy' with codec='fast'", "set model.decoding to one of them")
  own = from_config(c)
  have, want = (own.chunk, own.action_dim), (c["chunk"], c["action_dim"])
  if have != want:
    raise refuse(
      "model config",
      f"action tokens of chunks {have}",
      f"{want} (model.chunk, model.action_dim)",
      "fit them for this chunk: python -m semanticvla_jax.data fit-tokenizer --chunk",
    )
  room = c["variant"]["llm"]["vocab"] - extra_rows - SPECIAL
  if own.size > room:
    raise refuse(
      "model config",
      f"{own.size} action tokens",
      f"at most {room}, the language model's ids but the special ones",
      "fit fewer (data fit-tokenizer --vocab), or take a larger variant",
    )


def _refuse(field: str, got: Any, expected: str, remedy: str) -> None:
  raise refuse("model config", f"{field}={got!r}", expected, remedy)


def id_lengths(tokenizer: ActionTokenizer, vocab: int, rows: int) -> Int[Array, " rows"]:
  """How many coefficients each id has, 0 for all that are not action tokens; `rows` are those of the embedding."""
  found = np.zeros(rows, np.int32)
  found[vocab - tokenizer.size : vocab] = tokenizer.lengths[::-1]
  return jnp.asarray(found)


def actions(
  ids: Int[Array, "b m"], tokenizer: ActionTokenizer, vocab: int
) -> tuple[Float[Array, "b k a"], Bool[Array, " b"]]:
  """What was said up to </s> → normalized actions f32, and whether it is a whole chunk.

  Of anything else (another id among the tokens, too few coefficients or too many) all coefficients are 0, as in the
  published code: actions in the middle of their range, and a gripper outside the statistics' mask at 0. The actions of
  a whole chunk are those of `ActionTokenizer.decode` to the last bit.
  """
  token, said = vocab - 1 - ids, jnp.cumsum(ids == STOP, axis=1) == 0
  known = (token >= 0) & (token < tokenizer.size)
  token = jnp.clip(token, 0, tokenizer.size - 1)
  length = jnp.where(said & known, jnp.asarray(tokenizer.lengths)[token], 0)
  end = jnp.cumsum(length, axis=1)
  whole = (known | ~said).all(axis=1) & (end[:, -1] == tokenizer.numbers)
  place = jnp.arange(tokenizer.numbers)
  owner = (end[:, None, :] <= place[:, None]).sum(axis=-1)  # which token each coefficient is of
  owner = jnp.minimum(owner, ids.shape[1] - 1)
  own = jnp.take_along_axis(token, owner, axis=1)
  inside = place - jnp.take_along_axis(end - length, owner, axis=1)
  found = jnp.asarray(tokenizer.table)[own, jnp.clip(inside, 0, tokenizer.table.shape[1] - 1)]
  spectrum = rearrange(jnp.where(whole[:, None], found, 0), "b (f a) -> b 1 f a", a=tokenizer.action_dim)
  sums = (jnp.asarray(tokenizer.inverse)[:, :, None] * spectrum).sum(axis=2)  # integers, of one step each
  return sums.astype(jnp.float32) * tokenizer.unit, whole
