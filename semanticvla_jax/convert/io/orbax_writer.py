"""Writes an Orbax parameter folder piece by piece: one array, or one layer of a stacked array, is in memory at a time.

Orbax's own saving takes the whole tree of arrays at once. Here a leaf is a recipe (`Lazy`) that a type handler of this
module asks for its pieces when it writes; what is left behind is an ordinary Orbax folder, read by checkpoint.py. The
memory in use is a few times the largest piece (the embedding, 0.5 GB in float32 at 7B) and Orbax's write buffer
(`BUFFER`). Pieces are made, hashed and written in threads of their own.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict
from orbax.checkpoint._src.serialization import tensorstore_utils
from orbax.checkpoint._src.serialization import type_handlers as handlers

from semanticvla_jax.convert.io import prefetch

BUFFER = 128 * 1024 * 1024  # bytes that the store gathers before it writes a data file


@dataclasses.dataclass(frozen=True)
class Lazy:
  """An array that is made when it is written.

  Attributes:
    shape, dtype: of the whole array.
    stacked: whether `pieces` make the slices along the leading axis, and not the array itself.
    pieces: each makes one, in order; they may run at the same time.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  stacked: bool
  pieces: Sequence[Callable[[], np.ndarray]]

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  @property
  def ndim(self) -> int:
    return len(self.shape)


class _Window:
  """Work on pieces that is under way: together no more than BUFFER bytes, or one piece that is larger."""

  def __init__(self):
    self._pending: collections.deque = collections.deque()
    self._bytes = 0

  async def add(self, nbytes: int, *futures: Any) -> None:
    self._pending.append((futures, nbytes))
    self._bytes += nbytes
    while self._bytes > BUFFER:
      await self._oldest()

  async def drain(self) -> None:
    while self._pending:
      await self._oldest()

  async def settle(self) -> None:
    """Waits until nothing is under way any more, whatever became of it."""
    await asyncio.gather(*(future for futures, _ in self._pending for future in futures), return_exceptions=True)

  async def _oldest(self) -> None:
    futures, nbytes = self._pending[0]
    for future in futures:
      await future
    self._pending.popleft()
    self._bytes -= nbytes


class _Handler(handlers.NumpyHandler):
  """Writes `Lazy` leaves one after the other, in the order of their names; hashes what it writes."""

  def __init__(self, seen: Callable[[str, np.ndarray], None]):
    super().__init__(deepcopy_host_arrays=False)
    self._seen = seen
    self._digest = hashlib.sha256()

  async def serialize(self, values, infos, args=None):
    args = args or [ocp.SaveArgs()] * len(values)
    items = sorted(zip(map(_path, infos), values, infos, args), key=lambda item: item[0])
    for _, _, info, _ in items:
      await info.await_path_creation()
    # the whole folder is put on the disk when it is complete (target.whole), not file by file
    context = ts.Context(infos[0].ts_context.spec.to_json() | {"file_io_sync": False})
    stores = await asyncio.gather(*(self._open(*item, context) for _, *item in items))
    leaves = {name: (value, store) for (name, value, _, _), store in zip(items, stores)}
    window = _Window()
    with concurrent.futures.ThreadPoolExecutor(1) as hasher:
      try:
        for name, i, piece in prefetch.in_turn(_makers({name: value for name, (value, _) in leaves.items()})):
          value, store = leaves[name]
          hashed = asyncio.wrap_future(hasher.submit(self._look, name, value, i, piece))
          where = store[i] if value.stacked else store
          written = where.write(piece, can_reference_source_data_indefinitely=True)
          await window.add(piece.nbytes, written.commit, hashed)
        await window.drain()
      finally:
        await window.settle()  # after an error too: the caller will remove the folder
    return []

  def _look(self, name: str, value: Lazy, i: int, piece: np.ndarray) -> None:
    if i == 0:
      self._digest.update(f"{name} {value.dtype} {value.shape or (1,)}\n".encode())
    self._digest.update(piece.reshape(-1).view(np.uint8))
    self._seen(name, piece)

  async def _open(self, value: Lazy, info: Any, arg: Any, context: ts.Context) -> ts.TensorStore:
    spec = tensorstore_utils.build_array_write_spec(
      info=info,
      arg=arg,
      global_shape=value.shape,
      local_shape=value.shape,
      dtype=value.dtype,
      use_ocdbt=info.is_ocdbt_checkpoint,
      process_index=0,
    ).json
    if value.stacked:
      spec["metadata"]["chunks"] = [1, *value.shape[1:]]  # a layer is written at once, and never read back
    return await ts.open(ts.Spec(spec), create=True, open=True, context=context)

  @property
  def sha256(self) -> str:
    """Of all that was written: checkpoint.params_hash of the same tree."""
    return self._digest.hexdigest()


def _makers(leaves: Mapping[str, Lazy]) -> Iterator[Callable[[], tuple[str, int, np.ndarray]]]:
  """What makes (name, number, piece) of every leaf, one after the other; checked, in C order."""
  for name, value in leaves.items():
    count = value.shape[0] if value.stacked else 1
    if len(value.pieces) != count:
      raise ValueError(f"{name}: got {len(value.pieces)} pieces, expected {count}: one a layer of {value.shape}.")
    for i in range(count):
      yield functools.partial(_checked, name, value, i)


def _checked(name: str, value: Lazy, i: int) -> tuple[str, int, np.ndarray]:
  piece, shape = np.asarray(value.pieces[i](), order="C"), value.shape[1:] if value.stacked else value.shape
  if (piece.shape, piece.dtype) != (shape, value.dtype):
    raise ValueError(f"{name}: got a piece {piece.dtype}{list(piece.shape)}, expected {value.dtype}{list(shape)}.")
  return name, i, piece


def _path(info: Any) -> str:
  return "/".join(str(getattr(key, "key", key)) for key in info.keypath)


def write(folder: Path, leaves: Mapping[str, Lazy], seen: Callable[[str, np.ndarray], None]) -> str:
  """Writes `{path: Lazy}` as the Orbax folder `folder`.

  Args:
    folder: does not exist yet.
    leaves: what to write.
    seen: called with the path and every piece, right after it was made.

  Returns:
    SHA-256 of the parameters, equal to checkpoint.params_hash of the tree that is read back.
  """
  handler = _Handler(seen)
  registry = ocp.type_handlers.create_type_handler_registry(
    (Lazy, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  handling = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)  # weights are noise
  with ocp.Checkpointer(handling) as checkpointer:
    tree = unflatten_dict(dict(leaves), sep="/")
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=BUFFER))
  return handler.sha256
