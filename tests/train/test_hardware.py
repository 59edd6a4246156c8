"""Names of devices that are not there, what is known of them, and what is said where their compiler is missing."""

import pytest

from semanticvla_jax.train import flops, hardware


@pytest.mark.parametrize(
  ("name", "full", "devices", "near"),
  [
    ("v5e:4x4", "v5e:4x4", 16, 16),
    ("v5e:16", "v5e:4x4", 16, 16),
    ("v5p:8", "v5p:2x2x2", 8, 8),
    ("v4:2x2x1", "v4:2x2x1", 4, 4),
    ("h100", "h100:1", 1, 1),
    ("h200:8", "h200:8", 8, 8),
    ("b200:16", "b200:16", 16, 8),
  ],
)
def test_names_mean_so_many_devices(name, full, devices, near):
  found = hardware.topology(name)
  assert (found.name, found.devices, found.near) == (full, devices, near)
  assert found.gpu == (name[0] in "hb")


@pytest.mark.parametrize("name", ["v5e-16", "v5e", "v9:4x4", "h100:0", "h100:4x4", "rtx:1", "v5e:7", ""])
def test_an_unknown_name_lists_the_known_ones(name):
  with pytest.raises(ValueError) as refused:
    hardware.topology(name)
  message = str(refused.value)
  assert message.startswith(f"--topology: got {name!r}; expected ") and "\n" not in message
  for known in (*hardware.TPUS, *hardware.GPUS):
    assert known in message


def test_gpus_of_several_hosts_are_whole_hosts():
  with pytest.raises(ValueError, match="--topology: got 'h100:12'; expected up to 8 GPUs, or whole hosts of them"):
    hardware.topology("h100:12")
  with pytest.raises(ValueError, match="--slices: got 2; expected 1 for GPUs; name all of them, --topology=h100:N"):
    hardware.devices("h100:8", 2)


@pytest.mark.parametrize(
  ("name", "module", "target"),
  [("v5e:4x4", "libtpu", "make aot"), ("h100:8", "jax_cuda12_plugin", "make aot-gpu")],
)
def test_a_missing_compiler_names_its_target(name, module, target, monkeypatch):
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(hardware.Path, "is_dir", lambda path: False)
  with pytest.raises(ValueError, match=f"--topology={name}: got no {module}; expected its compiler; run {target}, "):
    hardware.devices(name)


def test_every_device_has_a_peak_and_is_found_by_its_kind():
  for known in (*hardware.TPUS.values(), *hardware.GPUS.values()):
    assert flops.peak(known.kind) is not None and hardware.facts(known.kind) == known
  assert hardware.facts("TPU v5 lite0").memory == 16 * 2**30 and hardware.facts("TPU v5p").memory == 95 * 2**30
  assert hardware.facts("cpu") is None


def test_the_target_of_a_gpu_holds_its_figures():
  text = hardware.target_config("l40s")
  for line in ("core_count: 142", "device_memory_size: 48305799168", "major: 8 minor: 9 feature_extension: NONE"):
    assert line in text
  assert text.count("{") == text.count("}")


@pytest.mark.aot_gpu
@pytest.mark.parametrize("name", hardware.GPUS)
def test_the_compiler_knows_every_gpu(name):
  pytest.importorskip("jax_cuda12_plugin")
  (device,) = hardware.devices(name)
  assert device.platform == "gpu" and device.device_kind == hardware.GPUS[name].kind
