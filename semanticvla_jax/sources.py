"""Which benchmark makes training examples itself, by the name in `config.data.mixture`; every other name is a dataset.

Training is handed a module of this table, so that it knows no benchmark. A module in the table has

    aux_loss(config) -> train.step.AuxLoss | None
    batches(config, model, tokenizers, kept statistics | None) -> (step -> Batch on the device, statistics)

and raises ValueError for a config that it cannot serve. One more benchmark is one more line.
"""

from __future__ import annotations

from typing import Any

from semanticvla_jax.tabletop import training as tabletop

GENERATORS = {tabletop.MIXTURE: tabletop}


def generator(config: Any) -> Any | None:
  """The module that makes the config's examples; None where they are read from datasets."""
  return GENERATORS.get(config.data.mixture)


def aux_loss(config: Any) -> Any | None:
  """The auxiliary loss that the config asks for, None without one.

  Raises:
    ValueError: the config cannot train with it.
  """
  return next((found for one in GENERATORS.values() if (found := one.aux_loss(config)) is not None), None)
