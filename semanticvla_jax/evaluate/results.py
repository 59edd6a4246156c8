"""Success rates and their intervals: summaries of episodes, as JSON values and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import grounding
from semanticvla_jax.evaluate.rollout import Episodes


class Row(NamedTuple):
  """One measured success rate.

  Attributes:
    name: what was measured, e.g. "this policy", "before", "keeps random patches".
    kind: "policy", "baseline" or "control".
    suite: name of the suite.
    summary: of `summary`.
    fingerprint: of `fingerprint.of`.
    episodes: all of its episodes.
  """

  name: str
  kind: str
  suite: str
  summary: dict
  fingerprint: dict
  episodes: Episodes


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
  """The Wilson score interval of a success rate, both ends in [0, 1]; (0, 1) for no episodes.

  Raises:
    ValueError: more successes than episodes, or negative numbers.
  """
  if not 0 <= successes <= episodes:
    raise refuse("Wilson interval", f"{successes} of {episodes}", f"0 to {episodes}", "count again")
  if episodes == 0:
    return 0.0, 1.0
  from scipy import stats  # takes seconds to import, and --help need not wait for it

  interval = stats.binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
  return float(interval.low), float(interval.high)


def percent(successes: int, episodes: int, decimals: int = 1) -> str:
  """A success rate as text, "79.2 %": "100 %" only where all succeeded, "0 %" only where none did, "–" of no episodes.

  Args:
    successes, episodes: what is counted; the caller prints what was left out of the count.
    decimals: fewest of a rate between 0 and 100; there are more where it would be rounded to one of these.

  Raises:
    ValueError: more successes than episodes, or negative numbers.
  """
  if not 0 <= successes <= episodes:
    raise refuse("Success rate", f"{successes} of {episodes}", f"0 to {episodes}", "count again")
  if episodes == 0:
    return "–"
  if successes in (0, episodes):
    return "100 %" if successes else "0 %"
  return f"{_rounded(100 * successes / episodes, decimals, most=6)} %"


def interval_text(interval: Sequence[float], decimals: int = 0) -> str:
  """The ends of an interval as text, "30–95 %"; as in `percent`, neither becomes 0 or 100 by rounding alone."""
  low, high = (_rounded(100 * end, decimals, most=2) for end in interval)
  return f"{low}–{high} %"


def _rounded(value: float, decimals: int, most: int) -> str:
  """A number in [0, 100] with some decimals, more of them (at most `most`) where it would be rounded to an end."""
  while float(text := f"{value:.{decimals}f}") in (0, 100) and 0 < value < 100 and decimals < most:
    decimals += 1
  return text


def summary(episodes: Episodes, group: Callable[[str], str] | None = None) -> dict:
  """Successes, episodes, errors, rate, Wilson interval and mean steps to success, as JSON values.

  Episodes that broke (`errors`) are in no other number. Those that failed by an action that is not finite count as
  failures and are reported separately. Of no episodes at all there is no rate (None).

  Args:
    episodes: the result.
    group: a function of an instruction; adds the same numbers by its values, under "tasks".
  """
  done = [int(steps) for steps, success in zip(episodes.steps, episodes.success) if success]
  n = episodes.valid
  found = {
    "successes": episodes.successes,
    "episodes": n,
    "errors": episodes.broken,
    "nonfinite": episodes.spoilt,
    "rate": episodes.successes / n if n else None,
    "interval": [*wilson(episodes.successes, n)],
    "mean_steps_to_success": sum(done) / len(done) if done else None,
  }
  if group is not None:
    names = [group(sentence) for sentence in episodes.instruction]
    members = {name: [i for i, other in enumerate(names) if other == name] for name in sorted(set(names))}
    bare = episodes._replace(grounding=None)
    found["tasks"] = {name: summary(select(bare, index)) for name, index in members.items()}
  if episodes.grounding is not None:
    found["grounding"] = grounding.summary(episodes.grounding)
  return found


def count_text(summary: Mapping) -> str:
  """A summary's count and what is reported with it: "38/38, 10 broke, 2 by a non-finite action"."""
  errors, spoilt = summary.get("errors", 0), summary.get("nonfinite", 0)
  broke = f", {errors} broke" if errors else ""
  failed = f", {spoilt} failed by a non-finite action" if spoilt else ""
  return f"{summary['successes']}/{summary['episodes']}{broke}{failed}"


def rate_text(summary: Mapping) -> str:
  """A summary's rate as a line ends with it: "38/48, 2 broke  79.2 %  (65–88 %)", or that there is none."""
  part = f"  {shard_text(summary)}" if "shard" in summary else ""
  if not summary["episodes"]:
    return f"no rate: all {summary.get('errors', 0)} episodes broke{part}"
  percentage = percent(summary["successes"], summary["episodes"])
  return f"{count_text(summary)}  {percentage}  ({interval_text(summary['interval'])}){part}"


def shard_text(summary: Mapping) -> str:
  """What share of an evaluation the summary of a shard is: "shard 3/16 of 500 episodes"."""
  return f"shard {summary['shard']} of {summary['of_episodes']} episodes"


def select(episodes: Episodes, index: Sequence[int]) -> Episodes:
  """Some of the episodes, without their states."""
  names = ("seeds", "success", "steps", "error", "nonfinite", "retries", "seconds")
  arrays = {name: None if (x := getattr(episodes, name)) is None else x[list(index)] for name in names}
  lists = ("instruction", "told", "grounding")
  said = {name: None if (x := getattr(episodes, name)) is None else [x[i] for i in index] for name in lists}
  return Episodes(**arrays, **said)


def per_episode(episodes: Episodes) -> list[dict]:
  """A dict for each episode, as JSON values; `episodes_of` reads them."""
  spoilt = np.zeros(len(episodes.seeds), bool) if episodes.nonfinite is None else episodes.nonfinite
  rows = [
    dict(
      seed=int(seed),
      success=bool(success),
      steps=int(steps),
      error=bool(error),
      nonfinite=bool(bad),
      asked=asked,
      told=told,
    )
    for seed, success, steps, error, asked, told, bad in zip(*episodes[:6], spoilt)
  ]
  if episodes.retries is not None:
    times = zip(episodes.retries.tolist(), episodes.seconds.tolist())
    rows = [row | dict(retries=retries, seconds=seconds) for row, (retries, seconds) in zip(rows, times)]
  if episodes.grounding is not None:
    rows = [row | ({} if one is None else {"grounding": one}) for row, one in zip(rows, episodes.grounding)]
  return rows


def episodes_of(rows: Sequence[Mapping]) -> Episodes:
  """What `per_episode` gave, without states; what an earlier version wrote lacks `nonfinite`.

  Raises:
    KeyError, TypeError, ValueError: they are something else.
  """
  column = lambda name, kind: np.array([kind(row[name]) for row in rows], kind)  # noqa: E731
  timed = all("retries" in row for row in rows) and bool(rows)
  return Episodes(
    column("seed", np.int64),
    column("success", bool),
    column("steps", np.int32),
    column("error", bool),
    [str(row["asked"]) for row in rows],
    [str(row["told"]) for row in rows],
    retries=column("retries", np.int64) if timed else None,
    seconds=column("seconds", np.float64) if timed else None,
    nonfinite=np.array([bool(row.get("nonfinite", False)) for row in rows], bool),
    grounding=[row.get("grounding") for row in rows] if any("grounding" in row for row in rows) else None,
  )


def to_json(rows: Sequence[Row], command: str, seconds: Mapping[str, float]) -> dict:
  """What results.json holds."""
  return {
    "command": command,
    "seconds": {name: round(value, 1) for name, value in seconds.items()},
    "results": [
      {
        "name": row.name,
        "kind": row.kind,
        "suite": row.suite,
        **row.summary,
        "fingerprint": row.fingerprint,
        "per_episode": per_episode(row.episodes),
      }
      for row in rows
    ],
  }
