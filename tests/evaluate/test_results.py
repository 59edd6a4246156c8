"""Intervals, fingerprints and summaries."""

import functools
import json
import types

import numpy as np
import policies
import pytest

from semanticvla_jax.evaluate import fingerprint, results
from semanticvla_jax.evaluate.rollout import Episodes


def episodes(success, error=None) -> Episodes:
  n = len(success)
  error = np.zeros(n, bool) if error is None else np.array(error, bool)
  said = [f"pick up the {('red', 'blue')[i % 2]} {('cube', 'ball')[i % 2]}" for i in range(n)]
  return Episodes(np.arange(n), np.array(success, bool), np.arange(n, dtype=np.int32) + 10, error, said, said)


@pytest.mark.parametrize(
  "successes, n, low, high",
  [
    (93, 100, 0.8625, 0.9657),
    (0, 10, 0.0, 0.2775),
    (10, 10, 0.7225, 1.0),
    (50, 100, 0.4038, 0.5962),
    (0, 0, 0, 1),
  ],
)
def test_wilson(successes, n, low, high):
  np.testing.assert_allclose(results.wilson(successes, n), (low, high), atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 16, 50, 128, 512])
def test_wilson_is_the_closed_form(n):
  """Wilson 1927: results.json files hold ends that were computed by it; they agree to the last digit or two."""
  k, z = np.arange(n + 1), 1.959963984540054
  middle, half = (k / n + z * z / n / 2), z * np.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
  ends = np.stack([middle - half, middle + half], axis=1) / (1 + z * z / n)
  np.testing.assert_allclose([results.wilson(int(one), n) for one in k], ends, rtol=1e-14, atol=3e-16)


def test_wilson_narrows_with_confidence_and_refuses_nonsense():
  wide, narrow = results.wilson(5, 10, 0.99), results.wilson(5, 10, 0.8)
  assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
  with pytest.raises(ValueError, match="got 11 of 10"):
    results.wilson(11, 10)


@pytest.mark.parametrize(
  "successes, n, text, short",
  [
    (38, 48, "79.2 %", "79 %"),
    (3, 4, "75.0 %", "75 %"),
    (511, 512, "99.8 %", "99.8 %"),
    (1, 512, "0.2 %", "0.2 %"),
    (199, 200, "99.5 %", "99.5 %"),
    (99999, 100000, "99.999 %", "99.999 %"),
    (1, 10000, "0.01 %", "0.01 %"),
    (512, 512, "100 %", "100 %"),
    (1, 1, "100 %", "100 %"),
    (0, 7, "0 %", "0 %"),
    (0, 0, "–", "–"),
  ],
)
def test_a_rate_is_100_percent_only_where_all_succeeded_and_0_only_where_none_did(successes, n, text, short):
  assert results.percent(successes, n) == text and results.percent(successes, n, decimals=0) == short


def test_an_interval_reaches_0_and_100_only_where_it_does():
  assert results.interval_text((0.3006, 0.9544)) == "30–95 %"
  assert results.interval_text((0.0, 1.0)) == "0–100 %" and results.interval_text((0.5, 1.0), 1) == "50.0–100.0 %"
  assert results.interval_text((0.002, 0.9998)) == "0.2–99.98 %"
  with pytest.raises(ValueError, match="got 5 of 4"):
    results.percent(5, 4)


def test_a_summary_counts_errors_apart():
  found = results.summary(episodes([1, 0, 1, 1], [0, 0, 0, 0]), lambda sentence: sentence.split()[-1])
  assert (found["successes"], found["episodes"], found["errors"], found["rate"]) == (3, 4, 0, 0.75)
  assert found["mean_steps_to_success"] == pytest.approx((10 + 12 + 13) / 3)
  tasks = {name: (x["successes"], x["episodes"]) for name, x in found["tasks"].items()}
  assert tasks == {"cube": (2, 2), "ball": (1, 2)}
  broken = results.summary(episodes([1, 0, 0, 0], [0, 0, 1, 1]))
  assert (broken["successes"], broken["episodes"], broken["errors"], broken["rate"]) == (1, 2, 2, 0.5)
  assert results.summary(episodes([0, 0], [1, 1]))["rate"] is None


def test_failures_by_actions_that_are_not_finite_are_in_the_rate_and_told():
  one = episodes([1, 0, 0, 0, 1], [0, 0, 1, 0, 0])._replace(nonfinite=np.array([0, 1, 0, 0, 0], bool))
  found = results.summary(one, lambda sentence: sentence.split()[-1])
  assert (found["successes"], found["episodes"], found["errors"], found["nonfinite"]) == (2, 4, 1, 1)
  tasks = {name: (x["episodes"], x["errors"], x["nonfinite"]) for name, x in found["tasks"].items()}
  assert tasks == {"cube": (2, 1, 0), "ball": (2, 0, 1)}
  assert results.rate_text(found) == "2/4, 1 broke, 1 failed by a non-finite action  50.0 %  (15–85 %)"
  assert results.rate_text(results.summary(episodes([0, 0], [1, 1]))) == "no rate: all 2 episodes broke"
  assert "100 %" not in results.rate_text(results.summary(episodes([1] * 511 + [0])))


@pytest.mark.parametrize("timed", [False, True])
def test_episodes_as_json_values_and_back(timed):
  one = episodes([1, 0, 0], [0, 0, 1])._replace(nonfinite=np.array([0, 1, 0], bool))
  one = one._replace(retries=np.array([0, 1, 2]), seconds=np.array([1.5, 2.5, 3.5])) if timed else one
  rows = json.loads(json.dumps(results.per_episode(one)))
  assert [(x["seed"], x["success"], x["error"], x["nonfinite"]) for x in rows] == [
    (0, True, False, False),
    (1, False, False, True),
    (2, False, True, False),
  ]
  again = results.episodes_of(rows)
  assert results.per_episode(again) == rows and (again.retries is None) != timed
  chosen = results.select(one, [2, 1])
  assert results.per_episode(chosen) == [rows[2], rows[1]]


@functools.cache
def facts() -> dict:
  return policies.policy().metadata


def mark(**changes):
  policy = types.SimpleNamespace(metadata=facts() | {"policy_hash": changes.pop("hash", "abc")})
  common = dict(environment="tabletop", suite="pick", split="heldout", seeds=range(5, 15), max_steps=40)
  return fingerprint.of(policy, **({"loop": "device", "replan_steps": 8} | common | changes))


def test_a_fingerprint_says_what_a_number_depends_on():
  found = mark()
  json.dumps(found)
  assert found["seeds"] == "5..14" and found["episodes"] == 10
  assert found["policy"]["policy_hash"] == "abc" and found["preprocessing"]["image_size"] == 32
  assert found["versions"]["jax"] and found["device"].startswith("cpu")
  assert mark(seeds=[3, 1, 2])["seeds"] == [3, 1, 2]
  seen = found["preprocessing"]
  assert (found["chunk"], seen["pruner_text"], seen["dct"]) == (8, "question", "accurate")


def test_only_like_results_are_compared():
  fingerprint.require_alike(mark(), mark(hash="def"))
  fingerprint.require_alike(mark(), mark(told="another's", model_changes={"anchor_rule": "random"}))
  for change in (dict(suite="place"), dict(seeds=range(10)), dict(loop="host"), dict(mujoco="3.1")):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: .* against"):
      fingerprint.require_alike(mark(), mark(**change))
  with pytest.raises(ValueError, match="replay: 8 against 4"):  # its name in all results.json files
    fingerprint.require_alike(mark(), mark(replan_steps=4))


@pytest.mark.parametrize(
  "part, field, value",
  [
    ("policy", "dataset", "libero_object_no_noops"),
    ("preprocessing", "crop_area", 0.9),
    ("preprocessing", "dtype", "bfloat16"),
    ("preprocessing", "normalisation", "bounds"),
    ("preprocessing", "dct", "fast"),
    ("preprocessing", "jpeg_quality", 95),
  ],
)
def test_how_a_policy_is_fed_is_not_what_is_compared(part, field, value):
  other = mark()
  other[part] = other[part] | {field: value}
  with pytest.raises(ValueError, match=f"{part}.{field}: .* against {value}"):
    fingerprint.require_alike(mark(), other)
  fingerprint.require_alike(mark(), other, but=(f"{part}.{field}",))


def test_sources_are_told_and_decide_nothing():
  found = mark()
  assert len(found["sources"]) == 16 and found["sources"] == fingerprint.sources()
  fingerprint.require_alike(found, found | {"sources": "another"})
  assert fingerprint.unlike(found, found | {"sources": "another"}) == [f"sources: {found['sources']} against another"]
