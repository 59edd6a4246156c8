"""Devices that need not be there: what their makers publish of them, and compilers that know them.

    v5e:4x4, v6e:4x4, v5p:2x2x2, v4:2x2x2     TPU slices, by libtpu's compiler (make aot); v5e:16 is v5e:4x4
    h100:8, h200:8, a100:8, l40s:4, b200:8    GPUs, by the compiler of jax's CUDA plugin (make aot-gpu); h100 is one

Nothing runs on such devices: programs are compiled for them, and their memory and instructions are read.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from semanticvla_jax.errors import refuse

# libtpu looks for a TPU VM's metadata and takes a lock; there is neither a VM nor a device here.
OFFLINE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}
# Without a device nothing is tuned, and products in Triton's hands then find no tile sizes at 7B: all go to cuBLASLt.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
GPUS_OF_A_HOST = 8


class Facts(NamedTuple):
  """One device, as its maker publishes it.

  Attributes:
    kind: words that jax.Device.device_kind holds. memory: bytes (the compiler keeps some). bandwidth: of it, bytes/s.
    link: bytes/s that it receives from others of its slice or host. network: likewise from other slices or hosts.
  """

  kind: str
  memory: float
  bandwidth: float
  link: float
  network: float


TPUS = {
  "v4": Facts("TPU v4", 32 * 2**30, 1228e9, 300e9, 6.25e9),
  "v5e": Facts("TPU v5 lite", 16 * 2**30, 819e9, 200e9, 3.125e9),
  "v5p": Facts("TPU v5", 95 * 2**30, 2765e9, 600e9, 6.25e9),
  "v6e": Facts("TPU v6 lite", 32 * 2**30, 1640e9, 448e9, 12.5e9),
}
TPU7X = Facts("TPU7x", 96 * 2**30, 3690e9, 600e9, 12.5e9)  # half a chip; compiled for where there is one
# Links: NVLink in one direction; PCIe 4.0 for the L40S. Networks: one adapter a device of 400 Gbit/s, or 200 Gbit/s.
GPUS = {
  "h100": Facts("NVIDIA H100 80GB HBM3", 84942979072, 3352.32e9, 450e9, 50e9),
  "h200": Facts("NVIDIA H200", 151397597184, 4800e9, 450e9, 50e9),
  "a100": Facts("NVIDIA A100-SXM4-80GB", 85100068864, 2039.04e9, 300e9, 25e9),
  "l40s": Facts("NVIDIA L40S", 48305799168, 864e9, 32e9, 25e9),
  "b200": Facts("NVIDIA B200", 191514411008, 7672.32e9, 900e9, 50e9),
}


class Processor(NamedTuple):
  """What the compiler asks about a GPU.

  Attributes:
    capability: compute capability. cores: multiprocessors. units, threads, shared: of each, 32-bit units, threads at
    once, bytes of shared memory. cache: bytes of the second cache. clock: GHz. accelerated: whether it has instructions
    of its generation alone ("sm_90a").
  """

  capability: tuple[int, int]
  cores: int
  units: int
  threads: int
  shared: int
  cache: int
  clock: float
  accelerated: bool = True


PROCESSORS = {
  "h100": Processor((9, 0), 132, 128, 2048, 233472, 52428800, 1.98),
  "h200": Processor((9, 0), 132, 128, 2048, 233472, 52428800, 1.98),
  "a100": Processor((8, 0), 108, 64, 2048, 167936, 41943040, 1.41, False),
  "l40s": Processor((8, 9), 142, 128, 1536, 102400, 100663296, 2.52, False),
  "b200": Processor((10, 0), 148, 128, 2048, 233472, 132644864, 1.965),
}
# Chips of a slice by number, for those who name no shape.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBIC = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


class Topology(NamedTuple):
  """A named set of devices.

  Attributes:
    name: as the compiler knows it, "v5e:4x4" or "h100:8". facts: of each device. devices: how many of a slice, or all
    GPUs. near: how many of them are joined by `facts.link`.
  """

  name: str
  facts: Facts
  devices: int
  near: int

  @property
  def gpu(self) -> bool:
    return self.name.partition(":")[0] in GPUS


def topology(name: str) -> Topology:
  """What a name means, e.g. v5e:4x4, v5e:16, h100:8, h100.

  Raises:
    ValueError: a name that says nothing known.
  """
  kind, _, shape = name.partition(":")
  if kind in GPUS and re.fullmatch(r"|[1-9]\d*", shape):
    n = int(shape or 1)
    if n > GPUS_OF_A_HOST and n % GPUS_OF_A_HOST:
      raise refuse("--topology", repr(name), f"up to {GPUS_OF_A_HOST} GPUs, or whole hosts of them", "round it up")
    return Topology(f"{kind}:{n}", GPUS[kind], n, min(n, GPUS_OF_A_HOST))
  if kind in TPUS and re.fullmatch(r"\d+(x\d+)*", shape):
    shapes = FLAT if kind in ("v5e", "v6e") else CUBIC
    shape = shapes.get(int(shape), shape) if shape.isdigit() else shape
    if "x" in shape:
      n = math.prod(map(int, shape.split("x")))
      return Topology(f"{kind}:{shape}", TPUS[kind], n, n)
  raise refuse(
    "--topology",
    repr(name),
    f"a TPU slice ({', '.join(TPUS)}) such as v5e:4x4, v5p:2x2x2 or v5e:16, or GPUs ({', '.join(GPUS)}) such as h100:8",
    "name one of these",
  )


def facts(kind: str) -> Facts | None:
  """Of a device of this `jax.Device.device_kind`; None where it is not known."""
  named = {"TPU v5p": TPUS["v5p"], "TPU v5e": TPUS["v5e"]}
  named |= {x.kind: x for x in (*TPUS.values(), TPU7X, *GPUS.values())}
  return next((named[name] for name in sorted(named, key=len, reverse=True) if name in kind), None)


def devices(name: str | None, slices: int = 1) -> list:
  """The devices of a topology that need not be there, or those present.

  Raises:
    ValueError: the compiler is not installed, or does not know the topology.
  """
  if name is None:
    return jax.devices()
  found = topology(name)
  if found.gpu and slices > 1:
    raise refuse("--slices", slices, "1 for GPUs", f"name all of them, --topology={name.partition(':')[0]}:N")
  return _gpus(found) if found.gpu else _slice(found, slices)


def _slice(wanted: Topology, slices: int) -> list:
  if "TPU_LIBRARY_PATH" not in os.environ:
    _require("libtpu", wanted.name, ".venv-aot", "make aot")
  for variable, value in OFFLINE.items():
    os.environ.setdefault(variable, value)
  options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
  if wanted.name.startswith("v4"):
    options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
  return _described("tpu", wanted.name, "a slice that libtpu knows, such as v5e:4x4 or v5p:2x2x2", options)


def _gpus(wanted: Topology) -> list:
  _require("jax_cuda12_plugin", wanted.name, ".venv-aot-gpu", "make aot-gpu")
  hosts = wanted.devices // wanted.near
  options = {
    "target_config": target_config(wanted.name.partition(":")[0]),
    "topology": f"1x{hosts}x{wanted.near}",
  }
  return _described("cuda", wanted.name, "GPUs that the CUDA plugin knows", options)


def _described(platform: str, name: str, expected: str, options: dict[str, Any]) -> list:
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
  except Exception as error:  # compilers raise what they like
    why = str(error).splitlines()[0][:200]
    raise refuse("--topology", repr(name), f"{expected} (its compiler says: {why})", "name another") from error


def _require(module: str, name: str, folder: str, target: str) -> None:
  """Finds a compiler that is installed in a separate folder. Raises ValueError where it is not."""
  if importlib.util.find_spec(module) is None:
    installed = Path(__file__).parents[2] / folder
    if (installed / module).is_dir() and str(installed) not in sys.path:
      sys.path.append(str(installed))
      importlib.invalidate_caches()
  if importlib.util.find_spec(module) is None:
    raise refuse(f"--topology={name}", f"no {module}", "its compiler", f"run {target}, which installs it in {folder}")


def target_config(name: str) -> str:
  """A GPU as XLA's GpuTargetConfigProto in text, from what its maker publishes."""
  gpu, chip = GPUS[name], PROCESSORS[name]
  major, minor = chip.capability
  extension = "ACCELERATED_FEATURES" if chip.accelerated else "NONE"
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {chip.shared}
  shared_memory_per_block_optin: {chip.shared - 1024}
  threads_per_core_limit: {chip.threads}
  core_count: {chip.cores}
  fpus_per_core: {chip.units}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {gpu.bandwidth:.0f}
  l2_cache_size: {chip.cache}
  clock_rate_ghz: {chip.clock}
  device_memory_size: {gpu.memory:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{gpu.kind}"
"""
