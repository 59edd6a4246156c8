"""Suites for measurement only, each a change of one of tasks.SUITES: clutter, and words that several objects fit.

    place_clutter0 … place_clutter8    suite `place` with 0 to 8 distractors; `place` itself has two
    place_twins                        the sentence of `place`, and two objects of its color and shape
    place_shape                        "pick up the cube and …": the target and a distractor have the shape
    place_color                        "pick up the red one and …": the target and a distractor have the color

An episode has the target, the bowls and the gripper's pose of the base suite at the same seed, so that suites compare
episode by episode. Distractors are nested: each number adds one object to the number below it. Nothing of the six
suites changes, and no policy is trained on these.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from semanticvla_jax.tabletop import tasks
from semanticvla_jax.tabletop.tasks import COLORS, FOOT, HALF, NONE, PEG, SHAPES, YAW, State, in_32_bits

DISTRACTORS = 8  # at most
_OWN = 2  # distractors of suite `place`: objects 1 and 2
_REACH = 0.18  # meters from the middle, in x and y, within which further distractors lie
_MARGIN = 0.030  # free space wanted between two objects
_CANDIDATES = 256  # random places of each further distractor


class Probe(NamedTuple):
  """One suite: the suite it changes, its number of distractors (None: as there), and what its sentences leave open."""

  base: str
  distractors: int | None = None
  open: str | None = None


CLUTTER = {f"place_clutter{n}": Probe("place", distractors=n) for n in range(DISTRACTORS + 1)}
AMBIGUOUS = {f"place_{what}": Probe("place", open=what) for what in ("twins", "shape", "color")}
PROBES = CLUTTER | AMBIGUOUS
SUITES = (*tasks.SUITES, *PROBES)

_VAGUE = {
  "shape": tuple(f"pick up the {s} and place it in the {c} bowl" for s in SHAPES[:3] for c in COLORS),
  "color": tuple(f"pick up the {d} one and place it in the {c} bowl" for d in COLORS for c in COLORS),
}
SENTENCES = (*tasks.INSTRUCTIONS, *(sentence for sentences in _VAGUE.values() for sentence in sentences))


def base(suite: str | int | Int[Array, ""]) -> str | int | Int[Array, ""]:
  """The suite of tasks.SUITES behind a suite; numbers pass. Raises ValueError if there is none of that name."""
  if not isinstance(suite, str) or suite in tasks.SUITES:
    return suite
  if suite not in PROBES:
    near = difflib.get_close_matches(suite, SUITES, 1, 0.0)[0]
    raise ValueError(f"Suite {suite!r} does not exist; expected one of {', '.join(SUITES)}: did you mean {near!r}?")
  return PROBES[suite].base


def max_steps(suite: str | int) -> int:
  """How many actions an episode of the suite may take."""
  return tasks.max_steps(base(suite))


def instructions(suite: str) -> list[str]:
  """The sentences of a suite, neighbors in SENTENCES."""
  probe = PROBES.get(suite)
  return [*_VAGUE[probe.open]] if probe is not None and probe.open in _VAGUE else tasks.instructions(base(suite))


def first_sentence(suite: str) -> int:
  """The index in SENTENCES of the suite's first."""
  return SENTENCES.index(instructions(suite)[0])


def instruction(state: State) -> str:
  """The sentence of one (unbatched) state, on the host."""
  return SENTENCES[int(state.instruction)]


@in_32_bits
def reset(key: PRNGKeyArray, suite: str | int | Int[Array, ""], split: str = "train") -> State:
  """As `tasks.reset`, of any suite of SUITES; `instruction` is an index into SENTENCES.

  A state of a cluttered suite has as many objects as it needs, the further distractors behind the containers.
  """
  state = tasks.reset(key, base(suite), split)
  probe = PROBES.get(suite) if isinstance(suite, str) else None
  if probe is None:
    return state
  if probe.distractors is not None:
    return _clutter(jax.random.fold_in(key, 1), state, probe.distractors, split)
  return _ambiguous(state, probe.open)


def _ambiguous(state: State, what: str) -> State:
  """A state of `place` whose words several objects fit: its first distractor shares the shape, its second the color."""
  shape, color, bowl = state.kind[0], state.color[0], state.color[3]
  if what == "twins":
    state = state.replace(color=state.color.at[1].set(color), kind=state.kind.at[1].set(shape))
    return state.replace(fitting=(state.kind == shape) & (state.color == color))
  index = (shape if what == "shape" else color) * len(COLORS) + bowl
  first = SENTENCES.index(_VAGUE[what][0])
  fits = state.kind == shape if what == "shape" else (state.color == color) & (state.kind <= PEG)
  return state.replace(fitting=fits, instruction=(first + index).astype(jnp.int32))


def _clutter(key: PRNGKeyArray, state: State, distractors: int, split: str) -> State:
  """A state of `place` with another number of distractors: some of its two taken away, or more of them."""
  for i in range(1 + distractors, 1 + _OWN):
    state = state.replace(
      kind=state.kind.at[i].set(NONE),
      center=state.center.at[i].set(jnp.array([10.0, 10.0, 0.0])),
      origin=state.origin.at[i].set(10.0),
    )
  more = max(distractors - _OWN, 0)
  if not more:
    return state
  k_things, k_places, k_yaws = jax.random.split(key, 3)
  things = _further_things(k_things, state, split)[:more]
  kind, color = things // len(COLORS), things % len(COLORS)
  spots = jax.random.uniform(k_places, (DISTRACTORS - _OWN, _CANDIDATES, 2), minval=-_REACH, maxval=_REACH)[:more]
  place = _places(spots, state.origin, jnp.asarray(FOOT)[state.kind], jnp.asarray(FOOT)[kind])
  yaw = jax.random.uniform(k_yaws, (DISTRACTORS - _OWN,), minval=-1.0)[:more] * jnp.asarray(YAW)[kind]
  center = jnp.concatenate([place, jnp.asarray(HALF)[kind, 2:]], axis=-1)
  more_of = dict(kind=kind, color=color, center=center, yaw=yaw, origin=place)
  return state.replace(**{name: jnp.concatenate([getattr(state, name), x]) for name, x in more_of.items()})


def _further_things(key: PRNGKeyArray, state: State, split: str) -> Int[Array, " c"]:
  """Combinations (shape * 6 + color) in a random order, those that the split allows and the state lacks first."""
  allowed = np.array(
    [s != "peg" and (split == "unseen" or (c, s) not in tasks.HELD_OUT) for s in SHAPES for c in COLORS]
  )
  combo = jnp.arange(len(allowed))
  there = (state.kind[:3, None] * len(COLORS) + state.color[:3, None] == combo).any(axis=0)
  order = jax.random.uniform(key, combo.shape) - (jnp.asarray(allowed) & ~there)
  return jnp.argsort(order).astype(jnp.int32)


def _places(
  spots: Float[Array, "e c 2"], taken: Float[Array, "n 2"], foot: Float[Array, " n"], own: Float[Array, " e"]
) -> Float[Array, "e 2"]:
  """The place of each of e objects: the first of its c spots with room round it, or the roomiest.

  Args:
    spots: candidates. taken, foot: of what is there already, and its radius. own: radii of the new objects.
  """
  found = []
  for i in range(len(spots)):
    gap = jnp.linalg.norm(spots[i][:, None] - taken, axis=-1) - foot - own[i]
    room = jnp.minimum(gap.min(axis=-1), _MARGIN)
    found.append(spots[i][jnp.argmax(room)])
    taken, foot = jnp.concatenate([taken, found[-1][None]]), jnp.append(foot, own[i])
  return jnp.stack(found)
