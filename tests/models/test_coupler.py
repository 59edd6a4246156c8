import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, tiny

from semanticvla_jax.models.coupler import Coupler, actions_to_tokens, grouped, tokens_to_actions
from semanticvla_jax.models.semanticvla import build

STATES = jax.random.normal(jax.random.key(0), (2, 4 * 3, 8))


def apply(coupler, states=STATES, bias=None):
  params = coupler.init(jax.random.key(1), states)["params"]
  return coupler.apply({"params": params}, states), params


def test_groups_cover_every_dimension_of_both_robots():
  for a in (7, 14):
    assert sorted(d for _, dims in grouped(a) for d in dims) == list(range(a))
  with pytest.raises(ValueError, match="got action_dim 8; expected a multiple of 7"):
    grouped(8)


def test_bimanual_order_is_left_arm_then_right_arm():
  coupler = Coupler(grouped(14), tokens=6, hidden=8)
  states = jnp.zeros((1, 12, 8))
  params = coupler.init(jax.random.key(0), states)["params"]
  for i, name in enumerate(("trans", "rot", "grip")):
    out = params[name]["out"]
    params[name]["out"] = {"kernel": 0 * out["kernel"], "bias": 10.0 * i + jnp.arange(out["bias"].shape[0])}
  actions = coupler.apply({"params": params}, states)[0, 0]
  assert actions.tolist() == [0, 1, 2, 10, 11, 12, 20, 3, 4, 5, 13, 14, 15, 21]


def test_a_step_reads_its_own_tokens_only():
  actions, params = apply(coupler := Coupler(grouped(7), tokens=3, hidden=8))
  assert actions.shape == (2, 4, 7) and actions.dtype == jnp.float32
  moved = coupler.apply({"params": params}, STATES.at[:, 3].add(1.0))  # first token of step 1
  changed = np.abs(np.asarray(moved - actions)) > 1e-7
  assert changed[:, 1].all() and not changed[:, [0, 2, 3]].any()


def test_paper_literal_heads_read_one_token_each_and_are_linear():
  coupler = Coupler(grouped(7), tokens=3, hidden=8, read="own", head="linear")
  actions, params = apply(coupler)
  assert params["rot"]["kernel"].shape == (8, 3)
  moved = coupler.apply({"params": params}, STATES.at[:, 1].add(1.0))  # rotation token of step 0
  changed = (np.abs(np.asarray(moved - actions)) > 1e-7).any(axis=0)
  assert changed[0].tolist() == [False] * 3 + [True] * 3 + [False] and not changed[1:].any()


HAND = (("wrist", (0, 1, 2)), ("base", (4, 3)), ("fingers", (5, 6, 7, 8, 9)))


@pytest.mark.parametrize("kind", ["grouped", "paper"])
def test_a_group_of_any_robot_has_a_head_and_a_token(kind):
  model = tiny(action_dim=10, groups=HAND, coupler=kind)
  assert model.coupler.tokens == 3 and model.coupler.groups == HAND
  states = jax.random.normal(jax.random.key(0), (1, 6, 32))
  params = model.coupler.init(jax.random.key(1), states)["params"]
  assert set(params) == {"wrist", "base", "fingers"}
  base = params["base"]["out"] if kind == "grouped" else params["base"]
  base |= {"kernel": 0 * base["kernel"], "bias": jnp.array([40.0, 30.0])}
  actions = model.coupler.apply({"params": params}, states)
  assert actions.shape == (1, 2, 10) and actions[0, 0, 3:5].tolist() == [30, 40], "dimension 4 is the group's first"


def test_the_groups_of_one_arm_written_out_are_those_without_any():
  assert tiny(groups=grouped(7)).coupler == tiny().coupler
  listed = [["trans", [0, 1, 2]], ["rot", [3, 4, 5]], ["grip", [6]]]
  assert build(TINY | {"groups": listed}).coupler == tiny().coupler, "as in JSON"
  assert tiny(action_dim=14).coupler.tokens == 6


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"groups": HAND}, "groups=.*expected each of the dimensions 0 to 6 in one group"),
    ({"groups": (("a", (0, 1, 2, 3)), ("b", (3, 4, 5, 6)))}, "each of the dimensions 0 to 6 in one group"),
    ({"groups": (("a", (0, 1, 2)), ("a", (3, 4, 5, 6)))}, "with different names"),
    ({"groups": (("a", ()), ("b", (*range(7),)))}, "with different names"),
    ({"groups": "trans"}, r"expected \(\(name, \(dimension"),
    ({"groups": grouped(7), "coupler": "single"}, "expected None with coupler='single'"),
    ({"action_dim": 10}, "expected a multiple of 7.*or name their groups in model.groups"),
    ({"optional_views": (2,)}, r"optional_views=\(2,\); expected some of the views 0 to 1"),
    ({"optional_views": (0, 1)}, "not all"),
  ],
)
def test_groups_and_views_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    build(TINY | fields)


def test_shapes_that_do_not_divide():
  with pytest.raises(ValueError, match="got 12 states, 5 tokens a step.*pass chunk × tokens"):
    apply(Coupler(grouped(7), tokens=5, hidden=8))
  with pytest.raises(ValueError, match="got read='all'.*set model.coupler"):
    apply(Coupler(grouped(7), tokens=3, hidden=8, read="all"))


def test_action_tokens_round_trip_within_half_a_bin_and_clip():
  actions = np.linspace(-1, 1, 1001)
  ids = actions_to_tokens(actions)
  assert ids.min() >= 31744 and ids.max() == 31999
  assert np.abs(np.asarray(tokens_to_actions(jnp.asarray(ids))) - actions).max() <= 1 / 255 + 1e-6
  assert actions_to_tokens(np.array([-5.0, 5.0])).tolist() == [31999, 31744]
  np.testing.assert_allclose(tokens_to_actions(jnp.array([32063, 5])), [-0.99607843, 0.99607843], atol=1e-6)
