"""Frames of the protocols, decoded without executing anything: maps, numbers, text and arrays.

    msgpack   arrays are maps {__ndarray__, data, dtype, shape}: keys are bytes in openpi's frames and str in vla-eval's
    JSON      arrays are maps {__numpy__: base64, dtype, shape} (json-numpy); a body may be encoded twice

Arrays have boolean, integer or float elements of up to 8 bytes; no pickle, no object, string or structured dtype. Runs
on the robot: numpy and msgpack only.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import msgpack
import numpy as np

from semanticvla_jax.errors import refuse

MOST_AXES = 8
MOST_DEPTH = 32  # of maps and lists in JSON; msgpack's decoder has its own limit
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])|bool|u?int(8|16|32|64)|float(16|32|64)")
_FORMATS = ("png", "jpeg")


class EncodedImage(NamedTuple):
  """A compressed image as it came, decoded later, outside the event loop: `images.decode`.

  Attributes:
    format: "png" or "jpeg". data: the file. shape: what it has to decode to, [h w c], or None.
  """

  format: str
  data: bytes
  shape: tuple[int, ...] | None


def pack(value: Any) -> bytes:
  """A value as one msgpack frame, arrays as openpi writes them (bytes keys).

  Raises:
    TypeError: something that is not a map, list, text, bytes, number or array of numbers.
  """
  return msgpack.packb(value, default=_openpi)


def pack_str(value: Any) -> bytes:
  """The same with the array maps of vla-eval (str keys)."""
  return msgpack.packb(value, default=_vla_eval)


def unpack(frame: bytes | str, hook: Callable[[dict], Any] | None = None) -> Any:
  """The value of a msgpack frame; arrays of both dialects are read-only views of its bytes.

  Args:
    hook: from a map to its value, instead of the two dialects'; it may call `array`.

  Raises:
    ValueError: text instead of bytes, a frame that is cut off or longer than its value, a key that is not text
      or bytes, or an array that is not what its map says.
  """
  if not isinstance(frame, bytes | bytearray | memoryview):
    raise refuse("Frame", "text", "a binary msgpack frame", "send bytes")
  try:
    return msgpack.unpackb(frame, object_hook=hook or _array, strict_map_key=True)
  except _Refused:
    raise
  except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
    raise refuse(
      "Frame", f"{len(frame)} bytes that are not msgpack", "one msgpack value", "check the client"
    ) from error


def unpack_stream(file: IO[bytes], cut_off: Callable[[], None]) -> Iterator[Any]:
  """The values of a file of frames, one after the other; `cut_off` is called where the last one is not whole."""
  unpacker = msgpack.Unpacker(file, object_hook=_array, strict_map_key=True)
  while True:
    before = unpacker.tell()
    try:
      yield unpacker.unpack()
    except msgpack.OutOfData:
      if file.tell() != before:
        cut_off()
      return


def dump_json(value: Any) -> str:
  """A value as JSON with json-numpy's arrays."""
  return json.dumps(value, default=_json_numpy)


def load_json(body: bytes | str) -> tuple[Any, bool]:
  """The value of a JSON body with json-numpy's arrays, and whether it was encoded twice.

  Clients of OpenVLA without patched libraries send {"encoded": JSON text} and expect JSON text in a JSON string.

  Raises:
    ValueError: not JSON, nested too deeply, or an array that is not what its map says.
  """
  value = _json(body)
  if isinstance(value, Mapping) and set(value) == {"encoded"} and isinstance(value["encoded"], str):
    return _json(value["encoded"]), True
  return value, False


class _Refused(ValueError):
  """A refusal out of a decoder's callback, distinguished from the decoder's own complaints by its type."""


def _refused(what: str, got: object, expected: object, remedy: str) -> _Refused:
  return _Refused(str(refuse(what, got, expected, remedy)))


def _json(body: bytes | str) -> Any:
  try:
    value = json.loads(body, object_hook=_array)
  except _Refused:
    raise
  except (ValueError, RecursionError) as error:
    raise refuse("Body", f"{len(body)} bytes that are not JSON", "one JSON value", "check the client") from error
  _check_depth(value)
  return value


def _check_depth(value: Any) -> None:
  """Raises ValueError for maps and lists nested deeper than MOST_DEPTH."""
  level = [value]
  for _ in range(MOST_DEPTH):
    level = [
      inner
      for one in level
      if isinstance(one, Mapping | list)
      for inner in (one.values() if isinstance(one, Mapping) else one)
      if isinstance(inner, Mapping | list)
    ]
    if not level:
      return
  raise refuse("Body", f"more than {MOST_DEPTH} levels of maps and lists", f"at most {MOST_DEPTH}", "send it flat")


def _array(found: dict) -> Any:
  """A decoded map, or the array, number or image that it encodes."""
  if b"__ndarray__" in found:
    return array(found.get(b"data"), found.get(b"dtype"), found.get(b"shape"))
  if b"__npgeneric__" in found:
    return array(found.get(b"data"), found.get(b"dtype"), ())[()]
  if "__ndarray__" in found:
    return array(found.get("data"), found.get("dtype"), found.get("shape"))
  if "__numpy__" in found:
    return array(_base64(found["__numpy__"]), found.get("dtype"), found.get("shape"))
  return _image(found) if "__image__" in found else found


def _image(found: Mapping) -> Any:
  if found.get("format") == "raw":
    return array(found.get("data"), found.get("dtype", "uint8"), found.get("shape"))
  form, data, shape = found.get("format"), found.get("data"), found.get("shape")
  if form not in _FORMATS or not isinstance(data, bytes):
    raise _refused("Image", f"format {form!r:.40}", f"bytes of one of {('raw', *_FORMATS)}", "encode it as one of them")
  return EncodedImage(form, data, None if shape is None else _shape(shape))


def _shape(shape: Any) -> tuple[int, ...]:
  whole = isinstance(shape, list | tuple) and all(type(n) is int and 0 <= n < 2**31 for n in shape)
  if not whole or len(shape) > MOST_AXES:
    got = f"shape {shape!r:.60}"
    raise _refused("Array", got, f"at most {MOST_AXES} lengths from 0", "send the array's own shape")
  return tuple(shape)


def array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
  """An array of what a frame says of it: bytes, a dtype of _DTYPE, and lengths.

  Raises:
    ValueError: they are something else, or do not fit together.
  """
  dtype = dtype.decode("ascii", "replace") if isinstance(dtype, bytes) else dtype
  if not isinstance(dtype, str) or _DTYPE.fullmatch(dtype) is None:
    raise _refused("Array", f"dtype {dtype!r:.40}", "booleans, integers or floats of up to 8 bytes", "convert it")
  kind, lengths = np.dtype(dtype), _shape(shape)
  need = math.prod(lengths) * kind.itemsize
  if not isinstance(data, bytes) or len(data) != need:
    got = f"{len(data)} bytes" if isinstance(data, bytes) else f"data of {type(data).__name__}"
    raise _refused("Array", got, f"{need} bytes for {dtype}{[*lengths]}", "send the array's own dtype, shape and bytes")
  return np.frombuffer(data, kind).reshape(lengths)


def _base64(text: Any) -> bytes | None:
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError, TypeError):
    return None


def _plain(value: Any) -> np.ndarray:
  if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
    return np.asarray(value)
  raise TypeError(
    f"{type(value).__name__} cannot be sent: only maps, lists, text, bytes, numbers and arrays of numbers"
  )


def _openpi(value: Any) -> dict:
  array = _plain(value)
  if isinstance(value, np.generic):
    return {b"__npgeneric__": True, b"data": array.tobytes(), b"dtype": array.dtype.str}
  return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def _vla_eval(value: Any) -> Any:
  array = _plain(value)
  if isinstance(value, np.generic):
    return value.item()
  return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": array.shape}


def _json_numpy(value: Any) -> dict:
  array = _plain(value)
  data = base64.b64encode(array.tobytes()).decode("ascii")
  return {"__numpy__": data, "dtype": array.dtype.str, "shape": array.shape}
