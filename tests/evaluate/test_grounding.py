"""Figures of grounding by hand-made masks, the tabletop's masks against its renderer, and what cannot be measured."""

import jax
import numpy as np
import policies
import pytest
from helpers import random_params, tiny

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics, text
from semanticvla_jax.evaluate import grounding, libero_grounding, run, visualize
from semanticvla_jax.evaluate.rollout_pool import EpisodeResult
from semanticvla_jax.tabletop import render, tasks


def square(size, rows, columns):
  mask = np.zeros((size, size), bool)
  mask[rows, columns] = True
  return mask


def test_a_patch_is_filled_by_the_share_of_its_area():
  mask = square(8, slice(0, 4), slice(2, 6))  # of four patches: half of the upper two
  assert grounding.filling(mask, 2).tolist() == [0.5, 0.5, 0, 0]
  assert grounding.filling(np.stack([mask, ~mask]), 2).tolist() == [[0.5, 0.5, 0, 0], [0.5, 0.5, 1, 1]]
  fine = np.kron(mask, np.ones((3, 3), bool))
  np.testing.assert_allclose(grounding.filling(fine, 4), grounding.filling(mask, 4))


def test_a_crop_is_what_the_policy_sees():
  mask = square(8, slice(0, 2), slice(0, 8))  # outside the middle half of either side
  assert grounding.filling(mask, 2, 0.25).tolist() == [0, 0, 0, 0]
  assert grounding.filling(square(8, slice(2, 4), slice(2, 4)), 2, 0.25).tolist() == [1, 0, 0, 0]
  assert grounding.filling(mask, 2).tolist() == [0.5, 0.5, 0, 0]


def test_figures_of_an_episode_are_means_over_queries_that_show_an_object():
  kept = np.array([[[True, True, False, False]], [[False, True, True, False]], [[True, False, True, False]]])
  filled = np.array([[[0.5, 0, 0, 0]], [[0.5, 0, 0.5, 0]], [[0, 0, 0, 0]]])
  found = grounding.of_episode(kept, filled, ["image"])["image"]
  assert found == {"queries": 2, "on_objects": 0.25, "chance": 0.1875, "objects_kept": 0.75, "kept": 0.5}
  assert grounding.of_episode(kept[2:], filled[2:], ["image"]) == {"image": {"queries": 0}}


def test_random_keeping_is_chance():
  rng = np.random.default_rng(0)
  filled = rng.uniform(0, 1, (1, 1, 16)).repeat(4000, axis=0)
  kept = rng.permuted(np.arange(16)[None].repeat(4000, axis=0), axis=1)[:, None] < 5
  found = grounding.of_episode(kept, filled, ["image"])["image"]
  assert found["on_objects"] == pytest.approx(found["chance"], abs=0.01)
  assert found["objects_kept"] == pytest.approx(found["kept"], abs=0.01) and found["kept"] == 5 / 16


def test_a_summary_is_a_mean_over_episodes_with_its_interval():
  one = lambda on: {"image": {"queries": 3, "on_objects": on, "chance": 0.1, "objects_kept": 0.5, "kept": 0.25}}  # noqa: E731
  found = grounding.summary([one(0.2), None, one(0.4), {"image": {"queries": 0}}, one(0.3)])["image"]
  assert (found["episodes"], found["queries"]) == (3, 9) and found["on_objects"] == pytest.approx(0.3)
  low, high = found["on_objects_interval"]
  assert (low, high) == pytest.approx((0.3 - 4.302653 * 0.1 / 3**0.5, 0.3 + 4.302653 * 0.1 / 3**0.5))
  assert found["objects_kept_interval"] == [0.5, 0.5]
  assert grounding.summary([{"image": {"queries": 0}}]) == {"image": {"episodes": 0, "queries": 0}}
  assert grounding.interval([0.4]) == (0.0, 1.0)


reset = jax.jit(lambda seed, suite: tasks.reset(jax.random.key(seed), suite))  # one program for all suites
views, which = jax.jit(render.views, static_argnums=1), jax.jit(render.visible_objects, static_argnums=1)


def state_of(suite, seed=3):
  return reset(seed, tasks.SUITES.index(suite))


@pytest.mark.parametrize("suite", tasks.SUITES)
def test_masks_are_the_pixels_that_change_with_an_objects_color(suite):
  state = state_of(suite)
  seen, plain = np.asarray(which(state, 48)), np.asarray(views(state, 48))
  for i in range(tasks.MAX_OBJECTS):
    other = state.replace(color=state.color.at[i].set((state.color[i] + 3) % 6))
    changed = (np.asarray(views(other, 48)) != plain).any(-1)
    assert (changed == (seen == i)).all(), f"object {i}"
    assert changed[0].any() == (int(state.kind[i]) != tasks.NONE)


def test_the_gripper_hides_what_is_behind_it():
  state = state_of("pick")
  before = state.replace(position=state.center[0] + np.array([0, -0.03, 0.02], np.float32), finger=np.float32(0))
  free, covered = (np.asarray(which(one, 48)) for one in (state, before))
  assert 0 < (covered[0] == 0).sum() < (free[0] == 0).sum()


@pytest.mark.parametrize(
  ("suite", "named"), [("pick", [0]), ("place", [0, 3]), ("spatial", [0, 3]), ("long", [0, 1, 3, 4]), ("align", [0, 3])]
)
def test_what_an_instruction_names(suite, named):
  assert np.flatnonzero(tasks.named_objects(state_of(suite))).tolist() == named


def test_a_goal_names_its_container_and_a_push_none():
  verbs = set()
  for seed in range(16):
    state = state_of("goal", seed)
    verbs.add(int(state.verb[0]))
    expected = [0] if state.verb[0] == tasks.PUSH else [0, int(state.destination[0])]
    assert np.flatnonzero(tasks.named_objects(state)).tolist() == expected
  assert verbs == {tasks.PUT, tasks.PUSH}


def test_the_outline_is_the_edge_of_the_mask():
  image = np.full((9, 9, 3), 100, np.uint8)
  found = visualize.outlined(image, square(9, slice(2, 7), slice(2, 7)))
  changed = (found != image).any(-1)
  assert changed.sum() == 16 and not changed[3:6, 3:6].any()


def seen(count):
  one = lambda i: {  # noqa: E731
    **policies.observation(i, 32, "pick up the red cube"),
    "objects/image": square(32, slice(0, 16), slice(0, 16)),
    "objects/wrist_image": np.zeros((32, 32), bool),
  }
  return [one(i) for i in range(count)]


def test_episodes_in_simulators_are_measured_when_they_end_and_read_again(tmp_path):
  policy, path, drawn = policies.policy(), tmp_path / "x_policy_grounding.jsonl", []
  record = lambda seed: EpisodeResult(seed, True, 20, None, "lift it", "lift it", 0, 1.0)  # noqa: E731
  recorder = libero_grounding.Recorder(policy, path, dict, drawn.append)
  recorder(record(4), seen(4))
  recorder(record(5), seen(11))
  one = recorder.of(4, "lift it")
  assert one["image"]["queries"] == 3 and one["wrist_image"] == {"queries": 0} and one["image"]["chance"] == 0.25
  assert recorder.of(5, "lift it")["image"]["queries"] == 10 and len(drawn) == 1 and len(drawn[0]) == 2
  kept = np.asarray(visualize.looks(policy, [{**seen(1)[0], "prompt": "lift it"}])[0].kept)
  first = grounding.of_episode(
    kept[None],
    grounding.filling(
      np.stack([x for k, x in seen(1)[0].items() if "objects" in k])[None], round(kept.shape[1] ** 0.5)
    ),
    ["image", "wrist_image"],
  )
  recorder(record(6), seen(1))
  assert recorder.of(6, "lift it") == first
  path.write_bytes(path.read_bytes()[:-20])
  again = libero_grounding.Recorder(policy, path, dict)
  assert again.of(4, "lift it") == one and again.of(6, "lift it") is None and again.of(4, "push it") is None
  again(record(6), seen(1))
  assert libero_grounding.Recorder(policy, path, dict).of(6, "lift it") == first


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("policies")
  for name, pruner in (("prunes", {}), ("plain", {"siglip_pruner": "sa", "film": ("dino", "siglip")})):
    config = policies.CROPPING | {"model": policies.CROPPING["model"] | pruner}
    entry = {"libero_goal": statistics.to_openvla(policies.stats())}
    policy_folder.save_policy(
      root / name, random_params(tiny(**pruner), 0), config=config, tokenizers=text.EMBEDDED, statistics=entry
    )
  return root


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--policy=prunes", "--suite=pick", "--host"], "--grounding: got --host, which keeps no states"),
    (["--policy=plain", "--suite=pick"], "--grounding: got a policy without an ID-Pruner"),
    (["--policy=plain", "--suite=libero_goal"], "--grounding: got a policy without an ID-Pruner"),
    (["--recorded=x", "--suite=libero_goal"], "--grounding: got --recorded; expected a policy folder"),
    (["--policy=ws://localhost:9", "--suite=libero_goal"], "--grounding: got a policy behind a server"),
  ],
)
def test_what_has_no_grounding_is_refused(folders, tmp_path, words, message):
  words = [word.replace("--policy=p", f"--policy={folders}/p") for word in words]
  with pytest.raises(SystemExit, match=message) as ended:
    run.main([*words, "--grounding", "--episodes=2"] if "pick" in words[1] else [*words, "--grounding"])
  assert "\n" not in ended.value.code
