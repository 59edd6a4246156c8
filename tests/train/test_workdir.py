"""A workdir belongs to one run at a time, and what cannot be written is said in one line, with where it goes on."""

import disks
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import make_config

from semanticvla_jax import files, policy_folder
from semanticvla_jax.train import __main__ as command
from semanticvla_jax.train import checkpoints, distributed, diverged, log

TREES = {"train": {"w": jnp.ones((400, 400))}}  # 640 kB


@pytest.fixture
def small_disk(tmp_path):
  with disks.small(tmp_path / "small", "1500k") as folder:
    yield folder


def test_a_workdir_that_another_run_writes_is_refused(tmp_path):
  with files.alone(tmp_path, inside=True), pytest.raises(ValueError, match="got process .* at work on it"):
    command.train(make_config("nowhere"), tmp_path)  # before anything is read


def test_a_workdir_is_free_again_whatever_ended_the_run(tmp_path):
  for _ in range(2):
    with pytest.raises(ValueError, match="nowhere"):
      command.train(make_config("nowhere"), tmp_path)
  with distributed.alone(tmp_path):
    pass


def test_a_disk_that_is_full_is_one_line_and_the_newest_whole_checkpoint_stays(small_disk):
  with pytest.raises(ValueError) as error, checkpoints.Checkpointer(small_disk, keep_last=5) as checkpointer:
    for step in range(1, 6):
      noise = np.random.default_rng(step).normal(size=(400, 400)).astype(np.float32)
      checkpointer.save(step, {"train": {"w": jnp.asarray(noise)}}, {"a": 1})
      checkpointer.wait()
  (line,) = str(error.value).splitlines()
  assert "got a full disk (No space left on device)" in line
  whole = int(line.split("from step ")[1].split(",")[0])
  with checkpoints.Checkpointer(small_disk, keep_last=5) as checkpointer:
    assert checkpointer.steps[-1] == whole


@pytest.mark.parametrize(
  "error",
  [OSError(30, "Read-only file system"), RuntimeError("UNAVAILABLE: bucket"), PermissionError(13, "Permission denied")],
)
def test_whatever_orbax_raises_is_one_line(tmp_path, monkeypatch, error):
  def fail(*_, **__):
    raise error

  checkpointer = checkpoints.Checkpointer(tmp_path)
  monkeypatch.setattr(checkpointer._manager, "save", fail)
  with pytest.raises(ValueError, match=f"cannot be written .*{str(error)[-12:]}.*it goes on at step 0"):
    checkpointer.save(1, TREES)
  checkpointer.close()


def test_a_policy_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
  facts = dict(config={}, statistics={})
  folder = policy_folder.save_policy(tmp_path / "policy", {"w": jnp.zeros(3)}, **facts)

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(policy_folder, "_complete", fail)
  with pytest.raises(ValueError, match="Policy .* cannot be written: got a full disk"):
    policy_folder.save_policy(folder, {"w": jnp.ones(3)}, **facts, replace=True)
  assert [path.name for path in tmp_path.iterdir()] == ["policy"]
  np.testing.assert_array_equal(policy_folder.load_policy(folder).params["w"], np.zeros(3))
  monkeypatch.undo()
  policy_folder.save_policy(folder, {"w": jnp.ones(3)}, **facts, replace=True)
  np.testing.assert_array_equal(policy_folder.load_policy(folder).params["w"], np.ones(3))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive", None])
def test_what_is_no_batch_is_named(tmp_path, content):
  path = tmp_path / "bad_batch_3.npz"
  np.savez(path, other=np.zeros(2)) if content is None else path.write_bytes(content)
  with pytest.raises(ValueError, match=f"{path} is not a saved batch: got .*; expected a bad_batch_STEP.npz"):
    diverged.load_batch(path)


def test_damaged_lines_of_metrics_are_dropped_and_counted(tmp_path, caplog):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": }\n\xff\n{"step": 2}\n[]\n{"step": 3}\n{"ste')
  log.Metrics(tmp_path, 10, 1, 2, 8).close()
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
  assert "3 damaged lines are dropped" in caplog.text


def test_tracebacks_of_orbax_are_no_news_and_others_are():
  import logging

  def record(filename):
    code = compile("raise OSError(28, 'full')", filename, "exec")
    try:
      exec(code)
    except OSError as error:
      return logging.LogRecord("absl", logging.ERROR, filename, 1, "failed", (), (OSError, error, error.__traceback__))

  assert not distributed.is_news(record("/lib/orbax/checkpoint/futures.py"))
  assert distributed.is_news(record("/home/me/run.py"))
  assert distributed.is_news(logging.LogRecord("absl", logging.INFO, "x", 1, "saved", (), None))
