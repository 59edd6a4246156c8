"""The parameters of a policy folder, read one array or one layer at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import flatten_dict

from semanticvla_jax import checkpoint


class Leaf(NamedTuple):
  """Shape and dtype of a parameter."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def size(self) -> int:
    return math.prod(self.shape)


class PolicyFolder:
  """A policy folder, nothing of its parameters read.

  Attributes:
    folder: where it is.
    leaves: {path: Leaf} of params/.
    config, statistics, metadata: its JSON files.

  Raises:
    ValueError: no complete policy folder.
  """

  def __init__(self, folder: str | Path):
    self.folder = Path(folder).expanduser().absolute()
    self.config, self.statistics, self.metadata = checkpoint.read_policy_json(self.folder)
    try:
      saved = flatten_dict(ocp.StandardCheckpointHandler().metadata(self.folder / "params").tree, sep="/")
    except (ValueError, OSError, KeyError, AttributeError) as error:
      raise ValueError(
        f"Policy {folder} cannot be read: got {type(error).__name__} in params/; expected Orbax parameters; copy the "
        "folder again from where it was made."
      ) from error
    self.leaves = {path: Leaf(tuple(x.shape), np.dtype(x.dtype)) for path, x in sorted(saved.items())}
    self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    self._stores: dict[str, ts.TensorStore] = {}

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in self.leaves.items()}

  @property
  def adapted(self) -> bool:
    """Whether adapters stand beside their kernels."""
    return any(path.endswith("/lora_a") for path in self.leaves)

  def read(self, path: str, layer: int | None = None) -> np.ndarray:
    """A parameter, or one layer of a stack."""
    if path not in self._stores:
      kvstore = {"driver": "ocdbt", "base": f"file://{self.folder}/params", "path": path.replace("/", ".") + "/"}
      spec = {"driver": "zarr", "kvstore": kvstore}
      self._stores[path] = ts.open(spec, context=self._context, open=True, read=True).result()
    store = self._stores[path]
    return np.asarray((store if layer is None else store[layer]).read().result())


def is_policy(path: str | Path) -> bool:
  """Whether a path looks like a policy folder."""
  return (Path(path) / "params").is_dir() and (Path(path) / "metadata.json").is_file()
