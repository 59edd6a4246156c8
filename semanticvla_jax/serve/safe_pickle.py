"""Pickles of LeRobot's clients, read and written without executing anything that they name.

A pickle names functions and calls them. Here every name maps to a small class of this module or is refused, and
arrays are made of their bytes. The classes are made anew for each pickle: one cannot change what the next one meets.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from semanticvla_jax.errors import refuse

HELPERS = "lerobot.async_inference.helpers"
RECORDS = ("RemotePolicyConfig", "TimedObservation")
MOST_VALUES = 20_000  # of a pickle; a robot sends some hundred
_KINDS = {"b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"}


class _Forbidden(pickle.UnpicklingError):
  """A name that is not on the list."""


def load(data: bytes) -> Any:
  """The value of a pickle of plain values, numpy arrays and LeRobot's two records, which become dicts.

  Raises:
    ValueError: it names anything else, is cut off, or holds an array of other elements than numbers.
  """
  reader = _Reader(io.BytesIO(data))
  try:
    return _Plain()(reader.load())
  except _Forbidden as error:
    expected = f"plain values, numpy arrays and {' or '.join(RECORDS)}"
    raise refuse("Pickle", str(error), expected, "send what LeRobot's RobotClient sends") from None
  except Exception as error:  # the reader of damaged bytes raises whatever its operations do
    raise refuse("Pickle", f"{len(data)} bytes that are not one", "a whole pickle", "check the client") from error


class _Reader(pickle._Unpickler):  # in Python: the one in C allocates whatever index a pickle names
  """pickle's machine with a list of names."""

  def __init__(self, file: io.BytesIO):
    super().__init__(file)
    self._names = _names()

  def _load_bytearray(self) -> None:
    (length,) = struct.unpack("<Q", self.read(8))
    self.append(bytearray(self.read(length)))  # pickle's own allocates the length before it looks for the bytes

  dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: _load_bytearray}

  def find_class(self, module: str, name: str) -> Any:
    """What a name maps to."""
    if (module, name) not in self._names:
      raise _Forbidden(f"the name {f'{module}.{name}':.80}")
    return self._names[module, name]


class _Record:
  """One of LeRobot's records: its fields are its attributes."""


class _Array:
  """An array that is being read; `value` when its state has come."""

  value: np.ndarray | None = None

  def __setstate__(self, state: Any) -> None:
    _, shape, dtype, fortran, data = state
    self.value = _array(data, dtype, shape, "F" if fortran else "C")


class _Dtype:
  """The type of an array's elements: its name, e.g. "u1", and ">" for the other byte order."""

  def __init__(self, name: Any, *_: Any):
    if name not in _KINDS:
      raise _Forbidden(f"an array of {name!r:.40}")
    self.name, self.order = name, "<"

  def __setstate__(self, state: Any) -> None:
    self.order = ">" if state[1] == ">" else "<"


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
  kind = np.dtype(dtype.order + dtype.name)
  if (
    not isinstance(data, bytes | bytearray)
    or len(data) != math.prod(shape) * kind.itemsize
    or min(shape, default=0) < 0
  ):
    raise ValueError("bytes and shape of an array differ")
  return np.frombuffer(bytes(data), kind).reshape(shape, order=order)


def _names() -> dict[tuple[str, str], Any]:
  """{(module, name): what it maps to}, made anew."""
  records = {(HELPERS, name): type(name, (_Record,), {}) for name in RECORDS}
  array, dtype = type("array", (_Array,), {}), type("dtype", (_Dtype,), {})

  def scalar(kind: Any, data: Any) -> Any:
    return _array(data, kind, (), "C")[()]

  found: dict[tuple[str, str], Any] = {("numpy", "ndarray"): array, ("numpy", "dtype"): dtype}
  for core in ("numpy.core", "numpy._core"):
    found[f"{core}.multiarray", "_reconstruct"] = lambda *_: array()
    found[f"{core}.multiarray", "scalar"] = scalar
    found[f"{core}.numeric", "_frombuffer"] = lambda data, kind, shape, order: _array(data, kind, shape, order)
  return records | found


class _Plain:
  """From what was read to plain values: records become dicts, arrays numpy's. A value may be in it many times."""

  def __init__(self) -> None:
    self._left = MOST_VALUES

  def __call__(self, value: Any, depth: int = 16) -> Any:
    """The plain value."""
    self._left -= 1
    if depth == 0 or self._left < 0:
      raise _Forbidden(f"values nested too deeply, or more than {MOST_VALUES}")
    if isinstance(value, _Array):
      if value.value is None:
        raise ValueError("an array without its bytes")
      return value.value
    if isinstance(value, _Record):
      return self(vars(value), depth - 1)
    if isinstance(value, dict):
      return {key: self(one, depth - 1) for key, one in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
      return [self(one, depth - 1) for one in value]
    if value is None or isinstance(value, bool | int | float | str | bytes | np.ndarray | np.generic):
      return value
    raise _Forbidden(f"a {type(value).__name__}")


def dump_actions(actions: np.ndarray, timestamp: float, timestep: int, period: float) -> bytes:
  """A pickle of [TimedAction(timestamp, timestep, torch.tensor(action)), …], written without either class.

  Args:
    actions: f32[k a]; torch.tensor makes float32 of numbers, the same bits.
    timestamp, timestep: of the first; the following are `period` seconds and one step later.
  """
  parts = [pickle.PROTO, b"\x02", pickle.EMPTY_LIST, pickle.MARK]
  for i, action in enumerate(actions):
    fields: Mapping[str, bytes] = {
      "timestamp": _float(timestamp + i * period),
      "timestep": pickle.BININT + struct.pack("<i", timestep + i),
      "action": _global("torch", "tensor") + _list([_float(float(x)) for x in action]) + pickle.TUPLE1 + pickle.REDUCE,
    }
    state = b"".join(_text(name) + value for name, value in fields.items())
    parts += [_global(HELPERS, "TimedAction"), pickle.EMPTY_TUPLE, pickle.NEWOBJ]
    parts += [pickle.EMPTY_DICT, pickle.MARK, state, pickle.SETITEMS, pickle.BUILD]
  return b"".join([*parts, pickle.APPENDS, pickle.STOP])


def _float(value: float) -> bytes:
  return pickle.BINFLOAT + struct.pack(">d", value)


def _text(value: str) -> bytes:
  return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode("ascii")


def _global(module: str, name: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")


def _list(items: Sequence[bytes]) -> bytes:
  return pickle.EMPTY_LIST + pickle.MARK + b"".join(items) + pickle.APPENDS
