"""The compiled programs of a policy: prepared arrays in, normalized actions out.

Two programs. One computes what a sentence alone decides (the text tower, what pruners make of its words, every block's
FiLM, the prompt's embeddings): once per sentence, remembered on the device. The other goes from images, proprioception
and sentences to actions. Each exists for every length of the prompt and size of the batch that was compiled, so that no
call ever compiles, and a short sentence does not pay for the longest one.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from semanticvla_jax.models import lora
from semanticvla_jax.models.semanticvla import SemanticVLA, dummy_observation
from semanticvla_jax.types import Array, Observation, Sentence

SENTENCES = 64  # remembered: at most; a megabyte each at 7B
MULTIPLE = 8  # positions: matrix units work on sequences of whole eights, and GPU libraries pad others at every product


def sentence_program(model: nn.Module):
  """(params, words of an Observation) → what the model makes of the instructions alone."""
  named = {"call": "sentence"} if isinstance(model, lora.LoRA) else {"method": "sentence"}
  return lambda params, words: model.apply({"params": params}, Observation(None, None, *words), True, **named)


def actions_program(model: nn.Module):
  """(params, sentences, images u8[b v h w 3], proprio f32[b p]) → normalized actions f32[b k a]."""

  def run(params: Mapping, sentence: Sentence, images: Array, proprio: Array | None) -> Array:
    return model.apply({"params": params}, Observation(images, proprio, None, None), sentence=sentence).actions

  return run


class Inference:
  """The programs of one model, for the batch sizes and prompt lengths that were compiled.

  Args:
    model: of `build`, or that in LoRA.
    prompt_length, instruction_length: of the arrays that come in; the longest prompt there can be.
    remember: how many sentences are kept on the device, the latest ones. 0: each is computed at every call.
  """

  def __init__(self, model: nn.Module, prompt_length: int, instruction_length: int, remember: int = SENTENCES):
    self.model = model
    self.bare: SemanticVLA = model.model if isinstance(model, lora.LoRA) else model
    self.prompt_length, self.instruction_length, self.remember = prompt_length, instruction_length, remember
    self.executables: dict[tuple[str, int, int], jax.stages.Compiled] = {}  # by ("actions", batch, prompt length), …
    self.sizes: tuple[int, ...] = ()
    self.lengths: tuple[int, ...] = ()
    self._programs = {"sentence": sentence_program(model), "actions": actions_program(model), "join": _join}
    self._sentences: collections.OrderedDict[tuple, Sentence] = collections.OrderedDict()
    self._params: Mapping | None = None  # whose sentences these are
    self._beside: int | None = None  # positions of the sequence beside the prompt's

  def compile(self, params: Mapping, sizes: Collection[int], lengths: Collection[int]) -> None:
    """Compiles all these batch sizes at all these prompt lengths (with those there are already), and runs each once."""
    self.sizes, self.lengths = (tuple(sorted({*a, *b})) for a, b in ((self.sizes, sizes), (self.lengths, lengths)))
    with jax.enable_x64(False):  # whatever the process around it is set to
      for length in self.lengths:
        sentence = self._compiled("sentence", 1, length, params, _words(self.dummy(1), length))
        for size in self.sizes:
          joined = sentence if size == 1 else self._compiled("join", size, length, *[sentence] * size)
          dummy = self.dummy(size)
          jax.block_until_ready(self._compiled("actions", size, length, params, joined, dummy.images, dummy.proprio))

  def length_for(self, params: Mapping, tokens: int) -> int:
    """The prompt length for prompts of so many tokens that gives the sequence a multiple of 8 positions.

    At most `prompt_length`.
    """
    if self._beside is None:
      read = {"call": "read"} if self.model is not self.bare else {"method": "read"}
      x = jax.eval_shape(lambda p, o: self.model.apply({"params": p}, o, **read)[0], params, self.dummy(1))
      own = 0 if self.bare.coupler is None else self.bare.chunk * self.bare.coupler.tokens + 1
      self._beside = x.shape[1] + own - self.prompt_length
    return min(tokens + -(self._beside + tokens) % MULTIPLE, self.prompt_length)

  def __call__(self, params: Mapping, observation: Observation) -> jax.Array:
    """Normalized actions f32[size k a] on the device; rows beyond the observation's batch repeat its last.

    Args:
      params: of the model. Other ones than at the last call forget its sentences.
      observation: arrays of batch 1 to the largest size, of numpy or on the device.
    """
    batch, mask = len(observation.images), np.asarray(observation.prompt_mask)
    size = min(size for size in self.sizes if size >= batch)
    length = min(length for length in self.lengths if not mask[:, length:].any())
    if params is not self._params:
      self._sentences.clear()
      self._params = params
    words = [None if x is None else np.asarray(x) for x in _words(observation, length)]
    rows = [self._sentence(params, [x if x is None else x[i : i + 1] for x in words], length) for i in range(batch)]
    rows += rows[-1:] * (size - batch)
    sentence = rows[0] if size == 1 else self.executables["join", size, length](*rows)
    images, proprio = (_padded(x, size) for x in (observation.images, observation.proprio))
    return self.executables["actions", size, length](params, sentence, images, proprio)

  def _sentence(self, params: Mapping, words: Sequence[np.ndarray | None], length: int) -> Sentence:
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

  def dummy(self, size: int) -> Observation:
    """An observation of zeros of the lengths that come in."""
    observation = dummy_observation(self.bare, size, self.prompt_length)
    if observation.instruction is not None:
      shape = (size, self.instruction_length)
      observation = observation.replace(instruction=np.zeros(shape, np.int32), instruction_mask=np.ones(shape, bool))
    return jax.tree.map(np.asarray, observation)


def _join(*rows: Sentence) -> Sentence:
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)


def _words(observation: Observation, length: int) -> list[Array | None]:
  """Prompt and instruction with their masks; the prompt cut to `length`, behind which there is only padding."""
  prompt = [observation.prompt[:, :length], observation.prompt_mask[:, :length]]
  return [*prompt, observation.instruction, observation.instruction_mask]


def _padded(x: Array | None, size: int) -> Array | None:
  """x [b …] → [size …] by repeating the last row."""
  if x is None or len(x) == size:
    return x
  return np.concatenate([x, np.repeat(np.asarray(x[-1:]), size - len(x), axis=0)])
