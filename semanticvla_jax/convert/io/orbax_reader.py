"""The parameters of a policy folder, read one array or one layer at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import flatten_dict

from semanticvla_jax import policy_folder
from semanticvla_jax.convert.io import direct_io, prefetch
from semanticvla_jax.errors import refuse
from semanticvla_jax.models import lora


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
    self.config, self.statistics, self.metadata = policy_folder.read_policy_json(self.folder)
    try:
      saved = flatten_dict(ocp.StandardCheckpointHandler().metadata(self.folder / "params").tree, sep="/")
    except (ValueError, OSError, KeyError, AttributeError) as error:
      raise refuse(
        f"Policy {folder} cannot be read",
        f"{type(error).__name__} in params/",
        "Orbax parameters",
        "copy the folder again from where it was made",
      ) from error
    self.leaves = {path: Leaf(tuple(x.shape), np.dtype(x.dtype)) for path, x in sorted(saved.items())}
    self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    self._stores: dict[str, ts.TensorStore] = {}

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in self.leaves.items()}

  @property
  def adapted(self) -> bool:
    """Whether it has adapters that are not folded in."""
    return any(path.endswith("/lora_a") for path in self.leaves)

  def read(self, path: str, layer: int | None = None) -> np.ndarray:
    """A parameter, or one layer of a stack."""
    if (path, layer) in self._plain:
      file, offset, nbytes = self._plain[path, layer]
      values, leaf = direct_io.read(file, offset, nbytes), self.leaves[path]
      if len(values) == nbytes:  # else let the store report what is wrong
        return values.view(leaf.dtype).reshape(leaf.shape if layer is None else leaf.shape[1:])
    if path not in self._stores:
      kvstore = {"driver": "ocdbt", "base": f"file://{self.folder}/params", "path": path.replace("/", ".") + "/"}
      spec = {"driver": "zarr", "kvstore": kvstore}
      self._stores[path] = ts.open(spec, context=self._context, open=True, read=True).result()
    store = self._stores[path]
    return np.asarray((store if layer is None else store[layer]).read().result())

  @functools.cached_property
  def _plain(self) -> dict[tuple[str, int | None], tuple[Path, int, int]]:
    return _plain_chunks(self.folder / "params", self.leaves)

  def pieces(self, path: str) -> Iterator[np.ndarray]:
    """A parameter whole, or one layer after another where it is a stack over the decoder's layers."""
    if not path.startswith("llm/layers/"):
      yield self.read(path)
      return
    yield from (self.read(path, layer) for layer in range(self.leaves[path].shape[0]))

  def merged(self, path: str, layer: int | None = None) -> np.ndarray:
    """A parameter, or one layer of a stack, with its adapter folded in where it has one; its dtype stays."""
    value = self.read(path, layer)
    a, b = (path.removesuffix("kernel") + name for name in ("lora_a", "lora_b"))
    if not path.endswith("/kernel") or a not in self.leaves:
      return value
    settings = self.config["lora"]
    tree = {"x": {"kernel": value, "lora_a": self.read(a, layer), "lora_b": self.read(b, layer)}}
    return np.asarray(lora.merge(tree, settings["rank"], settings["alpha"])["x"]["kernel"])

  def check_hash(self) -> None:
    """Raises ValueError where the parameters are not those that metadata.json was written for; reads all of them."""
    digest = hashlib.sha256()
    named = ((path, i, piece) for path in self.leaves for i, piece in enumerate(self.pieces(path)))
    for path, i, piece in prefetch.ahead(named):
      if i == 0:
        digest.update(f"{path} {self.leaves[path].dtype} {self.leaves[path].shape or (1,)}\n".encode())
      digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
    got, wanted = digest.hexdigest(), self.metadata["params_sha256"]
    if got != wanted:
      raise refuse(
        f"Policy {self.folder} is not what was saved",
        f"parameters of hash {got[:12]}…",
        f"{wanted[:12]}… (metadata.json)",
        "copy the folder again from where it was made",
      )


def _plain_chunks(params: Path, leaves: Mapping[str, Leaf]) -> dict[tuple[str, int | None], tuple[Path, int, int]]:
  """{(path, layer): (data file, offset, bytes)} of what lies in a data file as it is, from the store's index.

  That is a whole parameter (layer None), or a layer of a stack, in one chunk without compression. The rest is left to
  the store: what was saved with compression or in other chunks, small values in the index, an index of several nodes.
  """
  store = ts.KvStore.open(f"file://{params}/").result()
  root = ts.ocdbt.dump(store).result()["versions"][-1]
  if root.get("root_height", 1) > 0:  # unknown to another version of the store: it reads all itself
    return {}
  node = ts.ocdbt.dump(store, root["root"]["location"]).result()
  entries = {entry["key"].decode(): entry for entry in node["entries"]}
  out = {}
  for path, leaf in leaves.items():
    name = path.replace("/", ".")
    for layer, chunk in _chunk_names(json.loads(entries.get(f"{name}/.zarray", {}).get("inline_value", "{}"))):
      if value := entries.get(f"{name}/{chunk}", {}).get("indirect_value"):
        _, base, file, offset, nbytes = value.split(":")
        if int(nbytes) == leaf.dtype.itemsize * leaf.size // (1 if layer is None else leaf.shape[0]):
          out[path, layer] = params / base / file, int(offset), int(nbytes)
  return out


def _chunk_names(stored: Mapping) -> list[tuple[int | None, str]]:
  """[(layer, name of its chunk)] of an array whose chunks are numbers in C order, one for all or one a layer."""
  if not stored or stored["compressor"] or stored["filters"] or stored["order"] != "C" or stored["dtype"][0] == ">":
    return []
  shape, chunks = stored["shape"], stored["chunks"]
  rest = ["0"] * (len(shape) - 1)
  whole = [(None, ".".join(["0", *rest]))] if chunks == shape else []
  return whole + ([(i, ".".join([str(i), *rest])) for i in range(shape[0])] if chunks == [1, *shape[1:]] else [])


def is_policy(path: str | Path) -> bool:
  """Whether a path looks like a policy folder."""
  return (Path(path) / "params").is_dir() and (Path(path) / "metadata.json").is_file()
