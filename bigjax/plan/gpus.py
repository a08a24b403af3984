"""GPUs that are not here, for the compiler in JAX's CUDA plugin: it needs none, only what one is like.

What kernels it would choose by trying them it takes by its own estimate, and it gives no cycles. Nothing can run on
these devices. The plugin alone will do, without the libraries of CUDA: jax-cuda12-plugin and jax-cuda12-pjrt.
"""

from __future__ import annotations

import importlib.util
from typing import Any

# What differs between chips; https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs
_CORES = {
  "a100": dict(
    core_count=108,
    fpus_per_core=64,
    shared_memory_per_core=167_936,
    shared_memory_per_block_optin=166_912,
    l2_cache_size=41_943_040,
    clock_rate_ghz=1.41,
    memory_bandwidth=2_039_040_000_000,
    device_memory_size=85_100_068_864,
    capability="major: 8 feature_extension: NONE",
  ),
  "h100": dict(
    core_count=132,
    fpus_per_core=128,
    shared_memory_per_core=233_472,
    shared_memory_per_block_optin=232_448,
    l2_cache_size=52_428_800,
    clock_rate_ghz=1.98,
    memory_bandwidth=3_352_320_000_000,
    device_memory_size=84_942_979_072,
    capability="major: 9 feature_extension: ACCELERATED_FEATURES",
  ),
}
_CORES["h200"] = _CORES["h100"] | dict(memory_bandwidth=4_800_000_000_000, device_memory_size=151_397_597_184)
_ALL = """
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_vendor: "NVIDIA Corporation"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
"""


def compiler() -> str | None:
  """Returns the module of the plugin that is installed, of the newest CUDA; None if there is none."""
  found = importlib.util.find_spec("jax_plugins")
  names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12") if found else ()
  return next((name for name in names if importlib.util.find_spec(name)), None)


def target(chip: str, kind: str) -> str:
  """Returns what the compiler has to know of a chip, the text of its `GpuTargetConfigProto`."""
  figures = dict(_CORES[chip])
  capability = figures.pop("capability")
  own = " ".join(f"{name}: {value}" for name, value in figures.items())
  return (
    f'gpu_device_info {{ {own} cuda_compute_capability {{ {capability} }} name: "{kind}" {_ALL} }}\n'
    f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{kind}"\n'
  )


def devices(chip: str, kind: str, hosts: int, gpus: int) -> list[Any]:
  """Returns devices to compile for, host by host.

  Args:
    chip: "a100", "h100" or "h200".
    kind: what JAX calls it.
    hosts: their number.
    gpus: of each.
  """
  import jax
  from jax.experimental import topologies

  jax.devices()  # Which loads the plugins.
  options = dict(target_config=target(chip, kind), topology=f"1x{hosts}x{gpus}")
  return list(topologies.get_topology_desc(topology_name=chip, platform="cuda", **options).devices)
