"""Objects on the table, suites, instructions, and the draw of an initial state.

Frame: x to the right and y away from the agent camera, z up, meters, the origin on the table under the center of the
workspace. So "left of" is smaller x and "in front of" is smaller y, as seen in the agent's image.

A suite is data, not code: every task is two goals `(verb, target, destination)`, the second usually NOTHING, so one
branch-free program draws any suite and a vmapped batch can mix them.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


def in_32_bits(function: Callable) -> Callable:
  """Runs a function of the tabletop in 32 bits where jax is set to 64: the same seed is the same episode either way."""

  @functools.wraps(function)
  def run(*args, **kwargs):
    with jax.enable_x64(False):
      return function(*args, **kwargs)

  return run


SHAPES = ("cube", "ball", "cylinder", "peg")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
CUBE, BALL, CYLINDER, PEG, BOWL, PLATE, SLOT, NONE = range(8)  # kinds; from BOWL on they never move
WHITE = len(COLORS)  # the color of plates

# By kind. HALF: half extents (x, y, z); for a bowl and a plate x is the radius. FLOOR: the height on which an object
# inside a container comes to rest. FOOT: radius kept free around it in a first layout.
HALF = np.array(
  [
    [0.0225, 0.0225, 0.0225],
    [0.024, 0.024, 0.024],
    [0.021, 0.021, 0.0275],
    [0.0125, 0.038, 0.016],
    [0.058, 0.058, 0.018],
    [0.060, 0.060, 0.004],
    [0.034, 0.056, 0.014],
    [0.0, 0.0, 0.0],
  ],
  np.float32,
)
FLOOR = np.array([0, 0, 0, 0, 0.005, 0.008, 0.004, 0], np.float32)
FOOT = np.array([0.030, 0.024, 0.022, 0.036, 0.058, 0.060, 0.060, 0.0], np.float32)
YAW = np.array([0.5, 0, 0, 0.9, 0, 0, 0.9, 0], np.float32)  # first yaws are uniform within +- this
GROOVE = np.array([0.0165, 0.0420], np.float32)  # half extents of the hole in a slot, long along its y, as a peg is

SUITES = ("pick", "place", "spatial", "goal", "long", "align")
PICK, PLACE, SPATIAL, GOAL, LONG, ALIGN = range(6)
MAX_STEPS = (40, 60, 40, 60, 110, 60)
NOTHING, LIFT, PUT, PUSH, INSERT = range(5)  # verbs
DIRECTIONS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]], np.float32)  # left, right, front, back
RELATIONS = ("left of", "right of", "in front of", "behind")

# Color and shape combinations that no training episode contains, neither as target nor as distractor.
HELD_OUT = frozenset(
  {
    ("blue", "cube"),
    ("orange", "cube"),
    ("red", "ball"),
    ("yellow", "ball"),
    ("green", "cylinder"),
    ("purple", "cylinder"),
    ("red", "peg"),
    ("purple", "peg"),
  }
)
SPLITS = {"train": 0, "heldout": 1_000_000_000, "unseen": 1_500_000_000}  # first seed of each
_LAST_SEED = 2_000_000_000

MAX_OBJECTS = 5  # 0: target, 1 and 2: distractors (or the second target), 3 and 4: containers
GRASPABLE = 3  # objects 0..2 can be grasped, 3 and 4 cannot
_MARGIN = 0.030  # free space wanted between two objects, so that an open gripper fits
_CANDIDATES = 64

Leaf = Any  # an array; in jax's bookkeeping also its shape, axis or sharding


@flax.struct.dataclass
class State:
  """Everything about one moment of one episode; `n` = MAX_OBJECTS, absent objects have kind NONE and lie 10 m away.

  Attributes:
    position: f32[3], meters: the point between the fingertips.
    rotation: f32[3], axis-angle, radians; zero points the fingers down and closes them along x.
    finger: f32[], meters from the middle to either finger, 0 (closed) .. 0.04 (open).
    held: i32[], index of the held object, or -1.
    grip: f32[3], center of the held object in the gripper's frame, meters; grip_yaw: f32[], its yaw there.
    kind: i32[n], color: i32[n].
    center: f32[n 3], meters; yaw: f32[n], radians (the heading, where a held object is tilted).
    origin: f32[n 2], where the objects lay at reset or were last let go; a push counts from there.
    suite: i32[]; verb, target, destination: i32[2], the goals; a destination is an object, or a direction for PUSH.
    relation: i32[], of the target to object 3, named in the instruction of suite `spatial` only.
    instruction: i32[], index into INSTRUCTIONS.
    time: i32[], actions taken.
    fitting: bool[n], objects of which any will do as the first target, where the words fit several; None where they
      name one (see probes.py).

  `n` is larger than MAX_OBJECTS in cluttered suites: further distractors, behind the containers.
  """

  position: Leaf
  rotation: Leaf
  finger: Leaf
  held: Leaf
  grip: Leaf
  grip_yaw: Leaf
  kind: Leaf
  color: Leaf
  center: Leaf
  yaw: Leaf
  origin: Leaf
  suite: Leaf
  verb: Leaf
  target: Leaf
  destination: Leaf
  relation: Leaf
  instruction: Leaf
  time: Leaf
  fitting: Leaf = None


def _sentences() -> tuple[tuple[str, ...], ...]:
  """All instructions by suite, in the order of `_instruction`."""
  things = [f"{c} {s}" for s in SHAPES[:3] for c in COLORS]
  ends = [f"put the {{}} {where}" for where in ("in the bowl", "on the plate")]
  ends += [f"push the {{}} to the {where}" for where in ("left", "right", "front", "back")]
  return (
    tuple(f"pick up the {t}" for t in things),
    tuple(f"pick up the {t} and place it in the {c} bowl" for t in things for c in COLORS),
    tuple(f"pick up the {t} {r} the {c} bowl" for t in things for r in RELATIONS for c in COLORS),
    tuple(end.format(t) for t in things for end in ends),
    tuple(f"put the {t} in the bowl and the {u} on the plate" for t in things for u in things if u != t),
    tuple(f"insert the {c} peg into the {d} slot" for c in COLORS for d in COLORS),
  )


_BY_SUITE = _sentences()
_OFFSET = np.cumsum([0] + [len(s) for s in _BY_SUITE])[:-1].astype(np.int32)
INSTRUCTIONS = tuple(sentence for sentences in _BY_SUITE for sentence in sentences)


def suite_index(suite: str | int | Int[Array, ""]) -> int | Int[Array, ""]:
  """The index of a suite in SUITES; a traced index passes, an unknown name or number raises ValueError."""
  if isinstance(suite, str):
    if suite not in SUITES:
      near = difflib.get_close_matches(suite, SUITES, 1, 0.0)[0]
      raise ValueError(f"Suite {suite!r} does not exist; expected one of {', '.join(SUITES)}: did you mean {near!r}?")
    return SUITES.index(suite)
  if isinstance(suite, int) and not 0 <= suite < len(SUITES):
    raise ValueError(f"Suite number {suite} does not exist; expected 0 to {len(SUITES) - 1}: see tasks.SUITES.")
  return suite


def check_split(split: str) -> str:
  """Returns `split`, or raises ValueError if there is none of that name."""
  if split not in SPLITS:
    near = difflib.get_close_matches(split, SPLITS, 1, 0.0)[0]
    raise ValueError(f"Split {split!r} does not exist; expected one of {', '.join(SPLITS)}: did you mean {near!r}?")
  return split


def instructions(suite: str) -> list[str]:
  """The sentences of a suite in the order of INSTRUCTIONS."""
  return list(_BY_SUITE[suite_index(suite)])


def instruction(state: State) -> str:
  """The sentence of one (unbatched) state, on the host."""
  return INSTRUCTIONS[int(state.instruction)]


def named_objects(state: State) -> Bool[Array, " n"]:
  """Which objects the instruction names: targets, containers to put them into, and the bowl of suite `spatial`."""
  asks = state.verb != NOTHING
  into = (state.verb == PUT) | (state.verb == INSERT)
  index = jnp.arange(len(state.kind))[:, None]
  named = ((index == state.target) & asks) | ((index == state.destination) & into)
  named = named.any(axis=1) | ((index[:, 0] == 3) & (state.suite == SPATIAL))
  return named if state.fitting is None else named | state.fitting


def containers(state: State) -> Bool[np.ndarray, " n"]:
  """Which places among the objects are kept for containers, whatever lies there; a constant."""
  return np.isin(np.arange(len(state.kind)), range(GRASPABLE, MAX_OBJECTS))


def max_steps(suite: str | int) -> int:
  """How many actions an episode of the suite may take."""
  return MAX_STEPS[suite_index(suite)]


def check_seeds(seeds: Sequence[int] | np.ndarray, split: str) -> None:
  """Raises ValueError unless all seeds are in the split: the next ones are another split's layouts. On the host."""
  first = SPLITS[check_split(split)]
  size = min([s for s in SPLITS.values() if s > first], default=_LAST_SEED) - first
  for seed in (min(seeds), max(seeds)) if len(seeds) else ():
    if not 0 <= seed < size:
      raise ValueError(
        f"Seed {seed} is outside split {split!r}; expected 0 to {size - 1}: each split counts from 0; choose another "
        "first seed, or fewer episodes."
      )


@in_32_bits
def seed_key(seed: int | Int[Array, ""], split: str = "train") -> PRNGKeyArray:
  """The key of episode `seed` of a split.

  Splits own disjoint ranges of seeds, so a held-out layout is never a training layout: train has 0 .. 999,999,999,
  heldout and unseen 500 million each after that; `seed` counts from 0 within its split. Traceable in `seed`; what is
  traced is not checked, so callers under jit or vmap call `check_seeds` before.

  Raises:
    ValueError: the split does not exist or, for a Python int, the seed is outside it.
  """
  check_seeds([int(seed)] if isinstance(seed, (int, np.integer)) else [], split)
  return jax.random.key(SPLITS[split] + seed)


def _allowed(held_out: bool) -> np.ndarray:
  """bool[24]: combinations (shape * 6 + color) inside, or outside, HELD_OUT."""
  return np.array([((c, s) in HELD_OUT) == held_out for s in SHAPES for c in COLORS])


def _choose(
  noise: Float[Array, " n"], wanted: Bool[Array, " n"], possible: Bool[Array, " n"] | None = None
) -> Int[Array, ""]:
  """An index drawn evenly (by Gumbel noise) from `wanted`, or from `possible` where nothing wanted exists."""
  otherwise = -jnp.inf if possible is None else jnp.where(possible, -60.0, -jnp.inf)
  return jnp.argmax(jnp.where(wanted, 0.0, otherwise) + noise)


def _things(key: PRNGKeyArray, suite: Int[Array, ""], split: str) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
  """Draws kinds and colors i32[n]: the target, distractors that share its shape or its color, the containers."""
  noise = jax.random.gumbel(key, (5, 24))
  combo = jnp.arange(24)
  shape, color = combo // 6, combo % 6
  target_pool = jnp.asarray(_allowed(held_out=split == "unseen"))
  pool = target_pool | (split == "unseen")
  right_shape = jnp.where(suite == ALIGN, shape == PEG, shape != PEG)

  a = _choose(noise[0], target_pool & right_shape)
  distinct = pool & right_shape & (combo != a)
  b = _choose(noise[1], distinct & jnp.where(suite == LONG, target_pool, shape == a // 6), distinct)
  b = jnp.where(suite == SPATIAL, a, b)
  distinct = pool & (shape != PEG) & (combo != a) & (combo != b)
  c = _choose(noise[2], distinct & (color == a % 6) & (shape != a // 6), distinct)

  free = (jnp.arange(6) != a % 6) & ((suite != LONG) | (jnp.arange(6) != b % 6))
  first = _choose(noise[3, :6], free)
  second = _choose(noise[4, :6], free & (jnp.arange(6) != first))
  two = jnp.array([NONE, BOWL, NONE, PLATE, PLATE, SLOT])[suite]
  kind = jnp.stack([a // 6, b // 6, c // 6, jnp.where(suite == ALIGN, SLOT, BOWL), two])
  second = jnp.where(two == PLATE, WHITE, second)
  return kind.astype(jnp.int32), jnp.stack([a % 6, b % 6, c % 6, first, second]).astype(jnp.int32)


def _layout(
  key: PRNGKeyArray, suite: Int[Array, ""], kind: Int[Array, " n"], relations: Int[Array, "2"]
) -> Float[Array, "n 2"]:
  """Draws where things lie: each takes the first of 64 random places that leaves room, or the roomiest.

  In suite `spatial` the two identical objects lie within 25 degrees of their relation's direction from the bowl.
  """
  foot = jnp.asarray(FOOT)[kind]
  place = jnp.zeros((MAX_OBJECTS, 2))
  noise = jax.random.uniform(key, (MAX_OBJECTS, _CANDIDATES, 2), minval=-1.0)
  order = (3, 4, 0, 1, 2)
  for step, i in enumerate(order):
    spots = noise[i] * (jnp.where(suite == SPATIAL, 0.05, 0.135) if i >= GRASPABLE else 0.17)
    if i < 2:
      way = jnp.asarray(DIRECTIONS)[relations[i]]
      angle, reach = jnp.arctan2(way[1], way[0]) + 0.44 * noise[i, :, 0], 0.1275 + 0.0225 * noise[i, :, 1]
      cone = place[3] + reach[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
      spots = jnp.where(suite == SPATIAL, cone, spots)
    room = jnp.full((_CANDIDATES,), _MARGIN)
    for j in order[:step]:
      room = jnp.minimum(room, jnp.linalg.norm(spots - place[j], axis=-1) - foot[i] - foot[j])
    place = place.at[i].set(jnp.where(kind[i] == NONE, 10.0, spots[jnp.argmax(room)]))
  return place


def _push_room(place: Float[Array, "n 2"], kind: Int[Array, " n"]) -> Bool[Array, "4"]:
  """Which of the DIRECTIONS object 0 can be pushed in, with room for the gripper behind it and nothing in the way."""
  heading = jnp.asarray(DIRECTIONS)
  away = place[1:] - place[0]
  along = jnp.clip(away @ heading.T, -0.07, 0.10)  # [n-1 4]
  gap = jnp.linalg.norm(away[:, None] - along[..., None] * heading, axis=-1) - jnp.asarray(FOOT)[kind[1:], None]
  return jnp.all(gap > 0.03, axis=0) & jnp.all(jnp.abs(place[0] + 0.10 * heading) < 0.20, axis=-1)


def _goals(key: PRNGKeyArray, suite: Int[Array, ""], place: Float[Array, "n 2"], kind: Int[Array, " n"]) -> tuple:
  """Draws what is asked of the layout: verb, target, destination i32[2] each, and the ending of suite `goal` i32[]."""
  noise = jax.random.gumbel(key, (2, 4))
  ways = _push_room(place, kind)
  way = _choose(noise[0], ways, jnp.ones(4, bool))
  end = _choose(noise[1, :3], jnp.ones(3, bool))
  end = jnp.where(end < 2, end, jnp.where(ways.any(), 2 + way, way % 2))  # 0 bowl, 1 plate, 2..5 push
  goal_verb, goal_destination = jnp.where(end < 2, PUT, PUSH), jnp.where(end < 2, 3 + end, end - 2)
  verb = jnp.array([[LIFT, 0], [PUT, 0], [LIFT, 0], [0, 0], [PUT, PUT], [INSERT, 0]])[suite]
  verb = verb.at[0].set(jnp.where(suite == GOAL, goal_verb, verb[0]))
  destination = jnp.array([3, 4]).at[0].set(jnp.where(suite == GOAL, goal_destination, 3))
  return verb.astype(jnp.int32), jnp.arange(2, dtype=jnp.int32), destination.astype(jnp.int32), end


def _instruction(
  suite: Int[Array, ""], kind: Int[Array, " n"], color: Int[Array, " n"], relation: Int[Array, ""], end: Int[Array, ""]
) -> Int[Array, ""]:
  """The index into INSTRUCTIONS, from the integers of a task."""
  a, b = kind[0] * 6 + color[0], kind[1] * 6 + color[1]
  bowl = color[3]
  local = jnp.stack(
    [a, a * 6 + bowl, (a * 4 + relation) * 6 + bowl, a * 6 + end, a * 17 + b - (b > a), color[0] * 6 + bowl]
  )
  return (jnp.asarray(_OFFSET)[suite] + local[suite]).astype(jnp.int32)


@in_32_bits
def reset(key: PRNGKeyArray, suite: str | int | Int[Array, ""], split: str = "train") -> State:
  """Draws the first state of an episode.

  Args:
    key: all randomness; `seed_key` keeps the layouts of splits apart.
    suite: a name, a number, or a traced number, so that `vmap` mixes suites in one batch.
    split: "train" and "heldout" hold only seen combinations of color and shape; in "unseen" every target is one of
      HELD_OUT and distractors are any.

  Raises:
    ValueError: the suite or the split does not exist; the message names the nearest.
  """
  suite = jnp.asarray(suite_index(suite), jnp.int32)
  k_things, k_relation, k_layout, k_goal, k_pose = jax.random.split(key, 5)
  kind, color = _things(k_things, suite, check_split(split))
  relation = jax.random.randint(k_relation, (), 0, 4)
  place = _layout(k_layout, suite, kind, jnp.stack([relation, relation ^ 1]))  # ^ 1: the opposite direction
  verb, target, destination, end = _goals(k_goal, suite, place, kind)
  noise = jax.random.uniform(k_pose, (MAX_OBJECTS + 3,), minval=-1.0)
  center = jnp.concatenate([place, jnp.asarray(HALF)[kind, 2:]], -1)
  zero = jnp.zeros((), jnp.int32)
  return State(
    position=jnp.array([0.0, -0.02, 0.20]) + 0.03 * noise[MAX_OBJECTS:],
    rotation=jnp.zeros(3),
    finger=jnp.asarray(0.04),
    held=zero - 1,
    grip=jnp.zeros(3),
    grip_yaw=jnp.zeros(()),
    kind=kind,
    color=color,
    center=center,
    yaw=noise[:MAX_OBJECTS] * jnp.asarray(YAW)[kind],
    origin=place,
    suite=suite,
    verb=verb,
    target=target,
    destination=destination,
    relation=relation,
    instruction=_instruction(suite, kind, color, relation, end),
    time=zero,
  )


def angle_between(angle: Float[Array, "..."], period: float | Float[Array, "..."] = 2 * math.pi) -> Float[Array, "..."]:
  """Wraps an angle in radians to [-period/2, period/2]."""
  return angle - period * jnp.round(angle / period)
