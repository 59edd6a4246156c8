"""Meshes: the same losses on all of them, the constraints that hold activations, and the 7B tree's layout, frozen.

To accept a changed layout: PYTHONPATH=.:tests python tests/train/test_sharding.py
"""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_observation
from jax.sharding import PartitionSpec as P

from configs import common, libero
from semanticvla_jax.train import explain, flops, init, optimizer, program, sharding
from semanticvla_jax.train import step as stepping
from semanticvla_jax.train.partition import partition
from semanticvla_jax.types import Batch

MANIFESTS = Path(__file__).parent / "manifests"
ACCEPT = "accept with: PYTHONPATH=.:tests python tests/train/test_sharding.py"
# name: (mesh, devices)
TOPOLOGIES = {
  "fsdp8": (dict(fsdp=8), 8),  # v5p:2x2x2, v4:2x2x2
  "fsdp16": (dict(fsdp=16), 16),  # v5e:4x4, v6e:4x4
  "fsdp4_tensor4": (dict(fsdp=4, tensor=4), 16),
  "replica2_fsdp16": (dict(replica=2, fsdp=16), 32),  # two slices of v5e:4x4
}
MESHES = {
  "data": dict(data=8),
  "fsdp": dict(fsdp=8),
  "data2_fsdp4": dict(data=2, fsdp=4),
  "all": dict(data=2, fsdp=2, tensor=2),
  "tensor": dict(tensor=8),
}
BATCH, STEPS = 8, 10
TOLERANCE = 2e-3  # relative, on the loss; float32 sums in another order, ten updates long
LLM = "llm/layers/attn/q_proj/kernel"


def config(**mesh):
  c = common.get_config("tiny")
  c.lora.update(rank=2, alpha=4.0)
  c.optim.update(lr=1e-3, warmup_steps=0, decay_steps=100)
  c.data.update(batch_size=BATCH, prompt_length=12, instruction_length=8)
  c.model.cues = 3
  c.mesh.update(dict(replica=1, data=1, fsdp=1, tensor=1, split_above=256) | mesh)  # all are small at tiny size
  return c


def batch(c, bare):
  observation = random_observation(bare, BATCH, c.data.prompt_length, lengths=np.arange(BATCH) % 4 + 8)
  rng = np.random.default_rng(0)
  actions = jnp.asarray(rng.uniform(-1, 1, (BATCH, c.model.chunk, 7)), jnp.float32)
  return Batch(observation, actions, jnp.asarray(rng.random((BATCH, c.model.chunk)) < 0.9))


def start(c, mesh):
  """(state, frozen, step, batch) on the mesh."""
  model, bare = init.make_model(c)
  wanted = init.shapes(model, bare, c.trainable, c.frozen_dtype)
  rule = sharding.rule_of(c.mesh)
  params = init.init_params(model, bare, c.seed, wanted, sharding.param_sharding(wanted, mesh, rule))
  trainable, frozen = partition(params, c.trainable)
  transform = optimizer.transform(c.optim)
  state = stepping.new_state(transform, trainable)
  state = jax.device_put(state, stepping.state_sharding(state, mesh, rule))
  step = stepping.make_step(model, transform, optimizer.schedule(c.optim), c.seed)
  return state, frozen, step, sharding.place_whole(batch(c, bare), mesh)


def losses(mesh_sizes, devices):
  c = config(**mesh_sizes)
  mesh = sharding.make_mesh(c.mesh, devices)
  state, frozen, step, examples = start(c, mesh)
  run = stepping.compile_step(step, mesh, state, frozen, sharding.rule_of(c.mesh))
  out = []
  for _ in range(STEPS):
    state, metrics = run(state, frozen, examples)
    out.append(float(metrics["loss"]))
  return out


@pytest.fixture(scope="module")
def alone():
  return losses({}, jax.devices()[:1])  # one device: nothing to split


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_losses_of_one_device(name, alone):
  found = losses(MESHES[name], jax.devices())
  assert found == pytest.approx(alone, rel=TOLERANCE)
  assert found[-1] < found[0]


def test_activations_are_constrained_at_block_ends():
  c = config(fsdp=8)
  mesh = sharding.make_mesh(c.mesh)
  p = program.from_config(c)
  with stepping.over(mesh):
    text = str(jax.make_jaxpr(p.step)(p.state, p.frozen, p.batch))
  assert text.count("sharding_constraint") >= 9  # four blocks an encoder, the decoder's scanned one


def manifest(name):
  sizes, devices = TOPOLOGIES[name]
  c = libero.get_config("full@7b")
  c.mesh.update(dict(replica=1, data=1, fsdp=1, tensor=1) | sizes)
  mesh = sharding.abstract_mesh(c.mesh, devices)
  parts = "\n".join(f"{kind}: {size} bytes a device" for kind, size in explain.memory(c, mesh).items())
  return f"{parts}\n\n{explain.table(c, mesh)}\n"


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_layout_of_the_7b_tree_is_frozen(name):
  assert manifest(name) == (MANIFESTS / f"{name}.txt").read_text(), ACCEPT


def mesh_of(devices, **sizes):
  return sharding.abstract_mesh(dict(fsdp=1) | sizes, devices)


def test_tensor_splits_heads_and_columns_and_fsdp_the_rest():
  mesh = mesh_of(8, fsdp=2, tensor=4)
  assert sharding.param_spec(LLM, (32, 4096, 32, 128), mesh) == P(None, "fsdp", "tensor")
  assert sharding.param_spec("llm/layers/attn/o_proj/kernel", (32, 32, 128, 4096), mesh) == P(
    None, "tensor", None, "fsdp"
  )
  vit = "dino/Transformer/encoderblock_3/MlpBlock_0/"
  assert sharding.param_spec(vit + "Dense_0/bias", (4096,), mesh) == P("tensor")
  assert sharding.param_spec(vit + "Dense_1/kernel", (4096, 1024), mesh) == P("tensor", "fsdp")
  assert sharding.param_spec("mu/" + LLM, (32, 4096, 32, 128), mesh) == P(None, "fsdp", "tensor")  # a moment


def test_what_tensor_does_not_divide_is_told(caplog):
  mesh = mesh_of(8, tensor=8)
  tree = {"llm": {"layers": {"attn": {"q_proj": {"kernel": jax.ShapeDtypeStruct((2, 32, 2, 16), jnp.float32)}}}}}
  with caplog.at_level(logging.WARNING):
    sharding.check(tree, mesh)
  assert "tensor=8 does not divide the heads or columns of 1 arrays" in caplog.text


def rule(*overrides):
  return sharding.Rule(overrides)


def test_what_is_small_is_copied():
  mesh = mesh_of(8, fsdp=8)
  assert sharding.param_spec("x", (64, 64), mesh) == P()
  assert sharding.param_spec("x", (64, 64), mesh, sharding.Rule(split_above=4096)) == P("fsdp")
  assert sharding.rule_of(config(split_above=7).mesh) == sharding.Rule((), 7)
  assert sharding.rule_of(dict(fsdp=8)) == sharding.Rule()  # of an earlier run


def test_overrides_come_first_and_are_checked():
  mesh, shape = mesh_of(4, data=2, fsdp=2), (8, 6)
  assert sharding.param_spec("coupler/in/kernel", shape, mesh, rule((r"coupler/.*", ("data", None)))) == P("data")
  for spec in (("data",), ("batch", None), ("data", "data")):
    with pytest.raises(ValueError, match=r"config.mesh.overrides: got 'coupler/.\*'.*coupler/in/kernel of shape"):
      sharding.param_spec("coupler/in/kernel", shape, mesh, rule((r"coupler/.*", spec)))
  with pytest.raises(ValueError, match="'copler', which matches no parameter"):
    sharding.check({"coupler": {"bias": jax.ShapeDtypeStruct((5,), jnp.float32)}}, mesh, rule(("copler", ("fsdp",))))


def test_bytes_of_a_family_are_those_of_its_shards():
  mesh = mesh_of(8, fsdp=4, tensor=2)
  split = explain.Family("x", (8, 16, 3), "bfloat16", True, "fsdp·tensor·-")
  assert explain.family_bytes(split, 5, mesh) == 5 * (2 * 8 * 3) * 2
  assert explain.family_bytes(explain.Family("x", (8,), "float32", True, "copied"), 2, mesh) == 2 * 8 * 4


def test_explain_tells_mesh_families_and_bytes():
  text = explain.explain(config(fsdp=-1, tensor=2), 8)
  assert "mesh: replica 1, data 1, fsdp 4, tensor 2 (8 devices)" in text
  assert "batch: 8, 2 a device" in text
  assert "llm/layers/attn/q_proj/lora_b" in text and " trainable " in text and " frozen " in text
  assert "gradients" in text
  with pytest.raises(ValueError, match="got 8 examples; expected a multiple of the 16 devices"):
    explain.explain(config(fsdp=16), 16)


@pytest.mark.slow
def test_bytes_a_device_are_those_of_its_shards():
  c = config(fsdp=8)
  mesh = sharding.make_mesh(c.mesh)
  state, frozen, *_ = start(c, mesh)
  told = explain.memory(c, mesh)
  here = {"trainable parameters": state.trainable, "optimizer": state.optimizer, "frozen parameters": frozen}
  for name, tree in here.items():
    assert told[name] == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_flops_of_products_scans_and_gradients():
  x, w = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
  product = 2 * 4 * 8 * 16
  assert flops.count(lambda x, w: x @ w, x, w) == product
  assert flops.count(jax.grad(lambda x, w: jnp.sin(x @ w).sum(), argnums=(0, 1)), x, w) == 3 * product
  assert flops.count(jax.grad(lambda x, w: jnp.sin(x @ w).sum()), x, w) == 2 * product  # a frozen w
  square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  loop = lambda x, w: jax.lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, None, length=5)[0]  # noqa: E731
  assert flops.count(loop, x, square) == 5 * 2 * 4 * 8 * 8
  assert flops.count(lambda x, w: (x @ w, x @ square_of(w))[0], x, w) == product  # what nobody reads costs nothing


def square_of(w):
  return w @ w.T @ w


def test_flops_of_an_example_do_not_depend_on_remat():
  """Nor on whether layers are stacked, but for the last one: apart, it runs for the positions that are read alone."""
  plain, apart = (
    [
      program.example_flops(program.changed(config(), **{"model.scan": scan, "model.remat": remat}))
      for remat in (None, "full")
    ]
    for scan in (True, False)
  )
  assert plain[0] == plain[1] and apart[0] == apart[1]
  assert 0.9 * plain[0] < apart[0] < plain[0]


def test_peaks_go_by_whole_names():
  for kind, tera in {
    "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA L40S": 362,
    "NVIDIA L40": 181,
    "NVIDIA L4": 121,
    "NVIDIA A100-SXM4-40GB": 312,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
  }.items():
    assert flops.peak(kind) == tera * 1e12, kind
  assert flops.peak("cpu") is None and flops.peak("NVIDIA L400") is None and flops.peak("NVIDIA GB2000") is None


if __name__ == "__main__":
  MANIFESTS.mkdir(exist_ok=True)
  for name in TOPOLOGIES:
    (MANIFESTS / f"{name}.txt").write_text(manifest(name))
