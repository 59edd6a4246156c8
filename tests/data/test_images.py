"""The numpy image path against tf.image, and its promises: one path, equal bytes, counter-based randomness."""

import concurrent.futures
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from semanticvla_jax.data import images


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
  """A smooth picture with some grain, saturated and dark places."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
  return np.clip(np.asarray(coarse).astype(int) + rng.integers(-12, 13, (height, width, 3)), 0, 255).astype(np.uint8)


def grey_levels(a: np.ndarray, b: np.ndarray) -> int:
  return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("shape", [(256, 256), (128, 128), (480, 640), (37, 51), (64, 64)])
def test_resize_equals_tensorflow(shape):
  import tensorflow as tf

  image = picture(*shape)
  want = tf.image.resize(image, (224, 224), method="lanczos3", antialias=True)
  want = tf.cast(tf.clip_by_value(tf.round(want), 0, 255), tf.uint8).numpy()
  got = images.resize(image, 224)
  assert grey_levels(got, want) <= 1
  assert (got != want).mean() < 1e-3


def test_resize_keeps_an_image_of_that_size():
  image = picture(64, 64)
  assert images.resize(image, 64) is image


def test_resize_of_a_tiny_image_by_hand():
  flat = np.full((5, 7, 3), 93, np.uint8)
  np.testing.assert_array_equal(images.resize(flat, 3), np.full((3, 3, 3), 93))


def tf_crop(image, top, left, side):
  import tensorflow as tf

  box = [[top, left, top + side, left + side]]
  return tf.image.crop_and_resize(image[None], box, [0], image.shape[:2])[0]


@pytest.mark.parametrize("size", [224, 64])
def test_center_crop_equals_tensorflow(size):
  import tensorflow as tf

  image = picture(size, size)
  side = np.sqrt(0.9)
  want = tf_crop(tf.image.convert_image_dtype(image, tf.float32), (1 - side) / 2, (1 - side) / 2, side)
  want = tf.image.convert_image_dtype(tf.clip_by_value(want, 0, 1), tf.uint8, saturate=True).numpy()
  got = images.center_crop(image)
  assert grey_levels(got, want) <= 1
  assert (got != want).mean() < 1e-3


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("example", range(6))
def test_augment_equals_tensorflow_in_order_and_values(example, diagonal):
  import tensorflow as tf

  image = picture(96, 96, example)
  if example == 0:
    image[:32] = 120  # grey: no hue
    image[32:48] = (255, 0, 0)
  uniform = images.draws(0, example, 0)
  top, left, brightness, contrast, saturation, hue = uniform
  side = np.sqrt(0.9)
  x = tf.image.convert_image_dtype(image, tf.float32)
  x = tf_crop(x, top * (1 - side), (top if diagonal else left) * (1 - side), side)
  x = tf.clip_by_value(x, 0, 1)
  x = tf.clip_by_value(tf.image.adjust_brightness(x, -0.2 + 0.4 * brightness), 0, 1)
  x = tf.clip_by_value(tf.image.adjust_contrast(x, 0.8 + 0.4 * contrast), 0, 1)
  x = tf.clip_by_value(tf.image.adjust_saturation(x, 0.8 + 0.4 * saturation), 0, 1)
  x = tf.clip_by_value(tf.image.adjust_hue(x, -0.05 + 0.1 * hue), 0, 1)
  want = tf.image.convert_image_dtype(x, tf.uint8, saturate=True).numpy()
  got = images.augment(image[None], uniform[None], images.Augmentation(diagonal_crop=diagonal))[0]
  assert grey_levels(got, want) <= 1
  assert (got != want).mean() < 5e-3


def test_augment_by_hand():
  flat = np.full((1, 4, 4, 3), 100, np.uint8)
  middle = np.full((1, 6), 0.5)
  np.testing.assert_array_equal(images.augment(flat, middle), flat)
  brighter = middle.copy()
  brighter[0, 2] = 1.0  # + 0.2 of the range: trunc((100 / 255 + 0.2) * 255.5) = 151
  np.testing.assert_array_equal(images.augment(flat, brighter), np.full((1, 4, 4, 3), 151))
  red = np.zeros((1, 4, 4, 3), np.uint8)
  red[..., 0] = 255
  turned = middle.copy()
  turned[0, 5] = 1.0  # hue + 0.05 turn = 0.3 sixths towards yellow: green rises to 0.3
  np.testing.assert_array_equal(images.augment(red, turned)[0, 0, 0], [255, 76, 0])


def test_a_saturation_below_zero_is_gray():
  uniform = images.draws(0, 0, 0)[None]
  got = images.augment(picture(64, 64)[None], uniform, images.Augmentation(saturation=(-0.5, -0.5)))[0]
  np.testing.assert_array_equal(got, got[..., :1].repeat(3, axis=-1))


def test_an_image_is_augmented_alike_alone_and_in_company():
  many = np.stack([picture(40, 56, seed) for seed in range(5)])
  uniform = np.stack([images.draws(0, i, 1) for i in range(5)])
  together = images.augment(many, uniform)
  for i in range(5):
    np.testing.assert_array_equal(images.augment(many[i : i + 1], uniform[i : i + 1])[0], together[i])


def test_augment_with_a_size_resizes_first():
  mixed = [picture(56, 72, 0), picture(48, 48, 1), picture(90, 50, 2)]
  uniform = np.stack([images.draws(0, i, 0) for i in range(3)])
  want = images.augment(np.stack([images.resize(image, 48) for image in mixed]), uniform)
  np.testing.assert_array_equal(images.augment(mixed, uniform, size=48), want)


def test_results_outlive_later_calls_and_those_of_other_threads():
  """What a call computes with is kept for the next one of its thread."""
  shapes = [(40, 56), (200, 230), (64, 64)]
  uniform = images.draws(0, 3, 0)[None]

  def results(number):
    image = picture(*shapes[number % 3], number)
    return images.resize(image, 48), images.center_crop(image), images.augment([image], uniform)

  alone = [tuple(one.copy() for one in results(number)) for number in range(12)]
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    together = list(threads.map(results, range(12)))
  for want, got in zip(alone, together, strict=True):
    for one, other in zip(want, got, strict=True):
      np.testing.assert_array_equal(one, other)


def test_draws_depend_on_their_counters_only():
  first = images.draws(7, 123, 1)
  images.draws(7, 5, 0)
  np.testing.assert_array_equal(images.draws(7, 123, 1), first)
  others = [images.draws(7, 123, 0), images.draws(7, 124, 1), images.draws(8, 123, 1)]
  assert all(not np.array_equal(first, other) for other in others)
  many = np.stack([images.draws(0, i, 0) for i in range(500)])
  assert many.min() >= 0 and many.max() < 1
  assert abs(many.mean() - 0.5) < 0.03


def test_training_and_evaluation_give_equal_bytes_from_the_same_frame():
  stored = io.BytesIO()
  rendered = picture(256, 256)
  Image.fromarray(rendered).save(stored, "JPEG", quality=95)
  training = images.prepare(images.decode(stored.getvalue()), 224, crop_area=0.9)
  evaluation = images.prepare(rendered, 224, jpeg_quality=95, crop_area=0.9)
  np.testing.assert_array_equal(training, evaluation)


def test_jpeg_round_trip_equals_tensorflow():
  import tensorflow as tf

  image = picture(128, 128)
  encoded = tf.io.encode_jpeg(image, quality=95)
  accurate = tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE").numpy()
  np.testing.assert_array_equal(images.jpeg_round_trip(image), accurate)
  np.testing.assert_array_equal(images.jpeg_round_trip(image, dct="fast"), tf.io.decode_jpeg(encoded).numpy())


def test_errors():
  with pytest.raises(ValueError, match="cannot be decoded"):
    images.decode(b"not an image")
  with pytest.raises(ValueError, match="cannot be decoded"):
    images.decode(b"not an image", dct="fast")
  with pytest.raises(ValueError, match="Unknown JPEG transform"):
    images.decode(b"", dct="slow")


def test_images_text_and_statistics_do_not_import_tensorflow():
  code = (
    "import sys; from semanticvla_jax.data import images, text, statistics, rlds; sys.exit('tensorflow' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind)
  return buffer.getvalue()


def test_sixteen_bits_keep_their_upper_eight_as_tensorflow_does():
  values = np.linspace(0, 65535, 20 * 16).astype(np.uint16).reshape(20, 16)
  picture = encoded(Image.fromarray(values))
  decoded = images.decode(picture)
  np.testing.assert_array_equal(decoded, np.repeat((values >> 8)[..., None], 3, axis=2))
  np.testing.assert_array_equal(decoded, images.decode(picture, "fast"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pictures_of_eight_bits_are_read_as_tensorflow_reads_them(mode):
  picture = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 16, 3), np.uint8)).convert(mode))
  np.testing.assert_array_equal(images.decode(picture), images.decode(picture, "fast"))


@pytest.mark.parametrize(
  "values",
  [
    np.full((9, 9), 1 << 20, np.int32),
    np.full((9, 9), -5, np.int32),
    np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9),
  ],
)
def test_numbers_that_are_no_colors_are_refused(values):
  with pytest.raises(ValueError, match="mode '[IF]'.*expected colors of 8 or 16 bits"):
    images.decode(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("shape", [(0, 0), (1, 1), (0, 64), (64, 0), (7, 200), (1, 64)])
@pytest.mark.parametrize("options", [{}, {"crop_area": 0.9}, {"jpeg_quality": 95}])
def test_a_frame_without_a_picture_is_refused(shape, options):
  with pytest.raises(ValueError, match=f"too small: got {shape[0]} x {shape[1]} pixels; expected at least 8 x 8"):
    images.prepare(np.zeros((*shape, 3), np.uint8), 32, **options)
  assert images.prepare(np.zeros((8, 8, 3), np.uint8), 32, **options).shape == (32, 32, 3)
