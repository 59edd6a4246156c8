"""Action tokens behind a prompt: one after the other (OpenVLA), or all at once until they stay (PD-VLA).

greedy                  token i given those before it, a pass of one position each, with a key/value cache
jacobi                  all tokens guessed, then replaced by what the model says behind each, until nothing moves:
                        the same tokens in at most as many passes (PD-VLA, arXiv 2503.02310, its authors' code)
jacobi_bidirectional    the same with guesses that see one another, as PD-VLA's paper describes it: other tokens
constrained             FAST's tokens, of different lengths: one after the other, of those alone whose numbers still fit
                        into the chunk, and </s> exactly when it is full. "greedy" says anything until </s>
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.action_tokens import ActionTokenizer
from semanticvla_jax.models import fast, masks
from semanticvla_jax.models.fast import STOP

if TYPE_CHECKING:
  from semanticvla_jax.models.semanticvla import SemanticVLA

DECODINGS = ("greedy", "jacobi", "jacobi_bidirectional", "constrained")


class Spoken(NamedTuple):
  """Tokens, and how they came about.

  Attributes:
    ids: i32[b n], of the tokenizer.
    logits: f32[b n vocab], the ones behind each; None of FAST's tokens.
    passes: i32[], of the decoder over what is spoken; the prompt's own is not counted.
  """

  ids: Int[Array, "b n"]
  logits: Float[Array, "b n vocab"] | None
  passes: Int[Array, ""]


class _Prompt(NamedTuple):
  """What has been read: cache with room for n tokens, validity bool[b l + n], lengths i32[b], next-token logits."""

  cache: Any
  valid: Bool[Array, "b s"]
  length: Int[Array, " b"]
  first: Float[Array, "b vocab"]
  end: int


def speak(
  model: SemanticVLA,
  x: Float[Array, "b l D"],
  valid: Bool[Array, "b l"],
  last: Int[Array, " b"],
  tokens: int,
  decoding: str = "greedy",
  codec: ActionTokenizer | None = None,
) -> Spoken:
  """Tokens behind a prompt, by one of DECODINGS.

  Args:
    model: bound to its parameters. x: [ <s> | visual | proprio | prompt ] as embeddings, and which are `valid`.
    last: position of each prompt's last real token. tokens: n.
    codec: of FAST's tokens, of which there are different numbers; behind them </s> fills the n. None for other tokens.
  """
  prompt = _read(model, x, valid, last, tokens)
  if codec is not None:
    return _until_stop(model, prompt, tokens, codec if decoding == "constrained" else None)
  if decoding == "greedy":
    return _greedy(model, prompt, tokens)
  return _jacobi(model, prompt, tokens, decoding == "jacobi_bidirectional")


def _read(model: SemanticVLA, x: Array, valid: Array, last: Array, tokens: int) -> _Prompt:
  b, l = valid.shape
  allowed = masks.attention_mask(valid, jnp.zeros(l, bool), "causal")
  cache = model.llm.empty_cache(b, l + tokens)
  hidden, cache = model.llm(x, masks.positions(valid), jnp.pad(allowed, ((0, 0), (0, 0), (0, tokens))), cache, 0)
  first = model.llm.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]
  length = valid.sum(axis=-1, dtype=jnp.int32)
  return _Prompt(cache, jnp.pad(valid, ((0, 0), (0, tokens))), length, first, l)


def _greedy(model: SemanticVLA, prompt: _Prompt, tokens: int) -> Spoken:
  slots = jnp.arange(prompt.valid.shape[1])

  def step(module, carry, i):
    cache, logits = carry
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = prompt.valid | ((slots >= prompt.end) & (slots <= prompt.end + i))
    states, cache = module.llm(
      module.llm.embed_tokens(token[:, None]), (prompt.length + i)[:, None], keys[:, None, :], cache, prompt.end + i
    )
    return (cache, module.llm.logits(states)[:, 0]), (token, logits)

  scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, out_axes=1)
  _, (ids, logits) = scan(model, (prompt.cache, prompt.first), jnp.arange(tokens))
  return Spoken(ids, logits, jnp.int32(tokens))


def _jacobi(model: SemanticVLA, prompt: _Prompt, tokens: int, bidirectional: bool) -> Spoken:
  """The first token is known from the prompt; it is the first guess of the others. At most n passes, by induction."""
  first = jnp.argmax(prompt.first, axis=-1).astype(jnp.int32)
  positions, own = prompt.length[:, None] + jnp.arange(tokens), jnp.arange(prompt.valid.shape[1]) - prompt.end
  spoken = (own >= 0) if bidirectional else (own >= 0) & (own <= jnp.arange(tokens)[:, None])
  keys = prompt.valid[:, None, :] | jnp.broadcast_to(spoken, (tokens, len(own)))

  def again(_, carry):
    _, moved, passes, _ = carry
    return moved & (passes < tokens)

  def one_pass(module, carry):
    ids, _, passes, _ = carry  # the cache of a pass is dropped: the next one writes the same slots
    states, _ = module.llm(module.llm.embed_tokens(ids), positions, keys, prompt.cache, prompt.end)
    behind = module.llm.logits(states)[:, :-1]
    logits = jnp.concatenate([prompt.first[:, None], behind], axis=1)
    new = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return new, (new != ids).any(), passes + 1, logits

  guess = jnp.repeat(first[:, None], tokens, axis=1)
  begin = (guess, jnp.bool_(tokens > 1), jnp.int32(0), jnp.repeat(prompt.first[:, None], tokens, axis=1))
  ids, _, passes, logits = nn.while_loop(again, one_pass, model, begin, broadcast_variables="params")
  return Spoken(ids, logits, passes)


def _until_stop(model: SemanticVLA, prompt: _Prompt, tokens: int, codec: ActionTokenizer | None) -> Spoken:
  """At most n tokens, in as many passes as the longest row of the batch needs but one; </s> behind those of a row.

  Args:
    codec: which constrains the tokens to whole chunks. None: any token may come, until </s> does.
  """
  vocab, slots = model.spoken_vocab, jnp.arange(prompt.valid.shape[1])
  takes = None if codec is None else fast.id_lengths(codec, vocab, prompt.first.shape[-1])  # of what is left of a row

  def choose(logits, left):
    """The next token of each row, and what is left behind it."""
    if takes is None:
      token = jnp.where(left > 0, jnp.argmax(logits, axis=-1).astype(jnp.int32), STOP)
      return token, left * (token != STOP)
    fits = (takes > 0) & (takes <= left[:, None])
    token = jnp.argmax(jnp.where(fits, logits, -jnp.inf), axis=-1).astype(jnp.int32)
    token = jnp.where(left > 0, token, STOP)
    return token, left - takes[token]

  def unfinished(_, carry):
    count, _, left, _, _ = carry
    return (left > 0).any() & (count < tokens)

  def one_more(module, carry):
    count, token, left, ids, cache = carry
    at = prompt.end + count - 1
    keys = prompt.valid | ((slots >= prompt.end) & (slots <= at))
    where = (prompt.length + count - 1)[:, None]
    states, cache = module.llm(module.llm.embed_tokens(token[:, None]), where, keys[:, None, :], cache, at)
    token, left = choose(module.llm.logits(states)[:, 0], left)
    return count + 1, token, left, ids.at[:, count].set(token), cache

  b = prompt.first.shape[0]
  token, left = choose(prompt.first, jnp.full(b, 1 if codec is None else codec.numbers, jnp.int32))
  ids = jnp.full((b, tokens), STOP, jnp.int32).at[:, 0].set(token)
  begin = (jnp.int32(1), token, left, ids, prompt.cache)
  count, _, _, ids, _ = nn.while_loop(unfinished, one_more, model, begin, broadcast_variables="params")
  return Spoken(ids, None, count - 1)
