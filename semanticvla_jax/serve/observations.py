"""From the names and layouts that clients send to one observation dict with openpi's names, which `Policy` reads.

Nothing of an array's content changes: nested maps become flat, known names are exchanged, channels-first images are
viewed channels-last, compressed images are decoded. What the policy does not read is left out.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from semanticvla_jax import observation_dict
from semanticvla_jax.errors import refuse
from semanticvla_jax.serve.wire import EncodedImage

# What other projects' clients call the parts of an observation, without a leading "observation/" or "images/".
NAMES = {
  "image": (
    "agentview",
    "exterior_image_1_left",
    "exterior_image_0_left",
    "base_0_rgb",
    "cam_high",
    "image_0",
    "top",
    "top_cam",
  ),
  "wrist_image": ("wrist", "wrist_image_left", "left_wrist_0_rgb"),
  "left_wrist_image": ("cam_left_wrist", "left_cam"),
  "right_wrist_image": ("cam_right_wrist", "right_cam"),
  "state": ("states",),
  "instruction": ("lang", "language", "task"),
}
JOINED = ("joint_position", "gripper_position")  # DROID's state, in two parts
MOST_CHARACTERS = 2000  # of an instruction: tokenizing is linear in it, and a policy reads some sixty tokens
MOST_PIXELS = 4096 * 4096  # of a compressed image, before it is decoded
MOST_ENTRIES = 64
_DEPTH = 4
_OWNER = {alias: name for name, aliases in NAMES.items() for alias in aliases}


def keys_of(policy: Any) -> dict[str, Sequence[str]]:
  """{part: keys} under which a policy finds each view, its state (or the columns of it) and the instruction."""
  own, aliases = policy.preparation.robot, observation_dict.ALIASES
  views = {view: aliases[view] for view in policy.metadata["views"]} if own is None else own.views
  columns = {} if own is None else {key: (key, key.removeprefix("observation/")) for key in own.proprio}
  return {**columns, **views, "state": aliases["state"], "instruction": aliases["instruction"]}


def canonical(observation: Any, keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
  """What a client sent, under the names that the policy reads.

  Args:
    observation: a map of images, state and instruction; maps inside it are read as "outer/inner".
    keys: see `keys_of`.

  Raises:
    ValueError: not a map, too large, or an image that cannot be decoded.
  """
  if not isinstance(observation, Mapping):
    raise refuse("Observation", type(observation).__name__, "a map of images, state and instruction", "send a map")
  flat = dict(_flat(observation, "", _DEPTH))
  if len(flat) > MOST_ENTRIES:
    raise refuse("Observation", f"{len(flat)} entries", f"at most {MOST_ENTRIES}", "send only what the policy reads")
  known = {key: name for name, own in keys.items() for key in own}
  found = {key: value for key, value in flat.items() if key in known and value is not None}
  there = {known[key] for key in found}
  for key, value in flat.items():
    name = _OWNER.get(key.rpartition("/")[2])
    if key not in known and name in keys and name not in there and value is not None:
      found[keys[name][0]] = value
      there.add(name)
  if "state" not in there and (parts := _parts(flat)):
    found[observation_dict.ALIASES["state"][0]] = np.concatenate(parts)
  return {key: _value(key, value) for key, value in found.items()}


def assign_views(views: Sequence[str], cameras: Sequence[str]) -> dict[str, str]:
  """{view: camera}: by name where all have one that belongs to a view, otherwise in their order."""
  names = {view: {view, *observation_dict.ALIASES.get(view, ()), *NAMES.get(view, ())} for view in views}
  found = {view: camera for view in views for camera in cameras if camera in names[view]}
  return found if len(found) == len(views) else dict(zip(views, cameras))


def _flat(observation: Mapping, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
  for key, value in observation.items():
    if not isinstance(key, str):
      raise refuse("Observation", f"a key of {type(key).__name__}", "text", "name every entry")
    if isinstance(value, Mapping):
      if depth == 1:
        raise refuse("Observation", f"more than {_DEPTH} maps in one another", f"at most {_DEPTH}", "send it flat")
      yield from _flat(value, f"{prefix}{key}/", depth - 1)
    else:
      yield prefix + key, value


def _parts(flat: Mapping[str, Any]) -> list[np.ndarray]:
  """The parts of a state that comes in several, one-dimensional; [] unless all are there."""
  last = {key.rpartition("/")[2]: value for key, value in flat.items()}
  if not all(name in last for name in JOINED):
    return []
  parts = [np.atleast_1d(np.asarray(last[name])) for name in JOINED]
  return parts if all(part.ndim == 1 and part.dtype.kind in "fiu" for part in parts) else []


def _value(key: str, value: Any) -> Any:
  if isinstance(value, EncodedImage):
    return decode(value)
  if isinstance(value, str) and len(value) > MOST_CHARACTERS:
    got = f"{len(value):,} characters"
    raise refuse("Observation, instruction", got, f"at most {MOST_CHARACTERS:,}", "send one sentence")
  if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
    return np.moveaxis(value, 0, -1) if value.shape[0] == 3 and value.shape[-1] != 3 else value
  if isinstance(value, list) and value and isinstance(value[0], list):
    return _pixels(key, value)
  return value


def _pixels(key: str, rows: list) -> np.ndarray:
  """An image that came as nested lists of whole numbers."""
  try:
    array = np.array(rows)
  except ValueError as error:
    raise refuse(f"Observation, {key}", "rows of unequal length", "an image", "send an array") from error
  inside = array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255
  return array.astype(np.uint8) if inside else array


def decode(image: EncodedImage) -> np.ndarray:
  """Pixels of a PNG or JPEG file, u8[h w 3].

  Raises:
    ValueError: it is not such a file, has too many pixels, or other ones than it came with as its shape.
  """
  width, height = _read(image, lambda opened: opened.size)
  if width * height > MOST_PIXELS:
    raise refuse("Image", f"{width}×{height} pixels", f"at most {MOST_PIXELS:,}", "resize it before it is sent")
  pixels = _read(image, lambda opened: np.asarray(opened.convert("RGB")))
  if image.shape is not None and tuple(image.shape[:2]) != pixels.shape[:2]:
    raise refuse("Image", f"{[*pixels.shape]} decoded", f"its shape {[*image.shape]}", "send the image's own shape")
  return pixels


def _read(image: EncodedImage, read: Callable[[Image.Image], Any]) -> Any:
  try:
    with Image.open(io.BytesIO(image.data), formats=[image.format]) as opened:
      return read(opened)
  except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
    got = f"{len(image.data)} bytes that are not {image.format.upper()}"
    raise refuse("Image", got, "a whole file", "encode it again") from error
