"""What a policy reads from the dict that a robot, a simulator or a client sends, and under which names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from semanticvla_jax import cli
from semanticvla_jax.data import text
from semanticvla_jax.errors import refuse

# What a policy reads, and the names under which it finds it: openpi's, then OpenVLA-OFT's, then the bare name.
ALIASES = {
  "image": ("observation/image", "full_image", "image"),
  "wrist_image": ("observation/wrist_image", "wrist_image"),
  "left_wrist_image": ("observation/left_wrist_image", "left_wrist_image", "left_wrist"),
  "right_wrist_image": ("observation/right_wrist_image", "right_wrist_image", "right_wrist"),
  "state": ("observation/state", "state", "proprio"),
  "instruction": ("prompt", "task_description", "instruction"),
}
VIEWS = {1: ("image",), 2: ("image", "wrist_image"), 3: ("image", "left_wrist_image", "right_wrist_image")}


def read(
  observation: Any,
  views: Sequence[str] | Mapping[str, Sequence[str]],
  proprio_dim: int | None,
  optional: Sequence[str] = (),
  columns: Sequence[str] = (),
) -> dict:
  """One observation dict, checked: {"views": [u8[h w 3], …], "state": f32[p] or None, "instruction": str}.

  Args:
    observation: a mapping from any of ALIASES to images, f32[p] state in raw units and the instruction. An image is
      u8[h w 3], RGB 0..255; channels may come first, and floating-point numbers may lie in [0, 1].
    views: names of the images to read, in the order of the model; a mapping has the keys of each in the place of those
      of ALIASES.
    proprio_dim: p; None reads no state.
    optional: views that may be missing, or None, or empty, and are then None.
    columns: parts of the state, which an observation may have instead of it, with or without "observation/".

  Raises:
    ValueError: something is missing, ambiguous, of another type or shape, or not finite.
  """
  if not isinstance(observation, Mapping):
    raise refuse(
      "Observation",
      f"{type(observation).__name__}",
      "a dict of images, state and instruction",
      "see observation_dict.ALIASES for their names",
    )
  aliases = {**ALIASES, **(views if isinstance(views, Mapping) else {})}
  find = lambda name: _find(observation, name, aliases[name], aliases)  # noqa: E731
  missing = {name for name in optional if all(_is_empty(observation.get(key)) for key in aliases[name])}
  pictures = [None if name in missing else _image(name, find(name)) for name in views]
  parts = _parts(observation, columns)
  state = None if proprio_dim is None else _state(find("state") if parts is None else parts, proprio_dim)
  return {"views": pictures, "state": state, "instruction": _instruction(find("instruction"))}


def _parts(observation: Mapping[str, Any], columns: Sequence[str]) -> np.ndarray | None:
  """The state out of its columns; None where there is a state, or none of them."""
  keys = {column: (column, column.removeprefix("observation/")) for column in columns}
  there = {column: [key for key in own if observation.get(key) is not None] for column, own in keys.items()}
  if any(observation.get(key) is not None for key in ALIASES["state"]) or not any(there.values()):
    return None
  for column, own in there.items():
    if len(own) != 1:
      got = f"{own}, which mean the same" if own else f"{sorted(key for one in there.values() for key in one)} alone"
      raise refuse("Observation, state", got, f"all of {[*columns]}, each once", f"correct {column!r}")
  return np.concatenate([_array(column, observation[own[0]]).reshape(-1) for column, own in there.items()])


def _is_empty(image: Any) -> bool:
  """Whether there is no image: None, no bytes, or an array without pixels."""
  return image is None or (isinstance(image, bytes) and not image) or (isinstance(image, np.ndarray) and not image.size)


def _instruction(sentence: Any) -> str:
  """The instruction, tidy: str, bytes of UTF-8, or an array of one of them."""
  given = sentence
  try:
    sentence = sentence.item() if isinstance(sentence, np.ndarray | np.generic) and sentence.size == 1 else sentence
    sentence = sentence.decode() if isinstance(sentence, bytes) else sentence
    if isinstance(sentence, str):
      sentence.encode()  # half of a surrogate pair cannot be
      sentence = text.tidy(sentence)
  except UnicodeError as error:
    raise refuse(
      "Observation, instruction",
      f"{_described(given)}, which is not Unicode text ({error.reason})",
      "a sentence",
      "decode it where it comes from",
    ) from error
  if not isinstance(sentence, str) or not sentence:
    raise refuse("Observation, instruction", f"{_described(given)}", "a sentence that is not empty", "pass what to do")
  return sentence


def _described(value: Any) -> str:
  """A value in a few words, for a message."""
  if isinstance(value, str):
    return text.short(value)
  if isinstance(value, np.ndarray):
    return f"{value.dtype}{[*value.shape]}"
  return f"{type(value).__name__} {text.short(str(value))}"


def _find(observation: Mapping[str, Any], name: str, own: Sequence[str], aliases: Mapping[str, Sequence[str]]) -> Any:
  """The value under one of a part's `own` keys; `aliases` are those of all parts."""
  there = [alias for alias in own if observation.get(alias) is not None]
  if len(there) == 1:
    return observation[there[0]]
  if there:
    raise refuse("Observation is ambiguous", f"{there}, which all mean {name!r}", "one", "drop the others")
  have = sorted(map(str, observation))
  taken = {alias for keys in aliases.values() for alias in keys}  # a camera is never proposed as another one
  near = difflib.get_close_matches(own[0], [key for key in have if key not in taken], 1, 0.75)
  listing = ", ".join(text.short(key) for key in have[:20]) + (f" and {len(have) - 20} more" if len(have) > 20 else "")
  raise refuse(
    f"Observation lacks {name!r}",
    listing or "nothing",
    f"one of {[*own]}",
    f"add it (did you mean to rename {near[0]!r}?)" if near else "add it",
  )


def _array(name: str, value: Any) -> np.ndarray:
  """Anything that is an array, as numpy's. Raises ValueError for anything else."""
  try:
    return np.asarray(value)
  except Exception as error:  # lists of unequal rows, tensors with gradients or on a device: each raises its own
    raise refuse(
      f"Observation, {name}",
      f"{type(value).__name__}, which numpy cannot read ({cli.first_line(error)})",
      "an array",
      "convert it (a tensor: x.detach().cpu().numpy())",
    ) from error


def _image(name: str, image: Any) -> np.ndarray:
  """u8[h w 3] of an image in bytes or in [0, 1], channels last or first.

  Numbers that are all 0 or 1 may be of either range, and are refused as floating point.
  """
  image = _array(name, image)
  if image.ndim == 3 and image.shape[0] == 3 != image.shape[-1]:
    image = np.moveaxis(image, 0, -1)
  shaped, fits = image.ndim == 3 and image.shape[-1] == 3 and image.size, image.dtype == np.uint8
  if shaped and image.dtype.kind == "f" and image.min() >= 0 and image.max() <= 1 and np.any((image > 0) & (image < 1)):
    return np.round(image * 255).astype(np.uint8)
  if not (shaped and fits):
    raise refuse(
      f"Observation, {name}",
      f"{image.dtype}{[*image.shape]}",
      "uint8[h w 3], RGB 0..255, upright",
      "convert it (channels last; floating point in [0, 1] is taken too)",
    )
  return image


def _state(state: Any, width: int) -> np.ndarray:
  state = _array("state", state)
  numeric = state.dtype.kind in "fiu"
  with np.errstate(over="ignore"):
    small = state.astype(np.float32) if numeric else state
  if not numeric or small.shape != (width,) or not np.isfinite(small).all():
    values = f" {small.reshape(-1)[:16]}" if numeric else ""
    raise refuse(
      "Observation, state",
      f"{state.dtype}{[*state.shape]}{values}",
      f"{width} finite numbers in raw units",
      "pass the robot's state as in the training data",
    )
  return small
