"""Training on the tabletop's expert: what `config.data.mixture="expert"` means, and its fields of a config.

    config.data.suites         weights of the tabletop's suites, in the order of tasks.SUITES
    config.data.starts         fraction of examples at the initial state of an episode (see expert_batches.sample_state)
    config.data.askew          fraction of episodes whose cube is turned far (see expert_batches.initial_state)
    config.train.grounding     weights of the auxiliary losses by name, or None

configs/pretrain.py sets them. Training itself knows none of them: it is handed `batches` and `aux_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from semanticvla_jax.data import statistics
from semanticvla_jax.data.text import Tokenizers
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.pruner import kinds
from semanticvla_jax.tabletop import expert_batches, tasks
from semanticvla_jax.tabletop.auxiliary_losses import AuxiliaryLosses
from semanticvla_jax.types import Batch

MIXTURE = "expert"


def aux_loss(config: Any) -> AuxiliaryLosses | None:
  """The auxiliary losses of a config, None where it asks for none.

  Raises:
    ValueError: they cannot be used with the model, the adapters or the data of the config.
  """
  weights = config.train.get("grounding")
  if weights is None:
    return None
  if config.model.coupler is None:
    raise refuse(
      "config.train.grounding",
      "weights with model.coupler=None (OpenVLA's action tokens)",
      "a coupler, whose action states the probes read",
      "set train.grounding to None, or model.coupler='grouped'",
    )
  if config.lora is not None or config.data.mixture != MIXTURE:
    raise refuse(
      "config.train.grounding",
      f"weights with lora {'on' if config.lora is not None else 'off'} and mixture={config.data.mixture!r}",
      "training from scratch on the expert's own states (configs/pretrain.py)",
      "set it to None",
    )
  dino, siglip = (kinds(config.model[f"{name}_pruner"]) for name in ("dino", "siglip"))
  joint = config.model.sparse_fuser == "joint"
  dense = joint and not (dino or siglip or config.model.compressor or config.model.decoder_pruner)
  if not {"dino", "siglip"} <= set(config.model.encoders) or not (dense or "id" in siglip):
    raise refuse(
      "config.train.grounding",
      f"weights with model.encoders={tuple(config.model.encoders)}, model.siglip_pruner={config.model.siglip_pruner!r}",
      "both encoders, whose patches the probes read, and an ID-Pruner on SigLIP, whose scores two losses teach, or a "
      "model that shows all patches to its language model",
      "set train.grounding to None",
    )
  return AuxiliaryLosses(weights)


def batches(
  config: Any, model: Any, tokenizers: Tokenizers, kept: statistics.DatasetStatistics | None
) -> tuple[Callable[[int], Batch], statistics.DatasetStatistics]:
  """step → Batch, made by the expert on the device, and the statistics that it is normalized with.

  Args:
    model: the SemanticVLA that reads the batches.
    kept: statistics to normalize with; None measures the expert's.

  Raises:
    ValueError: the expert cannot draw what the config asks for.
  """
  check(config)
  stats = expert_batches.measure(seed=config.seed) if kept is None else kept
  encoder = model.siglip or model.dino
  make = expert_batches.make_batches(
    batch_size=config.data.batch_size,
    chunk=config.model.chunk,
    image=encoder.image,
    patch=encoder.patch,
    suites=config.data.suites,
    initial_fraction=config.data.get("starts", 0.0),
    hard_yaw_fraction=config.data.get("askew", 0.0),
    tokenizers=tokenizers,
    stats=stats,
    seed=config.seed,
  )
  if aux_loss(config) is not None:
    return make, stats
  return lambda step: make(step).replace(aux=None), stats


def check(config: Any) -> None:
  """Raises ValueError unless the expert can draw its examples: a weight for each suite, its own normalisation."""
  suites, data = config.data.get("suites"), config.data
  fits = suites is not None and len(suites) == len(tasks.SUITES) and min(suites) >= 0 and sum(suites) > 0
  if not fits:
    raise ValueError(
      f"config.data.suites: got {suites}, expected a weight for each of {tasks.SUITES}, none negative, not all 0; set "
      "it where config.data.mixture is 'expert', e.g. --config=configs/pretrain.py "
      "--config.data.suites='(1,1,0,0,0,0)'."
    )
  if data.normalisation != "bounds_q99":
    raise ValueError(
      f"config.data.normalisation: got {data.normalisation!r} with mixture 'expert', expected 'bounds_q99', in which "
      "the expert's batches are made; set it so."
    )
  if any(data.jitter):
    raise ValueError(
      f"config.data.jitter: got {data.jitter} with mixture 'expert', expected (0.0, 0.0): its examples start at random "
      "states anyway; set it so."
    )
  if data.get("servers"):
    raise ValueError(
      f"config.data.servers: got {tuple(data.servers)} with mixture 'expert', expected (), for its examples are made "
      "on the accelerator; leave it so."
    )
