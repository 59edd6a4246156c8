"""The input pipeline as the release builds it: plain tf.data, TensorFlow's own operations, frames shuffled in a buffer.

It chops no actions and resumes nowhere: what is compared is the way from records to batches of augmented images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from semanticvla_jax.data import images

_BUFFER = 1000  # frames, as JPEGs


def batches(folder: str, views: Sequence[str], size: int, batch: int, workers: int) -> Iterator[Any]:
  """Yields u8[b v s s 3] of an RLDS dataset without end, decoded, resized and augmented by TensorFlow.

  Args:
    folder: of the dataset's version.
    views: below `observation/`.
    size: height and width.
    batch: examples.
    workers: threads.
  """
  import tensorflow as tf
  import tensorflow_datasets as tfds

  images.hide_accelerators()
  builder = tfds.builder_from_directory(folder)
  skip = {"steps": {"observation": {view: tfds.decode.SkipDecoding() for view in views}}}
  episodes = builder.as_dataset(split="train", decoders=skip, shuffle_files=True)
  frames = episodes.flat_map(lambda episode: episode["steps"]).map(
    lambda step: tf.stack([step["observation"][view] for view in views])
  )
  shuffled = frames.cache().repeat().shuffle(_BUFFER)
  made = shuffled.map(lambda encoded: _augmented(encoded, len(views), size), num_parallel_calls=workers)
  options = tf.data.Options()
  options.threading.private_threadpool_size = workers
  options.threading.max_intra_op_parallelism = 1
  return made.batch(batch).prefetch(2).with_options(options).as_numpy_iterator()


def _augmented(encoded: Any, views: int, size: int) -> Any:
  import tensorflow as tf

  return tf.stack([_image(encoded[view], size) for view in range(views)])


def _image(encoded: Any, size: int) -> Any:
  """The release's way: decode, resize, then crop, brightness, contrast, saturation and hue, clipped after each."""
  import tensorflow as tf

  values = images.RELEASE
  image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
  image.set_shape([None, None, 3])
  image = tf.image.resize(image, (size, size), "lanczos3", antialias=True)
  image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
  image = tf.image.convert_image_dtype(image, tf.float32)
  side = values.crop_area**0.5
  corner = tf.random.uniform([2], 0, 1 - side)
  box = tf.concat([corner, corner + side], 0)[None]
  image = tf.clip_by_value(tf.image.crop_and_resize(image[None], box, [0], (size, size))[0], 0, 1)
  for change in (
    lambda x: tf.image.random_brightness(x, values.brightness),
    lambda x: tf.image.random_contrast(x, *values.contrast),
    lambda x: tf.image.random_saturation(x, *values.saturation),
    lambda x: tf.image.random_hue(x, values.hue),
  ):
    image = tf.clip_by_value(change(image), 0, 1)
  return tf.image.convert_image_dtype(image, tf.uint8, saturate=True)
