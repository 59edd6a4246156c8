"""Whether the recorded actions of the scripted expert's datasets do their tasks again, each in its own layout."""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from semanticvla_jax import cli
from semanticvla_jax.data import rlds
from semanticvla_jax.errors import refuse
from semanticvla_jax.libero import demonstrator, simulator, suites


class Recorded(NamedTuple):
  """An episode of a dataset: which attempt at which task it was, and its actions."""

  task: int
  attempt: int
  actions: Float[np.ndarray, "t 7"]


class Dataset(NamedTuple):
  """A dataset of the expert, as `expert_demonstrations.write` leaves it.

  Attributes:
    settings: of the simulator that it was recorded in; `assets` is None.
    variety: see demonstrator.Variety.
    episodes: in the order in which they were written.
    made_with: versions by package, and the hash of the assets.
  """

  settings: suites.Settings
  variety: demonstrator.Variety
  episodes: list[Recorded]
  made_with: dict[str, str]


def read(folder: str | pathlib.Path) -> Dataset:
  """The dataset in `<data dir>/<name>`. Raises ValueError for one that is not the expert's, or is not whole."""
  folder = pathlib.Path(folder)
  path = folder / "1.0.0" / "demonstrations.json"
  try:
    facts = json.loads(path.read_text(encoding="utf-8"))
    simulated, variety = dict(facts["simulator"]), demonstrator.Variety(**facts["variety"])
    made_with = facts["versions"] | {"assets": simulated.pop("assets")}
    settings = suites.Settings(**simulated)
    numbers = {task.name: number for number, task in enumerate(suites.tasks(settings.suite))}
    kept = [(numbers[name], attempt) for name, of in facts["tasks"].items() for attempt in of["kept_attempts"]]
  except (OSError, ValueError, KeyError, TypeError) as error:
    remedy = "name a dataset of `demonstrate libero --expert`"
    raise refuse(str(path), cli.first_line(error), "what the expert's dataset was made with", remedy) from error
  index = rlds.load(str(folder.parent), folder.name).index
  if len(kept) != len(index.lengths):
    raise refuse(str(folder), f"{len(index.lengths)} episodes", f"the {len(kept)} of {path.name}", "write it anew")
  parts = np.split(index.columns["action"], np.cumsum(index.lengths)[:-1])
  return Dataset(settings, variety, [Recorded(*one, part) for one, part in zip(kept, parts, strict=True)], made_with)


def replay(
  dataset: Dataset,
  settings: suites.Settings,
  workers: int = 2,
  progress: Callable[[int, int, int], None] | None = None,
) -> dict[str, tuple[int, int]]:
  """Does every episode again, without rendering: by task name, how many succeed, and of how many.

  Args:
    dataset: see `read`.
    settings: the dataset's, with the assets and the renderer of this machine.
    workers: simulators at once, one task each.
    progress: called with (episodes done, successes, episodes).

  Raises:
    ValueError: packages or assets are missing.
    BrokenEnvironment: a simulator broke.
  """
  waiting, done = queue.SimpleQueue(), collections.deque()
  by_task = {task: [one for one in dataset.episodes if one.task == task] for task, *_ in dataset.episodes}
  for task in by_task:
    waiting.put(task)

  def work() -> None:
    process = simulator.start(settings, make=functools.partial(demonstrator.Demonstrator, variety=dataset.variety))
    try:
      while True:
        for one in by_task[waiting.get_nowait()]:
          done.append((one.task, process.ask("replay", *one)))
          if progress is not None:
            progress(len(done), sum(good for _, good in [*done]), len(dataset.episodes))
    except queue.Empty:
      return
    finally:
      process.close()

  with ThreadPoolExecutor(workers) as pool:
    for one in [pool.submit(work) for _ in range(min(workers, len(by_task)))]:
      one.result()
  names = [task.name for task in suites.tasks(settings.suite)]
  ends = {task: [good for number, good in done if number == task] for task in by_task}
  return {names[task]: (sum(of), len(of)) for task, of in ends.items()}
