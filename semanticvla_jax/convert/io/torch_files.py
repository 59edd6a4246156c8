"""Tensors in files, opened lazily: safetensors, PyTorch's .pt / .bin and big_vision's .npz.

A header is read and checked when a file is opened; the numbers of a tensor only when they are asked for, one tensor at
a time, by a plain read (no page of a file stays mapped, so the memory in use is that of one tensor).
"""

from __future__ import annotations

import functools
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from semanticvla_jax.convert.io import direct_io
from semanticvla_jax.errors import refuse

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")  # PyTorch's, which numpy does not know
_MOST_HEADER = 100_000_000  # bytes, as safetensors allows
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
# Types of safetensors that are no weights as they are: packed or scaled ones, indices, complex numbers.
UNREAD = ("U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


class Tensor(NamedTuple):
  """One tensor of a file.

  Attributes:
    file: where it is.
    name: its key in that file.
    shape, dtype: of the stored numbers (bfloat16 is ml_dtypes').
    read: reads the numbers into a new array.
    offset: byte of the file where they begin; None where the file does not hold them as plain bytes.
  """

  file: Path
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  offset: int | None = None

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def open_file(path: Path) -> list[Tensor]:
  """The tensors of one file, none of them read.

  Raises:
    ValueError: another kind of file, a header that is damaged or does not fit the file, a pickle that is more than
      tensors, or PyTorch missing where it is needed.
  """
  if path.suffix == ".safetensors":
    return _safetensors(path)
  if path.suffix in (".pt", ".pth", ".bin"):
    return _pickled(path)
  if path.suffix == ".npz":
    return _npz(path)
  raise refuse("Unknown file", f"{path}", f"one of {', '.join(SUFFIXES)}", "convert it to safetensors first")


def _safetensors(path: Path) -> list[Tensor]:
  size = path.stat().st_size
  with path.open("rb") as file:
    lead = file.read(8)
    length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else None
    if length is None or length > min(_MOST_HEADER, size - 8):
      found = f"a header of {length:,} bytes" if length is not None else "no header"
      raise refuse(
        f"{path} is truncated or not a safetensors file",
        f"{found} in {size:,} bytes",
        "header and data",
        "download it again",
      )
    text = file.read(length)
  try:
    header = json.loads(text)
    _check_types(path, header)
    fields = [
      (name, DTYPES[f["dtype"]], tuple(map(int, f["shape"])), *map(int, f["data_offsets"]))
      for name, f in header.items()
      if name != "__metadata__"
    ]
  except UnreadType:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise refuse(
      f"{path} has a damaged header, or a type that is newer than this package",
      f"{type(error).__name__}: {str(error)[:120]}{_of_type(text, error)}",
      f"JSON of dtype (one of {', '.join(DTYPES)}), shape and data_offsets a tensor",
      "download the file again, or convert that tensor",
    ) from error
  start = 8 + length
  _check_header(path, fields, size - start)
  return [
    Tensor(path, name, shape, dtype, functools.partial(_read, path, dtype, shape, start + a), start + a)
    for name, dtype, shape, a, _ in fields
  ]


def _of_type(text: bytes, error: Exception) -> str:
  """The first tensor of the type that is unknown, where this is what is wrong."""
  if not isinstance(error, KeyError) or error.args[0] in ("dtype", "shape", "data_offsets"):
    return ""
  owners = [name for name, field in json.loads(text).items() if field.get("dtype") == error.args[0]]
  return f" ({owners[0]})" if owners else ""


class UnreadType(ValueError):
  """A tensor of a type that is not read."""


def _check_types(path: Path, header: dict) -> None:
  """Raises UnreadType at the first tensor of a type that safetensors has and this package does not read."""
  for name, field in header.items():
    if name != "__metadata__" and field["dtype"] in UNREAD:
      raise _unread(path, name, field["dtype"])


def _unread(path: Path, name: str, dtype: str) -> UnreadType:
  refusal = refuse(
    f"{path} has a tensor of a type that is not read",
    f"{name} of {dtype}",
    f"one of {', '.join(DTYPES)} in every tensor",
    "the file may be whole: pass the weights before they were quantised or packed",
  )
  return UnreadType(str(refusal))


def _check_header(path: Path, fields: list[tuple], room: int) -> None:
  """Raises ValueError where offsets leave the file, overlap, or disagree with dtype and shape."""
  at = 0
  for name, dtype, shape, begin, end in sorted(fields, key=lambda f: f[3:]):
    wanted = math.prod(shape) * dtype.itemsize
    if min((0, *shape)) < 0 or end - begin != wanted:
      raise refuse(
        f"{path} has an inconsistent header",
        f"{name} {dtype}{list(shape)} in bytes {begin} to {end} ({end - begin:,})",
        f"{wanted:,} bytes",
        "the file is damaged, download it again",
      )
    if begin < at:
      raise refuse(
        f"{path} has an inconsistent header",
        f"{name} from byte {begin}, inside the tensor before it",
        f"{at} or more",
        "the file is damaged, download it again",
      )
    if end > room:
      raise refuse(
        f"{path} is truncated",
        f"{room:,} bytes of data",
        f"{name} at bytes {begin:,} to {end:,}",
        "download the file again",
      )
    at = end


def _read(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
  count = math.prod(shape)
  values = direct_io.read(path, offset, count * dtype.itemsize)
  if values.nbytes != count * dtype.itemsize:
    raise refuse(
      f"{path} became shorter",
      f"{values.nbytes:,} bytes of a tensor",
      f"{count:,} numbers",
      "copy the file again",
    )
  return values.view(dtype).reshape(shape)


def _pickled(path: Path) -> list[Tensor]:
  try:
    import torch
  except ImportError as error:
    raise refuse(
      f"PyTorch is needed to read {path.name}",
      "no module torch",
      "it for .pt and .bin files",
      "`pip install torch` (the CPU build will do), or save the file as safetensors elsewhere",
    ) from error
  try:
    state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
  except pickle.UnpicklingError as error:
    raise refuse(
      f"{path} is refused",
      f"a pickle that is more than tensors ({_wants(error)})",
      "a state dict",
      "nothing of it was executed. Save the state dict alone, from a program that you trust",
    ) from error
  except (RuntimeError, EOFError, OSError) as error:
    raise refuse(
      f"{path} cannot be opened",
      f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}",
      "the zip format of torch.save",
      "download it again, or save it with a newer PyTorch",
    ) from error
  if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
    inside = sorted(f"{k}: {type(x).__name__}" for k, x in state.items())[:8] if isinstance(state, dict) else state
    raise refuse(f"{path} is not a state dict", f"{inside}", "names and tensors", "save `model.state_dict()`")
  return [_torch_tensor(path, name, x) for name, x in state.items()]


def _wants(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "class" in line]
  return (lines or [str(error)])[0][:160]


def _torch_tensor(path: Path, name: str, x) -> Tensor:
  import torch

  same_bits = {torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16))}
  same_bits |= {getattr(torch, ours): (torch.uint8, np.dtype(getattr(ml_dtypes, ours))) for ours in _FLOAT8}
  if x.layout != torch.strided or x.is_quantized:
    raise _unread(path, name, f"{x.layout}, {x.dtype}")

  def read() -> np.ndarray:
    dense = x.detach().contiguous()
    if x.dtype in same_bits:
      carrier, dtype = same_bits[x.dtype]
      return dense.view(carrier).numpy().view(dtype).copy()
    return dense.numpy().copy()

  try:
    dtype = same_bits[x.dtype][1] if x.dtype in same_bits else torch.empty(0, dtype=x.dtype).numpy().dtype
  except (TypeError, RuntimeError) as error:
    raise _unread(path, name, str(x.dtype)) from error
  return Tensor(path, name, tuple(x.shape), dtype, read)


def _npz(path: Path) -> list[Tensor]:
  """A released SigLIP of big_vision under our own names, `siglip/…` and `text/…`; the file is read at once."""
  try:
    with np.load(path, allow_pickle=False) as stored:
      arrays = {name: stored[name] for name in stored.files}
  except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
    raise refuse(
      f"{path} cannot be opened",
      f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}",
      "arrays of numbers as numpy.savez writes them",
      "download it again",
    ) from error
  out = []
  for tower, ours in (("img", "siglip"), ("txt", "text")):
    for name, x in big_vision(arrays, tower).items():
      out.append(Tensor(path, f"{ours}/{name}", tuple(x.shape), x.dtype, lambda x=x: x))
  return out


def big_vision(npz: dict[str, np.ndarray], tower: str) -> dict[str, np.ndarray]:
  """One tower ('img' or 'txt') of a released SigLIP `.npz`: the names are ours already.

  Undoes the two storage habits of those files: paths may be under `params/`, bfloat16 is stored as two-byte voids,
  and a scanned encoder has one `encoderblock` with a leading depth axis.
  """
  out: dict[str, np.ndarray] = {}
  for key, x in npz.items():
    path = key.removeprefix("params/")
    if not path.startswith(f"{tower}/"):
      continue
    if x.dtype.kind == "V":
      x = x.view(ml_dtypes.bfloat16)
    path = path.removeprefix(f"{tower}/")
    if "/encoderblock/" in path:
      head, tail = path.split("/encoderblock/")
      out |= {f"{head}/encoderblock_{i}/{tail}": x[i] for i in range(x.shape[0])}
    else:
      out[path] = x
  return out
