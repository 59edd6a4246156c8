"""What the parts of a policy do: the signs of a model that was built or trained wrongly, on the tabletop's frames.

    python -m semanticvla_jax.evaluate doctor --model --policy=checkpoints/tabletop_small --suite=place

prints where the Dense-Fuser runs, how much FiLM modulates each block and whether instructions differ in it, how widely
the aggregation tokens look, which words the cues choose, which decoder layers change their input least
(`model.skip_layers` leaves layers out), how many chunks of FAST's tokens are not whole, and how many patches chosen by
LightVLA had no place. Whether kept patches lie on what is asked for is measured by `evaluate run --grounding`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from semanticvla_jax.evaluate import cues, tabletop_flags
from semanticvla_jax.models import programs
from semanticvla_jax.models.decoder_pruner import LIGHT
from semanticvla_jax.models.semanticvla import Output, build
from semanticvla_jax.policy import Policy

_WORDS = 8  # of the cues, that are listed


def diagnose(policy: Policy, observations: Sequence[dict]) -> Iterator[str]:
  """Lines about a policy's parts, from observation dicts as for `Policy.infer`; a part that it lacks has none."""
  observation = policy.observe(observations)
  yield from _dense_fuser(policy.bare)
  yield from _film(policy, observation)
  yield from _aggregation(policy, observation)
  yield from _cues(policy, observations)
  yield from _layers(policy, observation)
  yield from _fallbacks(policy, observation)


def _dense_fuser(model: Any) -> Iterator[str]:
  if model.dense_fuser is None:
    return
  blocks = {name: [pair[i] for pair in model.dense_fuser.pairs] for i, name in enumerate(("dino", "siglip"))}
  yield "dense fuser: behind " + "; ".join(
    f"{name} blocks {', '.join(map(str, own))} of 0 to {getattr(model, name).depth - 1}" for name, own in blocks.items()
  )


def _film(policy: Policy, observation: Any) -> Iterator[str]:
  """Of each block: how large scale and shift are, and what share of that differs between instructions."""
  if not policy.bare.film:
    return
  sentence = jax.jit(lambda params, o: policy.model.apply({"params": params}, o, True, **_call(policy, "sentence")))
  for name, by in sentence(policy.params, observation).condition.items():
    by = np.asarray(by, np.float64)  # [b depth 2 d]
    size = np.sqrt((by**2).mean(axis=(0, 3)))
    varies = np.sqrt(by.var(axis=0).mean(axis=-1)) / np.maximum(size, 1e-12)
    for part, column in (("scale", 0), ("shift", 1)):
      cells = " ".join(f"{a:.2f}({b:.0%})" for a, b in zip(size[:, column], varies[:, column]))
      yield f"FiLM of {name}, {part} by block, root mean square (what differs between instructions): {cells}"


def _call(policy: Policy, method: str) -> dict:
  """How a method of the bare model is called through `policy.model`, which may be wrapped."""
  return {"method": method} if policy.model is policy.bare else {"call": method}


def _aggregation(policy: Policy, observation: Any) -> Iterator[str]:
  """Entropy of where aggregation tokens look, as a share of the largest, and how much the tokens look alike."""
  for name in ("dino", "siglip"):
    if policy.bare.pruner(name, "sa") is None:
      continue
    vit = getattr(policy.bare, name)
    patches = slice(vit.num_prefix, vit.num_prefix + vit.num_patches)
    look = jax.jit(lambda p, o, name=name: policy.model.apply({"params": p}, o).intermediates[f"{name}_attention"])
    weights = jnp.asarray(look(policy.params, observation)).mean(axis=1)[..., patches]  # heads; [bv q n]
    inside = weights.sum(axis=-1)
    weights = np.asarray(weights / inside[..., None], np.float64)
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(axis=-1) / np.log(vit.num_patches)
    centered = weights - weights.mean(axis=1, keepdims=True)
    own = np.sqrt((centered**2).sum() / (weights**2).sum())
    yield (
      f"aggregation tokens of {name}: {float(inside.mean()):.0%} of their attention is on patches; entropy there "
      f"{entropy.mean():.2f} ({entropy.min():.2f} to {entropy.max():.2f}; 1 looks everywhere alike); "
      f"{own:.0%} of it differs between tokens"
    )


def _cues(policy: Policy, observations: Sequence[dict]) -> Iterator[str]:
  """Which words the cues choose, most frequent first, with the share of cues, and how many of them are said at all."""
  words = cues.chosen(policy, observations)
  if words:
    each = words.total() // (len(observations) * policy.bare.num_views)
    yield f"cues: {each} words a view; chosen: {cues.frequent(words, _WORDS)}"


def layer_importance(policy: Policy, observation: Any) -> Float[np.ndarray, " L"]:
  """1 - cosine of what goes into each decoder layer and what comes out, mean over tokens (EfficientVLA, 2506.10100).

  Of the model with all its layers and visual tokens. Padding does not count, nor do placeholders where they are zeros.
  """
  model = build({**policy.config["model"], "skip_layers": (), "decoder_pruner": None})
  model = model if policy.model is policy.bare else policy.model.clone(model=model)
  method = programs.named(model, "logits") if policy.bare.coupler is None else {}

  def run(params, observation):
    out, state = model.apply({"params": params}, observation, mutable=["intermediates"], **method)
    seen, layers = out.intermediates if isinstance(out, Output) else out[1], state["intermediates"]["llm"]
    names = [f"layers_{i}" for i in range(policy.bare.llm.depth)]
    behind = layers["layers"]["hidden"][0] if "layers" in layers else [layers[name]["hidden"][0] for name in names]
    states = [x.astype(jnp.float32) for x in (seen["sequence"], *behind)]
    norms = [jnp.linalg.norm(x, axis=-1) for x in states]
    found = []
    for (x, own), (y, other) in itertools.pairwise(zip(states, norms)):
      counts = seen["valid"] & (own > 0)
      cosine = (x * y).sum(axis=-1) / jnp.maximum(own * other, 1e-24)
      found.append(1 - (cosine * counts).sum() / counts.sum())
    return jnp.stack(found)

  return np.asarray(jax.jit(run)(policy.params, observation))


def _layers(policy: Policy, observation: Any) -> Iterator[str]:
  """The importance of each decoder layer, and how to leave out the least important, as many as EfficientVLA does."""
  importance = layer_importance(policy, observation)
  yield "decoder layers, importance (1 - cosine of what goes in and what comes out): " + ", ".join(
    f"{i} {x:.3f}" for i, x in enumerate(importance)
  )
  order, count = np.argsort(importance, kind="stable"), max(round(len(importance) * 10 / 32), 1)
  least = tuple(sorted(int(i) for i in order[:count]))
  yield (
    f"least important first: {', '.join(map(str, order))}; EfficientVLA's share, {count} of {len(importance)}, is left "
    f"out by Policy.variant(skip_layers={least}) or --config.model.scan=False --config.model.skip_layers='{least}'"
  )


def _fallbacks(policy: Policy, observation: Any) -> Iterator[str]:
  """How often an answer is not what the model said (FAST without constraint) or saw (LightVLA with too few places)."""
  names, pruner = ("malformed", "visual_overflow", "visual_kept"), policy.bare.decoder_pruner
  if policy.bare.codec is None and (pruner is None or pruner.score != LIGHT):
    return

  @jax.jit
  def look(params, observation):
    seen = policy.model.apply({"params": params}, observation).intermediates
    return {name: seen[name] for name in names if name in seen}

  found = {name: np.asarray(x) for name, x in look(policy.params, observation).items()}
  if "malformed" in found:
    bad = found["malformed"]
    yield (
      f"chunks: {bad.sum()} of {bad.size} were not said whole; such a chunk is one of zero coefficients, in the middle "
      "of the actions' range (model.decoding='constrained' has none)"
    )
  if "visual_overflow" in found:
    over, chosen = found["visual_overflow"], found["visual_kept"]
    yield (
      f"chosen patches: {chosen.mean():.1f} of an observation ({chosen.min()} to {chosen.max()}), of which "
      f"{over.mean():.1f} had no place (decoder_pruner.keep is of a view)"
    )


def main(argv: Sequence[str]) -> None:
  """Prints the lines; problems end the program with their message."""
  parser = tabletop_flags.parser("doctor --model", __doc__, "place", 32, "first frames to look at")
  parser.add_argument("--model", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  try:
    policy = Policy.load(args.policy, dataset=args.dataset)
    for line in diagnose(policy, tabletop_flags.first_observations(policy, args.suite, args.split, args.episodes)):
      print(line)
  except ValueError as error:
    sys.exit(f"error: {error}")
