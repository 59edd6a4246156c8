"""The parameters of a policy folder, read one array or one layer at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import flatten_dict

from semanticvla_jax import checkpoint
from semanticvla_jax.convert import work


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

  def pieces(self, path: str) -> Iterator[np.ndarray]:
    """A parameter whole, or one layer after another where it is a stack over the decoder's layers."""
    if not path.startswith("llm/layers/"):
      yield self.read(path)
      return
    yield from (self.read(path, layer) for layer in range(self.leaves[path].shape[0]))

  def check_hash(self) -> None:
    """Raises ValueError where the parameters are not those that metadata.json was written for; reads all of them."""
    digest = hashlib.sha256()
    named = ((path, i, piece) for path in self.leaves for i, piece in enumerate(self.pieces(path)))
    for path, i, piece in work.ahead(named):
      if i == 0:
        digest.update(f"{path} {self.leaves[path].dtype} {self.leaves[path].shape or (1,)}\n".encode())
      digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
    got, wanted = digest.hexdigest(), self.metadata["params_sha256"]
    if got != wanted:
      raise ValueError(
        f"Policy {self.folder} is not what was saved: got parameters of hash {got[:12]}…, expected {wanted[:12]}… "
        "(metadata.json); copy the folder again from where it was made."
      )


def is_policy(path: str | Path) -> bool:
  """Whether a path looks like a policy folder."""
  return (Path(path) / "params").is_dir() and (Path(path) / "metadata.json").is_file()
