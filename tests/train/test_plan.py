"""The plan: its trace is exact, its memory near the compiler's, its order that of its figures."""

import math

import jax
import pytest

from configs import common
from semanticvla_jax.train import explain, hardware, plan, preflight, program, sharding

ONE = dict(replica=1, data=1, fsdp=1, tensor=1)


def config(**values):
  c = common.get_config("tiny")
  c.lora.update(rank=2, alpha=4.0)
  c.model.cues = 3
  small = {"data.prompt_length": 12, "data.instruction_length": 8, "data.batch_size": 64, "mesh.split_above": 256}
  c.update_from_flattened_dict(small | values)
  return c


@pytest.fixture(scope="module")
def setup():
  return plan._Setup(config(), hardware.topology("h100:8"), 989e12, None)


def test_operations_are_those_of_an_example_and_recomputation_adds_to_them(setup):
  work = setup.work
  assert work[None].flops == program.example_flops(config())
  assert work[None].flops < work["dots"].flops < work["full"].flops < 2 * work[None].flops
  assert work["full"].kept < work["dots"].kept < work[None].kept
  assert 0 < work["full"].block < work[None].block / 4  # its input alone


def test_bytes_of_weights_on_a_device_are_those_of_the_rule(setup):
  c, shape = config(), ONE | dict(fsdp=8)
  found = setup.weights(shape)
  listed = explain.memory(c, sharding.abstract_mesh(shape, 8))
  assert found.state == sum(listed[name] for name in ("frozen parameters", "trainable parameters", "optimizer"))
  assert found.gradients == listed["gradients"]
  assert setup.weights(ONE).gathered == 0 and found.gathered <= sum(
    x.size * 4 for x in jax.tree.leaves((setup.program.frozen, setup.program.state.trainable))
  )


def test_more_turns_take_less_memory_and_more_gathers(setup):
  shape = ONE | dict(fsdp=8)
  one, four = (plan._estimate(setup, None, shape, turns) for turns in (1, 4))
  assert four.arithmetic == one.arithmetic and four.collectives >= one.collectives
  full = plan._estimate(setup, "full", shape, 1)
  assert full.memory < one.memory and full.arithmetic > one.arithmetic


def test_collectives_follow_the_mesh(setup):
  assert plan._estimate(setup, None, ONE, 1).collectives == 0
  gradients = setup.weights(ONE | dict(data=8)).gradients
  alone = plan._estimate(setup, None, ONE | dict(data=8), 1)
  assert alone.collectives == pytest.approx(2 * gradients * 7 / 8 / setup.where.facts.link)
  assert plan._estimate(setup, None, ONE | dict(tensor=8), 1).collectives > 0


def test_meshes_are_all_that_multiply_to_the_devices():
  for name, slices in (("v5e:4x4", 1), ("h100:16", 1), ("v5p:2x2x2", 2)):
    where = hardware.topology(name)
    found = [*plan.meshes(where, slices)]
    assert all(math.prod(shape.values()) == where.devices * slices for shape in found)
    assert all(shape["tensor"] <= where.near and shape["replica"] == slices for shape in found)
    assert len({(*shape.values(),) for shape in found}) == len(found)


def test_the_plan_puts_the_fastest_that_fits_first_and_says_how_to_run_it(monkeypatch, setup):
  c, where = config(), hardware.topology("h100:8")
  monkeypatch.setattr(plan, "_Setup", lambda *args: setup)
  found = plan.candidates(c, where)
  assert all(plan.fits(x, where) for x in found) and found == sorted(found, key=lambda x: x.order)
  text = plan.describe(found, c, where)
  assert f"{len(found)} of {len(found)} ways fit 90% of the memory" in text and "an estimate" in text
  chosen = plan.applied(c, found[0])
  assert dict(chosen.mesh.items()).items() >= found[0].mesh.items() and chosen.model.remat == found[0].remat
  for flag in found[0].flags.split():
    assert flag in text
  small = where._replace(facts=where.facts._replace(memory=2**10))
  assert "DOES NOT FIT" in plan.describe(plan.candidates(c, small), c, small)


def test_what_no_plan_can_be_made_of_is_refused(monkeypatch, setup):
  monkeypatch.setattr(plan, "_Setup", lambda *args: setup)
  where = hardware.topology("h100:8")
  unknown = where._replace(facts=where.facts._replace(kind="abacus"))
  with pytest.raises(ValueError, match="--plan: got abacus; expected a device whose peak is known"):
    plan.candidates(config(), unknown)


@pytest.mark.aot_gpu
@pytest.mark.parametrize("remat", ["full", None])
def test_estimated_memory_is_near_the_compilers(remat):
  """For a model small enough to compile here: within the factor that the plan leaves room for at full size."""
  pytest.importorskip("jax_cuda12_plugin")
  c = config(**{"data.batch_size": 256, "model.remat": remat})
  where = hardware.topology("h100:8")
  report = preflight.compile_for(c, sharding.make_mesh(c.mesh, hardware.devices(where.name)))
  setup = plan._Setup(c, where, 989e12, None)
  estimate = plan._estimate(setup, remat, ONE | dict(fsdp=8), 1).memory
  workspace = 32 * 2**20  # of cuBLAS, whatever the model
  print(f"remat {remat}: estimated {estimate / 2**20:.1f} MiB, compiled {(report.peak - workspace) / 2**20:.1f} MiB")
  assert 0.5 < estimate / (report.peak - workspace) < 2
