"""From a stored or rendered frame to the pixels a model sees: one path for training, evaluation and serving.

Everything is numpy on the CPU, float32, without TensorFlow and without a device, so that a robot client, an evaluation
worker and a training host produce equal bytes from equal frames.

The numbers are those of the released code, which are OpenVLA's: `tf.image.resize(lanczos3, antialias=True)`, then in
training dlimp's augmentations, in evaluation a center crop of 0.9 of the area.
"""

from __future__ import annotations

import functools
import io
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from semanticvla_jax.data import channel_planes
from semanticvla_jax.errors import refuse

_STREAM = 2  # separates the augmentation draws from the other random streams of the same seed


class Augmentation(NamedTuple):
  """Random changes of a training image, in the order in which they are applied; the defaults are the release's.

  Attributes:
    crop_area: share of the area that a square-aspect random crop keeps; resized back bilinearly.
    brightness: largest absolute shift, in units of the full range.
    contrast, saturation: range of the factor.
    hue: largest absolute rotation, in turns.
    diagonal_crop: True copies the release, whose vertical and horizontal offsets share one random number, so that
      every crop is on the diagonal; False draws the two independently.
  """

  crop_area: float = 0.9
  brightness: float = 0.2
  contrast: tuple[float, float] = (0.8, 1.2)
  saturation: tuple[float, float] = (0.8, 1.2)
  hue: float = 0.05
  diagonal_crop: bool = False


RELEASE = Augmentation()
DCTS = ("accurate", "fast")
SMALLEST = 8  # pixels of a side: nothing can be recognized in fewer
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow's modes of a grey PNG of 16 bits
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def decode(encoded: bytes, dct: str = "accurate") -> UInt8[np.ndarray, "h w 3"]:
  """Decodes a JPEG or PNG to RGB.

  `dct` chooses the inverse transform of a JPEG. "accurate" is libjpeg's default and needs pillow only. "fast" is
  TensorFlow's default and therefore what the released weights were trained and evaluated on; it differs by about one
  grey level on average (up to 9 in sharp, saturated places) and imports TensorFlow.

  Of 16 bits a channel the upper eight are kept; grey becomes three equal channels, transparency is dropped.

  Raises:
    ValueError: the bytes are not an image, its values are not colors of 8 or 16 bits, or `dct` is unknown.
  """
  if dct == "fast":
    hide_accelerators()
    import tensorflow as tf

    try:
      return tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy()
    except tf.errors.InvalidArgumentError as error:
      raise _undecodable(encoded, error) from error
  if dct != "accurate":
    raise refuse("Unknown JPEG transform", f"dct={dct!r}", "'accurate' or 'fast'", "fix the config")
  from PIL import Image

  try:
    with Image.open(io.BytesIO(encoded)) as image:
      return _rgb(image)
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise _undecodable(encoded, error) from error


def _rgb(image: Any) -> UInt8[np.ndarray, "h w 3"]:
  """A PIL.Image of any mode as RGB; Pillow's own conversion clips 16 bits to 255 instead of scaling them."""
  if image.mode in _EIGHT_BITS:
    return np.array(image.convert("RGB"))
  values = np.asarray(image)
  if image.mode not in _SIXTEEN_BITS or values.min() < 0 or values.max() > 0xFFFF:
    raise refuse(
      "Image cannot be read",
      f"Pillow's mode {image.mode!r} with values from {values.min()} to {values.max()}",
      "colors of 8 or 16 bits",
      "store it as an 8-bit RGB JPEG or PNG",
    )
  return np.repeat((values.astype(np.uint32) >> 8).astype(np.uint8)[..., None], 3, axis=2)


@functools.cache
def hide_accelerators() -> None:
  """Keeps TensorFlow off the devices: it decodes and reads files here, and would else take their memory from JAX."""
  import tensorflow as tf

  try:
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")
  except RuntimeError:  # already initialized by the caller, who then decides
    logging.warning("tensorflow was initialized before its devices could be hidden")


def _undecodable(encoded: bytes, error: Exception) -> ValueError:
  return refuse(
    "Image cannot be decoded",
    f"{len(encoded)} bytes starting with {encoded[:4]!r} ({error})",
    "a whole JPEG or PNG",
    "fetch or write the file again",
  )


def jpeg_round_trip(
  image: UInt8[np.ndarray, "h w 3"], quality: int = 95, dct: str = "accurate"
) -> UInt8[np.ndarray, "h w 3"]:
  """Encodes and decodes a rendered frame, as the stored training frames were (quality 95, 4:2:0 chroma).

  The quantised coefficients equal those of `tf.io.encode_jpeg`; see `decode` for `dct`.
  """
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "JPEG", quality=quality)
  return decode(buffer.getvalue(), dct)


def resize(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
  """Resizes to `size` × `size` as `tf.image.resize(lanczos3, antialias=True)`, rounded and clipped to 0..255.

  The aspect ratio is not kept, as in the release; an image of that size already is returned as it is.
  """
  if image.shape[:2] == (size, size):
    return image
  planes, out = np.empty((3, size, size), np.float32), np.empty((size, size, 3), np.uint8)
  channel_planes.resize(image, planes)
  channel_planes.interleave(planes, out)
  return out


def center_crop(images: UInt8[Any, "*b h w 3"], area: float = 0.9) -> UInt8[Any, "*b h w 3"]:
  """Crops the middle `area` of each image and resizes it back: `tf.image.crop_and_resize`, clip, trunc(x * 255.5).

  Of numpy, or of jax, in jit too (where XLA rounds a few pixels in a thousand to the other side).
  """
  side = float(np.sqrt(area))
  offset = (1 - side) / 2
  if isinstance(images, np.ndarray):  # image by image, in place: the temporaries of a batch would not fit the cache
    out = np.empty(images.shape, np.uint8)
    for i in np.ndindex(images.shape[:-3]):
      planes = channel_planes.unit(images[i][None], images.shape[-3:-1])
      channel_planes.crop(planes[0], offset, offset, side)
      channel_planes.to_uint8(planes, out[i][None])
    return out
  xp = images.__array_namespace__()
  x = images.astype(np.float32) * np.float32(1 / 255)
  for axis in (-2, -3):
    first, second, fraction = channel_planes.neighbors(images.shape[axis], offset, side)
    low, high = xp.take(x, first, axis=axis), xp.take(x, second, axis=axis)
    x = low + (high - low) * fraction.reshape(-1, *(1,) * (-1 - axis))
  return (xp.clip(x, 0, 1) * np.float32(255.5)).astype(np.uint8)


def prepare(
  image: UInt8[np.ndarray, "h w 3"],
  size: int,
  *,
  jpeg_quality: int | None = None,
  dct: str = "accurate",
  crop_area: float | None = None,
) -> UInt8[np.ndarray, "s s 3"]:
  """Turns one upright RGB frame into the model's `size` × `size` input.

  Training prepares the stored frame and then calls `augment`, whose crop is random. Evaluation of a policy trained
  that way passes `crop_area=0.9`, and `jpeg_quality=95` where frames come from a renderer and not from a JPEG file.

  Raises:
    ValueError: a side of less than SMALLEST pixels.
  """
  check_size(image)
  if jpeg_quality is not None:
    image = jpeg_round_trip(image, jpeg_quality, dct)
  image = resize(image, size)
  return image if crop_area is None else center_crop(image, crop_area)


def check_size(image: UInt8[np.ndarray, "h w 3"]) -> None:
  """Raises ValueError for a side of less than SMALLEST pixels."""
  if min(image.shape[:2]) < SMALLEST:
    raise refuse(
      "Image is too small",
      f"{image.shape[0]} x {image.shape[1]} pixels",
      f"at least {SMALLEST} x {SMALLEST}",
      "pass the camera's frame (an empty one is a camera that gave none)",
    )


def draws(seed: int, example: int, view: int) -> Float[np.ndarray, "6"]:
  """Six uniform numbers in [0, 1) for one image: the same for the same arguments, in any order of calls.

  Counter based (Philox), so that a resumed run augments the n-th example exactly as an uninterrupted one.
  """
  bits = np.random.Philox(key=[seed, _STREAM], counter=[0, view, example, 0]).random_raw(6)
  return (bits >> np.uint64(11)) * 2.0**-53


def augment(
  images: UInt8[np.ndarray, "n _ _ 3"] | Sequence[UInt8[np.ndarray, "_ _ 3"]],
  uniform: Float[np.ndarray, "n 6"],
  values: Augmentation = RELEASE,
  size: int | None = None,
) -> UInt8[np.ndarray, "n h w 3"]:
  """Applies crop, brightness, contrast, saturation and hue to each image, clipping to [0, 1] after each.

  Args:
    images: RGB 0..255, of one shape; of any shapes with `size`.
    uniform: numbers in [0, 1) of each image, see `draws`: top, left, brightness, contrast, saturation, hue.
    values: ranges the numbers are mapped to.
    size: height and width to which `resize` brings them first, without the way over whole images; None for no change.

  Returns:
    RGB 0..255, by trunc(x * 255.5).
  """
  shape = images[0].shape[:2] if size is None else (size, size)
  out = np.empty((len(images), *shape, 3), np.uint8)
  step = max(1, channel_planes.PIXELS // math.prod(shape))
  for i in range(0, len(images), step):
    _augment(images[i : i + step], uniform[i : i + step], values, out[i : i + step])
  return out


def _augment(
  images: UInt8[np.ndarray, "n _ _ 3"] | Sequence[UInt8[np.ndarray, "_ _ 3"]],
  uniform: Float[np.ndarray, "n 6"],
  values: Augmentation,
  out: UInt8[np.ndarray, "n h w 3"],
) -> None:
  top, left, brightness, contrast, saturation, hue = uniform.T
  side = float(np.sqrt(values.crop_area))
  left = top if values.diagonal_crop else left
  planes = channel_planes.unit(images, out.shape[1:3])
  for i in range(len(planes)):
    channel_planes.crop(planes[i], float(top[i]) * (1 - side), float(left[i]) * (1 - side), side)
  channel_planes.adjust_brightness(planes, (2 * brightness - 1) * values.brightness)
  channel_planes.adjust_contrast(planes, _between(values.contrast, contrast))
  channel_planes.adjust_color(planes, _between(values.saturation, saturation), (2 * hue - 1) * values.hue)
  channel_planes.to_uint8(planes, out)


def _between(bounds: tuple[float, float], u: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
  return bounds[0] + u * (bounds[1] - bounds[0])
