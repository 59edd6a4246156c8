"""The pre-flight: on the devices present, on made-up program texts, and (make aot) on TPU slices that are not there."""

import math
import re
import subprocess
import sys

import jax
import pytest

from configs import common, libero
from semanticvla_jax.train import hardware, hlo_traffic, preflight, sharding

HLO = """
HloModule jit_step
%fused_computation.1 (p: f32[8]) -> f32[8] {
  %big.9 = f32[4096,4096]{1,0} add(%p, %p), metadata={op_name="jit(step)/inside"}
}
ENTRY %main (a: bf16[16,128]) -> bf16[16,128] {
  %a = bf16[16,128]{1,0} parameter(0)
  %gathered.1 = bf16[256,128]{1,0:T(8,128)} all-gather(%a), dimensions={0}, metadata={op_name="jit(step)/mlp/gather"}
  %start = (bf16[16,128]{1,0}, bf16[256,128]{1,0}) all-gather-start(%a), dimensions={0}
  %done = bf16[256,128]{1,0} all-gather-done(%start)
  ROOT %sum = f32[16,128]{1,0} all-reduce(%x), to_apply=%add, metadata={op_name="jit(step)/loss"}
}
"""


def config(**values):
  c = common.get_config("tiny")
  c.lora.update(rank=2, alpha=4.0)
  c.model.cues = 3
  c.update_from_flattened_dict({"data.prompt_length": 12, "data.instruction_length": 8, "data.batch_size": 8} | values)
  return c


def test_collectives_are_counted_with_their_bytes():
  collectives = hlo_traffic.traffic(HLO).collectives
  assert collectives == (("all-gather", 2, 2 * 256 * 128 * 2), ("all-reduce", 1, 16 * 128 * 4))


def test_arrays_that_wander_between_devices_are_warned_of():
  found = hlo_traffic.traffic(HLO)
  assert not any("WARNING" in line for line in preflight._moves(found, None))
  wandering = HLO.replace("ROOT %sum", "%there = f32[8]{0} collective-permute(%a), channel_id=1\n  ROOT %sum")
  lines = preflight._moves(hlo_traffic.traffic(wandering), hardware.GPUS["h100"])
  assert any("WARNING: 1 collective-permute: " in line for line in lines)
  assert any("ms at 3352 GB/s" in line for line in lines)


def test_largest_arrays_leave_out_fusions_and_arguments():
  found = preflight.largest(HLO)
  assert found[0] == (256 * 128 * 2, "bf16[256,128] jit(step)/mlp/gather")
  assert not any("inside" in what for _, what in found)


@pytest.mark.slow
def test_training_step_on_the_devices_present():
  c = config()
  mesh = sharding.make_mesh(c.mesh)
  report = preflight.compile_for(c, mesh)
  assert report.problem is None and report.peak > 0 and report.traffic.collectives
  text = preflight.describe(report, c, mesh)
  for part in (
    "train: batch 8 on 8 × cpu (fsdp 8)",
    "frozen parameters",
    "activations, gradients",
    "TFLOP a step",
    "all-gather",
    "launches of a call: ",
  ):
    assert part in text
  assert "memory of this device is not known" in text


def test_policy_on_the_devices_present():
  c = config(**{"data.batch_size": 1})
  mesh = sharding.make_mesh({"tensor": 2}, jax.devices()[:2])
  report = preflight.compile_for(c, mesh, "policy")
  assert report.problem is None and "parameters, observation" in preflight.describe(report, c, mesh, "policy")


def test_what_does_not_fit_says_the_number_and_what_would_help():
  c = config()
  mesh = sharding.make_mesh({"data": 4, "fsdp": 1}, jax.devices()[:4])
  message = "Used 24.15G of 15.75G hbm. Exceeded hbm capacity by 8.40G"
  report = preflight.Report(8, 1.0, {}, message, [], None, None)
  text = preflight.describe(report, c, mesh)
  assert not report.fits and f"DOES NOT FIT: {message}" in text
  for remedy in ("--config.model.remat=full", "--config.optim.accumulate=2 (the same batch", "--config.mesh.fsdp=-1"):
    assert remedy in text
  c.optim.accumulate, c.data.batch_size = 2, 16
  assert "--config.optim.accumulate=4" in preflight.remedies(c, mesh)[1]  # times what there is
  c.optim.accumulate = 4
  assert not any("accumulate" in remedy for remedy in preflight.remedies(c, mesh))  # one example a device and turn
  short = preflight._shorten(
    f"RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory. {message}.\n\nmore"
  )
  assert short == message


def test_sweep_finds_the_largest_batch(monkeypatch):
  mesh = sharding.make_mesh({"fsdp": 8})
  tried = []

  def compile_for(c, mesh, which, aux_loss=None):
    tried.append(c.data.batch_size)
    return preflight.Report(c.data.batch_size, 0.0, {"peak": c.data.batch_size}, None, [], None, 100)

  monkeypatch.setattr(preflight, "compile_for", compile_for)
  assert preflight.sweep(config(), mesh, lambda report: None) == 96
  assert len(tried) <= 8 and all(n % 8 == 0 for n in tried)


SLICES = {"v5e:2x2": 4, "v6e:2x4": 8, "v5p:2x2x1": 4, "v4:2x2x1": 4}


@pytest.mark.aot
@pytest.mark.parametrize("topology", SLICES)
def test_toy_step_compiles_for_every_generation(topology):
  pytest.importorskip("libtpu")
  devices = hardware.devices(topology)
  assert len(devices) == SLICES[topology]
  c = config()
  mesh = sharding.make_mesh(dict(fsdp=-1), devices)
  report = preflight.compile_for(c, mesh)
  assert report.fits and 0 < report.peak < 2**30 and report.largest
  assert report.traffic.count("collective-permute") == 0  # no rings: stepping.TPU_OPTIONS
  assert "TPU" in preflight.describe(report, c, mesh)


@pytest.mark.aot
def test_unknown_slice():
  pytest.importorskip("libtpu")
  with pytest.raises(ValueError, match="--topology: got 'v5e:3x5'; expected a slice that libtpu knows"):
    hardware.devices("v5e:3x5")


@pytest.mark.aot
@pytest.mark.slow
def test_the_released_7b_step_fits_sixteen_v5e():
  run = [sys.executable, "-m", "semanticvla_jax.train.preflight", "--config=configs/libero.py:full@7b"]
  run += ["--topology=v5e:4x4", "--batch=128", "--quick"]
  done = subprocess.run(run, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "fits: " in done.stdout and "TPU v5" in done.stdout
  peak = float(done.stdout.split("fits: ")[1].split()[0])
  assert math.isfinite(peak) and peak < 15.75
  assert "collective-permute" not in done.stdout


@pytest.mark.aot
def test_too_large_a_batch_is_refused_with_the_number():
  pytest.importorskip("libtpu")
  c = config(**{"data.batch_size": 2**17})
  mesh = sharding.make_mesh(dict(fsdp=-1), hardware.devices("v5e:2x2"))
  report = preflight.compile_for(c, mesh)
  text = preflight.describe(report, c, mesh)
  assert not report.fits
  assert re.search(r"DOES NOT FIT: .*\b[\d.]+G\b.*\b15.75G\b", text), text  # needed and there
  assert "what would help:" in text and "--config.optim.accumulate=2" in text


@pytest.mark.aot
def test_layout_of_a_slice_is_a_mesh_of_its_chips():
  pytest.importorskip("libtpu")
  c = libero.get_config("full@7b")
  mesh = sharding.make_mesh(c.mesh, hardware.devices("v5e:4x4"))
  assert dict(mesh.shape) == {"replica": 1, "data": 1, "fsdp": 16, "tensor": 1}
  two = sharding.make_mesh({"replica": 2, "fsdp": -1}, hardware.devices("v5e:2x2", slices=2))
  assert [len({d.slice_index for d in half.flat}) for half in two.devices] == [1, 1]
  with pytest.raises(ValueError, match="got replica 1 on 2 slices"):
    sharding.make_mesh({"fsdp": -1}, hardware.devices("v5e:2x2", slices=2))


@pytest.mark.aot_gpu
def test_a_training_step_compiles_for_eight_gpus_that_are_not_there():
  pytest.importorskip("jax_cuda12_plugin")
  c = config(**{"mesh.split_above": 256})
  mesh = sharding.make_mesh(dict(fsdp=-1), hardware.devices("h100:8"))
  report = preflight.compile_for(c, mesh)
  assert report.fits and 0 < report.peak < 2**30
  assert report.traffic.count("all-gather") > 0 and report.traffic.products > 100
  text = preflight.describe(report, c, mesh)
  for part in ("8 × NVIDIA H100 80GB HBM3 (fsdp 8)", "of 79.11 GiB a device", "weights copied again: ", "at peak"):
    assert part in text, text


@pytest.mark.aot_gpu
def test_a_policy_compiles_for_one_gpu_that_is_not_there():
  pytest.importorskip("jax_cuda12_plugin")
  c = libero.get_config("full@small")
  c.data.batch_size = 1
  mesh = sharding.make_mesh({"tensor": 1}, hardware.devices("h100"))
  report = preflight.compile_for(c, mesh, "policy")
  assert report.fits and report.traffic.collectives == ()
  weights = report.memory["parameters, observation"]
  assert weights < report.traffic.bytes < 10 * weights  # every weight is read once
  assert 50 < report.traffic.products < report.traffic.launches < 1000
  with c.model.unlocked():
    c.model.attention = "triton"
  kernel = preflight.compile_for(c, mesh, "policy").traffic  # no logits in memory, nothing brought into place
  assert kernel.launches <= report.traffic.launches - 2 * 11 and kernel.bytes < report.traffic.bytes
