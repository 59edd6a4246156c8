"""Trains a small model whose patches are scored by a rule of one's own: `python examples/custom_pruner.py`.

A rule is a function that JAX can trace, registered under a name. The config names it, and so does the config of a
policy that is trained with it: whoever loads that policy registers the rule first. The examples here are random: they
show that the training step learns through the rule, and nothing else.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from semanticvla_jax import cli
from semanticvla_jax.models import pruner
from semanticvla_jax.train import sharding, step
from semanticvla_jax.train.__main__ import prepare
from semanticvla_jax.train.partition import combine
from semanticvla_jax.types import Batch, Observation

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = ("pick up the red cube", "put the blue ball into the bowl") * 4


@pruner.anchor_rule("mean_word")
def mean_word(similarity, patches, words, mask):
  """How well each patch agrees with the mean of the instruction's words; returns scores f32[b n].

  Args:
    similarity: f32[b n m], cosines of patches and words; the paper's rule is its mean over the words.
    patches: f[b n d]. words: f[b m d], projected to the patches' width. mask: bool[b m], which of them are words.
  """
  count = jnp.maximum(mask.sum(axis=1), 1)[:, None, None]
  mean = jnp.where(mask[..., None], words, 0).sum(axis=1, keepdims=True) / count
  return pruner.cosine_similarity(patches, mean)[..., 0]


def get_config():
  """A `tiny` model of one encoder, which compiles sooner, from scratch."""
  cli.make_importable(str(ROOT / "configs" / "common.py"))
  from configs import common

  config = common.get_config("tiny")
  config.lora, config.trainable = None, ".*"
  config.model.update(anchor_rule="mean_word", encoders=("siglip",), film=(), dense_fuser=None, scan_encoders=True)
  config.optim.update(lr=3e-3, warmup_steps=1, decay_steps=None)
  config.data.update(batch_size=len(SENTENCES), prompt_length=32)
  return config


def examples(tokenizers) -> Batch:
  """Frames of noise, two views at 32 pixels, with instructions and chunks of 8 actions."""
  rng, b = np.random.default_rng(0), len(SENTENCES)
  images = rng.integers(0, 256, (b, 2, 32, 32, 3), dtype=np.uint8)
  state, actions = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((b, 8), (b, 8, 7)))
  words = (*tokenizers.prompt(SENTENCES), *tokenizers.instruction(SENTENCES))
  return Batch(Observation(images, state, *words), actions, np.ones((b, 8), bool))


def main(steps: int = 10) -> dict:
  """Returns the losses, and the indices of the patches kept of each view, i32[b·v h]."""
  ready = prepare(get_config(), deadline=60.0)
  batch = sharding.place_batch(examples(ready.tokenizers), ready.mesh, len(SENTENCES))
  train, state, losses = step.compile_step(ready.step, ready.mesh, ready.state, ready.frozen), ready.state, []
  for _ in range(steps):
    state, metrics = train(state, ready.frozen, batch)
    losses.append(float(metrics["loss"]))
  print("loss " + " ".join(f"{loss:.2f}" for loss in losses))
  look = jax.jit(lambda params, x: ready.bare.apply({"params": params}, x).intermediates["siglip_pruned"].kept)
  kept = np.asarray(look(combine(state.trainable, ready.frozen), batch.observation))
  print(f"of 64 patches of the first view, these are kept for {SENTENCES[0]!r}: {kept[0].tolist()}")
  return {"losses": losses, "kept": kept}


if __name__ == "__main__":
  main()
