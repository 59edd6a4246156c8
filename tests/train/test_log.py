"""What a run tells while it goes on: rates, MFU, memory, wandb, a profiler trace."""

import json
import sys
import types

import pytest

from semanticvla_jax.train import log


class Device:
  """Stands in for an accelerator, whose runtime says what is in use."""

  def __init__(self, gib):
    self.gib = gib

  def memory_stats(self):
    return {"peak_bytes_in_use": self.gib * 2**30, "bytes_limit": 80 * 2**30}


def metrics(workdir, start=0, **rates):
  return log.Metrics(workdir, total=4, every=2, start=start, examples=16, **rates)


def values(loss):
  return {"loss": loss, "lr": 1e-3, "tokens": 480.0}


def written(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rates_mfu_and_memory(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(log.jax, "local_devices", lambda: [Device(12), Device(14)])
  run = metrics(tmp_path, flops=5e12, peak=400e12)
  now[0] += 60.0  # compiling
  assert run.add(1, values(3.0), wait=0.1) is None
  now[0] += 1.0
  run.add(2, values(1.0), wait=0.2)
  (line,) = written(tmp_path)
  assert line["loss"] == 2.0 and line["step_ms"] == 1000 and line["input_wait_ms"] == pytest.approx(200)
  assert line["examples_per_s"] == 16 and line["tokens_per_s"] == 480
  assert line["mfu"] == pytest.approx(5e12 * 16 / 400e12) and line["hbm_gib"] == 14
  run.close()


def test_not_a_number_is_null_and_a_resumed_file_is_replaced_whole(tmp_path):
  run = metrics(tmp_path)
  run.add(2, values(float("nan")), wait=0.0)
  run.add(4, values(float("inf")), wait=0.0)
  run.close()
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
  assert [line["loss"] for line in written(tmp_path)] == [None, None]
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "lo')  # killed
  metrics(tmp_path, start=2).close()
  assert [line["step"] for line in written(tmp_path)] == [2]
  assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_not_known_is_not_written(tmp_path):
  run = metrics(tmp_path)
  run.add(2, values(1.0), wait=0.0)
  assert not {"mfu", "hbm_gib"} & written(tmp_path)[0].keys()
  run.close()


class Wandb(types.ModuleType):
  """Stands in for the package: remembers what it was called with."""

  def __init__(self):
    super().__init__("wandb")
    self.inits, self.logged, self.finished = [], [], 0

  def init(self, **options):
    self.inits.append(options)
    return self

  def log(self, values, step):
    self.logged.append((step, values["loss"]))

  def finish(self):
    self.finished += 1


def test_wandb_gets_the_same_and_a_resumed_run_goes_on_with_its_own(tmp_path, monkeypatch):
  wandb = Wandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  for start in (0, 2):
    run = metrics(tmp_path, start)
    run.also_to_wandb("robots", {"seed": 7})
    run.add(start + 2, values(1.0 + start), wait=0.0)
    run.close()
  first, second = wandb.inits
  assert first == second and first["project"] == "robots" and first["config"] == {"seed": 7} and first["id"]
  assert wandb.logged == [(2, 1.0), (4, 3.0)] and wandb.finished == 2
  metrics(tmp_path).also_to_wandb("robots", {})
  assert wandb.inits[-1]["id"] != first["id"]  # a new run


def test_wandb_that_is_not_installed_is_told(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match="config.train.wandb: got 'robots' without wandb.*pip install wandb"):
    metrics(tmp_path).also_to_wandb("robots", {})


@pytest.fixture
def profiler(monkeypatch):
  calls = []
  monkeypatch.setattr(log.jax.profiler, "start_trace", lambda folder: calls.append(folder))
  monkeypatch.setattr(log.jax.profiler, "stop_trace", lambda: calls.append("stop"))
  return calls


@pytest.mark.parametrize(("steps", "ran"), [((2, 3), range(1, 6)), ((2, 5), range(4, 7)), ((2, 9), range(1, 4))])
def test_a_trace_begins_and_ends_once(steps, ran, profiler, tmp_path):
  with log.Trace(tmp_path, steps) as trace:
    for step in ran:
      trace.before(step)
      trace.after(step, None)
  assert profiler == [str(tmp_path), "stop"]


def test_no_trace(profiler, tmp_path):
  for steps in (None, (8, 9)):
    with log.Trace(tmp_path, steps) as trace:
      trace.before(1)
      trace.after(1, None)
  assert profiler == []
