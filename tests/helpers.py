"""What several tests need: small models, random parameters without compiling an initializer, random observations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax.models.lora import LoRA
from semanticvla_jax.models.semanticvla import SemanticVLA, abstract_params, build, dummy_observation

TINY = dict(variant="tiny", keep=8, cues=3)


@functools.cache
def tiny(**fields) -> SemanticVLA:
  return build(TINY | fields)


def random_params(model, seed: int = 0, scale: float = 1.0) -> dict:
  """Parameters of any module that takes an observation: kernels ~ N(0, 1/fan_in), norms near one, no zeros."""
  bare = model.model if isinstance(model, LoRA) else model
  rng = np.random.default_rng(seed)
  flat = flatten_dict(abstract_params(model, dummy_observation(bare)))
  return unflatten_dict(
    {path: jnp.asarray(_leaf(rng, path[-1], x.shape, scale), jnp.float32) for path, x in flat.items()}
  )


def _leaf(rng, name: str, shape, scale: float) -> np.ndarray:
  x = rng.standard_normal(shape).astype(np.float32)
  if name in ("scale", "ls1", "ls2"):
    return 1 + 0.1 * x
  if name in ("bias", "cls", "reg", "pos_embedding"):
    return 0.1 * x
  if name in ("embedding", "queries"):
    return 0.5 * x
  fan_in = (
    np.prod(shape[:-1]) if name.startswith("lora") or len(shape) < 3 else np.prod(shape) / max(shape[-1], shape[0])
  )
  return scale * x / np.sqrt(fan_in)


def random_observation(model, batch: int = 2, prompt: int = 8, seed: int = 0, lengths=None):
  """An observation with real words in some positions and padding behind them."""
  rng = np.random.default_rng(seed)
  dummy = dummy_observation(model, batch, prompt)
  lengths = np.full(batch, prompt) if lengths is None else np.asarray(lengths)
  words = None if dummy.instruction is None else dummy.instruction.shape
  word_mask = None if words is None else np.arange(words[1]) < rng.integers(4, 9, (batch, 1))
  vocab = model.llm.vocab
  mask = np.arange(prompt) < lengths[:, None]
  observation = dummy.replace(
    images=rng.integers(0, 256, dummy.images.shape).astype(np.uint8),
    proprio=None if dummy.proprio is None else rng.uniform(-1, 1, dummy.proprio.shape).astype(np.float32),
    prompt=np.where(mask, rng.integers(3, vocab, (batch, prompt)), 0).astype(np.int32),
    prompt_mask=mask,
    instruction=None
    if words is None
    else np.where(word_mask, rng.integers(2, model.text.vocab, words), 1).astype(np.int32),
    instruction_mask=word_mask,
  )
  return jax.tree.map(jnp.asarray, observation)


def wide(model: SemanticVLA) -> SemanticVLA:
  """The model with decoder and coupler in float64, for use under `jax.enable_x64`.

  Sums of other lengths are grouped otherwise, in a way of each CPU's own. In float64 that is far below any bound here;
  only rotary angles and softmax stay in float32.
  """
  double = dict(dtype=jnp.float64)
  return model.clone(llm=model.llm.clone(**double), coupler=model.coupler.clone(**double))


def jit_apply(model, **static):
  """A compiled apply: (params, *args) → output."""
  return jax.jit(lambda params, *args: model.apply({"params": params}, *args, **static))
