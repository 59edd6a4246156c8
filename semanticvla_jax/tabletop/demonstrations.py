"""The tabletop's expert as demonstrations: rolled out and rendered on the device, cut at success, successes only."""

from __future__ import annotations

import functools
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from semanticvla_jax import files
from semanticvla_jax.data import writer
from semanticvla_jax.errors import refuse
from semanticvla_jax.tabletop import expert, physics, tasks

NOISE = 0.3  # moderate: about every other episode shows a recovery, and nearly all succeed
_CHUNK = 32  # episodes rolled out together
_FRAMES = 64  # frames rendered together
LABELS = ("intended", "executed")


class Options(NamedTuple):
  """What is demonstrated.

  Attributes:
    suite, split: of the tabletop; seeds count from `seed` within the split.
    episodes: successful ones wanted.
    seed: the first episode's.
    size: pixels of a side of both views.
    noise: of the executed actions, see expert.disturb.
    perturbed: share of the episodes that begin at a random moment (expert.perturbed_state) instead of where `reset`
      puts the gripper. With it states are many without noise, which makes the later actions of a chunk a guess.
    label: "intended" records what the expert would do in each state it got into (so recovery is taught and noise is
      not), "executed" what was done, noise included (a replay of the actions then gives the same states).
  """

  suite: str
  split: str = "train"
  episodes: int = 200
  seed: int = 0
  size: int = 64
  noise: float = NOISE
  label: str = "intended"
  perturbed: float = 0.0


class Summary(NamedTuple):
  """What came of it: episodes tried and kept, the seeds of those dropped, frames written, and the folder."""

  tried: int
  kept: int
  dropped: list[int]
  frames: int
  folder: pathlib.Path


def write(
  options: Options, out: str | pathlib.Path, name: str, progress: Callable[[int], None] | None = None
) -> Summary:
  """Writes `<out>/<name>/1.0.0` in the layout of `libero_*_no_noops`, and dataset_statistics.json next to the shards.

  The same options give the same bytes. Failed episodes are dropped and counted, and their places taken by the next
  seeds. `<name>` decides how the data is read, so it starts with "tabletop".

  Raises:
    ValueError: the dataset exists, a name is unknown, seeds leave the split, or the expert fails too often.
  """
  _check(options, name)
  dropped, lengths, kept = [], [], []

  def episodes() -> Iterator[writer.Episode]:
    for seed, episode in demonstrations(options):
      if episode is None:
        dropped.append(seed)
        _check_failures(options, len(dropped), len(lengths))
        continue
      kept.append((episode.action, episode.state))
      lengths.append(len(episode.action))
      yield episode
      if progress is not None:
        progress(len(lengths))
      if len(lengths) == options.episodes:
        return

  def finish(folder: pathlib.Path) -> None:
    writer.write_statistics(folder, name, kept)
    facts = {"tried": len(lengths) + len(dropped), "dropped_seeds": dropped, "frames": sum(lengths)}
    files.write_json(folder / "demonstrations.json", options._asdict() | facts)

  folder = writer.write(out, name, episodes(), finish=finish)
  logging.info("%s: %d episodes kept, %d dropped (seeds %s)", name, len(lengths), len(dropped), dropped[:10])
  return Summary(len(lengths) + len(dropped), len(lengths), dropped, sum(lengths), folder)


def demonstrations(options: Options) -> Iterator[tuple[int, writer.Episode | None]]:
  """Yields (seed, episode) without end, in the order of the seeds; None for an episode without success."""
  steps = tasks.max_steps(options.suite)
  first = options.seed
  while True:
    seeds = np.arange(first, first + _CHUNK)
    shares = (options.noise, options.perturbed)
    rollouts = _rollouts(jnp.asarray(seeds), *shares, options.suite, options.split, steps)
    rollouts = jax.tree.map(np.asarray, rollouts)
    for i, seed in enumerate(seeds.tolist()):
      tasks.check_seeds([seed], options.split)  # episodes that were dropped push the last seed on
      yield seed, _episode(options, seed, jax.tree.map(lambda x: x[i], rollouts), steps)  # noqa: B023
    first += _CHUNK


@functools.partial(jax.jit, static_argnames=("suite", "split", "steps"))
def _rollouts(
  seeds: Int[Array, "n"], noise: float | Array, perturbed: float | Array, suite: str, split: str, steps: int
) -> expert.Rollout:
  def one(seed):
    k_reset, k_noise = jax.random.split(physics.seed_key(seed, split))
    first = tasks.reset(k_reset, suite, split)
    k_perturb, k_which = jax.random.split(jax.random.fold_in(k_reset, 1))
    other = expert.perturbed_state(k_perturb, first)
    anywhere = jax.random.bernoulli(k_which, perturbed)
    start = jax.tree.map(lambda a, b: jnp.where(anywhere, a, b), other, first)
    return expert.rollout_from(start, k_noise, noise, steps)

  return jax.vmap(one)(seeds)


@functools.partial(jax.jit, static_argnames="size")
def _observe(states: tasks.State, size: int) -> tuple[Array, Array]:
  return jax.vmap(lambda state: physics.observe(state, size))(states)


def _episode(options: Options, seed: int, rollout: expert.Rollout, steps: int) -> writer.Episode | None:
  """One episode cut at success (its last action is the one that succeeds), rendered; None if it never succeeds."""
  length = int(rollout.first) + 1
  if length > steps:
    return None
  images, states = [], []
  for begin in range(0, length, _FRAMES):
    index = np.minimum(np.arange(begin, begin + _FRAMES), length - 1)  # one compiled size; the rest is cut off
    pictures, state = _observe(jax.tree.map(lambda x: x[index], rollout.states), options.size)  # noqa: B023
    images.append(np.asarray(pictures)[: length - begin])
    states.append(np.asarray(state)[: length - begin])
  views = np.concatenate(images)
  return writer.Episode(
    image=np.ascontiguousarray(views[:, 0]),
    wrist_image=np.ascontiguousarray(views[:, 1]),
    state=np.concatenate(states).astype(np.float32),
    action=(rollout.actions if options.label == "intended" else rollout.executed)[:length].astype(np.float32),
    instruction=tasks.INSTRUCTIONS[int(rollout.states.instruction[0])],
    file_path=f"tabletop/{options.suite}/{options.split}/{seed}",
  )


def _check(options: Options, name: str) -> None:
  tasks.suite_index(options.suite)
  tasks.check_seeds([options.seed, options.seed + max(options.episodes, 1) - 1], options.split)
  if not name.startswith("tabletop"):
    raise ValueError(
      f"Dataset name {name!r} would be read as another dataset; expected one that starts with 'tabletop'; "
      f"call it tabletop_{options.suite}."
    )
  if options.episodes < 1 or options.size < 8 or not (0 <= options.noise <= 1 and 0 <= options.perturbed <= 1):
    raise ValueError(
      f"Demonstrations: got episodes={options.episodes}, size={options.size}, noise={options.noise}, "
      f"perturbed={options.perturbed}; expected at least 1 episode, 8 pixels, noise and perturbed from 0 to 1."
    )
  if options.label not in LABELS:
    raise refuse("Demonstrations", f"label={options.label!r}", f"one of {LABELS}", "choose one of them")


def _check_failures(options: Options, dropped: int, kept: int) -> None:
  if dropped >= 16 and dropped > kept:
    raise refuse(
      "The expert fails",
      f"{dropped} failures and {kept} successes in suite {options.suite!r} at noise {options.noise}",
      "mostly successes",
      "lower the noise",
    )
