"""Which of several fitting objects is taken: counted from states put together by hand, and by the command."""

import jax
import numpy as np
import policies
import pytest

from semanticvla_jax.evaluate import choices
from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.tabletop import probes, tasks

STEPS = 3


@pytest.fixture(scope="module")
def episodes() -> Episodes:
  """Four episodes of place_twins: the nearest grasped, the other one, one that does not fit, and nothing moved."""
  first = jax.jit(lambda: probes.reset(tasks.seed_key(0, "heldout"), "place_twins", "heldout"))()
  distance = np.linalg.norm(np.asarray(first.center)[:2, :2] - np.asarray(first.position)[:2], axis=-1)
  near = int(np.argmin(distance))
  states = jax.tree.map(lambda x: np.repeat(np.repeat(np.asarray(x)[None, None], STEPS + 1, 0), 4, 1), first)
  held, center = np.full((STEPS + 1, 4), -1), np.array(states.center)
  for i, index in enumerate((near, 1 - near, 2)):
    held[1:, i] = index
    center[2:, i, index, 2] += 0.05
  held[2, 0] = 2  # what is grasped later does not count
  states = states.replace(held=held, center=center)
  sentence = [probes.instruction(first)] * 4
  success = np.array([True, True, False, False])
  return Episodes(np.arange(4), success, np.full(4, STEPS), np.zeros(4, bool), sentence, sentence, states)


def test_what_is_grasped_first_is_the_choice(episodes):
  np.testing.assert_array_equal(choices.chosen(episodes), [0, 1, 2, 3])
  np.testing.assert_array_equal(choices.moved(episodes), [True, True, True, False])
  text = "\n".join(choices.lines("place_twins", episodes))
  assert "success 2 of 4, 50.0 % (15–85 %)" in text
  assert "nearest to the gripper 1 of 4, 25.0 % (5–70 %), of these successes 1" in text
  assert "does not fit 1 of 4, 25.0 % (5–70 %), of these successes 0" in text
  assert "no object moved by more than 1 cm 1 of 4" in text


def test_what_comes_after_an_episode_s_end_does_not_count(episodes):
  held = np.array(episodes.states.held)
  held[:, 0] = [-1, -1, -1, 0]
  late = episodes._replace(states=episodes.states.replace(held=held), steps=np.array([2, STEPS, STEPS, STEPS]))
  assert choices.chosen(late)[0] == 3


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
  folder = policies.saved_for_libero(tmp_path / "policy")
  main(["choices", f"--policy={folder}", "--suite=place_color", "--episodes=2"])
  printed = capsys.readouterr().out
  assert printed.startswith("place_color: success 0 of 2, 0 % (0–66 %)\n") and printed.count("of 2, ") == 6
  with pytest.raises(SystemExit, match="error: --suite: got 'place'; expected some of place_twins,place_shape"):
    main(["choices", f"--policy={folder}", "--suite=place"])
