"""What `data inspect` reports before any training: all that the loader would stop at, and what looks odd."""

from __future__ import annotations

import collections
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from semanticvla_jax.data import faults, folders, images, rlds, text, tfrecord_index
from semanticvla_jax.data.spec import DatasetSpec
from semanticvla_jax.errors import refuse

_STILL = 0.02  # of its plausible range: a dimension that moves less is blown up to [-1, 1] with its noise
_STILL_IN_GROUP = 0.01  # of the widest dimension of its group, where the spec has no ranges
_GAP = 1.8  # steps of 1 / control_hz between two frames
_RATE = 0.2  # by which time may differ from 1 / control_hz


class Finding(NamedTuple):
  """One line of the report.

  Attributes:
    stops: whether training stops at it. Where `skippable`, config.data.skip_bad leaves its episodes out.
    line: what, how often, where, and a remedy.
  """

  stops: bool
  line: str
  skippable: bool = False


class Limits(NamedTuple):
  """How long sentences may be: tokens of the prompt and of the ID-Pruner's text, by the tokenizers of a folder."""

  prompt: int = 64
  instruction: int = 64
  folder: str | pathlib.Path = text.EMBEDDED


def inspect(
  data_dir: str,
  name: str,
  spec: DatasetSpec,
  *,
  split: str | None = None,
  cache_dir: str | None = None,
  limits: Limits | None = None,
) -> tuple[rlds.Dataset | None, list[Finding]]:
  """Reads a whole dataset, decodes every image, and lists what it finds.

  Returns:
    The dataset of its sound episodes, None without any; and the findings, those that stop training first.

  Raises:
    ValueError: no such dataset, or one without the features of the spec.
  """
  images.hide_accelerators()
  lost, problems, sizes = [], [], {}
  parts = folders.shards(data_dir, name, spec, split)
  index = tfrecord_index.index(parts, spec.columns, spec.views, cache_dir, name, lost)
  bad = [faults.Fault(faults.RECORDS, None, error) for _, error in lost]
  bad += [*faults.of_numbers(name, spec, index), *faults.of_images(name, spec, index, sizes)]
  found = [*_of_faults(bad, sum(count for count, _ in lost))]
  try:
    dataset = rlds.assemble(name, spec, index, None, {fault.episode for fault in bad} - {None}, problems)
  except ValueError as error:
    return None, [*found, Finding(True, str(error))]
  found += [Finding(True, str(error)) for error in problems]
  found += [*_of_sentences(dataset, limits or Limits()), *_of_sizes(sizes), *_of_dimensions(dataset)]
  found += [*_of_episodes(dataset), *_of_time(dataset)]
  if others := folders.unread(data_dir, name):
    found.append(Finding(False, f"{len(others)} folders or files next to the version that is read: {others[:20]}"))
  return dataset, sorted(found, key=lambda one: not one.stops)


def describe(findings: Sequence[Finding]) -> str:
  """The report: what stops training, then what to look at."""
  parts = []
  for stops, title in ((True, "training stops at"), (False, "worth a look")):
    lines = [f"  - {one.line}" for one in findings if one.stops == stops]
    parts += [f"{title}: {len(lines)}", *lines] if lines else [f"{title}: nothing"]
  if any(one.skippable for one in findings):
    parts.append("config.data.skip_bad=True (here --skip-bad) leaves out the episodes of the first of these.")
  return "\n".join(parts)


def _of_faults(bad: Sequence[faults.Fault], lost: int) -> Iterator[Finding]:
  for kind in dict.fromkeys(fault.kind for fault in bad):
    own = [fault for fault in bad if fault.kind == kind]
    count = lost if kind == faults.RECORDS else len({fault.episode for fault in own})
    yield Finding(True, f"{kind} in {count} episodes; the first: {own[0].error}", skippable=True)


def _of_sentences(dataset: rlds.Dataset, limits: Limits) -> Iterator[Finding]:
  """Instructions that do not fit, each kind with the only remedy that helps."""
  frames = collections.Counter(map(dataset.instruction, range(len(dataset.frames))))
  words = text.load(limits.folder)
  prompt = lambda one: len(words.language.encode(text.prompt(one))) + 2  # noqa: E731 (<s> and the empty token)
  pruner = lambda one: len(words.siglip.encode(text.canonical(text.question(one)))) + 1  # noqa: E731 (</s>)
  kinds = [("prompt", prompt, limits.prompt), ("instruction", pruner, limits.instruction)]
  for kind, count, most in kinds[: 2 if words.siglip is not None else 1]:
    lengths = {sentence: count(sentence) for sentence in frames}
    long = [sentence for sentence, length in lengths.items() if length > most]
    if not long:
      continue
    longest = max(long, key=lengths.__getitem__)
    remedy = (
      f"set config.data.prompt_length={lengths[longest]}"
      if kind == "prompt"
      else "shorten the sentences, for the text tower has no more positions"
    )
    total = sum(frames[sentence] for sentence in long)
    what = f"{len(long)} sentences of {total} frames, up to {lengths[longest]} {kind} tokens ({text.short(longest)})"
    yield Finding(True, str(refuse("sentences that are too long", what, f"at most {most}", remedy)))


def _of_sizes(sizes: dict[str, collections.Counter]) -> Iterator[Finding]:
  for view, counts in sizes.items():
    if len(counts) > 1:
      listed = ", ".join(f"{count} of {h} x {w}" for (h, w), count in counts.most_common(5))
      yield Finding(False, f"images of {view!r} have {len(counts)} sizes ({listed}); each is resized to the model's")


def _of_dimensions(dataset: rlds.Dataset) -> Iterator[Finding]:
  """Action dimensions that hardly move, and values that the robot cannot reach."""
  spec, stats = dataset.spec, dataset.statistics.action
  span = stats.q99 - stats.q01
  groups = [range(len(span))] if spec.groups is None else spec.groups.values()
  widest = {i: float(max(span[j] for j in dims)) for dims in groups for i in dims}
  for i in np.flatnonzero(stats.mask).tolist():
    where = f"action dimension {i}"
    if spec.ranges is not None:
      low, high = spec.ranges[i]
      outside = int(((dataset.actions[:, i] < low) | (dataset.actions[:, i] > high)).sum())
      if outside:
        extremes = f"values in [{stats.min[i]:g}, {stats.max[i]:g}], {outside} of {len(dataset.actions)} outside"
        yield Finding(False, str(refuse(where, extremes, f"[{low:g}, {high:g}]", "check unit and order")))
    share, whole = (_STILL_IN_GROUP, widest[i]) if spec.ranges is None else (_STILL, high - low)
    if 0 < span[i] < share * whole or (span[i] == 0 and stats.min[i] != stats.max[i]):
      yield Finding(
        False,
        str(
          refuse(
            f"{where} is nearly constant",
            f"98 % of its values within {span[i]:.3g}",
            f"{share * whole:.3g} or more, {share:.0%} of "
            + ("the robot's range" if spec.ranges else "the widest of its group"),
            "drop it, or set normalized False, for its noise would fill [-1, 1]",
          )
        ),
      )


def _of_episodes(dataset: rlds.Dataset) -> Iterator[Finding]:
  """Episodes that are there twice, or too short for a chunk, or dropped for want of an instruction."""
  index, spec = dataset.index, dataset.spec
  ends = np.cumsum(index.lengths)
  digests = collections.Counter(
    hashlib.sha256(b"".join(column[first:last].tobytes() for column in index.columns.values())).digest()
    for first, last in zip(ends - index.lengths, ends, strict=True)
  )
  if twice := sum(count - 1 for count in digests.values()):
    yield Finding(False, f"{twice} of {len(ends)} episodes repeat another's numbers: drop the copies")
  lengths = np.bincount(dataset.episodes)
  if short := int((lengths < spec.chunk).sum()):
    what = f"{short} of {len(lengths)} episodes are shorter than the chunk of {spec.chunk} and skipped"
    remedy = "config.data.trajectory_end=pad takes them"
    yield Finding(short == len(lengths), f"{what}: {remedy}")
  spoken = np.array([bool(sentence) for sentence in index.instructions], bool)
  silent = sum(not spoken[index.instruction[first:last]].any() for first, last in zip(ends - index.lengths, ends))
  if silent:
    yield Finding(False, f"{silent} of {len(ends)} episodes have no instruction and are dropped")


def _of_time(dataset: rlds.Dataset) -> Iterator[Finding]:
  spec, index = dataset.spec, dataset.index
  if spec.time is None or spec.control_hz is None:
    return
  owner = np.repeat(np.arange(len(index.lengths)), index.lengths)
  steps = np.diff(index.columns[spec.time][:, 0])[np.diff(owner) == 0]
  if gaps := int((steps > _GAP / spec.control_hz).sum()):
    line = f"{gaps} times more than {_GAP / spec.control_hz:g} s pass between two frames: frames may be missing"
    yield Finding(False, line)
  if len(steps) and abs(float(np.median(steps)) * spec.control_hz - 1) > _RATE:
    got = f"{1 / max(float(np.median(steps)), 1e-9):.3g} frames a second"
    yield Finding(False, str(refuse("time", got, f"control_hz={spec.control_hz:g}", "correct one of them")))
