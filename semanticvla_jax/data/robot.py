"""What a policy keeps of a DatasetSpec, as JSON in its config.json: names of cameras, groups, grippers, units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from semanticvla_jax.data.spec import DatasetSpec, Gripper
from semanticvla_jax.errors import refuse

KEY = "robot"  # of config.json: {dataset: a Robot as JSON}


class Robot(NamedTuple):
  """The robot of a dataset, as a policy that was trained on it sees it.

  Attributes:
    views: names of its cameras in the model's order, each with the keys under which an observation may hold its image.
    optional: cameras whose image may be missing.
    proprio: columns that the proprioception is made of, one after the other; () where a function makes it.
    grippers: of the dimensions that the model answers as openings, 1 open and 0 closed.
    facts: for people and clients: groups, absolute, units, control_hz.
  """

  views: dict[str, tuple[str, ...]]
  optional: tuple[str, ...]
  proprio: tuple[str, ...]
  grippers: tuple[Gripper, ...]
  facts: dict[str, Any]

  def commands(self, actions: Float[np.ndarray, "*b a"]) -> Float[np.ndarray, "*b a"]:
    """Actions in raw units whose openings become the values that this robot's grippers take.

    A binary gripper is open above 0.5; a continuous one is clipped to its range.
    """
    out = actions.copy()
    for one in self.grippers:
      opening = actions[..., one.dimension]
      open_, closed = one.answers
      share = opening > 0.5 if one.kind == "binary" else np.clip(opening, 0, 1)
      out[..., one.dimension] = closed + share * np.float32(open_ - closed)
    return out

  def to_json(self) -> dict:
    """As JSON values."""
    grippers = [{**one._asdict(), "command": one.command and [*one.command]} for one in self.grippers]
    views = {name: [*keys] for name, keys in self.views.items()}
    lists = {"views": views, "optional": [*self.optional], "proprio": [*self.proprio], "grippers": grippers}
    return lists | self.facts


def of(spec: DatasetSpec) -> Robot:
  """The robot that a spec describes."""
  keys = {name: dict.fromkeys((f"observation/{name}", name, *spec.aliases.get(name, ()))) for name in spec.views}
  facts = {
    "groups": spec.groups and {name: [*dims] for name, dims in spec.groups.items()},
    "absolute": [*map(bool, spec.absolute)],
    "units": {**spec.units},
    "control_hz": spec.control_hz,
  }
  grippers = tuple(one for one in spec.grippers if one.dimension in spec.openings)
  proprio = tuple(spec.proprio) if spec.standardize is None else ()
  return Robot({name: (*own,) for name, own in keys.items()}, tuple(spec.optional), proprio, grippers, facts)


def from_json(where: str, value: Any) -> Robot:
  """Reads what `to_json` gave. Raises ValueError where it is damaged."""
  try:
    value = {**value}
    views = {name: tuple(keys) for name, keys in value.pop("views").items()}
    grippers = [Gripper(**one) for one in value.pop("grippers")]
    grippers = [one._replace(command=one.command and (*one.command,)) for one in grippers]
    optional, proprio = (tuple(value.pop(key)) for key in ("optional", "proprio"))
    return Robot(views, optional, proprio, tuple(grippers), value)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise refuse(
      f"{where}: its robot", f"{type(error).__name__}: {error}", "views, optional and grippers", "copy the file again"
    ) from error


def select(config: Mapping, dataset: str) -> Robot | None:
  """The robot of a dataset, "" for the only one, in a policy's config.

  None where the config has none: of earlier versions, and of converted policies.
  """
  kept = config.get(KEY) or {}
  if not dataset and len(kept) == 1:
    (dataset,) = kept
  name = next((name for name in (dataset, f"{dataset}_no_noops") if name in kept), None)
  return None if name is None else from_json("config.json", kept[name])
