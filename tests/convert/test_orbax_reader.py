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


def pieces(arrays, specs):
  for path in sorted(arrays):
    for layer in specs[path].layers:
      value = arrays[path] if layer is None else arrays[path][layer]
      yield orbax_writer.Piece(path, layer, lambda value=value: value)


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16, np.int8], ids=["float32", "bfloat16", "int8"])
def written(request, tmp_path):
  """Arrays, and the folder they were written to piece by piece."""
  arrays = values(request.param)
  specs = {path: orbax_writer.ArraySpec(x.shape, x.dtype, "layers" in path) for path, x in arrays.items()}
  orbax_writer.write(tmp_path / "params", specs, pieces(arrays, specs), lambda *_: None)
  return arrays, tmp_path / "params"


def reordered(pieces):
  return [pieces[1], pieces[0], *pieces[2:]]


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda x: x[:-1], r"got None, expected \('small', None\)"),
    (lambda x: [*x, x[0]], r"got \('llm/layers/k', 0\), expected None"),
    (reordered, r"got \('llm/layers/k', 1\), expected \('llm/layers/k', 0\)"),
    (lambda x: [x[0]._replace(make=lambda: np.zeros((40, 51), np.int32)), *x[1:]], r"llm/layers/k: got a piece int32"),
    (lambda x: [x[0]._replace(make=lambda: np.zeros((51, 40), np.int8)), *x[1:]], r"got a piece int8\[51, 40\]"),
  ],
  ids=["missing", "too many", "another order", "another type", "another shape"],
)
def test_other_pieces_than_those_of_the_arrays_are_refused(change, message, tmp_path):
  arrays = values(np.int8)
  specs = {path: orbax_writer.ArraySpec(x.shape, x.dtype, "layers" in path) for path, x in arrays.items()}
  with pytest.raises(ValueError, match=message):
    orbax_writer.write(tmp_path / "params", specs, change([*pieces(arrays, specs)]), lambda *_: None)


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
