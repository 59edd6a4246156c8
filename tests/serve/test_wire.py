"""The codecs: what goes in comes out, and nothing that is not an array of numbers does."""

import pickle

import hypothesis
import msgpack
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays
from serving import equal

from semanticvla_jax.serve import wire

DTYPES = ("|b1", "|u1", "<u2", "<i4", "<i8", "<f2", "<f4", "<f8", ">f4")
ANY_ARRAY = strategies.sampled_from(DTYPES).flatmap(
  lambda dtype: arrays.arrays(np.dtype(dtype), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
QUICK = hypothesis.settings(max_examples=100, deadline=None)


@QUICK
@hypothesis.given(ANY_ARRAY)
def test_arrays_survive_every_codec(array):
  for encode, decode in ((wire.pack, wire.unpack), (wire.pack_str, wire.unpack), (wire.dump_json, load)):
    found = decode(encode({"a": [array]}))["a"][0]
    assert equal(found, array) and found.dtype == array.dtype and found.shape == array.shape


def load(text):
  return wire.load_json(text)[0]


def test_frames_are_openpi_s():
  """The bytes that openpi's own packer gives for this map."""
  image = np.arange(3, dtype=np.uint8)
  plain = {b"__ndarray__": True, b"data": image.tobytes(), b"dtype": "|u1", b"shape": (3,)}
  assert wire.pack({"image": image}) == msgpack.packb({"image": plain})
  number = {b"__npgeneric__": True, b"data": np.float32(2).tobytes(), b"dtype": "<f4"}
  assert wire.pack({"x": np.float32(2)}) == msgpack.packb({"x": number})
  assert wire.unpack(wire.pack({"x": np.float32(2)}))["x"] == 2


@pytest.mark.parametrize("value", [np.array([{}], object), np.array(["a"]), np.array([1j]), {1, 2}, object()])
def test_only_arrays_of_numbers_are_sent(value):
  for encode in (wire.pack, wire.pack_str, wire.dump_json):
    with pytest.raises(TypeError, match="cannot be sent"):
      encode({"x": value})


class Trap:
  ran = False

  def __reduce__(self):
    return (setattr, (Trap, "ran", True))


@pytest.mark.parametrize(
  "changed",
  [
    {b"dtype": "|O"},
    {b"dtype": "|V4"},
    {b"dtype": "<c8"},
    {b"dtype": "<f4,<f4"},
    {b"dtype": "S4"},
    {b"dtype": "<f16"},
    {b"dtype": 4},
    {b"dtype": None},
    {b"shape": [2]},
    {b"shape": [-1]},
    {b"shape": [1] * 40},
    {b"shape": [True]},
    {b"shape": "1"},
    {b"shape": [2**62, 2**62]},
    {b"shape": None},
    {b"data": b"12345"},
    {b"data": "1234"},
    {b"data": None},
    {b"data": pickle.dumps(Trap()), b"dtype": "|O"},
  ],
)
def test_an_array_that_is_not_what_it_says_is_refused(changed):
  good = {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [1]}
  assert wire.unpack(msgpack.packb(good)).shape == (1,)
  with pytest.raises(ValueError, match="Array: got"):
    wire.unpack(msgpack.packb(good | changed))
  assert not Trap.ran


@pytest.mark.parametrize(
  "frame",
  [
    "text",
    b"",
    b"\xc1",
    msgpack.packb(1) * 2,
    msgpack.packb({1: 2}),
    b"\xdd\xff\xff\xff\xff",
    b"\x91" * 100_000,
    b"\xa1\xff",
  ],
)
def test_what_is_not_one_value_is_refused(frame):
  with pytest.raises(ValueError, match="Frame: got"):
    wire.unpack(frame)


@pytest.mark.parametrize("body", [b"", b"{", "[" * 100_000, "[" * 40 + "]" * 40, b"\xff", '{"encoded": "["}'])
def test_what_is_not_json_is_refused(body):
  with pytest.raises(ValueError, match="Body: got"):
    wire.load_json(body)


@QUICK
@hypothesis.given(strategies.binary(max_size=200), strategies.text(max_size=100))
def test_any_bytes_give_a_value_or_a_refusal(frame, text):
  for decode, given in ((wire.unpack, frame), (wire.load_json, frame), (wire.load_json, text)):
    try:
      decode(given)
    except ValueError as error:
      assert "\n" not in str(error)
