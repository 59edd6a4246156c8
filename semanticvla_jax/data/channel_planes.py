"""Arithmetic on images as channel planes, f32[n 3 h w], in numpy; each of the n images comes out as it would alone.

Almost everything works in place, on arrays that each thread keeps.

`images` says what is done with it and to which of TensorFlow's operations it is equal.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

PIXELS = 1 << 15  # to work on together: of more, what is computed does not fit a core's cache
_KEPT = 1 << 22  # values of an array that a thread keeps: of larger images the arithmetic costs more than the memory
_BLOCK = 16  # output rows per matrix product: the band of a block is a few times narrower than the image


class _Scratch(threading.local):
  """Arrays that the calls of a thread use one after the other.

  Memory of an image's size comes from the kernel page by page, at each allocation, and takes as long as the arithmetic.
  """

  def __init__(self):
    self._arrays: dict[str, np.ndarray] = {}

  def array(self, name: str, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """Any values: the caller's until the name is asked for again. A name has one dtype."""
    count = math.prod(shape)
    kept = self._arrays.get(name)
    if kept is None or kept.size < count:
      kept = np.empty(count, dtype)
      if count <= _KEPT:
        self._arrays[name] = kept
    return kept[:count].reshape(shape)


_scratch = _Scratch()


def unit(
  images: UInt8[np.ndarray, "n _ _ 3"] | Sequence[UInt8[np.ndarray, "_ _ 3"]], shape: tuple[int, int]
) -> Float32[np.ndarray, "n 3 h w"]:
  """Images in [0, 1], resized to `shape` (see `resize`); the array is the thread's, until the next call."""
  planes = _scratch.array("unit", (len(images), 3, *shape))
  for image, own in zip(images, planes, strict=True):
    resize(image, own)
  planes *= np.float32(1 / 255)
  return planes


def resize(image: UInt8[np.ndarray, "_ _ 3"], out: Float32[np.ndarray, "3 h w"]) -> None:
  """Resizes to the shape of `out`: Lanczos-3, antialiased, rounded and clipped to whole levels 0..255."""
  shape, wanted = image.shape[:2], out.shape[1:]
  if shape == wanted:
    np.copyto(out, _levels(image))
    return
  planes = _scratch.array("whole", (3, *shape))
  np.copyto(planes, _levels(image))
  _resample(planes, *(_lanczos(*sides) for sides in zip(shape, wanted, strict=True)), out)
  np.rint(out, out=out)
  np.clip(out, 0, 255, out=out)


def _levels(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "3 h w"]:
  """Ordered as bytes first, which is faster than as floats."""
  levels = _scratch.array("levels", (3, *image.shape[:2]), np.uint8)
  np.copyto(levels, image.transpose(2, 0, 1))
  return levels


def to_uint8(planes: Float32[np.ndarray, "n 3 h w"], out: UInt8[np.ndarray, "n h w 3"]) -> None:
  """`tf.image.convert_image_dtype(x, uint8)` of values in [0, 1]: truncates x * 255.5. Changes `planes`."""
  planes *= np.float32(255.5)
  for image, own in zip(planes, out, strict=True):
    interleave(image, own)


def interleave(planes: Float32[np.ndarray, "3 h w"], out: UInt8[np.ndarray, "h w 3"]) -> None:
  """Truncates to whole levels; a channel at a time, a quarter of the time of a transposed copy."""
  levels = _scratch.array("levels", planes.shape, np.uint8)
  np.copyto(levels, planes, casting="unsafe")
  for channel in range(3):
    out[..., channel] = levels[channel]


class _Band(NamedTuple):
  """Rows of a resampling matrix and the inputs [start, stop) they touch: weights f32[rows, stop - start]."""

  start: int
  stop: int
  weights: np.ndarray


@functools.lru_cache(maxsize=64)
def _lanczos(n_in: int, n_out: int) -> tuple[_Band, ...]:
  """Lanczos-3 with antialiasing: the kernel is widened by the shrink factor, weights are renormalized at borders.

  The matrix is banded, so it is kept in blocks of a few rows, each with only the inputs they read.
  """
  scale = n_in / n_out
  stretch = max(scale, 1.0)
  center = (np.arange(n_out) + 0.5) * scale
  taps = min(int(np.ceil(2 * 3 * stretch)) + 1, n_in)
  first = np.clip(np.ceil(center - 3 * stretch - 0.5).astype(np.int64), 0, n_in - taps)
  x = (first[:, None] + np.arange(taps) + 0.5 - center[:, None]) / stretch
  weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
  weights /= weights.sum(axis=1, keepdims=True)
  bands = []
  for top in range(0, n_out, _BLOCK):
    rows = np.arange(top, min(top + _BLOCK, n_out))
    start, stop = int(first[rows].min()), int(first[rows].max()) + taps
    block = np.zeros((len(rows), stop - start), np.float32)
    block[(rows - top)[:, None], (first[rows] - start)[:, None] + np.arange(taps)] = weights[rows]
    bands.append(_Band(start, stop, block))
  return tuple(bands)


def _resample(
  planes: Float32[np.ndarray, "3 h w"],
  rows: tuple[_Band, ...],
  columns: tuple[_Band, ...],
  out: Float32[np.ndarray, "3 r c"],
) -> None:
  shorter = _scratch.array("shorter", (3, out.shape[1], planes.shape[2]))
  for i, band in enumerate(rows):
    top = i * _BLOCK
    np.matmul(band.weights, planes[:, band.start : band.stop], out=shorter[:, top : top + len(band.weights)])
  for i, band in enumerate(columns):
    left = i * _BLOCK
    np.matmul(shorter[..., band.start : band.stop], band.weights.T, out=out[..., left : left + len(band.weights)])


def crop(planes: Float32[np.ndarray, "3 h w"], top: float, left: float, side: float) -> None:
  """Crops the box [top, top + side] × [left, left + side] (shares of the image) and resizes it back, in place.

  Bilinear, as `tf.image.crop_and_resize`: pixel i of n samples the input at top * (n - 1) + i * side; in [0, 1] again
  at the end.
  """
  _, height, width = planes.shape
  pieces = planes if height * width > PIXELS // 2 else planes[None]  # a channel at a time, or all
  rows, other = _scratch.array("crop", (2, *pieces[0].shape))
  first, second, fraction = neighbors(width, left, side)
  above, below, weight = neighbors(height, top, side)
  for piece in pieces:
    np.take(piece, first, axis=-1, out=rows, mode="clip")  # "raise" is slower
    np.take(piece, second, axis=-1, out=other, mode="clip")
    other -= rows
    other *= fraction
    rows += other
    np.take(rows, above, axis=-2, out=piece, mode="clip")
    np.take(rows, below, axis=-2, out=other, mode="clip")
    other -= piece
    other *= weight[:, None]
    piece += other
  np.clip(planes, 0, 1, out=planes)


def neighbors(n: int, offset: float, side: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The two input pixels around each output pixel, i64[n] each, and the weight of the second, f32[n]."""
  at = np.clip(offset * (n - 1) + np.arange(n) * side, 0, n - 1)
  first = at.astype(np.int64)
  return first, np.minimum(first + 1, n - 1), (at - first).astype(np.float32)


def adjust_brightness(planes: Float32[np.ndarray, "n 3 h w"], shift: Float[np.ndarray, " n"]) -> None:
  """Adds to every channel, clipped to [0, 1], in place."""
  planes += _each(shift)
  np.clip(planes, 0, 1, out=planes)


def adjust_contrast(planes: Float32[np.ndarray, "n 3 h w"], factor: Float[np.ndarray, " n"]) -> None:
  """Scales about the mean of each channel, clipped to [0, 1], in place."""
  mean = planes.mean(axis=(2, 3), keepdims=True)
  planes *= _each(factor)
  planes += mean * _each(1 - factor)
  np.clip(planes, 0, 1, out=planes)


def adjust_color(
  planes: Float32[np.ndarray, "n 3 h w"], saturation: Float[np.ndarray, " n"], hue: Float[np.ndarray, " n"]
) -> None:
  """Scales the saturation of HSV (clipped to 0 to 1) and rotates its hue (in turns), in place; [0, 1] stays [0, 1]."""
  n, _, height, width = planes.shape
  rows = max(1, -(-height // -(-n * height * width // PIXELS)))
  for top in range(0, height, rows):
    _adjust_color(planes[:, :, top : top + rows], _each(saturation), _each(6 * hue))


def _adjust_color(
  planes: Float32[np.ndarray, "n 3 h w"],
  saturation: Float32[np.ndarray, "n 1 1 1"],
  sixths: Float32[np.ndarray, "n 1 1 1"],
) -> None:
  """Through hue and chroma, without branches; `sixths` of a turn are added to the hue."""
  red, green, blue = (planes[:, channel, None] for channel in range(3))
  value, chroma, hue, *spare = _scratch.array("color", (7, *red.shape))
  np.maximum(np.maximum(red, green, out=value), blue, out=value)
  np.minimum(np.minimum(red, green, out=chroma), blue, out=chroma)
  np.subtract(value, chroma, out=chroma)
  _hue(planes, value, chroma, spare, hue)
  hue += sixths
  chroma *= saturation
  np.clip(chroma, 0, value, out=chroma)  # chroma / value is the saturation, 0 to 1
  # Each channel is value - chroma · clip(min(k, 4 - k), 0, 1), k its distance in sixths.
  k, other = spare[:2]
  for channel, corner in zip((red, green, blue), (5, 3, 1), strict=True):
    np.add(hue, np.float32(corner), out=k)  # counted from this channel's corner
    np.floor(np.multiply(k, np.float32(1 / 6), out=other), out=other)
    other *= np.float32(6)
    k -= other
    np.minimum(k, np.subtract(np.float32(4), k, out=other), out=k)
    np.clip(k, 0, 1, out=k)
    k *= chroma
    np.subtract(value, k, out=channel)


def _hue(
  planes: Float32[np.ndarray, "n 3 h w"],
  value: Float32[np.ndarray, "n 1 h w"],
  chroma: Float32[np.ndarray, "n 1 h w"],
  spare: Sequence[Float32[np.ndarray, "n 1 h w"]],
  out: Float32[np.ndarray, "n 1 h w"],
) -> None:
  """In sixths of a turn: which channel is largest picks the sector, the difference of the other two the place in it.

  As products with masks: np.where branches at each pixel, and takes three times as long on noise.
  """
  red, green, blue = (planes[:, channel, None] for channel in range(3))
  is_red, is_green, is_blue, term = spare
  red_leads, green_leads = _scratch.array("leads", (2, *value.shape), np.bool_)
  np.equal(red, value, out=red_leads)
  np.equal(green, value, out=green_leads)
  np.greater(green_leads, red_leads, out=green_leads)  # of equals the first
  np.copyto(is_red, red_leads)
  np.copyto(is_green, green_leads)
  np.subtract(np.subtract(np.float32(1), is_red, out=is_blue), is_green, out=is_blue)
  np.multiply(np.subtract(green, blue, out=out), is_red, out=out)
  out += np.multiply(np.subtract(blue, red, out=term), is_green, out=term)
  out += np.multiply(np.subtract(red, green, out=term), is_blue, out=term)
  out /= np.clip(chroma, np.float32(1e-30), np.float32(1), out=term)
  # The sectors begin at 6 (red), 2 (green) and 4 (blue).
  np.multiply(np.subtract(is_red, is_green, out=is_red), np.float32(2), out=is_red)
  is_red += np.float32(4)
  out += is_red


def _each(values: Float[np.ndarray, " n"]) -> Float32[np.ndarray, "n 1 1 1"]:
  return values.astype(np.float32)[:, None, None, None]
