"""Pictures show what the model did, and films play."""

import imageio_ffmpeg
import jax
import numpy as np
import policies
import pytest
from helpers import TINY

from semanticvla_jax.evaluate import visualize
from semanticvla_jax.tabletop import physics, tasks

SAID = ("pick up the red cube", "pick up the green ball and place it in the blue bowl")


@pytest.fixture(scope="module")
def looks():
  """One picture, told two things; and another picture."""
  seen = [policies.observation(0, prompt=SAID[0]), policies.observation(0, prompt=SAID[1]), policies.observation(1)]
  return visualize.looks(policies.policy(), seen)


def test_a_look_is_what_the_pruners_did(looks):
  one = looks[0]
  assert one.kept.shape == (2, 64) and (one.kept.sum(axis=1) == TINY["keep"]).all()
  assert one.cues.shape == (2, TINY["cues"], 64)
  np.testing.assert_allclose(one.cues.sum(axis=2), 1, atol=1e-5)
  assert one.aggregation.shape == (2, 64) and (0 < one.aggregation.sum(axis=1)).all()
  assert (one.aggregation.sum(axis=1) < 1).all(), "what goes to prefix tokens and queries is left out"
  for look, sentence in zip(looks, SAID):
    question = f"what action should the robot take to {sentence}"
    assert all(word in question.split() for view in look.words for word in view), look.words


def test_aggregation_is_attention_to_patches_and_nothing_else(looks):
  policy = policies.policy()
  seen = policy.observe([policies.observation(0, prompt=SAID[0])])
  attention = jax.jit(lambda p, x: policy.model.apply({"params": p}, x).intermediates["dino_attention"])
  expected = np.asarray(attention(policy.params, seen))  # [v h q l], l = class token, registers, patches, queries
  assert expected.shape[-1] == 1 + 4 + 64 + TINY["keep"]
  np.testing.assert_allclose(looks[0].aggregation, expected[..., 5 : 5 + 64].mean(axis=(1, 2)), atol=1e-5)


def test_the_instruction_changes_the_look_and_so_does_the_picture(looks):
  told, other, elsewhere = looks
  assert (told.kept != other.kept).any() and (told.kept != elsewhere.kept).any()
  assert np.abs(told.aggregation - other.aggregation).max() > 1e-5, "through FiLM"


def test_every_letter_of_a_caption_can_be_drawn(looks):
  font, image = visualize._font(13), np.zeros((32, 32, 3), np.uint8)
  rows = [tile.caption for row in visualize.tiles([image, image], looks[0]) for tile in row]
  rows += [tile.caption for tile in visualize.cue_tiles(image, looks[0])] + ["…"]
  missing = bytes(font.getmask("\uffff"))
  assert not {letter for letter in "".join(rows) if bytes(font.getmask(letter)) == missing}
  assert visualize._piece(policies.policy(), policies.tokenizers().siglip.piece_to_id("▁")) == "_"


def test_kept_patches_stay_and_the_rest_goes_dark():
  image = np.random.default_rng(0).integers(100, 256, (64, 64, 3)).astype(np.uint8)
  kept = np.zeros(16, bool)
  kept[[1, 6]] = True
  shown = visualize.kept_overlay(image, kept)
  np.testing.assert_array_equal(shown[1:15, 17:31], image[1:15, 17:31])
  np.testing.assert_array_equal(shown[17:31, 33:47], image[17:31, 33:47])
  assert shown[40:].max() < 0.5 * image[40:].max() and (shown[0, 16:32] == 255).all()


def test_the_brightest_color_lies_on_the_greatest_weight():
  weights = np.full(16, 0.05)
  weights[6] = 0.25
  shown = visualize.heat_overlay(np.full((64, 64, 3), 128, np.uint8), weights).astype(int).sum(axis=2)
  assert (np.argwhere(shown == shown.max()).min(axis=0) == [16, 32]).all()
  assert (np.argwhere(shown == shown.max()).max(axis=0) == [31, 47]).all()
  flat = visualize.heat_overlay(np.full((64, 64, 3), 128, np.uint8), np.full(16, 0.1))
  assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1


def test_tiles_and_sheets(looks):
  images = [np.full((40, 40, 3), shade, np.uint8) for shade in (60, 120)]
  rows = visualize.tiles(images, looks[0])
  assert [row[0].caption for row in rows] == ["front camera", "wrist camera"]
  assert [len(row) for row in rows] == [4, 4]
  assert rows[0][1].caption == "kept 8 of 64 patches"
  assert [tile.caption.split("”")[0][1:] for tile in visualize.cue_tiles(images[0], looks[0])] == looks[0].words[0]
  assert visualize.sheet(rows).shape == (2 * 68 + 8, 4 * 48 + 8, 3)
  nothing = visualize.Look(None, None, [], None)
  assert [len(row) for row in visualize.tiles(images, nothing)] == [1, 1]
  assert not visualize.cue_tiles(images[0], nothing)


def test_pictures_of_states_are_what_the_environment_shows():
  keys = jax.vmap(tasks.seed_key)(np.arange(18))  # more than are rendered together
  states = jax.jit(jax.vmap(lambda key: tasks.reset(key, "pick")))(keys)
  shown = visualize.pictures(jax.tree.map(np.asarray, states), size=32)
  assert shown.shape == (18, 2, 32, 32, 3)
  for i in (0, 17):
    state = jax.tree.map(lambda x: np.asarray(x[i]), states)  # noqa: B023
    seen = visualize.observation(state, 32)
    difference = np.abs(shown[i, 0].astype(int) - seen["observation/image"])
    assert np.mean(difference > 2) < 0.01
    assert seen["prompt"] == tasks.instruction(state)
    np.testing.assert_allclose(seen["observation/state"], physics.proprio(state), atol=1e-6)


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_film_plays_and_ends_with_the_verdict(tmp_path):
  frames = np.random.default_rng(0).integers(0, 256, (5, 2, 90, 90, 3)).astype(np.uint8)
  done = visualize.film(frames, "pick up the red cube", success=True)
  failed = visualize.film(frames, "pick up the red cube", success=False)
  assert len(done) == 5 + visualize.FRAMES_A_SECOND and (done[4] == done[-1]).all()
  assert (done[0] == failed[0]).all() and (done[-1] != failed[-1]).any(), "only the end tells"
  np.testing.assert_array_equal(done[2, 8:98, 8:98], frames[2, 0])
  visualize.write_mp4(tmp_path / "film.mp4", done)
  count, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "film.mp4"))
  assert count == 15 and seconds == pytest.approx(1.5, abs=0.1)
  reader = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
  assert next(reader)["size"] == done.shape[2:0:-1]
  reader.close()


def test_captions_that_do_not_fit_are_cut():
  frames = np.zeros((1, 2, 60, 60, 3), np.uint8)
  long = visualize.film(frames, "pick up the red cube " * 9, True, "push the red cube to the left " * 9)
  assert (long[:, :, -4:] == 255).all(), "the margin stays free"
