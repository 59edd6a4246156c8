"""Action tokens behind a prompt: one after the other (OpenVLA), or all at once until they stay (PD-VLA).

greedy                  token i given those before it, a pass of one position each, with a key/value cache
jacobi                  all tokens guessed, then replaced by what the model says behind each, until nothing moves:
                        the same tokens in at most as many passes (PD-VLA, arXiv 2503.02310, its authors' code)
jacobi_bidirectional    the same with guesses that see one another, as PD-VLA's paper describes it: other tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.models import masks

if TYPE_CHECKING:
  from semanticvla_jax.models.semanticvla import SemanticVLA

DECODINGS = ("greedy", "jacobi", "jacobi_bidirectional")


class Spoken(NamedTuple):
  """Tokens, and how they came about.

  Attributes:
    ids: i32[b n], of the tokenizer.
    logits: f32[b n vocab], the ones behind each.
    passes: i32[], of the decoder over what is spoken; the prompt's own is not counted.
  """

  ids: Int[Array, "b n"]
  logits: Float[Array, "b n vocab"]
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
) -> Spoken:
  """Tokens behind a prompt, by one of DECODINGS.

  Args:
    model: bound to its parameters. x: [ <s> | visual | proprio | prompt ] as embeddings, and which are `valid`.
    last: position of each prompt's last real token. tokens: n.
  """
  prompt = _read(model, x, valid, last, tokens)
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
