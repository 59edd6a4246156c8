"""One evaluation, for every benchmark: a policy on a suite, its controls, and the rows that they give.

A benchmark adds an adapter with two classes: a `Benchmark`, which names its suites and adds its own flags, and a
`SuiteRun`, which runs the episodes of one suite with one policy. `evaluate/benchmarks.py` lists the adapters, and
examples/evaluate_my_environment.py shows one.
"""

from __future__ import annotations

import abc
import argparse
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from semanticvla_jax.envs.subprocess_env import BrokenEnvironment
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import controls, fingerprint, folder, progress, report, results
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.evaluate.shards import Shard
from semanticvla_jax.evaluate.visualize import Tile


class SuiteRun(abc.ABC):
  """One policy on one suite: which episodes there are, how they are run, and what their results depend on.

  Episodes that an earlier command finished are taken from results.json. An adapter whose simulators keep them elsewhere
  replaces `run`, `claim` and `told_before`.

  Args:
    policy: that is measured.
    suite: its name.
    seeds: numbers of the episodes.
    stored: rows of this and earlier commands.
    name, kind: of the policy's own row: ("this policy", "policy") or ("before", "baseline").
    shard: which share of the episodes is run; None for all.

  Attributes:
    whole: numbers of all episodes of the evaluation; `seeds` are those that are run.
  """

  def __init__(
    self,
    policy: Any,
    suite: str,
    seeds: Sequence[int],
    stored: folder.ResultsFile,
    name: str = "this policy",
    kind: str = "policy",
    shard: Shard | None = None,
  ):
    self.policy, self.suite, self.stored, self.name, self.kind = policy, suite, stored, name, kind
    self.whole, self.shard = seeds, shard
    self.seeds = seeds if shard is None else shard.share(seeds, self.tasks())

  @abc.abstractmethod
  def runner(self, policy: Any) -> Any:
    """What runs episodes with a policy: an OnDevice, OnHost or OnSimulators."""

  @abc.abstractmethod
  def facts(self) -> dict:
    """What the results depend on besides policy and seeds; keyword arguments of `fingerprint.of`."""

  def run(self, policy: Any, row: str, told: Sequence[str] | None = None) -> Episodes:
    """Runs all episodes with a policy, except those that an earlier command finished.

    Args:
      policy: the run's own, or a changed copy of it.
      row: "policy", or the name of a control.
      told: an instruction for each episode, instead of the task's.

    Raises:
      BrokenEnvironment: the simulator does not work at all.
    """
    runner, name = self.runner(policy), self.key(row)[2]
    resumed = folder.Resumed(runner, self.stored.before(self.key(row)), f"{self.suite}, {name}")
    return resumed.run(self.seeds, told, progress.one_line(name, len(self.seeds), lambda: runner.broken))

  def asked(self) -> list[str] | None:
    """The instruction of each of `whole`, known before the episodes are run; None where it is not."""
    return None

  def tasks(self) -> list | None:
    """The task of each of `whole`, its name or number, over which shards are balanced; None for one task."""
    asked = self.asked()
    return None if asked is None else [self.task(instruction) for instruction in asked]

  def fingerprint(self, **changes: Any) -> dict:
    """The fingerprint of this run, or of one of its controls: `told` and `model_changes` of `fingerprint.of`.

    A shard has that of the whole evaluation.
    """
    return fingerprint.of(self.policy, self.whole, **self.facts(), **changes)

  def claim(self, row: str, mark: Mapping) -> dict:
    """The fingerprint of a row together with that of the episodes which an earlier command finished.

    Raises:
      ValueError: those were measured differently.
    """
    found = self.stored.found.get(self.key(row))
    return {**mark} if found is None else folder.merged(found.fingerprint, mark, self.stored.out)

  def told_before(self) -> dict[int, str]:
    """{seed: instruction} of the episodes that an earlier command finished under the shuffled control."""
    before = self.stored.before(self.key("shuffled"))
    rows = [] if before is None else zip(before.seeds.tolist(), before.told, before.error)
    return {seed: told for seed, told, error in rows if not error}

  def key(self, row: str) -> folder.Key:
    """How a row is known in results.json: suite, kind and name."""
    kind, name = (self.kind, self.name) if row == "policy" else ("control", controls.NAMES[row])
    return self.suite, kind, name

  def task(self, instruction: str) -> str:
    """The name under which an instruction is summarized."""
    return instruction

  def finished(self) -> Episodes | None:
    """The policy's own episodes that are on disk, for when the environment breaks; None if there are none."""
    return None

  def films(self, episodes: Episodes, count: int) -> list[report.Film]:
    """Films of at most `count` of the policy's own episodes; as many as can be made."""
    return []

  def scenes(self, episodes: Episodes, count: int) -> list[report.Scene]:
    """Pictures of what the policy looked at in one of the episodes of those films."""
    return []

  def grounding_picture(self, episodes: Episodes) -> list[Tile]:
    """One of the policy's own episodes with the kept patches and the named objects' outlines, a tile a view."""
    return []

  def close(self) -> None:  # noqa: B027, most have nothing to end
    """Ends what runs the episodes."""


class Evaluation:
  """A policy's own row on a suite, and those of its controls.

  Args:
    run: the policy on the suite.
    stored: where the rows go.
  """

  def __init__(self, run: SuiteRun, stored: folder.ResultsFile):
    self.run, self._stored = run, stored

  def fingerprints(self, names: Sequence[str]) -> dict[folder.Key, dict]:
    """The fingerprint of each row: the policy's own, and those of the named controls that apply to it."""
    found = {self.run.key("policy"): self.run.fingerprint()}
    return found | {self.run.key(name): self._control(name, changes) for name, changes in self._applying(names)}

  def measure(self) -> results.Row:
    """Measures the policy itself and stores its row.

    Raises:
      ValueError: the folder holds episodes that were measured differently.
      BrokenEnvironment: all of the first episodes broke; they are stored as a row all the same.
    """
    mark = self.run.claim("policy", self.run.fingerprint())
    try:
      episodes = self.run.run(self.run.policy, "policy")
    except BrokenEnvironment:
      if (some := self.run.finished()) is not None:
        self._add("policy", mark, some)
      raise
    return self._add("policy", mark, episodes)

  def measure_controls(self, own: Episodes, names: Sequence[str]) -> None:
    """Measures the policy with one thing taken away at a time, and stores each row when it is measured.

    Args:
      own: the policy's own episodes.
      names: of `controls.NAMES`; those that change nothing in this policy are skipped.
    """
    policy, before, told = self.run.policy, self.run.told_before(), None
    if self.run.shard is not None and "shuffled" in names:
      told = dict(zip(self.run.whole, controls.shuffle(self._asked())))
    for name, episodes, changes in controls.each(policy, self.run.run, own, names, before=before, told=told):
      self._add(name, self.run.claim(name, self._control(name, changes)), episodes)

  def _asked(self) -> list[str]:
    if (asked := self.run.asked()) is None:
      raise refuse(
        "--shard with shuffled instructions",
        f"{self.run.suite}, whose instructions are not known before an episode",
        "a suite whose instructions are known",
        "leave out --controls=shuffled or --shard",
      )
    return asked

  def _applying(self, names: Sequence[str]) -> list[tuple[str, dict]]:
    return [*controls.of_policy(self.run.policy, names).items()] if names else []

  def _control(self, name: str, changes: Mapping) -> dict:
    told = {"told": fingerprint.ANOTHER_INSTRUCTION} if name == "shuffled" else {}
    return self.run.fingerprint(model_changes={**changes}, **told)

  def _add(self, row: str, mark: Mapping, episodes: Episodes) -> results.Row:
    suite, kind, name = self.run.key(row)
    summary = results.summary(episodes, self.run.task)
    summary |= {} if self.run.shard is None else {"shard": str(self.run.shard), "of_episodes": len(self.run.whole)}
    return self._stored.add(results.Row(name, kind, suite, summary, {**mark}, episodes))


class Job(NamedTuple):
  """What is measured on one suite: the policy, and what it was fine-tuned from (None: not asked for)."""

  own: Evaluation
  baseline: Evaluation | None = None


class Benchmark(abc.ABC):
  """A benchmark as the command sees it; an adapter has one subclass of it.

  Attributes:
    title: its name in messages and in the help.
    suites: names of its suites.
    bare_controls: controls that `--controls` without a value measures.
    damaged: what happens to rows of a results.json that cannot be read, for the warning.
    film_note: how fast its films run.
    knows_objects: whether it knows where the objects are that a task names, for `--grounding`.
  """

  title: str
  suites: tuple[str, ...]
  bare_controls: tuple[str, ...] = tuple(controls.NAMES)
  damaged: str = "all is measured again"
  film_note: str = "at half speed"
  knows_objects: bool = False

  def task(self, instruction: str) -> str:
    """The name under which an instruction is summarized."""
    return instruction

  def add_flags(self, add: Callable[..., None]) -> None:  # noqa: B027, there may be none
    """Adds the benchmark's own flags; `add` is called like argparse's add_argument."""

  def expand(self, args: argparse.Namespace) -> list[str]:
    """The suites of `args.suite`, a name that selects several replaced by those.

    Raises:
      ValueError: it is unknown which.
    """
    return args.suite

  def check(self, args: argparse.Namespace) -> None:  # noqa: B027, there may be nothing to check
    """Checks what can be known before anything is loaded or written; `args.suite` is a list of its suites.

    Raises:
      ValueError: something does not exist, does not fit, or cannot be measured.
    """

  @abc.abstractmethod
  def jobs(self, args: argparse.Namespace, stored: folder.ResultsFile) -> Iterator[Job]:
    """Loads the policies and yields what is measured, suite by suite.

    Raises:
      ValueError: the policy does not fit, or the folder holds something else.
    """

  def more(self, out: pathlib.Path) -> dict:
    """What results.json holds in addition to the rows."""
    return {}

  def sections(self, rows: Sequence[results.Row]) -> list[str]:
    """Sections of the report that only this benchmark has, as HTML, from all measured rows."""
    return []

  def films(self, args: argparse.Namespace) -> int:
    """How many films per suite are made."""
    return args.films

  def merge(self, shards: Sequence[pathlib.Path], out: pathlib.Path) -> None:  # noqa: B027, there may be none
    """Puts together what the benchmark keeps in a folder besides results.json, films and pictures."""


def check_minimum(args: argparse.Namespace, least: Mapping[str, int]) -> None:
  """Raises ValueError for a flag with a smaller number than it may have: {name: smallest}; flags not given pass."""
  for name, smallest in least.items():
    if (value := getattr(args, name)) is not None and value < smallest:
      raise refuse(f"--{name.replace('_', '-')}", f"{value}", f"at least {smallest}", "raise it")
