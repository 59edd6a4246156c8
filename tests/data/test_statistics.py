"""Statistics against plain numpy, both JSON families, normalisation by hand, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from semanticvla_jax.data import statistics
from semanticvla_jax.types import Statistics

MASK = (True,) * 6 + (False,)


def values(d: int, n: int = 400, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32) * (1 + np.arange(d, dtype=np.float32))


def dataset() -> statistics.DatasetStatistics:
  actions = values(7)
  actions[:, 6] = actions[:, 6] > 0
  return statistics.DatasetStatistics(
    statistics.compute(actions, MASK), statistics.compute(values(8, seed=1)), len(actions), 12
  )


def equal(a: Statistics, b: Statistics, fields=("mean", "std", "min", "max", "q01", "q99", "mask")) -> None:
  for field in fields:
    np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


def test_compute_equals_numpy():
  x = values(7)
  got = statistics.compute(x, MASK)
  np.testing.assert_allclose(got.mean, x.mean(0), atol=1e-6)
  np.testing.assert_allclose(got.std, x.std(0), rtol=1e-6)
  np.testing.assert_array_equal(got.min, x.min(0))
  np.testing.assert_array_equal(got.max, x.max(0))
  np.testing.assert_allclose(got.q01, np.quantile(x, 0.01, axis=0), rtol=1e-6)
  np.testing.assert_allclose(got.q99, np.quantile(x, 0.99, axis=0), rtol=1e-6)
  assert got.mask.tolist() == list(MASK)


def test_normalize_by_hand():
  zeros = np.zeros(4, np.float32)
  stats = Statistics(
    mean=zeros,
    std=zeros,
    min=np.array([-10, 0, 0, 5], np.float32),
    max=np.array([10, 1, 1, 5], np.float32),
    q01=np.array([-1, 0, 0, 5], np.float32),
    q99=np.array([3, 1, 1, 5], np.float32),
    mask=np.array([True, True, False, True]),
  )
  x = np.array([[1, 0.25, 0.25, 5], [-9, 2, 2, 5]], np.float32)
  normalized = statistics.normalize(x, stats)
  np.testing.assert_allclose(normalized, [[0, -0.5, 0.25, 0], [-1, 1, 2, 0]], atol=1e-6)
  np.testing.assert_allclose(statistics.normalize(x, stats, mode="bounds")[:, 0], [0.1, -0.9], atol=1e-6)
  back = statistics.unnormalize(np.array([0, -0.5, 0.25, 0], np.float32), stats)
  np.testing.assert_allclose(back, [1, 0.25, 0.25, 5], atol=1e-6)
  outside = statistics.unnormalize(np.array([2, 0, 0, 0], np.float32), stats)
  assert outside[0] == 5  # not clipped
  wide = dataclasses.replace(stats, q01=zeros, q99=zeros, min=-np.ones(4, np.float32))
  assert statistics.unnormalize(np.ones(4, np.float32), wide, eps=2.0)[0] == 2.0
  assert statistics.unnormalize(np.ones(4, np.float32), wide, eps=0.0)[0] == 0.0


def test_unnormalize_inverts_normalize_inside_the_bounds():
  x = values(7)
  stats = statistics.compute(x)
  inside = np.clip(x, stats.q01, stats.q99)
  round_trip = statistics.unnormalize(statistics.normalize(inside, stats), stats)
  np.testing.assert_allclose(round_trip, inside, atol=1e-5)


def test_openvla_json_round_trip(tmp_path):
  path = tmp_path / "dataset_statistics.json"
  want = {"libero_spatial_no_noops": dataset(), "libero_goal_no_noops": dataset()}
  statistics.save_openvla(path, want)
  content = json.loads(path.read_text())["libero_goal_no_noops"]
  assert set(content) == {"action", "proprio", "num_transitions", "num_trajectories"}
  assert set(content["action"]) == {"mean", "std", "min", "max", "q01", "q99", "mask"}
  assert set(content["proprio"]) == {"mean", "std", "min", "max", "q01", "q99"}
  assert content["action"]["mask"] == list(MASK)
  got = statistics.load(path)
  assert list(got) == list(want)
  for name, one in want.items():
    equal(got[name].action, one.action)
    equal(got[name].proprio, one.proprio)
    assert got[name][2:] == (400, 12)
  wrapped = tmp_path / "config.json"
  wrapped.write_text(json.dumps({"norm_stats": json.loads(path.read_text())}))
  equal(statistics.load(wrapped)["libero_goal_no_noops"].action, want["libero_goal_no_noops"].action)


def test_openpi_json_round_trip(tmp_path):
  path = tmp_path / "libero" / "norm_stats.json"
  want = dataset()
  statistics.save_openpi(path, want)
  content = json.loads(path.read_text())
  assert set(content) == {"norm_stats"} and set(content["norm_stats"]) == {"state", "actions"}
  assert set(content["norm_stats"]["state"]) == {"mean", "std", "q01", "q99"}
  (name, got), *_ = statistics.load(path).items()
  assert name == "libero"
  equal(got.action, want.action, ("mean", "std", "q01", "q99"))
  equal(got.proprio, want.proprio, ("mean", "std", "q01", "q99"))
  assert got.action.mask.all() and got.num_transitions is None
  statistics.normalize(values(7), got.action)
  with pytest.raises(ValueError, match="Statistics lack min and max"):
    statistics.normalize(values(7), got.action, mode="bounds")


def test_select():
  entries = {"libero_goal_no_noops": dataset(), "other": dataset()}
  assert statistics.select(entries, "libero_goal") is entries["libero_goal_no_noops"]
  with pytest.raises(ValueError, match="No statistics of 'libero_10'"):
    statistics.select(entries, "libero_10")


def changed(**changes) -> statistics.DatasetStatistics:
  one = dataset()
  action = {field: np.array(getattr(one.action, field)) for field in ("mean", "min", "max", "q01", "q99", "mask")}
  for field, (dimension, value) in changes.items():
    action[field][dimension] = value
  return one._replace(action=dataclasses.replace(one.action, **action))


def check(one: statistics.DatasetStatistics, **widths) -> None:
  statistics.check("toy", one, **({"action_dim": 7, "proprio_dim": 8} | widths))


def test_check_accepts_good_statistics_and_constant_dimensions():
  check(dataset())
  check(changed(min=(3, 0.5), max=(3, 0.5), q01=(3, 0.5), q99=(3, 0.5)))


@pytest.mark.parametrize(
  ("one", "message"),
  [
    (changed(q01=(2, 0.1), q99=(2, 0.1)), r"'toy'[\s\S]*action dimension 2: got a range q99 - q01 = 0 "),
    (changed(q99=(1, np.nan)), "action dimension 1: got q01=.*, q99=nan; expected finite"),
    (changed(q99=(1, -50.0)), "action dimension 1: got q01=.* above q99=-50.0"),
    (changed(min=(6, -1.0)), r"action dimension 6: got gripper commands in \[-1, 1\]; expected \[0, 1\]"),
    (dataset()._replace(proprio=None), "proprio: got no statistics; expected width 8"),
  ],
)
def test_check_names_dataset_dimension_value_and_remedy(one, message):
  with pytest.raises(ValueError, match=message):
    check(one)


def test_a_model_without_proprioception_does_not_read_its_statistics():
  check(dataset(), proprio_dim=None)
  check(dataset()._replace(proprio=None), proprio_dim=None)


def test_check_reports_all_problems_at_once():
  with pytest.raises(ValueError) as error:
    check(changed(q99=(1, np.nan), min=(6, -1.0)), proprio_dim=14)
  assert all(part in str(error.value) for part in ("dimension 1", "dimension 6", "proprio: got width 8; expected 14"))


def test_errors(tmp_path):
  with pytest.raises(ValueError, match="Widths differ: got values of width 6; expected 7"):
    statistics.normalize(values(6), dataset().action)
  with pytest.raises(ValueError, match="Unknown normalisation"):
    statistics.normalize(values(7), dataset().action, mode="zscore")
  with pytest.raises(ValueError, match="Non-finite value: got nan in frame 3, dimension 1"):
    x = values(2)
    x[3, 1] = np.nan
    statistics.compute(x)
  with pytest.raises(ValueError, match="No data"):
    statistics.compute(values(2)[:0])
  with pytest.raises(ValueError, match="Wrong mask"):
    statistics.compute(values(2), MASK)
  path = tmp_path / "x.json"
  path.write_text("{")
  with pytest.raises(ValueError, match="is not JSON"):
    statistics.load(path)
  path.write_text(json.dumps({"a": {"action": {"q01": [0, 0], "q99": [1]}}}))
  with pytest.raises(ValueError, match="lacks 'mean'"):
    statistics.load(path)
  path.write_text(json.dumps({"a": {"proprio": {}}}))
  with pytest.raises(ValueError, match="lacks 'action'"):
    statistics.load(path)
  short = statistics.to_openvla(dataset())
  short["action"]["q99"] = [1.0]
  path.write_text(json.dumps({"a": short}))
  with pytest.raises(ValueError, match="inconsistent: got q99"):
    statistics.load(path)
