import numpy as np
import pytest

from semanticvla_jax.convert.rules.engine import Mismatch, Rule, convert, make, plan, with_lora


def test_patterns_parts_and_stacks():
  rng = np.random.default_rng(0)
  qkv = [rng.standard_normal((12, 4)).astype(np.float32) for _ in range(2)]
  rules = [Rule(f"layers/{n}/kernel", "blocks.{i}.qkv", "(t h c) d -> t d h c", (i, 3)) for i, n in enumerate("qkv")]
  out = convert(
    rules, {}, {f"blocks.{i}.qkv": x for i, x in enumerate(qkv)}, {f"layers/{n}/kernel": (2, 4, 2, 2) for n in "qkv"}
  )
  np.testing.assert_array_equal(out["layers/k/kernel"][1], qkv[1][4:8].T.reshape(4, 2, 2))


def test_lora_rules_follow_the_kernels_pattern():
  """W + B·A in PyTorch's layout is kernel + A·B in ours, for fused, split and convolution kernels."""
  rng = np.random.default_rng(0)
  cases = [
    ("(h c) d -> d h c", (6, 5), (5, 2, 3), (6, 4), (4, 5), None),
    ("d (h c) -> h c d", (5, 6), (2, 3, 5), (5, 4), (4, 6), None),
    ("(t h c) d -> t d h c", (12, 5), (5, 2, 2), (12, 4), (4, 5), (1, 3)),
    ("d c p q -> p q c d", (6, 3, 2, 2), (2, 2, 3, 6), (6, 4, 1, 1), (4, 3, 2, 2), None),
  ]
  for pattern, w_shape, ours, b_shape, a_shape, part in cases:
    a, b = rng.standard_normal(a_shape), rng.standard_normal(b_shape)
    delta = np.tensordot(b.reshape(b.shape[0], -1), a, axes=1).reshape(w_shape)
    rules = with_lora([Rule("x/kernel", "x.weight", pattern, part)])
    inputs, outputs = (
      (5,) if part or "(h c) d" in pattern else ours[:-1],
      ours[1:] if part or pattern.startswith("(") else ours[-1:],
    )
    target = {"x/kernel": ours, "x/lora_a": (*inputs, 4), "x/lora_b": (4, *outputs)}
    if part:  # the other parts read the rest of the fused matrix
      rules += with_lora([Rule(f"{i}/kernel", "x.weight", pattern, (i, 3)) for i in (0, 2)])
      target |= {f"{i}/{k.split('/')[1]}": s for i in (0, 2) for k, s in list(target.items())[:3]}
    out = convert(rules, {}, {"x.weight": delta, "x.lora_A.weight": a, "x.lora_B.weight": b}, target)
    np.testing.assert_allclose(np.tensordot(out["x/lora_a"], out["x/lora_b"], axes=1), out["x/kernel"], atol=1e-12)


RULES = [Rule("a/kernel", "a.weight", "o i -> i o"), Rule("a/bias", "a.bias")]
TARGET = {"a/kernel": (3, 2), "a/bias": (2,)}
SOURCE = {"a.weight": (2, 3), "a.bias": (2,)}


def test_exact_cover():
  entries, skipped = plan(RULES, {r"head\..*": "not used"}, SOURCE | {"head.weight": (9,)}, TARGET)
  assert [e.target for e in entries] == ["a/kernel", "a/bias"] and skipped == {"head.weight": "not used"}


@pytest.mark.parametrize(
  ("source", "target", "line"),
  [
    ({"a.weight": (2, 3)}, TARGET, "+ a/bias (2,): needs a.bias"),
    (SOURCE | {"b.weight": (1,)}, TARGET, "- b.weight (1,): no parameter wants it"),
    (SOURCE, TARGET | {"c/bias": (1,)}, "+ c/bias (1,): no rule makes it"),
    (SOURCE | {"a.weight": (3, 2)}, TARGET, "! a.weight: got shape (3, 2), expected (2, 3) for a/kernel (3, 2)"),
  ],
)
def test_leftovers_and_shapes_raise_with_both_lists(source, target, line):
  with pytest.raises(Mismatch) as error:
    plan(RULES, {}, source, target)
  assert line in str(error.value) and "Nothing was written" in str(error.value)


COMBINED = [Rule("c", ("cls", "position"), combine=lambda cls, x: cls + x[:, :1], shared=True)]


@pytest.mark.parametrize(
  ("source", "line"),
  [
    ({"cls": (1, 1, 8), "position": (1, 5, 4)}, r"! cls \(1, 1, 8\), position \(1, 5, 4\): cannot be combined"),
    ({"cls": (3, 1, 4), "position": (1, 5, 4)}, r"make shape \(3, 1, 4\), expected \(1, 1, 4\) for c"),
    ({"cls": (1, 1, 4), "position": (5,)}, "cannot be combined"),
    ({"cls": (1, 1, 4)}, r"\+ c \(1, 1, 4\): needs position"),
  ],
)
def test_shapes_of_a_combination_are_checked_before_anything_is_read(source, line):
  with pytest.raises(Mismatch, match=line):
    plan(COMBINED, {}, source, {"c": (1, 1, 4)})
  assert plan(COMBINED, {}, {"cls": (1, 1, 4), "position": (1, 5, 4)}, {"c": (1, 1, 4)})


def test_long_lists_show_every_sign():
  source = SOURCE | {f"more.{i}": (1,) for i in range(50)} | {"a.bias": (5,)}
  with pytest.raises(Mismatch) as error:
    plan(RULES, {}, source, TARGET | {f"lost/{i}": (1,) for i in range(45)})
  message = str(error.value)
  assert "(45 +, 50 -, 1 !;" in message and "+ … and 25 more" in message and "- … and 30 more" in message
  assert "! a.bias: got shape" in message and len(message.splitlines()) == 1 + 21 + 21 + 1


def test_nearest_key_is_named():
  with pytest.raises(Mismatch, match=r"Nearest source key to a\.weight: a\.weigth"):
    plan(RULES, {}, {"a.weigth": (2, 3), "a.bias": (2,)}, TARGET)


def test_a_tensor_read_twice_and_a_parameter_made_twice():
  with pytest.raises(Mismatch, match=r"! a\.bias: read more than once"):
    plan([*RULES, Rule("c/bias", "a.bias")], {}, SOURCE, TARGET | {"c/bias": (2,)})
  with pytest.raises(Mismatch, match=r"! a/bias: made by 2 rules"):
    plan([*RULES, Rule("a/bias", "d.bias")], {}, SOURCE | {"d.bias": (2,)}, TARGET)


def test_dtype_is_kept():
  entries, _ = plan(RULES, {}, SOURCE, TARGET)
  assert make(entries[0], {"a.weight": np.zeros((2, 3), np.float16)}.__getitem__).dtype == np.float16
