"""The mesh, one rule for parameters, and batches placed on it.

replica   copies of everything on several slices; gradients cross the data-center network once a step
data      copies inside a slice
fsdp      examples and parameters are split (ZeRO-3, Rajbhandari et al. 2020)
tensor    attention heads and MLP columns are split (Megatron-LM, Shoeybi et al. 2019)
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from semanticvla_jax.errors import refuse

AXES = ("replica", "data", "fsdp", "tensor")
ROWS = AXES[:3]  # the examples of a batch lie over these
# Logical axes of activations (nn.with_logical_constraint in the models) → mesh axes.
ACTIVATIONS = (("batch", ROWS), ("length", None), ("embed", None))

_LLM, _VIT = r"llm/layers(_\d+)?", r".+/encoderblock_\d+"
# Which axis, counted from the last, `tensor` splits: heads of attention, columns of MLPs.
TENSOR = (
  (rf"{_LLM}/attn/(q|k|v|qkv)_proj/(kernel|lora_b)", -2),
  (rf"{_LLM}/attn/o_proj/(kernel|lora_a)", -3),
  (rf"{_LLM}/mlp/(gate|up|gate_up)_proj/(kernel|lora_b)", -1),
  (rf"{_LLM}/mlp/down_proj/(kernel|lora_a)", -2),
  (rf"{_VIT}/MultiHeadDotProductAttention_0/(query|key|value|qkv)/(kernel|bias|lora_b)", -2),
  (rf"{_VIT}/MultiHeadDotProductAttention_0/out/(kernel|lora_a)", -3),
  (rf"{_VIT}/MlpBlock_0/Dense_0/(kernel|bias|lora_b)", -1),
  (rf"{_VIT}/MlpBlock_0/Dense_1/(kernel|lora_a)", -2),
)


class Rule(NamedTuple):
  """What config.mesh says about parameters.

  Attributes:
    overrides: (regular expression over whole paths, a mesh axis or None for each axis of the array), …; come first.
    split_above: parameters of fewer numbers are copied over `fsdp`.
  """

  overrides: Sequence[tuple[str, Sequence[str | None]]] = ()
  split_above: int = 2**16


DEFAULT_RULE = Rule()  # of a config that says nothing


def rule_of(mesh: Any) -> Rule:
  """The rule of config.mesh, whose fields earlier runs may lack."""
  return Rule(**{name: mesh[name] for name in Rule._fields if name in mesh})


def mesh_shape(sizes: Any, devices: int) -> dict[str, int]:
  """The size of every axis; one may be -1 and takes what is left, axes that are not named are 1.

  Raises:
    ValueError: when the sizes do not multiply to the number of devices.
  """
  shape = [sizes.get(axis, 1) for axis in AXES]
  if shape.count(-1) == 1 and 0 not in shape:
    known = -math.prod(shape)
    shape[shape.index(-1)] = max(1, devices // known)
  if math.prod(shape) != devices or min(shape) < 1:
    raise refuse(
      "mesh",
      f"{dict(zip(AXES, shape))} for {devices} devices",
      f"sizes that multiply to {devices}",
      "set config.mesh (one size may be -1)",
    )
  return dict(zip(AXES, shape))


def make_mesh(sizes: Any, devices: list | None = None) -> Mesh:
  """A mesh over all devices, laid out along the wires where it is a TPU's; sizes as in `mesh_shape`.

  Raises:
    ValueError: sizes that do not multiply to the number of devices, or a `replica` that the slices do not divide.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(sizes, len(devices))
  slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
  if shape["replica"] % slices:
    raise refuse(
      "mesh",
      f"replica {shape['replica']} on {slices} slices",
      f"a multiple of {slices}, so that only gradients cross from slice to slice",
      f"set config.mesh.replica={slices}",
    )
  inside = (shape["replica"] // slices, *(shape[axis] for axis in AXES[1:]))
  if slices > 1:
    grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
  else:
    grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES)


def abstract_mesh(sizes: Any, devices: int) -> AbstractMesh:
  """A mesh of so many devices that need not exist, for `--explain` and for looking at the rule."""
  shape = mesh_shape(sizes, devices)
  return AbstractMesh(tuple(shape.values()), AXES)


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rule: Rule = DEFAULT_RULE) -> P:
  """How a parameter is split over the mesh: the first override that matches its path, else the one rule.

  The rule: `tensor` splits heads and MLP columns where it divides them (TENSOR); `fsdp` splits the largest other axis
  of a large array that it divides; everything else is copied.

  Args:
    path: "llm/layers/attn/q_proj/kernel"; a moment of an optimizer may have names before it.
    shape: of the array.
    mesh: gives the sizes of the axes.
    rule: of config.mesh.

  Raises:
    ValueError: an override that does not fit the array.
  """
  for pattern, names in rule.overrides:
    if _matches(pattern, path):
      return _override(pattern, tuple(name or None for name in names), path, shape, mesh)
  axes: list[str | None] = [None] * len(shape)
  tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
  if tensor > 1:
    at = next((at for pattern, at in TENSOR if _matches(pattern, path)), None)
    if at is not None and shape[at] % tensor == 0:
      axes[at] = "tensor"
  if fsdp > 1 and math.prod(shape) >= rule.split_above:
    free = [i for i, size in enumerate(shape) if axes[i] is None and size % fsdp == 0]
    if free:
      axes[max(free, key=lambda i: shape[i])] = "fsdp"
  return _spec(axes)


def _spec(axes: Sequence[str | None]) -> P:
  """Without the Nones at its end, so that equal shardings are equal specs."""
  last = max((i for i, axis in enumerate(axes) if axis is not None), default=-1)
  return P(*axes[: last + 1])


def _override(pattern: str, names: tuple, path: str, shape: tuple[int, ...], mesh: Any) -> P:
  """The spec of an override. Raises ValueError when it does not fit the array."""
  known = [name for name in names if name is not None]
  fits = len(names) == len(shape) and len(set(known)) == len(known) and set(known) <= set(AXES)
  if not fits or any(size % mesh.shape[name] for size, name in zip(shape, names) if name):
    raise refuse(
      "config.mesh.overrides",
      f"{pattern!r} → {names} for {path} of shape {shape}",
      f"for each axis None or a name of {AXES} that divides it (sizes now: {dict(mesh.shape)}), none twice",
      "change the override or the mesh",
    )
  return _spec(names)


@functools.cache
def _expression(pattern: str) -> re.Pattern:
  return re.compile(f"(?:.*/)?(?:{pattern})")


def _matches(pattern: str, path: str) -> bool:
  return _expression(pattern).fullmatch(path) is not None


def param_sharding(tree: Any, mesh: Mesh, rule: Rule = DEFAULT_RULE) -> Any:
  """NamedShardings for arrays or shapes: parameters, or optimizer state, whose moments are named like them."""

  def where(path, x):
    name = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
    return NamedSharding(mesh, param_spec(name, tuple(x.shape), mesh, rule))

  return jax.tree_util.tree_map_with_path(where, tree)


def check(params: Any, mesh: Mesh | AbstractMesh, rule: Rule = DEFAULT_RULE) -> None:
  """Logs what `tensor` would split and does not divide. Raises ValueError for an override that matches nothing."""
  shapes = {path: tuple(x.shape) for path, x in flatten_dict(params, sep="/").items()}
  for pattern, _ in rule.overrides:
    if not any(_matches(pattern, path) for path in shapes):
      raise refuse(
        "config.mesh.overrides",
        f"{pattern!r}, which matches no parameter",
        f"a regular expression over whole paths such as {next(iter(shapes))!r}",
        "see the names with --explain",
      )
  n = mesh.shape["tensor"]
  whole = [path for path, s in shapes.items() for pattern, at in TENSOR if _matches(pattern, path) and s[at] % n]
  if whole:
    logging.warning(
      "mesh: tensor=%d does not divide the heads or columns of %d arrays (%s, …); they are not split over it",
      n,
      len(whole),
      whole[0],
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples over `replica`, `data` and `fsdp`."""
  return NamedSharding(mesh, P(ROWS))


def devices_of_rows(mesh: Mesh | AbstractMesh) -> int:
  """How many parts the examples of a batch lie in."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def host_rows(size: int, mesh: Mesh) -> Int[np.ndarray, " rows"]:
  """Which examples of a global batch of `size` lie on this process's devices, ascending: what it has to read.

  Processes that share examples (`tensor` across hosts) read the same ones.

  Raises:
    ValueError: when the examples do not divide over the devices.
  """
  check_rows(size, devices_of_rows(mesh))
  slices = {index[0].indices(size) for index in batch_sharding(mesh).addressable_devices_indices_map((size,)).values()}
  return np.concatenate([np.arange(*part) for part in sorted(slices)])


def check_rows(size: int, n: int, turns: int = 1) -> None:
  """Raises ValueError unless `size` examples divide over `n` devices and the turns of config.optim.accumulate."""
  if turns < 1 or size % (n * turns):
    more = "" if turns == 1 else f" times the {turns} turns of config.optim.accumulate"
    raise refuse(
      "batch",
      f"{size} examples",
      f"a multiple of the {n} devices that share them (mesh replica × data × fsdp){more}",
      "change config.data.batch_size",
    )


def place_batch(batch: Any, mesh: Mesh, size: int) -> Any:
  """The examples `host_rows(size, mesh)` of a global batch → global arrays."""
  where = batch_sharding(mesh)

  def place(x):
    return jax.make_array_from_process_local_data(where, np.asarray(x), (size, *x.shape[1:]))

  return jax.tree.map(place, batch)


def place_whole(batch: Any, mesh: Mesh) -> Any:
  """A batch that every process made whole → global arrays."""
  where = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, where)
  host = jax.tree.map(np.asarray, batch)
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, x.__getitem__), host)
