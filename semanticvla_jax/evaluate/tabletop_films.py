"""Films and pictures of tabletop episodes, rendered from their states after they were measured."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from semanticvla_jax.evaluate import attention, folder, report, visualize
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.policy import Policy


def choose(success: np.ndarray, count: int) -> list[int]:
  """The first episodes of either outcome, `count` in all, successes first; half failures if there are as many."""
  good, bad = np.flatnonzero(success).tolist(), np.flatnonzero(~success).tolist()
  failures = min(len(bad), max(count // 2, count - len(good)))
  return good[: count - failures] + bad[:failures]


def films(result: Episodes, count: int, out: pathlib.Path, suite: str) -> list[report.Film]:
  """Films of the first episodes, half of them failures if there are as many; up to the first that cannot be made."""
  found = []
  folder.afterwards("films", lambda: [found.append(film) for film in _films(result, count, out, suite)], None)
  return found


def _films(result: Episodes, count: int, out: pathlib.Path, suite: str) -> Iterator[report.Film]:
  for i in choose(result.success, count):
    steps, success = int(result.steps[i]), bool(result.success[i])
    states = jax.tree.map(lambda x: x[: steps + 1, i], result.states)  # noqa: B023
    frames = visualize.film(visualize.pictures(states, visualize.SIZE), result.told[i], success, result.instruction[i])
    path = out / f"{suite}_{result.seeds[i]}_{'done' if success else 'not_done'}.mp4"
    folder.write_film(path, frames)
    yield report.Film(path, result.told[i], success, steps, int(result.seeds[i]))


def scenes(policy: Policy, result: Episodes, out: pathlib.Path, suite: str) -> list[report.Scene]:
  """What the policy looks at in one episode, at its first and a middle step, under its own and another instruction.

  Also writes each as a picture, `<suite>_looks_<moment>.png`.
  """
  index = choose(result.success, 1)[0]
  told = result.told[index]
  other = next((sentence for sentence in result.instruction if sentence != told), told)
  steps = [0, int(result.steps[index]) // 2]
  states = jax.tree.map(lambda x: x[steps, index], result.states)
  views = visualize.pictures(states, visualize.SIZE)[:, : policy.bare.num_views]
  seen = [visualize.observation(jax.tree.map(lambda x: x[i], states), policy.image_size) for i in (0, 1)]  # noqa: B023
  looks = visualize.looks(policy, [{**one, "prompt": sentence} for one in seen for sentence in (told, other)])
  found = []
  for i, moment in enumerate(("first step", "half way")):
    name, path = f"episode {result.seeds[index]} of {suite}, {moment}", attention.path(out, suite, moment)
    found.append(attention.scene(name, views[i], (told, other), looks[2 * i : 2 * i + 2], path))
  return found
