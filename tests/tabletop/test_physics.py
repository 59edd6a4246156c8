"""The tabletop: what its physics allows, what its instructions mean, what its pictures show."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.tabletop import physics, render, tasks
from semanticvla_jax.tabletop.tasks import BALL, BOWL, COLORS, CUBE, HALF, NONE, PEG, PLATE, SHAPES, SLOT, SUITES

RESET = jax.jit(physics.reset, static_argnames="split")
RESETS = jax.jit(jax.vmap(physics.reset, in_axes=(0, 0, None)), static_argnums=2)
STEP = jax.jit(physics.step)
COUNT = 256  # episodes looked at
SUCCESS = jax.jit(physics.success)
VIEWS = jax.jit(jax.vmap(lambda state: render.views(state, 64)))


def scene(*objects: tuple, position=(0.0, 0.0, 0.15), yaw: float = 0.0, finger: float = 0.04) -> tasks.State:
  """A pick-up task with the given (kind, x, y, yaw) objects, containers last, and the gripper at `position`."""
  state = RESET(physics.seed_key(0), tasks.PICK)
  items = list(objects) + [(NONE, 10.0, 10.0, 0.0)] * (tasks.MAX_OBJECTS - len(objects))
  items.sort(key=lambda item: BOWL <= item[0] < NONE)
  kind = np.array([item[0] for item in items], np.int32)
  center = np.array([(x, y, HALF[k, 2]) for k, x, y, _ in items], np.float32)
  numbers = functools.partial(jnp.asarray, dtype=jnp.float32)
  return state.replace(
    kind=jnp.asarray(kind),
    center=numbers(center),
    yaw=numbers([item[3] for item in items]),
    origin=numbers(center[:, :2]),
    position=numbers(position),
    rotation=numbers([0.0, 0.0, yaw]),
    finger=numbers(finger),
  )


def act(state: tasks.State, move=(0.0, 0.0, 0.0), turn=(0.0, 0.0, 0.0), grip=-1.0, times: int = 1) -> tasks.State:
  """Steps `times` times with a motion in meters and radians a step."""
  action = np.concatenate([np.divide(move, physics.TRANSLATION), np.divide(turn, physics.ROTATION), [grip]])
  for _ in range(times):
    state = STEP(state, jnp.asarray(action, jnp.float32))
  return state


def grasped(*objects: tuple, yaw: float = 0.0) -> tasks.State:
  """The same scene after the first object was grasped and lifted by 10 cm."""
  kind, x, y, _ = objects[0]
  state = act(scene(*objects, position=(x, y, HALF[kind, 2]), yaw=yaw), grip=1, times=2)
  assert int(state.held) == 0
  return act(state, move=(0, 0, 0.05), grip=1, times=2)


def test_closing_on_air_takes_two_steps_and_reopens():
  state, fingers = scene((CUBE, 0.1, 0.1, 0)), []
  for grip in (1, 1, 1, -1, -1, -1):
    state = act(state, grip=grip)
    fingers.append(float(state.finger))
  np.testing.assert_allclose(fingers, [0.02, 0.0, 0.0, 0.02, 0.04, 0.04], atol=1e-6)
  assert int(state.held) == -1


@pytest.mark.parametrize("offset, yaw", [((0, 0.035, 0), 0), ((0, 0, 0.045), 0), ((0.10, 0, 0), 0)])
def test_a_missed_object_stays(offset, yaw):
  before = scene((CUBE, 0.05, 0.02, 0), position=np.add((0.05, 0.02, 0.0225), offset), yaw=yaw)
  after = act(before, grip=1, times=3)
  assert int(after.held) == -1 and float(after.finger) == 0.0
  np.testing.assert_allclose(after.center, before.center, atol=1e-6)


@pytest.mark.parametrize(
  "kind, yaw, caught",
  [
    (CUBE, 0.2, True),
    (CUBE, 0.2 + np.pi / 2, True),
    (CUBE, 0.7, False),
    (PEG, 0.2, True),
    (PEG, np.pi / 2, False),
    (BALL, 0.7, True),
  ],
)
def test_a_grasp_needs_the_yaw(kind, yaw, caught):
  after = act(scene((kind, 0, 0, yaw), position=(0, 0, HALF[kind, 2])), grip=1, times=2)
  assert (int(after.held) == 0) == caught


@pytest.mark.parametrize(
  "offset, caught",
  [((0.015, 0, 0), True), ((0, 0.015, 0), True), ((0, 0, 0.015), True), ((0, 0.022, 0), False), ((0, 0, 0.024), False)],
)
def test_a_grasp_tolerates_fifteen_millimeters(offset, caught):
  after = act(scene((CUBE, 0, 0, 0), position=np.add((0, 0, 0.0225), offset)), grip=1, times=2)
  assert (int(after.held) == 0) == caught


def test_a_held_object_follows_and_the_pads_center_it():
  state = act(scene((CUBE, 0, 0, 0.2), position=(0.01, 0.01, 0.0225)), grip=1, times=2)
  np.testing.assert_allclose(state.center[0], [0.01, 0, 0.0225], atol=1e-5)
  assert abs(float(state.yaw[0])) < 1e-5, "the pads align a box with themselves"
  state = act(state, move=(0.02, 0.0, 0.03), turn=(0, 0, 0.25), grip=1, times=2)
  np.testing.assert_allclose(state.position, [0.05, 0.01, 0.0825], atol=1e-5)
  np.testing.assert_allclose(state.yaw[0], 0.5, atol=1e-5)
  np.testing.assert_allclose(state.center[0], [0.05 + 0.01 * np.sin(0.5), 0.01 - 0.01 * np.cos(0.5), 0.0825], atol=1e-5)
  assert bool(SUCCESS(act(state, move=(0, 0, 0.02), grip=1)))


@pytest.mark.parametrize(
  "below, height",
  [
    ((NONE, 10, 10, 0), 0.0),
    ((BOWL, 0, 0.01, 0), 0.005),
    ((PLATE, 0.02, 0, 0), 0.008),
    ((CUBE, 0.005, 0, 0), 0.045),
    ((SLOT, 0, 0, 0), 0.028),
  ],
)
def test_a_dropped_object_falls_onto_what_lies_below(below, height):
  state = grasped((CUBE, 0.1, 0, 0), below)
  state = act(state, move=(-0.05, 0, 0), grip=1, times=2)
  state = act(state, times=3)
  assert int(state.held) == -1
  np.testing.assert_allclose(state.center[0], [0, 0, height + HALF[CUBE, 2]], atol=1e-5)


def test_an_object_dropped_on_the_wall_of_a_bowl_slides_off_it():
  for x, inside in ((0.052, True), (0.064, False)):
    state = act(grasped((BALL, x, 0.15, 0), (BOWL, 0, 0, 0)), move=(0, -0.05, 0), grip=1, times=3)
    state = act(act(state, times=3), move=(0, 0, 0.05), times=2)
    distance = float(jnp.linalg.norm(state.center[0, :2]))
    assert distance < 0.03 if inside else distance > 0.08


def test_open_fingers_push_from_the_side_and_rest_on_top():
  pushed = act(scene((CUBE, 0, 0, 0), position=(-0.1, 0, 0.02)), move=(0.04, 0, 0))
  assert float(pushed.center[0, 0]) > 0.008 and abs(float(pushed.center[0, 1])) < 1e-6
  above = act(scene((CUBE, 0, 0, 0), position=(0.046, 0, 0.10)), move=(0, 0, -0.05), times=3)
  np.testing.assert_allclose(above.position[2], 0.045 + 0.010, atol=1e-4)
  np.testing.assert_allclose(above.center[0], [0, 0, 0.0225], atol=1e-6)


def test_a_wall_stops_a_held_object():
  state = act(grasped((BALL, 0.15, 0, 0), (BOWL, 0, 0, 0)), move=(0, 0, -0.05), grip=1, times=2)
  state = act(state, move=(-0.05, 0, 0), grip=1, times=4)
  np.testing.assert_allclose(state.center[0, 0], HALF[BOWL, 0] + HALF[BALL, 0], atol=1e-4)
  np.testing.assert_allclose(state.position[0], state.center[0, 0], atol=1e-4)


@pytest.mark.parametrize(
  "x, turn, goes_in", [(0.0, 0.6, True), (0.006, 0.5, True), (0.0, 0.2, False), (0.02, 0.6, False)]
)
def test_a_peg_enters_a_slot_only_aligned(x, turn, goes_in):
  state = grasped((PEG, 0.1, 0, 0), (SLOT, 0, 0, 0.6))
  state = act(state, move=(-0.05 + x / 2, 0, 0), turn=(0, 0, turn / 2), grip=1, times=2)
  state = act(state, move=(0, 0, -0.03), grip=1, times=4)
  state = act(act(state, times=2), move=(0, 0, 0.05), times=2)
  asked = state.replace(verb=jnp.array([tasks.INSERT, 0]), destination=jnp.array([4, 4]))
  assert bool(SUCCESS(asked)) == goes_in
  assert (float(state.center[0, 2]) < 0.03) == goes_in
  if goes_in:
    np.testing.assert_allclose([*state.center[0, :2], state.yaw[0]], [0, 0, 0.6], atol=1e-5)


def test_the_wrong_object_is_no_success():
  state = grasped((CUBE, 0, 0, 0), (BALL, 0.15, 0, 0))
  assert bool(SUCCESS(state)) and not bool(SUCCESS(state.replace(target=jnp.array([1, 0], jnp.int32))))


def test_a_push_counts_from_where_the_object_was_let_go():
  state = grasped((CUBE, 0, 0, 0)).replace(verb=jnp.array([tasks.PUSH, 0]), destination=jnp.array([1, 0]))
  carried = act(act(state, move=(0.05, 0, 0), grip=1, times=2), times=3)
  assert not bool(SUCCESS(carried))
  moved = carried.replace(center=carried.center.at[0, 0].add(0.07))
  assert bool(SUCCESS(moved)) and not bool(SUCCESS(moved.replace(destination=jnp.array([0, 0]))))


def test_the_gripper_stays_in_reach():
  state = act(scene((CUBE, 0, 0.2, 0)), move=(0.05, -0.05, 0.05), turn=(0.5, -0.5, 0.5), times=12)
  np.testing.assert_allclose(state.position, [0.24, -0.24, 0.30], atol=1e-6)
  assert np.all(np.abs(state.rotation) <= physics.TWIST + 1e-6)


def test_compose_is_the_product_of_rotations():
  a, b = jnp.array([0.3, -0.2, 0.9]), jnp.array([-0.4, 0.1, 0.5])
  product = render.rotation_matrix(a) @ render.rotation_matrix(b)
  np.testing.assert_allclose(render.rotation_matrix(physics.compose(a, b)), product, atol=1e-5)
  np.testing.assert_allclose(physics.compose(a, -a), np.zeros(3), atol=1e-5)
  np.testing.assert_allclose(physics.compose(jnp.zeros(3), b), b, atol=1e-5)


@functools.cache
def seeds(suite: int, split: str = "train") -> tasks.State:
  """The first COUNT episodes of a suite, arrays on the host."""
  keys = jax.vmap(lambda seed: physics.seed_key(seed, split))(jnp.arange(COUNT))
  return jax.tree.map(np.asarray, RESETS(keys, jnp.full(COUNT, suite), split))


def row(states: tasks.State, i: int) -> tasks.State:
  """One state of a batch."""
  return jax.tree.map(lambda x: x[i], states)


def test_a_seed_is_an_episode_and_a_split_owns_its_seeds():
  key = physics.seed_key(7)
  jax.tree.map(np.testing.assert_array_equal, RESET(key, tasks.PLACE), RESET(key, tasks.PLACE))
  layouts = {split: seeds(tasks.PLACE, split).center.reshape(COUNT, -1) for split in tasks.SPLITS}
  everything = np.concatenate(list(layouts.values()))
  assert len(np.unique(everything, axis=0)) == len(everything)


@pytest.mark.slow
def test_batched_and_eager_give_the_same():
  states = jax.tree.map(lambda *x: jnp.stack(x), *(row(seeds(suite), 0) for suite in range(6)))
  actions = jax.random.uniform(jax.random.key(1), (6, 7), minval=-1.0)
  after = jax.jit(jax.vmap(physics.step))(states, actions)
  close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=0)
  for i in range(6):
    jax.tree.map(close, row(states, i), RESET(physics.seed_key(0), i))
    jax.tree.map(close, row(after, i), STEP(row(states, i), actions[i]))
  with jax.disable_jit():
    jax.tree.map(close, row(after, 0), physics.step(row(states, 0), actions[0]))


def meant(state: tasks.State, color: str, shape: str) -> list[int]:
  """All objects of a color and shape."""
  kinds = list(SHAPES) + ["bowl", "plate", "slot"]
  return [
    i
    for i in range(tasks.MAX_OBJECTS)
    if state.kind[i] != NONE
    and kinds[state.kind[i]] == shape
    and (color in ("", "the") or COLORS[state.color[i]] == color)
  ]


def related(state: tasks.State, candidates: list[int], relation: str, anchor: int) -> list[int]:
  """Those of the candidates that lie in a direction of the anchor, more than in any other."""
  axis, sign = {"left of": (0, -1), "right of": (0, 1), "in front of": (1, -1), "behind": (1, 1)}[relation]
  apart = state.center[candidates, :2] - state.center[anchor, :2]
  return [c for c, d in zip(candidates, apart) if sign * d[axis] > abs(d[1 - axis])]


@pytest.mark.parametrize("suite", range(6), ids=SUITES)
def test_the_instruction_means_one_object(suite):
  thing = r"(\w+) (cube|ball|cylinder|peg)"
  states = seeds(suite)
  for i in range(COUNT):
    state = row(states, i)
    sentence = physics.instruction(state)
    assert sentence in physics.instructions(SUITES[suite])
    targets = [meant(state, *found) for found in re.findall(thing, sentence)]
    if suite == tasks.SPATIAL:
      relation, color = re.search(r"(left of|right of|in front of|behind) the (\w+) bowl", sentence).groups()
      (anchor,) = meant(state, color, "bowl")
      assert len(targets[0]) == 2, "only the relation tells"
      targets = [related(state, targets[0], relation, anchor)]
    assert targets == [[t] for t in state.target[: len(targets)]]
    assert len(targets) == 1 + (suite == tasks.LONG)
    places = re.findall(r"(?:in|into|on) the (\w+ )?(bowl|plate|slot)", sentence) if suite != tasks.SPATIAL else []
    for (color, kind), destination in zip(places, state.destination):
      assert meant(state, color.strip(), kind) == [destination]
    if "push" in sentence:
      assert sentence.split()[-1] == ("left", "right", "front", "back")[state.destination[0]]
    same_color = [j for j in range(3) if state.color[j] == state.color[0]]
    assert len(same_color) > 1, "a distractor shares the color"


@pytest.mark.parametrize("suite", range(6), ids=SUITES)
def test_held_out_combinations_are_never_seen_in_training(suite):

  def combination(states, j):
    return {(COLORS[c], SHAPES[k]) for c, k in zip(states.color[:, j], states.kind[:, j])}

  targets = (0, 1) if suite == tasks.LONG else (0,)
  for split in ("train", "heldout"):
    states = seeds(suite, split)
    assert not tasks.HELD_OUT & set.union(*(combination(states, j) for j in range(3)))
  assert set.union(*(combination(seeds(suite, "unseen"), j) for j in targets)) <= tasks.HELD_OUT


def test_layouts_leave_room_for_the_gripper():
  for suite in range(6):
    states = seeds(suite)
    for kind, center in zip(states.kind, states.center[..., :2]):
      center, foot = center[kind != NONE], tasks.FOOT[kind[kind != NONE]]
      gap = np.linalg.norm(center[:, None] - center, axis=-1) - foot[:, None] - foot
      assert gap[~np.eye(len(gap), dtype=bool)].min() > 0.02
      assert np.abs(center).max() < 0.21


def test_instructions_are_one_table():
  assert len(set(tasks.INSTRUCTIONS)) == len(tasks.INSTRUCTIONS) == 1008
  assert [s for suite in SUITES for s in physics.instructions(suite)] == list(tasks.INSTRUCTIONS)
  counts = collections.Counter(tasks.INSTRUCTIONS[i].split()[0] for i in seeds(tasks.GOAL).instruction)
  assert counts["put"] > 100 and counts["push"] > 40


def hue(color: np.ndarray) -> np.ndarray:
  """A color without its brightness."""
  return color / np.linalg.norm(color, axis=-1, keepdims=True).clip(1e-6)


def test_views_show_the_target():
  states = jax.tree.map(lambda x: x[:32], seeds(tasks.PICK))
  views = np.asarray(VIEWS(states))
  assert views.shape == (32, 2, 64, 64, 3) and views.dtype == np.uint8
  assert views.std(axis=(2, 3, 4)).min() > 20
  wanted = hue(render.PALETTE[states.color[:, 0]])[:, None, None]
  close = np.linalg.norm(hue(views[:, 0].astype(float)) - wanted, axis=-1) < 0.12
  assert np.mean(close.sum((1, 2)) >= 20) > 0.95, "the target and one distractor have this color"


def test_views_follow_what_happens():
  state = jax.tree.map(jnp.asarray, row(seeds(tasks.PICK), 0))
  moved = state.replace(center=state.center.at[0, 0].add(0.05))
  lifted = state.replace(position=state.position.at[2].add(0.05))
  batch = jax.tree.map(lambda *x: jnp.stack(x + x[:1] * 29), state, moved, lifted)
  pictures = np.asarray(VIEWS(batch)).astype(int)
  assert np.abs(pictures[0, 0] - pictures[1, 0]).max() > 60
  assert np.abs(pictures[0, 1] - pictures[2, 1]).mean() > 2, "the wrist camera moves with the gripper"


def test_proprioception_reads_the_gripper():
  state = act(scene((CUBE, 0.1, 0.1, 0), position=(0.02, 0.03, 0.2)), turn=(0, 0, 0.3), grip=1)
  np.testing.assert_allclose(physics.proprio(state), [0.02, 0.03, 0.2, 0, 0, 0.3, 0.02, -0.02], atol=1e-5)


def test_the_environment_keeps_the_protocol():
  world = physics.TabletopEnvironment("place", split="heldout", size=64)
  first = world.reset(3)
  views = np.stack([first["observation/image"], first["observation/wrist_image"]]).astype(int)
  batched = VIEWS(jax.tree.map(lambda x: x[:32], seeds(tasks.PLACE, "heldout")))[3]
  assert np.mean(np.abs(views - batched) > 2) < 0.005
  assert first["observation/state"].shape == (8,) and first["prompt"] == world.instruction
  observation, done = world.step(np.zeros(7), observe=False)
  assert observation is None and not done and not world.success
  for _ in range(world.max_steps - 1):
    observation, done = world.step(np.zeros(7), observe=False)
  assert done and not world.success
  again = world.reset(3)
  np.testing.assert_array_equal(again["observation/image"], first["observation/image"])
  with pytest.raises(ValueError, match="7 finite numbers"):
    world.step(np.zeros(6))


def test_wrong_names_say_what_is_right():
  with pytest.raises(ValueError, match="did you mean 'place'"):
    physics.reset(physics.seed_key(0), "plaec")
  with pytest.raises(ValueError, match="expected 0 to 5"):
    physics.reset(physics.seed_key(0), 6)
  with pytest.raises(ValueError, match="did you mean 'heldout'"):
    physics.reset(physics.seed_key(0), "pick", "held_out")
  with pytest.raises(ValueError, match="outside split 'heldout'"):
    physics.seed_key(500_000_000, "heldout")
  for split, size in (("train", 1_000_000_000), ("heldout", 500_000_000), ("unseen", 500_000_000)):
    tasks.check_seeds(range(size - 2, size), split)
    for seeds in (range(-1, 2), range(size - 1, size + 1)):
      with pytest.raises(ValueError, match=f"outside split '{split}'; expected 0 to {size - 1}: .*; choose another"):
        tasks.check_seeds(seeds, split)
  with pytest.raises(ValueError, match="call reset first"):
    print(physics.TabletopEnvironment("pick").instruction)
