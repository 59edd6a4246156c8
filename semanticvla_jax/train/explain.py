"""What `--explain` prints: the mesh, how each family of parameters is split over it, and its bytes on each device."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from semanticvla_jax.train import program, sharding
from semanticvla_jax.train.step import AuxLoss


class Family(NamedTuple):
  """Parameters that differ only in the number of their layer and are split alike."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  trainable: bool
  spec: str


def families(config: Any, mesh: Any, aux_loss: AuxLoss | None = None) -> Counter:
  """How many parameters each family has."""
  step, rule = program.from_config(config, aux_loss), sharding.rule_of(config.mesh)
  found: Counter = Counter()
  for tree, trainable in ((step.state.trainable, True), (step.frozen, False)):
    for path, x in flatten_dict(tree, sep="/").items():
      spec = sharding.param_spec(path, tuple(x.shape), mesh, rule)
      name = re.sub(r"(encoderblock|layers|block|pair)_\d+", r"\1_*", path)
      found[Family(name, tuple(x.shape), str(x.dtype), trainable, _show(spec, len(x.shape)))] += 1
  return found


def _show(spec: Any, dims: int) -> str:
  axes = [*spec, *[None] * (dims - len(spec))]
  return "copied" if not any(axes) else "·".join(axis or "-" for axis in axes)


def local_bytes(tree: Any, mesh: Any, rule: sharding.Rule = sharding.DEFAULT_RULE) -> int:
  """Bytes of a tree of arrays or shapes on each device under the rule."""

  def one(path, x):
    name = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
    spec = sharding.param_spec(name, tuple(x.shape), mesh, rule)
    parts = math.prod(mesh.shape[axis] for axis in spec if axis is not None)
    return math.prod(x.shape) // parts * jnp.dtype(x.dtype).itemsize

  return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(one, tree)))


def family_bytes(family: Family, n: int, mesh: Any) -> int:
  """Bytes of a family's `n` parameters on each device."""
  parts = math.prod(mesh.shape.get(axis, 1) for axis in family.spec.split("·"))
  return n * math.prod(family.shape) // parts * jnp.dtype(family.dtype).itemsize


def table(config: Any, mesh: Any, sizes: bool = False, aux_loss: AuxLoss | None = None) -> str:
  """One line a family: how many, shape, type, trainable or frozen, which mesh axis splits each of its axes.

  With `sizes` the bytes on each device come first.
  """
  lines = []
  for family, n in sorted(families(config, mesh, aux_loss).items()):
    shape = "x".join(map(str, family.shape)) or "scalar"
    kind = "trainable" if family.trainable else "frozen"
    line = f"{family.name:<76} {n:>3} × {shape:<18} {family.dtype:<9} {kind:<10} {family.spec}"
    lines.append(f"{size(family_bytes(family, n, mesh))}  {line}" if sizes else line)
  return "\n".join(lines)


def memory(config: Any, mesh: Any, aux_loss: AuxLoss | None = None) -> dict[str, int]:
  """Bytes on each device of what lives across steps, and of the gradients; activations come on top (see preflight)."""
  step, rule = program.from_config(config, aux_loss), sharding.rule_of(config.mesh)
  return {
    "frozen parameters": local_bytes(step.frozen, mesh, rule),
    "trainable parameters": local_bytes(step.state.trainable, mesh, rule),
    "optimizer": local_bytes(step.state.optimizer, mesh, rule),
    "gradients": local_bytes(step.state.trainable, mesh, rule) * min(2, config.optim.accumulate),  # and their sum
  }


def explain(config: Any, devices: int | None = None, aux_loss: AuxLoss | None = None) -> str:
  """The whole text, for the devices present or for so many that need not be.

  Raises:
    ValueError: a mesh, batch or override that does not fit.
  """
  n = len(jax.devices()) if devices is None else devices
  mesh, step = sharding.abstract_mesh(config.mesh, n), program.from_config(config, aux_loss)
  both = flatten_dict(step.frozen) | flatten_dict(step.state.trainable)
  sharding.check({"/".join(path): x for path, x in both.items()}, mesh, sharding.rule_of(config.mesh))
  rows, turns = sharding.devices_of_rows(mesh), config.optim.accumulate
  sharding.check_rows(config.data.batch_size, rows, turns)
  sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  lines = [
    f"mesh: {sizes} ({n} devices{'' if devices else ', those present'})",
    f"batch: {config.data.batch_size}, {config.data.batch_size // rows} a device"
    + (f" in {turns} turns" if turns > 1 else ""),
    "",
    table(config, mesh, sizes=True, aux_loss=aux_loss),
    "",
    "on each device:",
  ]
  parts = memory(config, mesh, aux_loss)
  lines += [f"  {name:<22} {size(n)}" for name, n in (parts | {"together": sum(parts.values())}).items()]
  lines.append("  activations and temporaries come on top: python -m semanticvla_jax.train.preflight")
  return "\n".join(lines)


def size(n: int) -> str:
  """Bytes as text of fixed width, in GiB, or MiB where that says more."""
  return f"{n / 2**30:9.3f} GiB" if n >= 2**30 / 100 else f"{n / 2**20:9.3f} MiB"
