"""What a config leaves to the DatasetSpecs of `config.data.specs`: views, widths, groups, chunk, normalization.

    config.model.num_views, proprio_dim, action_dim, chunk   -1: as the spec says
    config.model.groups, optional_views                      None and (): as the spec says
    config.data.normalisation, mixture                       None: the spec's mode; all specs' datasets

configs/robot.py leaves all of them open.
"""

from __future__ import annotations

from typing import Any

from semanticvla_jax.data import spec as specs
from semanticvla_jax.data.spec import DatasetSpec
from semanticvla_jax.errors import refuse

OPEN = -1  # a number that the spec decides


def own_specs(config: Any) -> list[DatasetSpec]:
  """The DatasetSpecs that the config names. Raises ValueError for one that cannot be loaded."""
  return [specs.load(place) for place in config.data.get("specs", ())]


def resolve(config: Any) -> Any:
  """The config with every field that it leaves open filled in from its specs; the same config where there is none.

  Raises:
    ValueError: open fields without a spec, specs that differ in what the model must know, or a spec that is wrong.
  """
  found = own_specs(config)
  wanted = {name for name in ("num_views", "proprio_dim", "action_dim", "chunk") if config.model.get(name) == OPEN}
  if not found:
    if wanted or config.data.mixture is None:
      raise refuse(
        "config.data.specs",
        "no DatasetSpec",
        f"one that decides {', '.join(f'model.{name}' for name in sorted(wanted)) or 'data.mixture'}",
        "pass --config.data.specs=my_robot.py:SPEC (docs/your_robot.md)",
      )
    return config
  one = _common(found)
  groups = one["groups"] if config.model.coupler in ("grouped", "paper") else None
  values = {f"model.{name}": one[name] for name in wanted}
  values |= {} if config.model.get("groups") is not None else {"model.groups": groups}
  values |= {} if config.model.get("optional_views") else {"model.optional_views": one["optional_views"]}
  values |= {} if config.data.normalisation is not None else {"data.normalisation": one["mode"]}
  values |= {} if config.data.mixture is not None else {"data.mixture": _mixture(found)}
  resolved = config.copy_and_resolve_references()
  with resolved.unlocked(), resolved.ignore_type():
    resolved.update_from_flattened_dict(values)
  return resolved


def _common(found: list[DatasetSpec]) -> dict[str, Any]:
  """What the specs say of the model. Raises ValueError where they differ."""
  described = [
    {
      "num_views": len(one.views),
      "proprio_dim": one.proprio_dim or None,
      "action_dim": len(one.absolute),
      "chunk": one.chunk,
      "groups": None if one.groups is None else tuple(one.groups.items()),
      "optional_views": tuple(i for i, view in enumerate(one.views) if view in one.optional),
      "mode": one.mode,
    }
    for one in found
  ]
  for field, value in described[0].items():
    values = [one[field] for one in described]
    if any(other != value for other in values):
      raise refuse(
        "config.data.specs",
        f"{field} {values} in {[one.name for one in found]}",
        "the same, for one model reads them",
        "train on them apart",
      )
  return described[0]


def _mixture(found: list[DatasetSpec]) -> str:
  if unnamed := [one for one in found if one.name is None]:
    raise refuse(
      "config.data.mixture",
      f"None with {len(unnamed)} DatasetSpecs without a name",
      "the dataset's name",
      "set config.data.mixture, or name=… in the DatasetSpec",
    )
  return ",".join(one.name for one in found)
