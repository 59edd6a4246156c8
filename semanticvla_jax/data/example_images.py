"""Images of training examples: prepared as evaluation prepares them, then augmented. Only numpy, in any process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from semanticvla_jax.data import images


class ExampleImages(NamedTuple):
  """How the images of examples are made.

  Attributes:
    size: height and width in pixels.
    seed: of the augmentation.
    augmentation: random changes, None for none.
    crop_area: center crop instead, as in evaluation.
    dct: see images.decode.
  """

  size: int
  seed: int
  augmentation: images.Augmentation | None = None
  crop_area: float | None = None
  dct: str = "accurate"

  def decode(self, encoded: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """One image; that of a missing view, b"", has no pixels."""
    return images.decode(encoded, self.dct) if encoded else np.zeros((0, 0, 3), np.uint8)

  def prepare(self, decoded: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """One image at the model's size; one without pixels is black. Raises ValueError for one that is too small."""
    if not decoded.size:
      return np.zeros((self.size, self.size, 3), np.uint8)
    return images.prepare(decoded, self.size, crop_area=self.crop_area)

  def finish(
    self, examples: Int[np.ndarray, "g 3"], decoded: Sequence[UInt8[np.ndarray, "_ _ 3"]]
  ) -> UInt8[np.ndarray, "g v s s 3"]:
    """Prepares and augments the images of some examples, one example after the other; missing ones stay black."""
    if self.augmentation is None:
      pictures = np.stack([self.prepare(one) for one in decoded])
    else:
      pictures = self._augmented(examples, decoded)
    return pictures.reshape(len(examples), -1, *pictures.shape[1:])

  def _augmented(
    self, examples: Int[np.ndarray, "g 3"], decoded: Sequence[UInt8[np.ndarray, "_ _ 3"]]
  ) -> UInt8[np.ndarray, "n s s 3"]:
    missing = [not one.size for one in decoded]
    black = np.zeros((self.size, self.size, 3), np.uint8)
    for one in decoded:
      if one.size:
        images.check_size(one)
    whole = [black if gone else one for one, gone in zip(decoded, missing, strict=True)]
    views = len(decoded) // len(examples)
    drawn = [images.draws(self.seed, n, view) for n in examples[:, 2].tolist() for view in range(views)]
    pictures = images.augment(whole, np.stack(drawn), self.augmentation, self.size)
    pictures[missing] = 0
    return pictures

  def make(self, examples: Int[np.ndarray, "g 3"], encoded: Sequence[bytes]) -> UInt8[np.ndarray, "g v s s 3"]:
    """Decodes and finishes the images of some examples."""
    return self.finish(examples, [self.decode(one) for one in encoded])
