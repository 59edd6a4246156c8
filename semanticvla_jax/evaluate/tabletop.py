"""The tabletop's adapter: its suites and flags, its layouts by seed, and its episodes on the device or on the host."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from semanticvla_jax.data import datasets
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import (
  controls,
  fingerprint,
  folder,
  report,
  served,
  tabletop_films,
  tabletop_grounding,
)
from semanticvla_jax.evaluate.evaluation import Benchmark, Evaluation, Job, SuiteRun, check_minimum
from semanticvla_jax.evaluate.rollout import Episodes, OnDevice, OnHost, check_robot
from semanticvla_jax.evaluate.served import ServedPolicy
from semanticvla_jax.evaluate.visualize import Tile, check_prunes
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import physics, probes, tasks

_COLORS = re.compile(rf" ?\b({'|'.join((*tasks.COLORS, 'white'))})\b")


def task(instruction: str) -> str:
  """The instruction without its colors: "pick up the red cube" → "pick up the cube"."""
  return _COLORS.sub("", instruction)


def instructions(suite: str, split: str, seeds: Sequence[int]) -> list[str]:
  """The instructions of episodes, by their seeds, without running them."""
  found = jax.vmap(lambda seed: probes.reset(tasks.seed_key(seed, split), suite, split).instruction)
  return [probes.SENTENCES[i] for i in np.asarray(jax.jit(found)(np.array(seeds, np.int32)))]


class TabletopRun(SuiteRun):
  """One policy on one suite of the tabletop.

  Args:
    args: of the command line.
    policy: that is measured, a Policy or a ServedPolicy.
    suite: of the tabletop.
    stored: rows of earlier commands.
    baseline: whether the policy is the one before fine-tuning.

  Raises:
    ValueError: a seed is outside the split, or the policy does not fit.
  """

  def __init__(
    self, args: argparse.Namespace, policy: Any, suite: str, stored: folder.ResultsFile, baseline: bool = False
  ):
    name, kind = ("before", "baseline") if baseline else ("this policy", "policy")
    self._args, seeds = args, range(args.seed, args.seed + args.episodes)
    tasks.check_seeds(seeds, args.split)
    super().__init__(policy, suite, seeds, stored, name, kind, args.shard)
    self._own = self._make(policy)
    self._again: Episodes | None = None  # episodes that were run again for their states

  def runner(self, policy: Any) -> OnDevice | OnHost:
    """See `SuiteRun`."""
    return self._own if policy is self.policy else self._make(policy)

  def _make(self, policy: Any) -> OnDevice | OnHost:
    args, replan_steps = self._args, self._args.replan_steps
    if not args.host:
      # Equal batches; a shard's are those of the whole, so that it runs the same program.
      batch = -(-args.episodes // -(-args.episodes // args.batch))
      return OnDevice(policy, self.suite, args.split, replan_steps=replan_steps, batch=batch, keep_states=True)
    check_robot(policy, policy.replan_steps if replan_steps is None else replan_steps)
    environment = physics.TabletopEnvironment(self.suite, args.split, policy.image_size)
    ask = lambda seed: instructions(self.suite, args.split, [seed])[0]  # noqa: E731
    return OnHost(policy, environment, replan_steps=replan_steps, instruction=ask)

  def run(self, policy: Any, row: str, told: Sequence[str] | None = None) -> Episodes:
    """See `SuiteRun`; with --grounding also where the kept patches lay, for episodes of which that is not known."""
    episodes = super().run(policy, row, told)
    if not self._args.grounding:
      return episodes
    found = episodes.grounding or [None] * len(episodes.seeds)
    if unknown := [i for i, one in enumerate(found) if one is None]:
      some = episodes
      if some.states is None:
        some = self.runner(policy).run(episodes.seeds[unknown], told and [episodes.told[i] for i in unknown])
      new = tabletop_grounding.measure(policy, self.suite, self._args.split, some, self._own.replan_steps)
      found = [new[unknown.index(i)] if one is None else one for i, one in enumerate(found)]
    return episodes._replace(grounding=found)

  def grounding_picture(self, episodes: Episodes) -> list[Tile]:
    """See `SuiteRun`: of the first episode that a film shows."""
    some = self._with_states(episodes, 1)
    index = tabletop_films.choose(some.success, 1)[0]
    return tabletop_grounding.picture(self.policy, self.suite, self._args.split, some, index)

  def facts(self) -> dict:
    """See `SuiteRun`."""
    return {
      "environment": "tabletop",
      "suite": self.suite,
      "split": self._args.split,
      "max_steps": self._own.max_steps,
      "replan_steps": self._own.replan_steps,
      "loop": "host" if self._args.host else "device",
      **(self.policy.facts if isinstance(self.policy, ServedPolicy) else {}),
    }

  def asked(self) -> list[str]:
    """See `SuiteRun`."""
    return instructions(self.suite, self._args.split, self.whole)

  def task(self, instruction: str) -> str:
    """See `SuiteRun`."""
    return task(instruction)

  def films(self, episodes: Episodes, count: int) -> list[report.Film]:
    """See `SuiteRun`."""
    return tabletop_films.films(self._with_states(episodes, count), count, self.stored.out, self.suite)

  def scenes(self, episodes: Episodes, count: int) -> list[report.Scene]:
    """See `SuiteRun`."""
    return tabletop_films.scenes(self.policy, self._with_states(episodes, count), self.stored.out, self.suite)

  def _with_states(self, episodes: Episodes, count: int) -> Episodes:
    """The episodes if their states are known; if they were read from disk, those that are shown, run again."""
    if episodes.states is not None:
      return episodes
    if self._again is None:
      self._again = self._own.run(episodes.seeds[sorted(tabletop_films.choose(episodes.success, count))])
    return self._again


class Tabletop(Benchmark):
  """The tabletop, for the command."""

  title, suites, knows_objects = "the tabletop", probes.SUITES, True

  def task(self, instruction: str) -> str:
    """See `Benchmark`."""
    return task(instruction)

  def add_flags(self, add: Callable[..., None]) -> None:
    """See `Benchmark`."""
    add("--split", default="heldout", help=f"split of the layouts: {', '.join(tasks.SPLITS)} (default: heldout)")
    add("--episodes", type=int, default=100, help="number of episodes per suite (default: 100)")
    add("--seed", type=int, default=0, help="seed of the first episode (default: 0)")
    add("--batch", type=int, default=64, help="number of episodes that run together on the device (default: 64)")
    add("--baseline", help="policy folder from before fine-tuning, to measure on the same episodes (default: none)")
    add("--host", action="store_true", help="run episodes one at a time on the host instead of the device, no films")

  def check(self, args: argparse.Namespace) -> None:
    """See `Benchmark`."""
    if args.policy is None:
      raise refuse("--policy", "none", "a policy folder", "add --policy=DIR")
    check_minimum(args, {"episodes": 1, "batch": 1})
    tasks.check_split(args.split)
    if served.is_url(args.policy):
      served.check_flags(args)
      args.host = True  # only the policy is elsewhere
    if args.grounding and args.host:
      got = "a policy behind a server" if served.is_url(args.policy) else "--host, which keeps no states"
      raise refuse("--grounding", got, "a policy folder on the device", "leave one of the two out")

  def jobs(self, args: argparse.Namespace, stored: folder.ResultsFile) -> Iterator[Job]:
    """See `Benchmark`; all suites are checked before the first is measured."""
    timed = stored.seconds.timed
    sizes = (1,) if args.host else ()
    options = dict(dataset=args.dataset, dtype=args.dtype, weights=args.weights, batch_sizes=sizes)
    policy = timed("load", lambda: self._load(args.policy, options))
    before = timed("load", lambda: Policy.load(args.baseline, **options)) if args.baseline else None
    for one in filter(None, (policy, before)):
      if args.grounding:
        check_prunes(one.bare)
      _check_units(one, args.dataset)
    found = [self._job(args, policy, before, suite, stored) for suite in args.suite]
    applying = controls.of_policy(policy, args.controls)
    if skipped := [name for name in args.controls if name not in applying]:
      logging.warning("Controls skipped, because they change nothing in this policy: %s", ", ".join(skipped))
    marks = {key: mark for job in found for key, mark in job.own.fingerprints(args.controls).items()}
    for job in found:
      marks |= {} if job.baseline is None else job.baseline.fingerprints([])
    stored.check(marks, found[0].own.run.seeds)
    yield from found

  @staticmethod
  def _load(policy: str, options: dict) -> Policy | ServedPolicy:
    return ServedPolicy(policy) if served.is_url(policy) else Policy.load(policy, **options)

  @staticmethod
  def _job(args: argparse.Namespace, policy: Any, before: Policy | None, suite: str, stored: folder.ResultsFile) -> Job:
    own, baseline = TabletopRun(args, policy, suite, stored), None
    if before is not None:
      baseline = TabletopRun(args, before, suite, stored, baseline=True)
      _check_alike(own.fingerprint(), baseline.fingerprint())
    if "shuffled" in args.controls:
      controls.shuffle(own.asked())
    return Job(Evaluation(own, stored), None if baseline is None else Evaluation(baseline, stored))

  def films(self, args: argparse.Namespace) -> int:
    """See `Benchmark`."""
    return 0 if args.host else args.films


def _check_units(policy: Policy | ServedPolicy, chosen: str | None) -> None:
  """Raises ValueError for statistics of another robot's data, unless they were chosen."""
  dataset = policy.metadata.get("dataset") or ""
  if chosen is None and dataset.startswith(tuple(name for name in datasets.SPECS if name != "tabletop")):
    raise refuse(
      "Policy has no statistics of the tabletop",
      f"those of {dataset}",
      "those of its data, because actions of other data are in other units",
      "evaluate the suite that it was trained on, or choose with --dataset",
    )


def _check_alike(own: dict, before: dict) -> None:
  """Raises ValueError if two policies would be measured differently; reports how the policies themselves differ."""
  fingerprint.require_alike(own, before, but=fingerprint.OWN)
  # Fine-tuning gives the statistics the name of its own data.
  expected = (*fingerprint.COMPARED, *fingerprint.NOTED, "policy.dataset")
  if lines := fingerprint.unlike(own, before, expected):
    logging.warning("This policy and the baseline differ in their own settings: %s", "; ".join(lines))
