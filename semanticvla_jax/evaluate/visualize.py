"""Pictures of a policy at work: what its pruners keep and look at, and films of its episodes."""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import imageio_ffmpeg
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from semanticvla_jax.data import images
from semanticvla_jax.errors import refuse
from semanticvla_jax.models import programs
from semanticvla_jax.models.pruner import IDPruned
from semanticvla_jax.models.semanticvla import SemanticVLA
from semanticvla_jax.observation_dict import VIEWS
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import physics, render, tasks
from semanticvla_jax.types import Observation

FRAMES_A_SECOND = 10  # half the speed of the tabletop's 20 Hz
SIZE = 256  # of a view in films and pictures, pixels: more than a page shows, so that edges come out smooth
_RENDERED = 16  # frames rendered together
_MARGIN, _CAPTION = 8, 44  # pixels
_CAMERAS = {"image": "front camera", "wrist_image": "wrist camera"}
_OUTLINE = (255, 64, 200)
_INK, _PAPER, _GOOD, _BAD = (28, 30, 34), (255, 255, 255), (22, 130, 72), (190, 50, 45)


class Look(NamedTuple):
  """What a policy looked at, at one moment; n patches in raster order.

  Attributes:
    kept: bool[v n], the patches that the instruction made it keep (anchors); None without an ID-Pruner.
    cues: f32[v k n], where each salient word looks (rows sum to one); None likewise.
    words: v lists of those k words.
    aggregation: f32[v n], where the aggregation tokens look, mean over tokens and heads; None without an SA-Pruner.
  """

  kept: Bool[np.ndarray, "v n"] | None
  cues: Float[np.ndarray, "v k n"] | None
  words: list[list[str]]
  aggregation: Float[np.ndarray, "v n"] | None


def pruning_encoder(model: SemanticVLA) -> str | None:
  """The encoder whose patches are kept by the instruction: "siglip" or "dino"; None without an ID-Pruner."""
  return next((name for name in ("siglip", "dino") if model.pruner(name, "id") is not None), None)


def check_prunes(model: SemanticVLA) -> None:
  """Raises ValueError unless a model keeps patches by the instruction."""
  if pruning_encoder(model) is None:
    raise refuse(
      "--grounding", "a policy without an ID-Pruner", "one that keeps patches by the instruction", "leave it out"
    )


def kept_patches(pruned: IDPruned) -> Bool[Array, "b n"]:
  """Which patches an ID-Pruner kept, in raster order."""
  b, n, _ = pruned.similarity.shape
  return jnp.zeros((b, n), bool).at[jnp.arange(b)[:, None], pruned.kept].set(True)


@functools.partial(jax.jit, static_argnames="model")
def kept_of(params: dict, observation: Observation, *, model: nn.Module) -> Bool[Array, "b v n"]:
  """The patches that a model with an ID-Pruner keeps of b observations; the rest of it is not computed."""
  found = model.apply({"params": params}, observation).intermediates
  kept = kept_patches(found[f"{pruning_encoder(programs.bare(model))}_pruned"])
  return kept.reshape(*observation.images.shape[:2], -1)


def looks(policy: Policy, observations: Sequence[Mapping]) -> list[Look]:
  """What the policy looks at in each observation (dicts as for `Policy.infer`), in one batch."""
  observation = policy.observe(observations)
  b, v = observation.images.shape[:2]
  bare = policy.bare
  sa = next((name for name in ("dino", "siglip") if bare.pruner(name, "sa") is not None), None)
  id_ = pruning_encoder(bare)

  @jax.jit
  def seen(params, observation):
    found, out = policy.model.apply({"params": params}, observation).intermediates, {}
    if sa is not None:
      vit = getattr(bare, sa)
      patches = slice(vit.num_prefix, vit.num_prefix + vit.num_patches)
      out["aggregation"] = found[f"{sa}_attention"][..., patches].mean(axis=(1, 2))
    if id_ is not None:
      pruned = found[f"{id_}_pruned"]
      out["kept"] = kept_patches(pruned)
      if pruned.cues is not None:
        out |= {"cues": pruned.cue_weights.swapaxes(1, 2), "salient": pruned.salient}
    return out

  found = {name: np.asarray(x).reshape(b, v, *x.shape[1:]) for name, x in seen(policy.params, observation).items()}
  rows = []
  for i in range(b):
    one = {name: x[i] for name, x in found.items()}
    ids = [] if "salient" not in one else observation.instruction[i][one["salient"]]
    words = [[_piece(policy, int(k)) for k in view] for view in ids]
    rows.append(Look(one.get("kept"), one.get("cues"), words, one.get("aggregation")))
  return rows


def _piece(policy: Policy, index: int) -> str:
  """A word piece as letters that the pictures' font has: it has no "▁"."""
  return policy.tokenizers.siglip.id_to_piece(index).replace("▁", " ").strip() or "_"


def kept_overlay(image: UInt8[np.ndarray, "s s 3"], kept: Bool[np.ndarray, " n"]) -> UInt8[np.ndarray, "s s 3"]:
  """The kept patches as they are, each framed; the rest dark."""
  size, side = image.shape[0], round(len(kept) ** 0.5)
  dark = 0.38 * image.mean(axis=2, keepdims=True) + 0.10 * image
  out = np.where(_spread(kept, size)[..., None], image, dark).astype(np.uint8)
  canvas = Image.fromarray(out)
  draw, step = ImageDraw.Draw(canvas), size / side
  for index in np.flatnonzero(kept):
    y, x = divmod(int(index), side)
    draw.rectangle([x * step, y * step, (x + 1) * step - 1, (y + 1) * step - 1], outline=(255, 255, 255))
  return np.asarray(canvas)


def outlined(image: UInt8[np.ndarray, "s s 3"], mask: Bool[np.ndarray, "s s"]) -> UInt8[np.ndarray, "s s 3"]:
  """An image with the edge of a mask in its pixels' place."""
  inside = mask.copy()
  for axis in (0, 1):
    for shift in (-1, 1):
      inside &= np.roll(mask, shift, axis)
  return np.where((mask & ~inside)[..., None], np.array(_OUTLINE, np.uint8), image)


def grounding_tiles(
  frames: UInt8[np.ndarray, "v s s 3"],
  kept: Bool[np.ndarray, "v n"],
  masks: Bool[np.ndarray, "v s s"],
  crop_area: float | None,
  views: Sequence[str],
) -> list[Tile]:
  """Each view as the policy sees it, with its kept patches and the outline of what the task names.

  Args:
    frames: whole frames.
    kept: patches of each, in raster order.
    masks: pixels that show an object that the task names.
    crop_area: share of a frame that the policy sees; None for all of it.
    views: their names.
  """
  masks = np.repeat(masks[..., None], 3, axis=-1).astype(np.uint8) * 255
  if crop_area is not None:
    frames, masks = images.center_crop(frames, crop_area), images.center_crop(masks, crop_area)
  return [
    Tile(f"{_CAMERAS.get(name, name)}: kept {int(k.sum())} of {len(k)}", outlined(kept_overlay(image, k), mask))
    for name, image, k, mask in zip(views, frames, kept, masks[..., 0] > 127)
  ]


def heat_overlay(image: UInt8[np.ndarray, "s s 3"], weights: Float[np.ndarray, " n"]) -> UInt8[np.ndarray, "s s 3"]:
  """Weights as colors from dark violet (least) to yellow (most), each picture on its own scale, over a gray image."""
  span = float(np.ptp(weights))
  heat = (weights - weights.min()) / (span if span > 0 else 1.0)
  colors = matplotlib.colormaps["inferno"](_spread(heat, image.shape[0]))[..., :3] * 255
  gray = image.mean(axis=2, keepdims=True)
  return np.clip(0.38 * gray + 0.62 * colors, 0, 255).astype(np.uint8)


def _spread(values: np.ndarray, size: int) -> np.ndarray:
  """Patch values [n] as pixels [size size]."""
  side = round(len(values) ** 0.5)
  row = np.minimum(np.arange(size) * side // size, side - 1)
  return values.reshape(side, side)[row[:, None], row[None, :]]


class Tile(NamedTuple):
  """One picture with what it shows."""

  caption: str
  image: np.ndarray


def tiles(pictures: Sequence[UInt8[np.ndarray, "s s 3"]], look: Look) -> list[list[Tile]]:
  """For each view: as seen, patches kept, where the cues look together, where the aggregation tokens look."""
  rows = []
  for view, (name, image) in enumerate(zip(VIEWS[len(pictures)], pictures)):
    row = [Tile(_CAMERAS.get(name, name), image)]
    if look.kept is not None:
      kept = look.kept[view]
      row.append(Tile(f"kept {int(kept.sum())} of {len(kept)} patches", kept_overlay(image, kept)))
    if look.cues is not None:
      weights = look.cues[view].mean(axis=0)
      row.append(Tile(f"cues {_peak(weights)}: {', '.join(look.words[view])}", heat_overlay(image, weights)))
    if look.aggregation is not None:
      weights = look.aggregation[view]
      row.append(Tile(f"aggregation tokens {_peak(weights)}", heat_overlay(image, weights)))
    rows.append(row)
  return rows


def _peak(weights: Float[np.ndarray, " n"]) -> str:
  """How much more the brightest patch gets than an even share: colors are scaled to each picture, this is not."""
  return f"(peak {weights.max() / weights.mean():.1f}x)"


def cue_tiles(picture: UInt8[np.ndarray, "s s 3"], look: Look, view: int = 0) -> list[Tile]:
  """Where each cue looks, one picture per word."""
  if look.cues is None:
    return []
  return [
    Tile(f"“{word}” {_peak(look.cues[view, i])}", heat_overlay(picture, look.cues[view, i]))
    for i, word in enumerate(look.words[view])
  ]


def sheet(rows: Sequence[Sequence[Tile]]) -> UInt8[np.ndarray, "h w 3"]:
  """Tiles of one size as one picture with captions, a row a list."""
  size = rows[0][0].image.shape[0]
  height, width = size + 20 + _MARGIN, size + _MARGIN
  page = Image.new("RGB", (max(map(len, rows)) * width + _MARGIN, len(rows) * height + _MARGIN), _PAPER)
  draw = ImageDraw.Draw(page)
  for y, row in enumerate(rows):
    for x, tile in enumerate(row):
      at = (x * width + _MARGIN, y * height + _MARGIN)
      page.paste(Image.fromarray(tile.image), (at[0], at[1] + 20))
      draw.text(at, _fit(draw, tile.caption, size, _font(13)), fill=_INK, font=_font(13))
  return np.asarray(page)


@functools.lru_cache(maxsize=8)
def _renderer(size: int) -> Callable:
  return jax.jit(jax.vmap(lambda state: render.views(state, size)))


def pictures(states: tasks.State, size: int) -> UInt8[np.ndarray, "t 2 {size} {size} 3"]:
  """Renders a film's states [t]."""
  t, found = len(states.time), []
  for first in range(0, t, _RENDERED):
    index = np.minimum(np.arange(first, first + _RENDERED), t - 1)  # one compiled size; the rest is cut off
    part = jax.tree.map(lambda x: x[index], states)  # noqa: B023
    found.append(np.asarray(_renderer(size)(part))[: t - first])
  return np.concatenate(found)


def observation(state: tasks.State, size: int) -> dict:
  """What a policy sees of one state, as the environment's dict."""
  views, proprio = jax.jit(physics.observe, static_argnums=1)(state, size)
  views = np.asarray(views)
  return {
    "observation/image": views[0],
    "observation/wrist_image": views[1],
    "observation/state": np.asarray(proprio),
    "prompt": physics.instruction(state),
  }


def film(
  frames: UInt8[np.ndarray, "t 2 s s 3"],
  told: str,
  success: bool,
  asked: str | None = None,
  steps: Sequence[int] | None = None,
) -> UInt8[np.ndarray, "u h w 3"]:
  """Both views side by side over a caption: the instruction, the step, and at the end whether it succeeded.

  Args:
    frames: of one episode, up to its last state.
    told: the instruction that the policy got.
    success: whether the last state is one.
    asked: the instruction that success refers to, if it is another one.
    steps: actions taken before each frame, if that is not one per frame.
  """
  steps = range(len(frames)) if steps is None else steps
  t, _, s = frames.shape[:3]
  width, height = 2 * s + 3 * _MARGIN, s + 2 * _MARGIN + _CAPTION
  width, height = width + width % 2, height + height % 2  # H.264 wants even sizes
  large, small = _font(s // 15), _font(s // 18)
  out = []
  for i, (front, wrist) in enumerate(frames):
    page = Image.new("RGB", (width, height), _PAPER)
    page.paste(Image.fromarray(front), (_MARGIN, _MARGIN))
    page.paste(Image.fromarray(wrist), (s + 2 * _MARGIN, _MARGIN))
    draw, y = ImageDraw.Draw(page), s + _MARGIN + 6
    draw.text((_MARGIN, y), _fit(draw, f"“{told}”", width - 2 * _MARGIN, large), fill=_INK, font=large)
    state = f"step {steps[i]}" + ("" if i < t - 1 else ": done" if success else ": not done")
    color = _INK if i < t - 1 else _GOOD if success else _BAD
    draw.text((_MARGIN, y + 22), state, fill=color, font=small)
    if asked is not None and asked != told:
      task = _fit(draw, f"(the task was: {asked})", width - s // 2 - _MARGIN, small)
      draw.text((s // 2, y + 22), task, fill=_INK, font=small)
    out.append(np.asarray(page))
  return np.stack(out + [out[-1]] * FRAMES_A_SECOND)  # the last frame stays for a second


def write_mp4(path: str | os.PathLike, frames: UInt8[np.ndarray, "t h w 3"], fps: int = FRAMES_A_SECOND) -> None:
  """Writes an H.264 film that browsers play."""
  height, width = frames.shape[1:3]
  writer = imageio_ffmpeg.write_frames(
    str(path),
    (width, height),
    fps=fps,
    codec="libx264",
    pix_fmt_out="yuv420p",
    macro_block_size=2,
    output_params=["-crf", "26", "-preset", "slow", "-movflags", "+faststart"],
    ffmpeg_log_level="error",
  )
  with warnings.catch_warnings():  # jax warns of forks; this child becomes ffmpeg at once
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called")
    writer.send(None)
  for frame in frames:
    writer.send(np.ascontiguousarray(frame))
  writer.close()


def png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
  """A picture as the bytes of a PNG file."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG", optimize=True)
  return buffer.getvalue()


@functools.lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
  return ImageFont.load_default(size)


def _fit(draw: ImageDraw.ImageDraw, sentence: str, width: int, font: ImageFont.FreeTypeFont) -> str:
  """The sentence, cut with an ellipsis where it is wider than `width` pixels."""
  if draw.textlength(sentence, font=font) <= width:
    return sentence
  while sentence and draw.textlength(sentence + "…", font=font) > width:
    sentence = sentence[:-1]
  return sentence + "…"
