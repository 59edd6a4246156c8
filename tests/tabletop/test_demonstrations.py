"""Demonstrations are successes, reproducible to the byte, and read like any other dataset."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semanticvla_jax.data import images, rlds, statistics, tfrecord_index
from semanticvla_jax.demonstrate.__main__ import main
from semanticvla_jax.tabletop import demonstrations as demonstrate
from semanticvla_jax.tabletop import physics, tasks

OPTIONS = demonstrate.Options("pick", episodes=5, seed=3, size=32, noise=0.4)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """The dataset of OPTIONS, its report, and its episodes."""
  out = tmp_path_factory.mktemp("data")
  done = []
  report = demonstrate.write(OPTIONS, out, "tabletop_pick", done.append)
  assert done == [1, 2, 3, 4, 5]
  found = dict(itertools.islice(demonstrate.demonstrations(OPTIONS), report.tried))
  return out, report, found


def test_the_dataset_reads_back(written):
  out, report, found = written
  dataset = rlds.load(str(out), "tabletop_pick")
  assert report.kept == 5 and len(dataset.actions) == report.frames == sum(len(x.action) for x in found.values() if x)
  first = next(episode for episode in found.values() if episode)
  n = len(first.action)
  np.testing.assert_allclose(dataset.actions[:n, :6], first.action[:, :6], atol=1e-6)
  np.testing.assert_array_equal(dataset.actions[:n, 6], first.action[:, 6] < 0)
  assert dataset.instruction(0) == first.instruction and first.instruction in tasks.instructions("pick")
  stored = images.decode(tfrecord_index.Reader(dataset.index).image(int(dataset.frames[0]), 0))
  assert np.abs(stored.astype(int) - first.image[0]).mean() < 6


def test_statistics_lie_beside_it(written):
  out, report, _ = written
  beside = statistics.load(report.folder / "dataset_statistics.json")["tabletop_pick"]
  computed = rlds.load(str(out), "tabletop_pick").statistics
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), beside, computed)
  facts = json.loads((report.folder / "demonstrations.json").read_text())
  assert facts["seed"] == 3 and facts["tried"] == report.tried and facts["dropped_seeds"] == report.dropped


def test_equal_recipes_give_equal_bytes(written, tmp_path):
  _, report, _ = written
  again = demonstrate.write(OPTIONS, tmp_path, "tabletop_pick")
  files = sorted(path.name for path in report.folder.iterdir())
  assert files == sorted(path.name for path in again.folder.iterdir()) and len(files) == 5
  for name in files:
    assert (report.folder / name).read_bytes() == (again.folder / name).read_bytes(), name
  other = next(episode for _, episode in demonstrate.demonstrations(OPTIONS._replace(seed=4)) if episode)
  assert other.file_path == "tabletop/pick/train/4"


def test_an_episode_is_what_happened_and_ends_with_success():
  options = OPTIONS._replace(label="executed")
  seed, episode = next((s, e) for s, e in demonstrate.demonstrations(options) if e)
  intended = dict(itertools.islice(demonstrate.demonstrations(OPTIONS), seed - options.seed + 1))[seed]
  step, success = jax.jit(physics.step), jax.jit(physics.success)
  state = jax.jit(tasks.reset, static_argnums=(1, 2))(jax.random.split(tasks.seed_key(seed))[0], "pick", "train")
  for t, action in enumerate(episode.action):
    np.testing.assert_allclose(episode.state[t], physics.proprio(state), atol=1e-4)
    assert not success(state)
    state = step(state, jnp.asarray(action))
  assert success(state)
  np.testing.assert_array_equal(intended.state, episode.state)
  assert np.abs(intended.action - episode.action)[:, :6].max() > 0.05, "the label is not the noise"
  assert episode.image.shape == (len(episode.action), 32, 32, 3) and episode.image.dtype == np.uint8


def test_failures_are_dropped_and_counted(tmp_path, monkeypatch):
  real = demonstrate._episode
  lost = {4, 6}
  monkeypatch.setattr(demonstrate, "_episode", lambda r, seed, *rest: None if seed in lost else real(r, seed, *rest))
  report = demonstrate.write(OPTIONS._replace(episodes=3), tmp_path, "tabletop_pick")
  assert (report.kept, report.tried, report.dropped) == (3, 5, [4, 6])
  monkeypatch.setattr(demonstrate, "_episode", lambda *_: None)
  with pytest.raises(ValueError, match="The expert fails: got 16 failures and 0 successes"):
    demonstrate.write(OPTIONS, tmp_path, "tabletop_never")
  assert not (tmp_path / "tabletop_never" / "1.0.0").exists()


def test_the_command_writes_one_and_says_what_is_wrong(written, tmp_path, capsys):
  out, report, _ = written
  flags = ["--suite=pick", "--episodes=5", "--seed=3", "--size=32", "--noise=0.4"]
  main(["tabletop", *flags, f"--out={tmp_path}"])
  assert "5 episodes" in capsys.readouterr().out
  shard = "tabletop_pick-train.tfrecord-00000-of-00001"
  assert (tmp_path / "tabletop_pick" / "1.0.0" / shard).read_bytes() == (report.folder / shard).read_bytes()
  for wrong, message in [
    ([f"--out={out}"], "Dataset exists"),
    (["--name=pick"], "starts with 'tabletop'"),
    (["--suite=pik"], "did you mean 'pick'"),
    (["--label=both"], "expected one of"),
    (["--noise=2"], "noise and perturbed from 0 to 1"),
    (["--perturbed=-1"], "perturbed=-1.0"),
    (["--split=test"], "Split 'test'"),
    (["--seed=-1"], "Seed -1 is outside split 'train'"),
    (["--seed=999999999"], "outside split 'train'"),
  ]:
    with pytest.raises(SystemExit, match=message):
      main([*flags, f"--out={tmp_path / 'other'}", *wrong])


def test_perturbed_episodes_begin_anywhere():
  options = OPTIONS._replace(episodes=8, noise=0.0)
  drawn = (demonstrate.demonstrations(options._replace(perturbed=p)) for p in (0.0, 1.0, 0.5))
  usual, other, half = (np.stack([e.state[0, :3] for _, e in itertools.islice(each, 8)]) for each in drawn)
  assert np.ptp(usual, axis=0).max() < 0.2 < np.ptp(other, axis=0).max()
  as_usual = (half == usual).all(axis=1)
  assert as_usual.any() and not as_usual.all() and ((half == other).all(axis=1) | as_usual).all()
