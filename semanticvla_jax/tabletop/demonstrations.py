"""The tabletop's expert as demonstrations: rolled out and rendered on the device, cut at success, successes only."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import importlib
import itertools
import logging
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from semanticvla_jax import files
from semanticvla_jax.data import writer
from semanticvla_jax.errors import refuse
from semanticvla_jax.tabletop import expert, physics, probes, tasks

NOISE = 0.3  # moderate: about every other episode shows a recovery, and nearly all succeed
_CHUNK = 32  # episodes rolled out together
_FRAMES = 64  # frames rendered together
_AHEAD = 8  # episodes made before they are asked for
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
    # Writing imports TensorFlow, which takes seconds: while the expert is compiled. (Not tensorflow_datasets, which
    # changes how all threads import until it is imported itself.)
    threading.Thread(target=importlib.import_module, args=("tensorflow",)).start()
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
  """Yields (seed, episode) without end, in the order of the seeds; None for an episode without success.

  The next episodes are made in a thread while the caller encodes this one, but none beyond `options.episodes`.
  """
  made, pending, kept = _episodes(options), collections.deque(), 0
  with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="expert") as worker:
    try:
      while True:
        while len(pending) < max(1, min(_AHEAD, options.episodes - kept)):
          pending.append(worker.submit(next, made))
        seed, episode = pending.popleft().result()
        kept += episode is not None
        yield seed, episode
    finally:
      for future in pending:
        future.cancel()


def _episodes(options: Options) -> Iterator[tuple[int, writer.Episode | None]]:
  steps, size = probes.max_steps(options.suite), options.size
  roll, given = _rollouts(), (options.noise, options.perturbed, options.suite, options.split, steps)
  seeds = np.arange(options.seed, options.seed + _CHUNK)
  with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="render") as other:
    # What renders is compiled while the expert is.
    ready = other.submit(_compile_rendering, roll.eval_shape(jnp.asarray(seeds), *given).states, size)
    rollouts = roll(jnp.asarray(seeds), *given)
    ready.result()
  while True:
    rollouts = jax.tree.map(np.asarray, rollouts)
    lengths = np.where(rollouts.first < steps, rollouts.first + 1, 0)  # cut at success
    frames = _frames(rollouts.states, lengths, options.size)
    for i, (seed, length) in enumerate(zip(seeds.tolist(), lengths.tolist())):
      tasks.check_seeds([seed], options.split)  # episodes that were dropped push the last seed on
      own = [*itertools.islice(frames, length)]
      yield seed, _episode(options, seed, jax.tree.map(lambda x: x[i], rollouts), own) if own else None  # noqa: B023
    seeds = seeds + _CHUNK
    rollouts = roll(jnp.asarray(seeds), *given)


@functools.cache
def _rollouts() -> Any:
  """`_roll` under jit, on CPUs without optimization: 10 seconds of a core to compile instead of 29, and 0.2 seconds
  instead of 0.1 for each 32 episodes."""
  options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  return jax.jit(_roll, static_argnames=("suite", "split", "steps"), compiler_options=options)


def _roll(
  seeds: Int[Array, " n"], noise: float | Array, perturbed: float | Array, suite: str, split: str, steps: int
) -> expert.Rollout:
  def one(seed):
    k_reset, k_noise = jax.random.split(physics.seed_key(seed, split))
    first = probes.reset(k_reset, suite, split)
    k_perturb, k_which = jax.random.split(jax.random.fold_in(k_reset, 1))
    other = expert.perturbed_state(k_perturb, first)
    anywhere = jax.random.bernoulli(k_which, perturbed)
    start = jax.tree.map(lambda a, b: jnp.where(anywhere, a, b), other, first)
    return expert.rollout_from(start, k_noise, noise, steps)

  return jax.vmap(one)(seeds)


@functools.partial(jax.jit, static_argnames="size")
def _observe(states: tasks.State, size: int) -> tuple[Array, Array]:
  return jax.vmap(lambda state: physics.observe(state, size))(states)


def _compile_rendering(states: tasks.State, size: int) -> None:
  """Compiles `_observe` for the frames of such states, shapes [n, t, …]."""
  jax.block_until_ready(_observe(jax.tree.map(lambda x: np.zeros((_FRAMES, *x.shape[2:]), x.dtype), states), size))


def _frames(states: tasks.State, lengths: Int[np.ndarray, " n"], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Views u8[2 size size 3] and proprioception f32[8] of the first `lengths` states of each episode, one after another.

  Rendered _FRAMES at a time, whichever episodes they are of.

  Args:
    states: State with leading axes [n, t].
    lengths: of each of the n episodes.
    size: pixels.
  """
  episodes = np.repeat(np.arange(len(lengths)), lengths)
  steps = np.concatenate([np.arange(length) for length in lengths])
  for begin in range(0, len(steps), _FRAMES):
    index = np.minimum(np.arange(begin, begin + _FRAMES), len(steps) - 1)  # one compiled size; the rest is cut off
    views, proprio = _observe(jax.tree.map(lambda x: x[episodes[index], steps[index]], states), size)  # noqa: B023
    yield from zip(np.asarray(views)[: len(steps) - begin], np.asarray(proprio))


def _episode(
  options: Options, seed: int, rollout: expert.Rollout, frames: Sequence[tuple[np.ndarray, np.ndarray]]
) -> writer.Episode:
  """One episode; its last action is the one that succeeds. `frames`: see `_frames`, one an action."""
  views, states = (np.stack(column) for column in zip(*frames))
  actions = rollout.actions if options.label == "intended" else rollout.executed
  return writer.Episode(
    image=np.ascontiguousarray(views[:, 0]),
    wrist_image=np.ascontiguousarray(views[:, 1]),
    state=states.astype(np.float32),
    action=actions[: len(frames)].astype(np.float32),
    instruction=probes.SENTENCES[int(rollout.states.instruction[0])],
    file_path=f"tabletop/{options.suite}/{options.split}/{seed}",
  )


def _check(options: Options, name: str) -> None:
  probes.base(options.suite)
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
