"""What lies in a data file as it is is read from there, and is what the store reads; all else is left to the store."""

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax.convert.io import orbax_reader, orbax_writer

SHAPES = {"llm/layers/k": (3, 40, 51), "llm/layers/one": (1, 33, 17), "odd": (1023, 7), "small": (5,), "row": (1, 601)}


def leaves_of(params):
  saved = flatten_dict(ocp.StandardCheckpointHandler().metadata(params).tree, sep="/")
  return {path: orbax_reader.Leaf(tuple(x.shape), np.dtype(x.dtype)) for path, x in saved.items()}


def opened(params):
  policy = orbax_reader.PolicyFolder.__new__(orbax_reader.PolicyFolder)
  policy.folder, policy.leaves = params.parent, leaves_of(params)
  policy._context, policy._stores = ts.Context(), {}
  return policy


def values(dtype):
  rng = np.random.default_rng(0)
  return {path: rng.integers(-99, 99, shape).astype(dtype) for path, shape in SHAPES.items()}


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16, np.int8], ids=["float32", "bfloat16", "int8"])
def written(request, tmp_path):
  """Arrays, and the folder they were written to piece by piece."""
  arrays = values(request.param)
  lazy = {
    path: orbax_writer.Lazy(x.shape, x.dtype, stacked, [lambda y=y: y for y in (x if stacked else [x])])
    for path, x in arrays.items()
    for stacked in ["layers" in path]
  }
  orbax_writer.write(tmp_path / "params", lazy, lambda *_: None)
  return arrays, tmp_path / "params"


def test_plain_chunks_are_read_without_the_store(written, monkeypatch):
  arrays, params = written
  policy = opened(params)
  monkeypatch.setattr(ts, "open", None)
  for path in ("llm/layers/k", "odd"):
    for layer in range(3) if path == "llm/layers/k" else [None]:
      got, wanted = policy.read(path, layer), arrays[path] if layer is None else arrays[path][layer]
      assert got.dtype == wanted.dtype and got.shape == wanted.shape and got.tobytes() == wanted.tobytes()


def test_every_way_of_reading_gives_the_same(written):
  arrays, params = written
  policy = opened(params)
  for path, x in arrays.items():
    assert policy.read(path).tobytes() == x.tobytes(), path
    for layer in range(len(x)) if x.ndim > 1 and len(x) < 4 else ():
      assert policy.read(path, layer).tobytes() == x[layer].tobytes(), (path, layer)


def test_compressed_parameters_are_left_to_the_store(tmp_path):
  arrays = values(np.float32)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "params", unflatten_dict(arrays, sep="/"))
  policy = opened(tmp_path / "params")
  assert not policy._plain and all(policy.read(path).tobytes() == x.tobytes() for path, x in arrays.items())


@pytest.mark.parametrize(
  "change", [{"compressor": {"id": "zstd"}}, {"order": "F"}, {"dtype": ">f4"}, {"chunks": [2, 4]}, {"filters": [{}]}]
)
def test_other_chunks_are_left_to_the_store(change):
  plain = {"shape": [4, 4], "chunks": [4, 4], "compressor": None, "filters": None, "order": "C", "dtype": "<f4"}
  assert orbax_reader._chunk_names(plain) == [(None, "0.0")]
  assert orbax_reader._chunk_names(plain | {"chunks": [1, 4]}) == [(i, f"{i}.0") for i in range(4)]
  assert orbax_reader._chunk_names(plain | change) == [] == orbax_reader._chunk_names({})


def test_a_data_file_that_became_shorter_is_an_error(written):
  policy = opened(written[1])
  file, offset, _ = policy._plain["odd", None]
  with file.open("r+b") as data:
    data.truncate(offset + 10)
  with pytest.raises(ValueError, match="odd"):
    policy.read("odd")
