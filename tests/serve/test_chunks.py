"""Which action is executed when: open loop, early queries, late answers, blending."""

import numpy as np
import pytest

from semanticvla_jax.serve.chunks import Chunks


def chunk(first, k=4):
  """Actions [k 2] that say when they were meant for."""
  return np.stack([np.arange(first, first + k, dtype=np.float32)] * 2, axis=1)


def times(chunks, n):
  return [None if (action := chunks.next()) is None else float(action[0]) for _ in range(n)]


def test_open_loop_executes_the_whole_chunk_and_then_holds():
  chunks = Chunks()
  assert chunks.wants and chunks.next() is None and chunks.executed == 0
  chunks.add(chunk(0), 0)
  assert not chunks.wants and times(chunks, 5) == [0, 1, 2, 3, None]
  assert chunks.wants and chunks.executed == 4


def test_early_queries_replace_the_rest():
  chunks = Chunks(2)
  chunks.add(chunk(0), 0)
  assert times(chunks, 2) == [0, 1] and chunks.wants
  chunks.add(chunk(2), 2)
  assert times(chunks, 4) == [2, 3, 4, 5]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_late_answer_loses_as_many_actions_as_were_executed_meanwhile(late):
  chunks = Chunks(1)
  chunks.add(chunk(0), 0)
  assert times(chunks, 1) == [0.0]
  asked = chunks.executed
  times(chunks, late)
  chunks.add(chunk(1), asked)
  assert times(chunks, 4 - late) == [*range(1 + late, 5)] and chunks.next() is None


def test_a_robot_that_held_executes_what_it_missed():
  """Delay counts in actions executed, not in time: nothing was executed, nothing is skipped."""
  chunks = Chunks()
  assert times(chunks, 3) == [None] * 3
  chunks.add(chunk(0), 0)
  assert times(chunks, 4) == [0, 1, 2, 3]


def test_without_alignment_the_first_action_is_of_the_past():
  chunks = Chunks(1, align=False)
  chunks.add(chunk(0), 0)
  times(chunks, 3)
  chunks.add(chunk(1), 1)
  assert times(chunks, 2) == [1, 2]


def test_an_answer_later_than_its_chunk_is_empty():
  chunks = Chunks()
  chunks.add(chunk(0), 0)
  times(chunks, 4)
  chunks.add(chunk(0), 0)
  assert len(chunks) == 0 and chunks.wants


def test_blending_is_linear_over_the_overlap_and_spares_discrete_dimensions():
  chunks = Chunks(1, blend=3, discrete=[1])
  chunks.add(np.zeros((4, 2), np.float32), 0)
  chunks.next()
  chunks.add(np.ones((4, 2), np.float32), 1)
  actions = np.stack([chunks.next() for _ in range(4)])
  np.testing.assert_array_equal(actions[:, 0], [0.25, 0.5, 0.75, 1.0])
  np.testing.assert_array_equal(actions[:, 1], 1.0)


def test_an_episode_begins_empty():
  chunks = Chunks()
  chunks.add(chunk(0), 0)
  chunks.reset()
  assert len(chunks) == 0 and chunks.wants
  with pytest.raises(ValueError, match="at least 1"):
    Chunks(0)
