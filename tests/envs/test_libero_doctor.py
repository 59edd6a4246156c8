"""The known traps, each planted and found."""

import contextlib
from pathlib import Path

import numpy as np
import policies
import pytest

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics, writer
from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.libero import doctor, opengl, suites

DATA = policies.DATA | {"augment": True, "crop_area": 0.9, "normalisation": "bounds_q99"}
HEALTHY = policies.CONFIG | {"data": DATA}


def proprio(rotation):
  """Statistics of a gripper that points down and turns about x between the two angles."""
  rng = np.random.default_rng(0)
  rows = rng.normal(0, 0.1, (400, 8)).astype(np.float32)
  rows[:, 3] = np.resize(rotation, 400)
  return statistics.compute(rows)


DOWN = proprio([3.0, 3.1, 3.3])  # past half a turn: no flip
FLIPPED = proprio([3.0, 3.1, 3.3 - 2 * np.pi])


@pytest.mark.parametrize(
  "stats, convention, applies",
  [
    (DOWN, "robosuite", False),
    (DOWN, "positive_w", True),
    (FLIPPED, "robosuite", True),
    (FLIPPED, "positive_w", False),
    (proprio([1.0, 2.0]), "robosuite", None),
    (None, "robosuite", None),
  ],
)
def test_quaternion_convention(stats, convention, applies):
  assert doctor.quaternion(stats, convention).applies is applies


@pytest.mark.parametrize(
  "changes, applies",
  [
    ({}, False),
    ({"crop_area": None}, True),
    ({"crop_area": 0.8}, True),
    ({"augment": False}, True),
    ({"augment": False, "crop_area": None}, False),
    ({"augment": None}, None),
    ({"diagonal_crop": False}, False),
    ({"diagonal_crop": False, "crop_area": None}, True),
    ({"diagonal_crop": False, "crop_area": 0.8}, False),
    ({"diagonal_crop": False, "augment": False}, False),
  ],
)
def test_missing_crop(changes, applies):
  assert doctor.crop({"data": DATA | changes}).applies is applies


def test_extremes_for_quantiles():
  action = policies.stats().action
  assert doctor.bounds(HEALTHY, action).applies is False
  assert doctor.bounds({"data": DATA | {"normalisation": "bounds"}}, action).applies
  copied = action.replace(q01=action.min, q99=action.max)
  assert doctor.bounds(HEALTHY, copied).applies


@pytest.mark.parametrize(
  "model, applies",
  [
    ({}, False),
    ({"mask": "full"}, False),
    ({"mask": "causal"}, True),
    ({"mask": "causal", "coupler": None}, False),
  ],
)
def test_unmasked_action_block(model, applies):
  assert doctor.action_block({"model": model}).applies == applies


def test_a_gripper_that_was_not_converted():
  action = policies.stats().action
  assert doctor.gripper(action).applies is False
  low = np.array(action.min)
  low[-1] = -1
  assert doctor.gripper(action.replace(min=low)).applies
  assert doctor.gripper(action.replace(mask=np.ones(7, bool))).applies


@pytest.mark.parametrize(
  "names, applies",
  [
    (["libero_goal_no_noops"], False),
    (["libero_goal"], False),
    (["libero_4_task_suites_no_noops"], False),
    (["libero_object_no_noops", "libero_goal_no_noops"], False),
    (["libero_object_no_noops"], True),
  ],
)
def test_statistics_of_another_suite(names, applies):
  assert doctor.key(names, "libero_goal").applies == applies


@pytest.mark.parametrize(
  "mujoco, robosuite, applies",
  [
    ("3.2.3", "1.4.1", (False, False, False)),
    ("3.3.2", "1.4.0", (False, False, False)),
    ("3.3.3", "1.4.0", (True, False, False)),
    ("3.3.7", "1.4.0", (True, False, False)),
    ("3.4.0", "1.4.0", (True, True, False)),
    ("3.8.1", "1.4.0", (True, True, False)),
    ("3.10.0", "1.5.1", (True, True, True)),
    (None, None, (None, None, None)),
  ],
)
def test_versions(mujoco, robosuite, applies):
  found = doctor.simulator_versions({"mujoco": mujoco, "robosuite": robosuite})
  assert tuple(one.applies for one in found) == applies
  assert all("make sim" in one.remedy for one in found)


@pytest.mark.parametrize(
  "turn, applies, best",
  [
    ((1, 1), False, "as it is 0"),
    ((-1, -1), True, "180° 0"),
    ((-1, 1), True, "upside down 0"),
    ((1, -1), True, "mirrored 0"),
  ],
)
def test_rotation(turn, applies, best):
  rng = np.random.default_rng(0)
  frame = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
  found = doctor.rotation([frame, frame], np.ascontiguousarray(frame[:: turn[0], :: turn[1]]))
  assert found.applies == applies and best in found.seen


def test_nothing_to_run_with_says_how_to_get_it(tmp_path):
  assets, _ = doctor.libraries(str(tmp_path))
  assert assets.applies and "hf download" in assets.seen


@pytest.mark.parametrize(
  "drawn, other, applies, words",
  [
    (opengl.Drawn(2, "a GPU", None), None, False, "egl: drawn by a GPU, EGL device 0 of 2"),
    (opengl.Drawn(1, None, "ImportError: Cannot initialize"), None, True, "apt-get install libegl1"),
    (opengl.Drawn(None, None, "AttributeError: no EGL"), "llvmpipe", True, "--renderer=osmesa draws here"),
    (opengl.Drawn(None, None, "the process ended with status -11"), None, True, "status -11"),
    (opengl.Drawn(None, None, "ModuleNotFoundError: mujoco", missing=True), None, None, "make sim"),
  ],
)
def test_opengl_is_drawn_with(drawn, other, applies, words, monkeypatch):
  def draw(renderer, device=None):
    return drawn if renderer == "egl" else opengl.Drawn(None, other, None if other else "no library")

  monkeypatch.setattr(opengl, "draw", draw)
  opengl._first.cache_clear()
  found = doctor.drawing("egl")
  opengl._first.cache_clear()
  assert found.applies is applies and words in doctor.show([found])


def test_a_device_that_there_is_not_is_found(monkeypatch):
  monkeypatch.setattr(opengl, "draw", lambda *_: opengl.Drawn(2, None, "must be between"))
  found = doctor.libraries(None, "egl", 5)[-1]
  assert found.applies and "got 5; expected 0 to 1, for this machine has 2 EGL devices" in found.seen


@pytest.mark.parametrize("quality, own, applies", [(95, None, False), (None, None, True), (None, 95, False)])
def test_frames_without_a_jpeg(quality, own, applies):
  found = doctor.image_path({"data": DATA | {"jpeg_quality": own, "dct": "fast"}}, quality)
  assert found.applies is applies and "Lanczos-3" in found.seen and ("fast DCT" in found.seen) is not applies


@pytest.mark.parametrize(
  "changes, applies",
  [
    ({}, False),
    ({"pruner_text": "prompt"}, False),
    ({"pruner_text_eval": "question"}, False),
    ({"pruner_text": "question", "pruner_text_eval": "prompt"}, True),
  ],
)
def test_another_text_for_the_pruner(changes, applies):
  assert doctor.pruner_text({"data": DATA | changes}).applies is applies


def test_seeds_that_make_an_episode_depend_on_those_before():
  assert doctor.seeding("environment").applies and not doctor.seeding("episode").applies


@pytest.mark.parametrize(
  "backend, devices, applies",
  [
    ("cpu", ["/dev/nvidia0"], True),
    ("gpu", ["/dev/nvidia0"], False),
    ("cpu", [], False),
  ],
)
def test_an_accelerator_left_idle(backend, devices, applies):
  assert doctor.accelerator(backend, devices).applies is applies


@pytest.mark.parametrize(
  "digest, applies, words",
  [
    ("b255b0b0b5a3b489", False, "published"),
    ("7a3e5bfefe92d5b1", True, "visual stand-ins for 15"),
    ("0123456789abcdef", None, "without a name"),
  ],
)
def test_assets_are_judged_by_their_hash(digest, applies, words):
  found = doctor.looks(digest)
  assert found.applies is applies and f"hash {digest}" in found.seen and words in found.seen


def test_data_with_another_gripper_convention(tmp_path):
  rng = np.random.default_rng(0)
  action = rng.uniform(-1, 1, (12, 7)).astype(np.float32)
  action[:, 6] = np.arange(12) < 6  # 1 open, 0 closed
  image = rng.integers(0, 256, (12, 16, 16, 3), np.uint8)
  state = rng.normal(size=(12, 8)).astype(np.float32)
  writer.write(tmp_path, "libero_goal_no_noops", [writer.Episode(image, image, state, action, "push the plate")])
  found, frames = doctor.training_data(str(tmp_path), "libero_goal_no_noops")
  assert found.applies and "got gripper commands in [0, 1]; expected -1 open" in found.seen and not frames


@pytest.fixture
def folder(tmp_path):
  def save(config=HEALTHY, name="libero_goal_no_noops", rotation=DOWN):
    stats = policies.stats()._replace(proprio=rotation)
    return str(
      policy_folder.save_policy(
        tmp_path / "policy",
        {"x": np.zeros(1, np.float32)},
        config=config,
        statistics={name: statistics.to_openvla(stats)},
      )
    )

  return save


def test_a_healthy_folder_has_no_trap(folder):
  assert not [one for one in doctor.policy(folder(), "libero_goal") if one.applies is not False]


def test_every_planted_trap_of_a_folder_is_found_by_the_command(folder, capsys, monkeypatch):
  monkeypatch.setattr(suites, "find_assets", lambda given: Path(__file__).parent / "none")
  planted = HEALTHY | {
    "model": policies.TINY | {"mask": "causal"},
    "data": DATA | {"crop_area": None, "normalisation": "bounds"},
  }
  path = folder(planted, "libero_spatial_no_noops", FLIPPED)
  with pytest.raises(SystemExit) as ended:
    main(["doctor", f"--policy={path}", "--suite=libero_goal"])
  lines = capsys.readouterr().out.splitlines()
  applies = {line.split("  ", 1)[1].split(":")[0] for line in lines if line.startswith("APPLIES")}
  wanted = {"statistics key", "center crop", "mask of the action block", "quaternion convention", "statistics"}
  assert ended.value.code == 1 and wanted <= applies and "gripper" not in applies
  assert any(line.startswith("unknown  rotation") for line in lines)


def test_without_a_suite_the_statistics_name_it(folder, capsys, monkeypatch):
  monkeypatch.setattr(suites, "find_assets", lambda given: Path(__file__).parent / "none")
  with contextlib.suppress(SystemExit):  # where the simulator's libraries are missing
    main(["doctor", f"--policy={folder()}"])
  assert capsys.readouterr().out.startswith("suite: libero_goal, ")
  assert doctor.suites_of(["libero_4_task_suites_no_noops"]) == [*suites.SUITES[:4]]
  with pytest.raises(ValueError, match=r"got statistics of \['bridge_orig'\].*pass --suite"):
    doctor.suites_of(["bridge_orig"])


def test_what_is_no_policy_is_refused(tmp_path):
  with pytest.raises(SystemExit, match="No policy"):
    main(["doctor", f"--policy={tmp_path / 'none'}", "--suite=libero_goal"])
  with pytest.raises(SystemExit, match="suite='goal'"):
    main(["doctor", "--policy=x", "--suite=goal"])
