"""Writes an Orbax parameter folder piece by piece: one array, or one layer of a stacked array, is in memory at a time.

Orbax's own saving takes the whole tree of arrays at once. Here the leaves of the tree are only shapes and types
(`ArraySpec`), and a type handler of this module writes the numbers as they are made (`Piece`). The result is an
ordinary Orbax folder, read by policy_folder.py. The memory in use is a few times the largest piece (the embedding,
0.5 GB in float32 at 7B) and Orbax's write buffer (`BUFFER`). Pieces are made, hashed and written in separate threads.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from semanticvla_jax.convert.io import prefetch

BUFFER = 128 * 1024 * 1024  # bytes that the store gathers before it writes a data file


@dataclasses.dataclass(frozen=True)
class ArraySpec:
  """An array that is to be written; `stacked`: layer by layer along its leading axis, and not at once."""

  shape: tuple[int, ...]
  dtype: np.dtype
  stacked: bool

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def layers(self) -> Sequence[int | None]:
    """The layers of a stack; (None,), the whole array, of anything else."""
    return range(self.shape[0]) if self.stacked else (None,)


class Piece(NamedTuple):
  """One array, or one layer of a stack, and what makes its numbers (in any thread)."""

  path: str
  layer: int | None
  make: Callable[[], np.ndarray]


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
    """Waits for all pending work, failed or not."""
    await asyncio.gather(*(future for futures, _ in self._pending for future in futures), return_exceptions=True)

  async def _oldest(self) -> None:
    futures, nbytes = self._pending[0]
    for future in futures:
      await future
    self._pending.popleft()
    self._bytes -= nbytes


class _Handler(ocp.type_handlers.NumpyHandler):
  """Writes `ArraySpec` leaves piece by piece, in the order of their paths; hashes what it writes."""

  def __init__(self, pieces: Iterable[Piece], seen: Callable[[str, np.ndarray], None]):
    super().__init__(deepcopy_host_arrays=False)
    self._pieces, self._seen = pieces, seen
    self._digest = hashlib.sha256()

  async def serialize(self, values, infos, args=None):
    args = args or [ocp.SaveArgs()] * len(values)
    for info in infos:
      await info.await_path_creation()
    # the whole folder is put on the disk when it is complete (target.whole), not file by file
    context = ts.Context(infos[0].ts_context.spec.to_json() | {"file_io_sync": False})
    stores = await asyncio.gather(*(self._open(*item, context) for item in zip(values, infos, args)))
    leaves = {_path(info): (value, store) for info, value, store in zip(infos, values, stores)}
    arrays = {path: leaves[path][0] for path in sorted(leaves)}
    window = _Window()
    with concurrent.futures.ThreadPoolExecutor(1) as hasher:
      try:
        for path, layer, piece in prefetch.in_turn(_makers(arrays, self._pieces)):
          value, store = leaves[path]
          hashed = asyncio.wrap_future(hasher.submit(self._look, path, value, layer, piece))
          where = store if layer is None else store[layer]
          written = where.write(piece, can_reference_source_data_indefinitely=True)
          await window.add(piece.nbytes, written.commit, hashed)
        await window.drain()
      finally:
        await window.settle()  # after an error too: the caller will remove the folder
    return []

  def _look(self, path: str, value: ArraySpec, layer: int | None, piece: np.ndarray) -> None:
    if not layer:  # the first of a stack, or the whole
      self._digest.update(f"{path} {value.dtype} {value.shape or (1,)}\n".encode())
    self._digest.update(piece.reshape(-1).view(np.uint8))
    self._seen(path, piece)

  async def _open(self, value: ArraySpec, info: Any, arg: Any, context: ts.Context) -> ts.TensorStore:
    spec = ocp.type_handlers.get_json_tspec_write(
      info,
      use_ocdbt=info.is_ocdbt_checkpoint,
      global_shape=value.shape,
      local_shape=value.shape,
      dtype=value.dtype,
      process_index=0,
      arg=arg,
    )
    if value.stacked:
      spec["metadata"]["chunks"] = [1, *value.shape[1:]]  # a layer is written at once, and never read back
    return await ts.open(ts.Spec(spec), create=True, open=True, context=context)

  @property
  def sha256(self) -> str:
    """Of all that was written: policy_folder.params_hash of the same tree."""
    return self._digest.hexdigest()


def _makers(
  arrays: Mapping[str, ArraySpec], pieces: Iterable[Piece]
) -> Iterator[Callable[[], tuple[str, int | None, np.ndarray]]]:
  """What makes each piece, which is checked. Raises ValueError unless they are those of `arrays`, in order."""
  wanted = ((path, layer) for path, x in arrays.items() for layer in x.layers)
  for expected, piece in itertools.zip_longest(wanted, pieces):
    got = piece and (piece.path, piece.layer)
    if got != expected:
      raise ValueError(f"Pieces: got {got}, expected {expected} (path, layer); every layer of every array, in order.")
    yield functools.partial(_checked, arrays[piece.path], piece)


def _checked(array: ArraySpec, piece: Piece) -> tuple[str, int | None, np.ndarray]:
  """(path, layer, numbers) of a piece, in C order."""
  x, shape = np.asarray(piece.make(), order="C"), array.shape if piece.layer is None else array.shape[1:]
  if (x.shape, x.dtype) != (shape, array.dtype):
    raise ValueError(f"{piece.path}: got a piece {x.dtype}{list(x.shape)}, expected {array.dtype}{list(shape)}.")
  return piece.path, piece.layer, x


def _path(info: Any) -> str:
  return "/".join(str(getattr(key, "key", key)) for key in info.keypath)


def write(
  folder: Path, arrays: Mapping[str, ArraySpec], pieces: Iterable[Piece], seen: Callable[[str, np.ndarray], None]
) -> str:
  """Writes arrays as the Orbax folder `folder`.

  Args:
    folder: does not exist yet.
    arrays: {path: shape and type}.
    pieces: the numbers: every array, or every layer of a stack, in the order of the sorted paths.
    seen: called with the path and every piece, right after it was made.

  Returns:
    SHA-256 of the parameters, equal to policy_folder.params_hash of the tree that is read back.

  Raises:
    ValueError: other pieces than those of `arrays`, or another order, shape or type.
  """
  handler = _Handler(pieces, seen)
  registry = ocp.type_handlers.create_type_handler_registry(
    (ArraySpec, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  handling = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)  # weights are noise
  with ocp.Checkpointer(handling) as checkpointer:
    tree = unflatten_dict(dict(arrays), sep="/")
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=BUFFER))
  return handler.sha256
