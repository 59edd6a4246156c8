"""A policy of your own robot: its cameras' names, missing cameras, grippers and image formats."""

import numpy as np
import policies
import pytest
from helpers import random_params

from semanticvla_jax import observation_dict
from semanticvla_jax.data import datasets, robot, statistics
from semanticvla_jax.data.spec import DatasetSpec, Gripper
from semanticvla_jax.exported import ExportedPolicy
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.policy import Policy

SPEC = DatasetSpec(
  name="arm",
  columns={"action": 8, "observation/state": 5},
  views=("front", "image", "hand"),
  absolute=(False,) * 6 + (True, True),
  normalized=(True,) * 5 + (False,) * 3,
  groups={"joints": (0, 1, 2, 3, 4), "mode": (5,), "fingers": (6, 7)},
  gripper=(Gripper(6, 0.08, 0.0, "continuous"), Gripper(7, 255.0, 0.0)),
  optional=("hand",),
  units={"joints": "rad"},
  control_hz=20.0,
)
MODEL = policies.TINY | dict(
  num_views=3,
  proprio_dim=5,
  action_dim=8,
  optional_views=(2,),
  groups=[[n, [*dims]] for n, dims in SPEC.groups.items()],
)
CONFIG = policies.CONFIG | {"model": MODEL, robot.KEY: {"arm": robot.of(SPEC).to_json()}}


def stats() -> statistics.DatasetStatistics:
  actions = np.random.default_rng(0).uniform(0, 1, (400, 8)).astype(np.float32)
  actions[:, 5] = 2 * actions[:, 5] - 1
  proprio = np.random.default_rng(1).normal(size=(400, 5)).astype(np.float32)
  return statistics.DatasetStatistics(
    statistics.compute(actions, SPEC.normalized), statistics.compute(proprio), 400, 20
  )


def make(config=CONFIG, **options) -> Policy:
  model = build(config["model"])
  options = {"batch_sizes": (), "metadata": {"dataset": "arm"}} | options
  return Policy(model, random_params(model), stats(), policies.tokenizers(), config, **options)


@pytest.fixture(scope="module")
def policy() -> Policy:
  return make()


def observation(**changes) -> dict:
  rng = np.random.default_rng(0)
  front, side, hand = (rng.integers(0, 256, (*size, 3), np.uint8) for size in ((24, 32), (32, 32), (16, 16)))
  state = rng.normal(size=5).astype(np.float32)
  return {"front": front, "observation/image": side, "hand": hand, "state": state, "prompt": "pick up"} | changes


def test_a_robot_is_the_same_after_json():
  for spec in (SPEC, *datasets.SPECS.values()):
    one = robot.of(spec)
    assert robot.from_json("x", one.to_json()) == one
  with pytest.raises(ValueError, match="config.json: its robot: got KeyError: 'grippers'; expected views, optional"):
    robot.select({robot.KEY: {"arm": {"views": {}}}}, "arm")


def test_a_policy_takes_its_only_robot_or_that_of_its_dataset():
  kept = CONFIG[robot.KEY]
  assert robot.select(CONFIG, "") == robot.select(CONFIG, "arm") == robot.of(SPEC)
  two = {robot.KEY: kept | {"libero_goal_no_noops": robot.of(datasets.LIBERO).to_json()}}
  assert robot.select(two, "libero_goal") == robot.of(datasets.LIBERO)
  assert robot.select(two, "") is robot.select(two, "other") is robot.select({}, "arm") is None


def test_images_are_found_under_the_specs_names(policy):
  seen = policy.observe([observation()])
  assert seen.images.shape == (1, 3, 32, 32, 3) and policy.metadata["views"] == ["front", "image", "hand"]
  np.testing.assert_array_equal(seen.images[0, 1], observation()["observation/image"])
  prefixed = observation()
  prefixed["observation/front"] = prefixed.pop("front")
  np.testing.assert_array_equal(policy.observe([prefixed]).images, seen.images)
  without = observation()
  del without["front"]
  with pytest.raises(
    ValueError, match=r"lacks 'front': got .*expected one of \['observation/front', 'front'\]; add it\."
  ):
    policy.observe([without])
  with pytest.raises(ValueError, match="lacks 'front'.*did you mean to rename 'observation/fromt'"):
    policy.observe([without | {"observation/fromt": 0}])
  with pytest.raises(ValueError, match="lacks 'image'"):  # which is the name of one of its cameras, and no alias
    policy.observe([{key: x for key, x in observation(full_image=1).items() if key != "observation/image"}])


def test_the_state_may_come_in_its_columns():
  parts = {"joints": np.array([1.0, 2.0]), "observation/opening": 3.0}
  read = lambda **changes: observation_dict.read(  # noqa: E731
    {"front": np.zeros((8, 8, 3), np.uint8), "prompt": "go"} | parts | changes,
    {"front": ("front",)},
    3,
    (),
    ("observation/joints", "observation/opening"),
  )["state"]
  assert read().tolist() == [1, 2, 3] and read().dtype == np.float32
  assert read(state=np.array([4.0, 5.0, 6.0])).tolist() == [4, 5, 6]
  with pytest.raises(ValueError, match=r"state: got \['observation/opening'\] alone; expected all of"):
    read(joints=None)
  with pytest.raises(ValueError, match=r"got \['observation/opening', 'opening'\], which mean the same"):
    read(opening=2.0)
  with pytest.raises(ValueError, match="Observation lacks 'state'"):
    read(joints=None, **{"observation/opening": None})


@pytest.mark.parametrize("name", ["libero", "bridge", "aloha"])
def test_the_known_robots_keep_their_aliases(name):
  one = robot.of(datasets.SPECS[name])
  for old, keys in zip(observation_dict.VIEWS[len(one.views)], one.views.values(), strict=True):
    assert set(observation_dict.ALIASES[old]) <= set(keys)


@pytest.mark.parametrize("empty", [None, b"", np.zeros((0, 0, 3), np.uint8)])
def test_a_missing_camera_is_black_where_the_spec_allows_it(policy, empty):
  seen = policy.observe([observation(hand=empty)])
  assert not seen.images[0, 2].any() and seen.images[0, :2].any(axis=(1, 2, 3)).all()
  with pytest.raises(ValueError, match="Observation(, front| lacks 'front')"):
    policy.observe([observation(front=empty)])


def test_actions_have_the_robots_own_values(policy):
  answered = np.zeros((1, 3, 8), np.float32)
  answered[0, :, 5], answered[0, :, 6], answered[0, :, 7] = (-0.7, 0, 0.7), (-0.2, 0.5, 1.0), (0.4, 0.51, 1.2)
  actions = policy.preparation.actions(answered)[0]
  np.testing.assert_allclose(actions[:, 5], [-0.7, 0, 0.7], atol=1e-6)  # outside the mask, and still not a gripper
  np.testing.assert_allclose(actions[:, 6], [0, 0.04, 0.08], atol=1e-6)
  assert actions[:, 7].tolist() == [0, 255, 255] and actions.dtype == np.float32
  raw = make(gripper="raw").preparation.actions(answered)[0]
  np.testing.assert_allclose(raw[:, 6:], answered[0, :, 6:], atol=1e-6)


def test_the_commands_of_libero_are_those_of_a_policy_without_a_robot():
  actions = np.random.default_rng(0).uniform(-1, 1, (2, 4, 7)).astype(np.float32)
  config = policies.CONFIG | {robot.KEY: {"toy": robot.of(datasets.LIBERO).to_json()}}
  own, old = policies.policy(config=config, metadata={"dataset": "toy"}), policies.policy()
  assert own.robot is not None and old.robot is None
  np.testing.assert_array_equal(own.preparation.actions(actions), old.preparation.actions(actions))
  bridge = robot.of(datasets.BRIDGE).commands(actions)
  np.testing.assert_array_equal(bridge[..., 6], np.where(actions[..., 6] > 0.5, -1, 1))


def test_a_robot_that_is_not_the_models_is_refused():
  two = CONFIG | {"model": MODEL | {"num_views": 2, "optional_views": ()}}
  with pytest.raises(ValueError, match=r"a robot with the views \['front', 'image', 'hand'\]; expected 2 views"):
    make(two)
  with pytest.raises(ValueError, match="3 views|gripper commands"):  # of no robot, the mode would be a gripper
    make(policies.CONFIG | {"model": MODEL})


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_channels_may_come_first_and_numbers_may_lie_in_0_to_1(dtype):
  read = lambda image: observation_dict._image("front", image)  # noqa: E731
  image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
  floating = (image / 255).astype(dtype)
  for same in (image, image.transpose(2, 0, 1), floating, floating.transpose(2, 0, 1)):
    found = read(same)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, image)
  square = np.zeros((3, 3, 3), np.uint8)
  square[0] = 9
  np.testing.assert_array_equal(read(square), square)


@pytest.mark.parametrize(
  "image",
  [
    np.ones((8, 8, 3), np.float32),  # white in [0, 1], or black in 0..255
    np.full((8, 8, 3), 1.5, np.float32),
    np.full((8, 8, 3), -0.1, np.float32),
    np.full((8, 8, 3), np.nan, np.float32),
    np.zeros((8, 8, 3), np.int32),
    np.zeros((8, 8, 4), np.uint8),
    np.zeros((1, 8, 8, 3), np.uint8),
    np.zeros((0, 8, 3), np.uint8),
    np.zeros((8, 8), np.uint8),
  ],
)
def test_images_that_leave_a_doubt_are_refused(image):
  with pytest.raises(ValueError, match=r"Observation, front: got .*; expected uint8\[h w 3\].*convert it"):
    observation_dict._image("front", image)


@pytest.mark.slow
def test_an_exported_policy_knows_its_robot(policy, tmp_path):
  ready = make(batch_sizes=(1,))
  ready.export(tmp_path / "arm.svla", platforms=("cpu",))
  loaded = ExportedPolicy.load(tmp_path / "arm.svla")
  assert loaded.preparation.robot == policy.robot and loaded.metadata[robot.KEY]["control_hz"] == 20.0
  for seen in (observation(), observation(hand=None)):
    np.testing.assert_array_equal(loaded.infer(seen)["actions"], ready.infer(seen)["actions"])
