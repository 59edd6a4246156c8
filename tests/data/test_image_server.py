"""Batches whose images come from tf.data services are those made here; servers that are gone or differ are named."""

import contextlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from toy_rlds import assert_equal, batches

from semanticvla_jax.data import image_server, images, loader, pipeline
from semanticvla_jax.data.image_server import ImageServer

OPTIONS = loader.BatchOptions(8, 8, 32, augmentation=images.RELEASE, window=2)


def options(**fields) -> dict:
  return dict(batch_size=8, chunk=8, image_size=32, augmentation=images.RELEASE, window=2) | fields


@pytest.fixture(scope="module")
def made(dataset, tokenizers) -> loader.BatchLoader:
  return loader.BatchLoader([(dataset, 1.0)], tokenizers, OPTIONS)


@pytest.fixture(scope="module")
def servers(dataset, tokenizers):
  """Two, with loaders of their own, as on two hosts."""
  with contextlib.ExitStack() as stack:
    loaders = [loader.BatchLoader([(dataset, 1.0)], tokenizers, OPTIONS) for _ in range(2)]
    yield [
      stack.enter_context(contextlib.closing(ImageServer(one, "localhost", 0, 2, processes))).address
      for one, processes in zip(loaders, (0, 1), strict=True)
    ]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("start_step, rows", [(0, None), (5, np.array([1, 2, 6]))])
def test_batches_are_the_same_from_any_step_for_any_host(dataset, tokenizers, servers, count, start_step, rows):
  how = options(count=5, start_step=start_step, rows=rows)
  served = batches([(dataset, 1.0)], tokenizers, servers=servers[:count], **how)
  for found, want in zip(served, batches([(dataset, 1.0)], tokenizers, **how), strict=True):
    assert_equal(found, want)


@pytest.mark.parametrize(
  "fields, said",
  [
    (dict(seed=1), "seed=0; expected seed=1, as this run has"),
    (dict(augmentation=None, crop_area=0.9), r"augmentation=Augmentation.*\(crop_area differ too\)"),
    (dict(image_size=48), "image_size=32; expected image_size=48"),
  ],
)
def test_a_server_with_other_options_is_refused(dataset, tokenizers, servers, fields, said):
  with pytest.raises(ValueError, match=f"^Image server localhost:[0-9]+: got {said}.*this run's config"):
    batches([(dataset, 1.0)], tokenizers, servers=servers, **options(**fields))


def test_a_server_with_other_data_is_refused(other, tokenizers, servers):
  with pytest.raises(ValueError, match=r"got datasets=.*; expected datasets=.*, as this run has"):
    batches([(other, 1.0)], tokenizers, servers=servers, **options())


def test_other_examples_than_drawn_here_are_refused():
  with pytest.raises(ValueError, match=r"^Image server cpu-7:5050, batch 3: got other examples"):
    image_server.check("cpu-7:5050", 3, np.zeros((2, 3), int), np.ones((2, 3), int))


def test_no_server_and_no_address_are_one_line(dataset, tokenizers):
  with contextlib.closing(socket.create_server(("localhost", 0))) as listening:
    port = listening.getsockname()[1]
  for address, said in (
    (f"localhost:{port}", r"^Image server localhost:\d+: got no answer \(.*refused.*\); expected one that runs"),
    ("localhost", r"^config.data.servers: got 'localhost'; expected host:port"),
  ):
    with pytest.raises(ValueError, match=said):
      batches([(dataset, 1.0)], tokenizers, servers=[address], **options())


def test_a_port_in_use_is_refused(made, servers):
  port = int(servers[0].rpartition(":")[2])
  with pytest.raises(ValueError, match=rf"^--port: got {port} \(.*\); expected one that is free"):
    ImageServer(made, "localhost", port)


def test_an_image_that_cannot_be_used_is_named_as_without_servers(dataset, tokenizers, monkeypatch):
  whole = loader.tfrecord_index.Reader.image
  monkeypatch.setattr(loader.tfrecord_index.Reader, "image", lambda self, frame, view: whole(self, frame, view)[:60])
  made = loader.BatchLoader([(dataset, 1.0)], tokenizers, OPTIONS)
  with contextlib.closing(ImageServer(made, "localhost", 0, 2)) as server:
    for how in (dict(), dict(servers=(server.address,))):
      with pytest.raises(ValueError, match=rf"^Dataset {dataset.name!r}, .* of .*"):
        next(made.batches(**how))


CLOSES = """
import contextlib, time
import numpy as np
from semanticvla_jax.data import image_server, pipeline

def read(examples):
  time.sleep(0.05)  # a batch is always under way
  return [b""]

class Loader:
  group, image_facts = 1, staticmethod(dict)

  @contextlib.contextmanager
  def stages(self, rows, processes=0):
    yield pipeline.Stages(
      lambda number: np.zeros((len(rows), 3), np.int64), read,
      lambda examples, decoded: np.zeros((1, 1, 8, 8, 3), np.uint8), lambda examples: None, 1, 8, "accurate")

server = image_server.ImageServer(Loader(), "localhost", 0, 2)
source = image_server.batches(server.address, 0, np.arange(2), 1)
next(source)
server.close()
print("closed", flush=True)
try:
  for _ in source: pass
except image_server.Unreachable:
  print("gone", flush=True)
"""


def test_a_server_at_work_can_be_closed_and_its_clients_find_it_gone():
  """In a process of its own: a server that waited for its threads and held Python's lock would hold the test, too."""
  run = subprocess.run([sys.executable, "-c", CLOSES], capture_output=True, text=True, timeout=120)
  assert (run.returncode, run.stdout) == (0, "closed\ngone\n"), run.stderr[-2000:]


def test_a_server_that_ends_is_left_out_and_the_last_ones_end_is_an_error(made, monkeypatch, caplog):
  """Servers end as `batches` says it; killed ones are in tests/train/test_image_server.py."""
  lives = {"a": 3, "b": 4, "c": 1}  # batches that each gives

  def batches_of(address, start, rows, stride):
    with made.stages(rows) as stages:
      source = pipeline.dataset(stages, start, len(rows), pipeline.Readers(1), stride=stride, group=4, prefetch=0)
    for batch in source.as_numpy_iterator():
      if not lives[address]:
        raise image_server.Unreachable(address, "gone")
      lives[address] -= 1
      yield batch

  monkeypatch.setattr(image_server, "batches", batches_of)
  monkeypatch.setattr(image_server, "check_servers", lambda servers, facts: None)
  served = made.batches(2, servers=("a", "b", "c"))
  for _, want in zip(range(8), made.batches(2)):
    assert_equal(next(served), want)
  said = [record.getMessage() for record in caplog.records]
  assert [one.split(": ")[0] for one in said] == ["Image server c", "Image server a"] and not any(lives.values())
  assert said[0].endswith("Batches from 7 on come from a, b.") and said[1].endswith("from 9 on come from b.")
  with pytest.raises(ValueError, match=r"^Image server b: got no answer \(gone\)"):
    next(served)
  with pytest.raises(ValueError, match=r"^Image server a: got no answer"):  # at the start, all have to be there
    next(made.batches(servers=("a", "b")))
