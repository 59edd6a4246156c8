"""The compiled programs of a policy: prepared arrays in, normalized actions out.

Two programs. One computes what a sentence alone decides (the text tower, what pruners make of its words, every block's
FiLM, the prompt's embeddings): once per sentence, remembered on the device. The other goes from images, proprioception
and sentences to actions. Each exists for every length of the prompt and size of the batch that was compiled, so that no
call ever compiles, and a short sentence does not pay for the longest one.
"""

from __future__ import annotations

import collections
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from semanticvla_jax.errors import refuse
from semanticvla_jax.types import Array, Observation

SENTENCES = 64  # remembered: at most; a megabyte each at 7B


class Inference:
  """The programs of one model, for the batch sizes and prompt lengths that were compiled.

  Args:
    sentence: (params, [prompt, its mask, instruction, its mask]) → a pytree of arrays with the batch in front.
    actions: (params, such a pytree, images, proprioception) → normalized actions f32[b k a]; with a memory
      (…, proprioception, memory) → (actions, memory).
    dummy: batch size → an observation of the shapes that come in; its prompt is the longest one.
    remember: how many sentences are kept on the device, the latest ones. 0: each is computed at every call.
    memory: what one episode's first query is given, a pytree of arrays [1 …]; None where queries do not depend on
      earlier ones.
  """

  def __init__(
    self,
    sentence: Callable,
    actions: Callable,
    dummy: Callable[[int], Observation],
    remember: Any = SENTENCES,
    memory: Any = None,
  ):
    if not is_whole(remember) or remember < 0:
      raise refuse("Policy", f"remember={remember!r}", "a number of sentences, 0 or more", "choose another")
    self.dummy, self.remember, self.memory = dummy, remember, memory
    self.executables: dict[tuple[str, int, int], jax.stages.Compiled] = {}  # by ("actions", batch, prompt length), …
    self.sizes: tuple[int, ...] = ()
    self.lengths: tuple[int, ...] = ()
    self._programs = {"sentence": sentence, "actions": actions, "join": _join}
    self._sentences: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
    self._params: Mapping | None = None  # whose sentences these are

  def compile(self, params: Mapping, sizes: Collection[int], lengths: Collection[int]) -> None:
    """Compiles all these batch sizes at all these prompt lengths (with those there are already), and runs each once."""
    self.sizes, self.lengths = (tuple(sorted({*a, *b})) for a, b in ((self.sizes, sizes), (self.lengths, lengths)))
    with jax.enable_x64(False):  # whatever the process around it is set to
      for length in self.lengths:
        sentence = self._compiled("sentence", 1, length, params, words(self.dummy(1), length))
        for size in self.sizes:
          joined = sentence if size == 1 else self._compiled("join", size, length, *[sentence] * size)
          dummy = self.dummy(size)
          args = (joined, dummy.images, dummy.proprio, *self._memory([], size))
          jax.block_until_ready(self._compiled("actions", size, length, params, *args))

  def __call__(self, params: Mapping, observation: Observation, memories: Sequence[Any] = ()) -> tuple[jax.Array, Any]:
    """(normalized actions f32[size k a], memory) on the device; rows beyond the observation's batch repeat its last.

    Args:
      params: of the model. Other ones than at the last call forget its sentences.
      observation: arrays of batch 1 to the largest size, of numpy or on the device.
      memories: of each row, where the last query of its episode left off, [1 …]; () where all episodes begin.
    """
    batch, mask = len(observation.images), np.asarray(observation.prompt_mask)
    size = min(size for size in self.sizes if size >= batch)
    length = min(length for length in self.lengths if not mask[:, length:].any())
    if params is not self._params:
      self._sentences.clear()
      self._params = params
    said = [None if x is None else np.asarray(x) for x in words(observation, length)]
    rows = [self._sentence(params, [x if x is None else x[i : i + 1] for x in said], length) for i in range(batch)]
    rows += rows[-1:] * (size - batch)
    sentence = rows[0] if size == 1 else self.executables["join", size, length](*rows)
    images, proprio = (_padded(x, size) for x in (observation.images, observation.proprio))
    found = self.executables["actions", size, length](params, sentence, images, proprio, *self._memory(memories, size))
    return (found, None) if self.memory is None else found

  @property
  def cached(self) -> int:
    """How many sentences the device keeps the states of now."""
    return len(self._sentences)

  def _memory(self, rows: Sequence[Any], size: int) -> tuple[Any, ...]:
    """The last argument of the actions' program: rows, and empty ones behind them; () without a memory."""
    if self.memory is None:
      return ()
    rows = [*rows, *[self.memory] * (size - len(rows))]
    return (jax.tree.map(lambda *parts: np.concatenate(parts), *rows),)

  def _sentence(self, params: Mapping, words: Sequence[np.ndarray | None], length: int) -> Any:
    """What the model makes of one instruction, remembered."""
    key = (length, *(None if x is None else x.tobytes() for x in words))
    found = self._sentences.pop(key, None)
    if found is None:
      found = self.executables["sentence", 1, length](params, words)
    if self.remember:
      self._sentences[key] = found  # the latest stand last
    while len(self._sentences) > self.remember:
      self._sentences.popitem(last=False)
    return found

  def _compiled(self, name: str, size: int, length: int, *args: Any) -> Any:
    """What a program gives, compiled for these arguments if it was not before."""
    key = (name, size, length)
    if key not in self.executables:
      self.executables[key] = jax.jit(self._programs[name]).lower(*args).compile()
    return self.executables[key](*args)


def is_whole(number: Any) -> bool:
  """Whether this is an integer, True and False apart."""
  return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def positive(name: str, given: Any) -> list[int]:
  """Sizes or lengths to compile for, ascending. Raises ValueError for anything else than positive integers."""
  is_list = isinstance(given, Sequence | set | frozenset | range) and not isinstance(given, str)
  found = [*given] if is_list else [None]
  if not all(is_whole(number) and number >= 1 for number in found):
    expected = "a tuple of positive integers, such as (1, 8), or () for none"
    raise refuse("Policy", f"{name}={given!r}", expected, "choose others")
  return sorted({int(number) for number in found})


def _join(*rows: Any) -> Any:
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)


def words(observation: Observation, length: int) -> list[Array | None]:
  """Prompt and instruction with their masks; the prompt cut or padded to `length`, behind which there is nothing."""
  prompt = [x[:, :length] for x in (observation.prompt, observation.prompt_mask)]
  if (missing := length - prompt[0].shape[1]) > 0:
    prompt = [np.pad(x, ((0, 0), (0, missing))) for x in prompt]
  return [*prompt, observation.instruction, observation.instruction_mask]


def _padded(x: Array | None, size: int) -> Array | None:
  """x [b …] → [size …] by repeating the last row."""
  if x is None or len(x) == size:
    return x
  return np.concatenate([x, np.repeat(np.asarray(x[-1:]), size - len(x), axis=0)])
