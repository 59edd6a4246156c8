"""Arithmetic on images as channel planes, f32[n 3 h w], in numpy; each of the n images comes out as it would alone.

`images` says what is done with it and to which of TensorFlow's operations it is equal.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

_BLOCK = 16  # output rows per matrix product: the band of a block is a few times narrower than the image


def of(images: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n 3 h w"]:
  return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32)


def unit(images: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n 3 h w"]:
  planes = of(images)
  planes *= np.float32(1 / 255)
  return planes


def to_uint8(planes: Float32[np.ndarray, "n 3 h w"]) -> UInt8[np.ndarray, "n h w 3"]:
  """`tf.image.convert_image_dtype(clip(x, 0, 1), uint8)`: truncates x * 255.5."""
  np.clip(planes, 0, 1, out=planes)
  planes *= np.float32(255.5)
  return interleaved(planes)


def interleaved(planes: Float32[np.ndarray, "n 3 h w"]) -> UInt8[np.ndarray, "n h w 3"]:
  """Truncates to whole levels; a channel at a time, a quarter of the time of a transposed copy."""
  levels = planes.astype(np.uint8)
  out = np.empty((len(planes), *planes.shape[2:], 3), np.uint8)
  for channel in range(3):
    out[..., channel] = levels[:, channel]
  return out


class _Band(NamedTuple):
  """Rows of a resampling matrix and the inputs [start, stop) they touch: weights f32[rows, stop - start]."""

  start: int
  stop: int
  weights: np.ndarray


@functools.lru_cache(maxsize=64)
def lanczos(n_in: int, n_out: int) -> tuple[_Band, ...]:
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


def resample(
  planes: Float32[np.ndarray, "n 3 h w"], rows: tuple[_Band, ...], columns: tuple[_Band, ...]
) -> Float32[np.ndarray, "n 3 r c"]:
  shorter = np.empty((*planes.shape[:2], sum(len(band.weights) for band in rows), planes.shape[3]), np.float32)
  out = np.empty((*shorter.shape[:3], sum(len(band.weights) for band in columns)), np.float32)
  for i, band in enumerate(rows):
    top = i * _BLOCK
    np.matmul(band.weights, planes[:, :, band.start : band.stop], out=shorter[:, :, top : top + len(band.weights)])
  for i, band in enumerate(columns):
    left = i * _BLOCK
    np.matmul(shorter[..., band.start : band.stop], band.weights.T, out=out[..., left : left + len(band.weights)])
  return out


def crop(planes: Float32[np.ndarray, "3 h w"], top: float, left: float, side: float) -> None:
  """Crops the box [top, top + side] × [left, left + side] (shares of the image) and resizes it back, in place.

  Bilinear, as `tf.image.crop_and_resize`: pixel i of n samples the input at top * (n - 1) + i * side.
  """
  _, height, width = planes.shape
  first, second, fraction = neighbors(width, left, side)
  rows, other = (np.take(planes, taps, axis=2, mode="clip") for taps in (first, second))  # "raise" is slower
  other -= rows
  other *= fraction
  rows += other
  first, second, fraction = neighbors(height, top, side)
  np.take(rows, first, axis=1, out=planes, mode="clip")
  np.take(rows, second, axis=1, out=other, mode="clip")
  other -= planes
  other *= fraction[:, None]
  planes += other


def neighbors(n: int, offset: float, side: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The two input pixels around each output pixel, i64[n] each, and the weight of the second, f32[n]."""
  at = np.clip(offset * (n - 1) + np.arange(n) * side, 0, n - 1)
  first = at.astype(np.int64)
  return first, np.minimum(first + 1, n - 1), (at - first).astype(np.float32)


def each(values: Float[np.ndarray, " n"]) -> Float32[np.ndarray, "n 1 1 1"]:
  return values.astype(np.float32)[:, None, None, None]


def adjust_contrast(planes: Float32[np.ndarray, "n 3 h w"], factor: Float[np.ndarray, " n"]) -> None:
  """Scales about the mean of each channel, in place."""
  mean = planes.mean(axis=(2, 3), keepdims=True)
  planes *= each(factor)
  planes += mean * each(1 - factor)
  np.clip(planes, 0, 1, out=planes)


def adjust_color(
  planes: Float32[np.ndarray, "n 3 h w"], saturation: Float[np.ndarray, " n"], hue: Float[np.ndarray, " n"]
) -> Float32[np.ndarray, "n 3 h w"]:
  """Scales the saturation of HSV (at most to 1) and rotates its hue (in turns), in one pass through hue and chroma."""
  # Hue as sixths of a turn: which channel is largest picks the sector, the difference of the other two the place in it.
  red, green, blue = (planes[:, channel, None] for channel in range(3))
  value = np.maximum(np.maximum(red, green), blue)
  chroma = value - np.minimum(np.minimum(red, green), blue)
  # The sector as products with masks: np.where branches at each pixel, and takes three times as long on noise.
  is_red, is_green = red == value, green == value
  is_green, is_blue = is_green > is_red, ~(is_red | is_green)
  sixth = (green - blue) * is_red
  sixth += (blue - red) * is_green
  sixth += (red - green) * is_blue
  sixth /= np.maximum(chroma, np.float32(1e-30))
  sixth += 6 * is_red.astype(np.float32) + 2 * is_green.astype(np.float32) + 4 * is_blue.astype(np.float32)
  sixth += each(6 * hue)
  chroma *= each(saturation)
  np.minimum(chroma, value, out=chroma)  # chroma / value is the saturation, at most 1
  # Back to RGB without branches: each channel is value - chroma · clip(min(k, 4 - k), 0, 1), k its distance in sixths.
  # In place, since the temporaries of a batch would not fit the cache.
  out = np.empty_like(planes)
  for channel, corner in enumerate((5, 3, 1)):
    k = sixth + np.float32(corner)  # hue in sixths of a turn, counted from this channel's corner
    k -= np.float32(6) * np.floor(k * np.float32(1 / 6))
    np.minimum(k, np.float32(4) - k, out=k)
    np.clip(k, 0, 1, out=k)
    k *= chroma
    np.subtract(value, k, out=out[:, channel, None])
  return out
