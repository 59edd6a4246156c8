"""Counting a compiled program from its text: a made-up one whose figures are known, and one that XLA compiles here."""

import jax
import jax.numpy as jnp
import pytest

from semanticvla_jax.train.hlo_traffic import traffic

# A loop of three turns that slices a stacked weight in place of a library's product, a second that copies the slice; a
# concatenation of two weights; a collective; a start with its done; a cache of which one row is written.
PROGRAM = """
HloModule jit_step, is_scheduled=true
%sliced_product (w: bf16[3,8,8], i: s32[], x: bf16[4,8]) -> (bf16[4,8], s8[1024]) {
  %w = bf16[3,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[4,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %slice.1 = bf16[1,8,8]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,8,8}
  %flat = bf16[8,8]{1,0} bitcast(%slice.1)
  ROOT %product = (bf16[4,8]{1,0}, s8[1024]{0}) custom-call(%x, %flat), custom_call_target="__cublas$lt$matmul"
}
%copied_slice (w: bf16[3,8,8], i: s32[]) -> bf16[8,8] {
  %w = bf16[3,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice.2 = bf16[1,8,8]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %turned = bf16[8,8]{0,1} bitcast(%slice.2)
}
%written (cache: f32[16,8], row: f32[1,8], at: s32[]) -> f32[16,8] {
  %cache = f32[16,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %updated = f32[16,8]{1,0} dynamic-update-slice(%cache, %row, %at, %zero)
}
%body (carry: (s32[], bf16[4,8], bf16[3,8,8])) -> (s32[], bf16[4,8], bf16[3,8,8]) {
  %carry = (s32[], bf16[4,8]{1,0}, bf16[3,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%carry), index=1
  %w = bf16[3,8,8]{2,1,0} get-tuple-element(%carry), index=2
  %a = (bf16[4,8]{1,0}, s8[1024]{0}) fusion(%w, %i, %x), kind=kCustom, calls=%sliced_product, \
backend_config={"fusion_backend_config":{"kind":"__custom_fusion"}}
  %b = bf16[4,8]{1,0} get-tuple-element(%a), index=0
  %c = bf16[8,8]{0,1} fusion(%w, %i), kind=kLoop, calls=%copied_slice
  %d = bf16[4,8]{1,0} dot(%b, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[4,8]{1,0}, bf16[3,8,8]{2,1,0}) tuple(%next, %d, %w)
}
%condition (carry: (s32[], bf16[4,8], bf16[3,8,8])) -> pred[] {
  %carry = (s32[], bf16[4,8]{1,0}, bf16[3,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (s: bf16[3,8,8], k: bf16[8,4], v: bf16[8,4], x: bf16[4,8], t: f32[16,8]) -> f32[16,8] {
  %s = bf16[3,8,8]{2,1,0} parameter(0), metadata={op_name="params[\\'stack\\']"}
  %k = bf16[8,4]{1,0} parameter(1), metadata={op_name="params[\\'k\\']"}
  %v = bf16[8,4]{1,0} parameter(2), metadata={op_name="params[\\'v\\']"}
  %x = bf16[4,8]{1,0} parameter(3), metadata={op_name="observation.images"}
  %t = f32[16,8]{1,0} parameter(4), metadata={op_name="observation.cache"}
  %kv = bf16[8,8]{1,0} concatenate(%k, %v), dimensions={1}, metadata={op_name="jit(step)/llm/attn/concatenate"}
  %first = bf16[4,8]{1,0} dot(%x, %kv), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4,8]{1,0}, bf16[3,8,8]{2,1,0}) tuple(%zero, %first, %s)
  %loop = (s32[], bf16[4,8]{1,0}, bf16[3,8,8]{2,1,0}) while(%start), condition=%condition, body=%bodyTRIPS
  %y = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  %gathering = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%y), dimensions={0}
  %gathered = bf16[16,8]{1,0} all-gather-done(%gathering)
  %row = f32[1,8]{1,0} slice(%t), slice={[0:1], [0:8]}
  ROOT %cache = f32[16,8]{1,0} fusion(%t, %row, %zero), kind=kLoop, calls=%written
}
"""
TRIPS = ', backend_config={"known_trip_count":{"n":"3"}}'


def made_up(trips: str = TRIPS) -> str:
  return PROGRAM.replace("TRIPS", trips)


def test_launches_and_products_count_a_loop_as_often_as_it_runs():
  found = traffic(made_up())
  assert found.products == 1 + 3 * 2  # the library's, inside a fusion, is one
  assert found.launches == 2 + 3 * 4 + 3  # of a turn: two fusions, a product, the counter
  assert traffic(made_up("")) == found  # how often is read from the condition where it is not written down


def test_bytes_are_what_is_read_and_written():
  found = traffic(made_up())
  weight, rows = 8 * 8 * 2, 4 * 8 * 2
  concatenation, first = 2 * weight, rows + weight + rows
  turn = (weight + 4 + rows + rows) + (weight + 4 + weight) + (rows + weight + rows) + (4 + 4 + 4)
  gather, cache = rows + 16 * 8 * 2, 2 * 8 * 4 + (8 * 4 + 4 + 8 * 4)  # a slice; a row read, a place and a row written
  assert found.bytes == concatenation + first + 3 * turn + gather + cache


def test_weights_that_are_copied_at_every_call_are_told_from_data():
  found = traffic(made_up())
  assert found.copied_weights == 8 * 8 * 2 + 3 * 8 * 8 * 2
  assert [(size, n) for size, n, _ in found.copies] == [(384, 3), (128, 1)]
  assert found.copies[1][2] == "bf16[8,8] llm/attn/concatenate"
  assert traffic(made_up(), weights="nothing").copied_weights == 0


def test_collectives():
  found = traffic(made_up())
  assert found.collectives == (("all-gather", 1, 16 * 8 * 2),)
  assert (found.count("all-gather"), found.count("all-to-all")) == (1, 0)


def test_collectives_of_several_arrays_count_what_they_make():
  text = """
ENTRY %main (a: f32[4], b: f32[8]) -> f32[16] {
  %a = f32[4]{0} parameter(0), metadata={op_name="frozen"}
  %b = f32[8]{0} parameter(1)
  %both = ((f32[4]{0}, f32[8]{0}), (f32[8]{0}, f32[16]{0})) all-gather-start(%a, %b), dimensions={0}
  %done = (f32[8]{0}, f32[16]{0}) all-gather-done(%both)
  %sums = (f32[4]{0}, f32[8]{0}) all-reduce(%a, %b), to_apply=%add
  %going = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a)
  %gone = f32[4]{0} collective-permute-done(%going)
  ROOT %last = f32[16]{0} get-tuple-element(%done), index=1
}
"""
  found = {kind: (n, size) for kind, n, size in traffic(text).collectives}
  assert found == {"all-gather": (1, 4 * 24), "all-reduce": (1, 4 * 12), "collective-permute": (1, 4 * 4)}
  assert traffic(text).copied_weights == 0  # parameters that are gathered are not copied


def test_an_array_that_a_kernel_is_given_twice_is_read_once():
  text = """
ENTRY %main (qkv: f32[4,3,8], mask: s8[4]) -> f32[4,8] {
  %qkv = f32[4,3,8]{2,1,0} parameter(0)
  %mask = s8[4]{0} parameter(1)
  ROOT %out = f32[4,8]{1,0} custom-call(%qkv, %qkv, %qkv, %mask), custom_call_target="__gpu$xla.gpu.triton"
}
"""
  assert traffic(text).bytes == 4 * 3 * 8 * 4 + 4 + 4 * 8 * 4


def test_what_a_tpu_keeps_on_the_chip_moves_nothing():
  fast = made_up().replace("%kv = bf16[8,8]{1,0}", "%kv = bf16[8,8]{1,0:T(8,128)(2,1)S(1)}")
  assert traffic(made_up()).bytes - traffic(fast).bytes == 2 * 8 * 8 * 2


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="got a text without ENTRY; expected that of a compiled program"):
    traffic("HloModule empty")


def test_a_program_compiled_here():
  """Two weights are concatenated at every call, one is used as it is; the batch is copied too, but is not a weight."""

  def f(params, x):
    y = jnp.concatenate([x, x], axis=1) @ jnp.concatenate([params["a"], params["b"]], axis=0)
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ params["c"]), None), y, None, length=5)[0]

  shape = jax.ShapeDtypeStruct
  params = {name: shape((64, 64), jnp.float32) for name in "abc"}
  text = jax.jit(f).lower(params, shape((8, 64), jnp.float32)).compile().as_text()
  found = traffic(text)
  assert found.products == 6
  assert found.copied_weights == 2 * 64 * 64 * 4, found.copies
  assert found.bytes > 5 * 64 * 64 * 4


PIECES = """
%piece (shard: bf16[2,8], whole: bf16[16,8], x: f32[4]) -> (f32[4], bf16[2,8], bf16[16,8]) {
  %shard = bf16[2,8]{1,0} parameter(0)
  %whole = bf16[16,8]{1,0} parameter(1)
  %x = f32[4]{0} parameter(2)
  %y = f32[4]{0} negate(%x)
  %gather = bf16[16,8]{1,0} all-gather(%shard), channel_id=7, dimensions={0}, frontend_attributes={chain_id="2"}
  ROOT %out = (f32[4]{0}, bf16[2,8]{1,0}, bf16[16,8]{1,0}) tuple(%y, %shard, %gather)
}

ENTRY %main (shard: bf16[2,8], whole: bf16[16,8], x: f32[4]) -> f32[4] {
  %shard = bf16[2,8]{1,0} parameter(0), metadata={op_name="params"}
  %whole = bf16[16,8]{1,0} parameter(1)
  %x = f32[4]{0} parameter(2)
  %a = (f32[4]{0}, bf16[2,8]{1,0}, bf16[16,8]{1,0}) fusion(%shard, %whole, %x), kind=kOutput, calls=%piece
  %a0 = f32[4]{0} get-tuple-element(%a), index=0
  %a1 = bf16[2,8]{1,0} get-tuple-element(%a), index=1
  %a2 = bf16[16,8]{1,0} get-tuple-element(%a), index=2
  %b = (f32[4]{0}, bf16[2,8]{1,0}, bf16[16,8]{1,0}) fusion(%a1, %a2, %a0), kind=kOutput, calls=%piece
  ROOT %b0 = f32[4]{0} get-tuple-element(%b), index=0
}
"""


def test_a_collective_that_runs_in_pieces_counts_once():
  """TPUs fuse the pieces of one all-gather into other work: each names the whole, and passes its buffers on."""
  found = traffic(PIECES)
  assert found.collectives == (("all-gather", 1, 16 * 8 * 2),)
  assert (found.launches, found.bytes) == (2, 2 * (16 + 16) + 2 * 8 * 2 + 16 * 8 * 2)
