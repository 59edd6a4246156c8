"""Where parameters come from: a fresh draw, or a policy folder whose parts the model takes over."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax import action_tokens
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.lora import TARGETS, LoRA
from semanticvla_jax.models.semanticvla import SemanticVLA, abstract_params, build, dummy_observation
from semanticvla_jax.train.partition import LORA, combine, partition
from semanticvla_jax.train.step import AuxLoss

# Words of config.init_from besides folders.
RANDOM = "random"  # draw the frozen parameters too
MATCHING = "matching"  # take of the bases what fits by name and shape, whatever it was trained for; draw the rest
# Parts of a base that a model with another head does not read, each as a whole. Anything else it lacks is an error.
UNUSED_IN_BASE = {
  "llm/lm_head/": "logits of the language model; a coupler answers instead",
  "coupler/": "the action head of another policy; this one's is new",
  "proprio_projector/": "proprioception that this model does not see, or of another width",
}


def make_model(config: Any, aux_loss: AuxLoss | None = None) -> tuple[nn.Module, SemanticVLA]:
  """(the module to train, the bare model): wrapped by `aux_loss`, or in LoRA when config.lora is there.

  Raises:
    ValueError: unknown LoRA targets, or action tokens that are not there or of other actions.
  """
  codec = fitted_tokens(config)
  bare = build(config.model if codec is None else {**config.model, "codec": codec})
  if aux_loss is not None:
    return aux_loss.wrap(bare), bare
  if config.lora is None:
    return bare, bare
  if config.lora.targets not in TARGETS:
    raise refuse("config.lora.targets", f"{config.lora.targets!r}", f"one of {sorted(TARGETS)}", "choose one of them")
  return LoRA(bare.clone(), config.lora.rank, config.lora.alpha, TARGETS[config.lora.targets]), bare


def action_tokens_file(config: Any) -> epath.Path | None:
  """Where FAST's tokens of a config are: config.data.action_tokens, else of the first base that has any; None for bins.

  Raises:
    ValueError: the model needs them and there are none, or the other way round.
  """
  given = config.data.get("action_tokens")
  if config.model.get("codec", "bins") == "bins":
    if given is not None:
      raise refuse("config.data.action_tokens", f"{given} with model.codec='bins'", "None", "set model.codec='fast'")
    return None
  folders = [] if given is not None else bases(config.init_from)[0]
  known = (epath.Path(folder).expanduser() / "tokenizers" / action_tokens.NAME for folder in folders)
  found = epath.Path(given).expanduser() if given is not None else next((path for path in known if path.exists()), None)
  if found is None:
    raise refuse(
      "config.data.action_tokens",
      "None with model.codec='fast'",
      "the file of tokens fitted to the data",
      "write it with python -m semanticvla_jax.data fit-tokenizer",
    )
  return found


def fitted_tokens(config: Any) -> action_tokens.ActionTokenizer | None:
  """FAST's tokens of a config, None for bins.

  Raises:
    ValueError: see `action_tokens_file`; or they are of actions that were normalized otherwise.
  """
  path = action_tokens_file(config)
  if path is None:
    return None
  found = action_tokens.load(path)
  if found.normalisation != config.data.normalisation:
    raise refuse(
      f"config.data.action_tokens={path}",
      f"tokens of actions normalized by {found.normalisation!r}",
      f"{config.data.normalisation!r} (data.normalisation)",
      "fit them with the DatasetSpec's mode set to it, or change data.normalisation",
    )
  return found


def shapes(model: nn.Module, bare: SemanticVLA, trainable: str | None, frozen_dtype: str | None) -> dict:
  """The parameters as ShapeDtypeStructs: trainable ones float32, frozen floating-point ones `frozen_dtype` if given."""
  tree = abstract_params(model, dummy_observation(bare))
  kept, frozen = partition(tree, trainable)
  if frozen_dtype is not None:
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(frozen_dtype)), frozen)
  return combine(kept, frozen)


def init_params(model: nn.Module, bare: SemanticVLA, seed: int, wanted: dict, where: Any) -> dict:
  """Initial values of the parameters `wanted`, a function of the seed, created with their sharding.

  Args:
    wanted: shapes and types, all of the model's parameters or some.
    where: their shardings, or one for all.
  """
  names = set(flatten_dict(wanted))

  def make(key):
    rngs = dict.fromkeys(("params", "noise"), jax.random.wrap_key_data(key))
    params = flatten_dict(model.init(rngs, dummy_observation(bare))["params"])
    return cast_like(unflatten_dict({path: x for path, x in params.items() if path in names}), wanted)

  # The key is an argument, so that runs with other seeds reuse the compiled program; as numpy, for runs of many hosts.
  return jax.jit(make, out_shardings=where)(np.asarray(jax.random.key_data(jax.random.key(seed))))


def cast_like(params: dict, like: dict) -> dict:
  """Every parameter in the type that `like` has for it."""
  return jax.tree.map(lambda x, y: x.astype(y.dtype), params, like)


def select(tree: dict, paths: list[str]) -> dict:
  """The parameters of a tree with these paths."""
  flat = flatten_dict(tree, sep="/")
  return unflatten_dict({path: flat[path] for path in paths}, sep="/")


def bases(init_from: str | None) -> tuple[list[str], bool]:
  """config.init_from → (policy folders, whether "random" is among them): "policies/openvla,policies/siglip"."""
  names = _names(init_from)
  return [name for name in names if name not in (RANDOM, MATCHING)], RANDOM in names


def matching(init_from: str | None) -> bool:
  """Whether config.init_from has the word "matching"."""
  return MATCHING in _names(init_from)


def _names(init_from: str | None) -> list[str]:
  return [name.strip() for name in (init_from or "").split(",") if name.strip()]


def assign_sources(
  wanted: dict,
  found: Mapping[str, dict],
  trainable: str | None,
  random: bool = False,
  own_robot: bool = False,
  matching: bool = False,
) -> tuple[dict[str, list[str]], dict]:
  """Where each parameter comes from: (paths by base, the first that has them; those that are drawn).

  Args:
    wanted: the model's parameters, as shapes. found: those of each base, in order.
    trainable: config.trainable. random: draws frozen parameters too. own_robot, matching: see `match_base`.

  Raises:
    ValueError: a shape that differs, a parameter of a base that the model does not have (but UNUSED_IN_BASE), or a
      frozen one that no base has.
  """
  left, taken = flatten_dict(wanted, sep="/"), {}
  for i, (source, base) in enumerate(found.items()):
    taken[source] = match_base(unflatten_dict(left, sep="/"), base, source, i == 0, own_robot, matching)
    left = {path: x for path, x in left.items() if path not in taken[source]}
    logging.info("init_from %s: took %d parameters", source, len(taken[source]))
  _, frozen = partition(wanted, trainable)
  noise = sorted(set(flatten_dict(frozen, sep="/")) & set(left))
  if noise and not random:
    raise refuse(
      "config.init_from",
      f"{', '.join(found) or None}, which leaves {len(noise)} frozen parameters without values "
      f"({', '.join(noise[:3])}, …)",
      "a base that has them: adapters on random weights learn nothing of use",
      "name a policy folder (several with commas: the later ones give what the first lacks), let config.trainable "
      f"cover them, or ask for random values with --config.init_from={','.join([*found, RANDOM])}",
    )
  if left:
    logging.info("drew %d new parameters (%s …)", len(left), ", ".join(sorted(left)[:2]))
  return taken, unflatten_dict(left, sep="/")


def match_base(
  wanted: dict, base: dict, source: str, whole: bool = True, own_robot: bool = False, matching: bool = False
) -> list[str]:
  """Paths of the parameters `wanted` (shapes or arrays) that `base` has; what it has beyond them is logged.

  Args:
    whole: whether `base` may hold nothing that the model does not have but UNUSED_IN_BASE; False where it only
      completes another base.
    own_robot: whether a part of UNUSED_IN_BASE whose shapes differ is that of another robot, and drawn anew.
    matching: what the model does not have, or has in another shape, is left unread and logged.

  Raises:
    ValueError: a shape that differs, or a parameter of `base` that the model has no use for.
  """
  ours, theirs = flatten_dict(wanted, sep="/"), flatten_dict(base, sep="/")
  if matching:
    fitting = sorted(path for path, x in theirs.items() if path in ours and ours[path].shape == x.shape)
    logging.info("init_from %s: left %d parameters that do not match unread", source, len(theirs) - len(fitting))
    return fitting
  for part, reason in UNUSED_IN_BASE.items():
    there = {path for path in theirs if path.startswith(part)}
    foreign = any(path not in ours and not re.fullmatch(LORA, path) for path in there)
    wider = own_robot and any(path in ours and ours[path].shape != theirs[path].shape for path in there)
    if foreign or wider:
      logging.info("init_from %s: left %d parameters of %s unread: %s", source, len(there), part, reason)
      theirs = {path: x for path, x in theirs.items() if path not in there}
  extra = sorted(set(theirs) - set(ours)) if whole else []
  both = sorted(set(theirs) & set(ours))
  wrong = [f"{k}: {theirs[k].shape} there, {ours[k].shape} here" for k in both if theirs[k].shape != ours[k].shape]
  if extra or wrong:
    raise refuse(
      f"init_from {source}",
      f"{len(extra)} parameters the model does not have ({extra[:4]}) and {len(wrong)} of another shape ({wrong[:4]})",
      "a base of this config",
      f"pass the config it was trained with, or take what fits with --config.init_from=…,{MATCHING}",
    )
  return both
