import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import common, openvla_oft
from semanticvla_jax.train import init, losses, optimizer, sharding
from semanticvla_jax.train.partition import combine, count, partition

PARAMS = {"llm": {"q": {"kernel": jnp.ones((4, 3)), "lora_a": jnp.ones((4, 2))}}, "coupler": {"bias": jnp.ones(5)}}


def test_partition_and_combine():
  trainable, frozen = partition(PARAMS, "coupler/.*")
  assert trainable == {"llm": {"q": {"lora_a": trainable["llm"]["q"]["lora_a"]}}, "coupler": trainable["coupler"]}
  assert count(trainable) == 8 + 5 and count(frozen) == 12
  jax.tree.map(np.testing.assert_array_equal, combine(trainable, frozen), PARAMS)
  assert "coupler" not in partition(PARAMS, None)[0]
  with pytest.raises(ValueError, match="config.trainable='copler/.*', which matches no parameter"):
    partition({"coupler": PARAMS["coupler"]}, "copler/.*")


def test_released_schedule():
  rate = optimizer.schedule(common.get_config().optim)
  for step, expected in ((0, 0.0), (1000, 2.5e-4), (2000, 5e-4), (42_000, 2.55e-4), (80_004, 1.0752e-5)):
    assert float(rate(step)) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_oft_schedule_drops_once():
  rate = optimizer.schedule(openvla_oft.get_config("libero").optim)
  assert [float(rate(s)) for s in (0, 99_999, 100_001)] == pytest.approx([5e-4, 5e-4, 5e-5])


def test_l1_counts_unmasked_steps_only():
  predicted, actions = jnp.zeros((1, 2, 7)), jnp.ones((1, 2, 7)).at[0, 1].set(100.0).at[0, 0, 6].set(3.0)
  loss, groups = losses.l1(predicted, actions, jnp.array([[True, False]]))
  assert float(loss) == pytest.approx((6 * 1 + 3) / 7)
  assert {k: float(v) for k, v in groups.items()} == {"l1_translation": 1.0, "l1_rotation": 1.0, "l1_gripper": 3.0}


def test_next_token_shifts_by_one():
  ids, mask = jnp.array([[5, 2, 7, 0]]), jnp.array([[False, True, True, False]])
  right = 50 * jax.nn.one_hot(jnp.array([[2, 7, 0, 0]]), 9)
  assert float(losses.next_token(right, ids, mask)) < 1e-6
  assert float(losses.next_token(right[:, ::-1], ids, mask)) > 10


def test_append_puts_tokens_behind_the_last_real_one():
  prompt, mask = jnp.array([[1, 5, 6], [1, 7, 9]]), jnp.array([[True, True, True], [True, True, False]])
  ids, real, number = losses.append(prompt, mask, jnp.array([[20, 21], [30, 31]]))
  assert ids[0].tolist() == [1, 5, 6, 20, 21] and ids[1, :4].tolist() == [1, 7, 30, 31]
  assert real.tolist() == [[True] * 5, [True] * 4 + [False]]
  assert number[1].tolist() == [-2, -1, 0, 1, 2]


def test_mesh_fills_and_refuses():
  mesh = sharding.make_mesh(dict(data=2, fsdp=-1, tensor=1))
  assert dict(mesh.shape) == {"replica": 1, "data": 2, "fsdp": 4, "tensor": 1}
  with pytest.raises(ValueError, match=r"mesh: got .*'data': 3.* for 8 devices"):
    sharding.make_mesh(dict(data=3, fsdp=1, tensor=1))
  with pytest.raises(ValueError, match=r"mesh: got .*'data': 0.* for 8 devices"):
    sharding.make_mesh(dict(data=0, fsdp=-1))


def test_parameter_rule():
  mesh = sharding.make_mesh(dict(data=2, fsdp=4, tensor=1))
  assert sharding.param_spec("x", (1024, 4096), mesh) == P(None, "fsdp")
  assert sharding.param_spec("x", (4096, 1023), mesh) == P("fsdp")
  assert sharding.param_spec("x", (8, 8), mesh) == P()
  assert sharding.param_spec("x", (1023, 1021), mesh) == P()


def test_batch_must_divide():
  mesh = sharding.make_mesh(dict(data=2, fsdp=4, tensor=1))
  placed = sharding.place_batch({"x": np.arange(16)}, mesh, 16)["x"]
  assert len(placed.addressable_shards) == 8 and placed.addressable_shards[0].data.shape == (2,)
  with pytest.raises(ValueError, match="got 12 examples; expected a multiple of the 8 devices"):
    sharding.host_rows(12, mesh)


def test_average_follows_the_parameters_and_leaves_the_update_alone():
  config = common.get_config("tiny").optim
  config.ema = 0.9
  plain = optimizer.transform(common.get_config("tiny").optim)
  averaging = optimizer.transform(config)
  params, state, other = {"w": jnp.ones(3)}, None, None
  state, other = averaging.init(params), plain.init(params)
  expected = params["w"]
  for _ in range(3):
    updates, state = averaging.update({"w": jnp.ones(3)}, state, params)
    same, other = plain.update({"w": jnp.ones(3)}, other, params)
    np.testing.assert_array_equal(updates["w"], same["w"])
    params = {"w": params["w"] + updates["w"]}
    expected = 0.9 * expected + 0.1 * params["w"]
  np.testing.assert_allclose(optimizer.average_of(state, params)["w"], expected, rtol=1e-6)
  assert optimizer.average_of(other, params) is params
  config.ema = 1.5
  with pytest.raises(ValueError, match="config.optim.ema: got 1.5"):
    optimizer.transform(config)


def test_frozen_parameters_take_their_type_and_trainable_ones_stay_float32():
  config = common.get_config("tiny")
  model, bare = init.make_model(config)
  trainable, frozen = partition(init.shapes(model, bare, config.trainable, "bfloat16"), config.trainable)
  assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
  assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
  assert common.get_config("7b").frozen_dtype == "bfloat16" and config.frozen_dtype is None


def test_muon_takes_matrices_and_leaves_the_rest_to_adamw():
  params = {
    "attn": {
      "query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))},
      "out": {"kernel": jnp.ones((2, 4, 8))},
    },
    "layers": {"mlp": {"kernel": jnp.ones((3, 8, 16))}},
    "embed": {"embedding": jnp.ones((16, 8))},
    "patch": {"kernel": jnp.ones((2, 2, 3, 8))},
    "lm_head": {"kernel": jnp.ones((8, 16))},
  }
  found = optimizer.matrices(params)
  assert tuple(found["attn"]["query"]["kernel"]) == ((0,), (1, 2))
  assert tuple(found["attn"]["out"]["kernel"]) == ((0, 1), (2,))
  assert tuple(found["layers"]["mlp"]["kernel"]) == ((1,), (2,))  # one matrix a layer
  assert found["embed"]["embedding"] is None and found["patch"]["kernel"] is None
  assert found["attn"]["query"]["bias"] is None and found["lm_head"]["kernel"] is None
  config = common.get_config("tiny").optim
  config.update(name="muon", lr=0.1, warmup_steps=0)
  transform = optimizer.transform(config)
  gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
  updates, _ = transform.update(gradients, transform.init(params), params)
  update = updates["attn"]["query"]["kernel"].reshape(8, 8)
  values = np.linalg.svd(update + 0.1 * 0.01, compute_uv=False)  # without the weight decay all are nearly equal
  assert values.max() / values.min() < 2.5
  config.name = "sgd"
  with pytest.raises(ValueError, match="got 'sgd'; expected 'adamw' or 'muon'"):
    optimizer.transform(config)
