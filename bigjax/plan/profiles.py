"""What a chip can do, each figure with where it was published; and the compiler options that it is programmed with.

A figure that nobody has published is None, and what would need it says so. Bytes are bytes (1 GiB = 2**30), rates are a
second and a chip; a chip may be several devices of JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bigjax.errors import UserError, suggest

_DOCS = "https://docs.cloud.google.com/tpu/docs/"
_TPU7X = _DOCS + "tpu7x"  # Its table has v5p and v6e beside it.
_BOOK = "https://jax-ml.github.io/scaling-book/tpus/"
_JAX = "https://github.com/jax-ml/jax/blob/main/jax/_src/tpu_info.py"
_V4_PAPER = "https://arxiv.org/abs/2304.01433, table 4"
_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446"
_A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
GIB, MIB = 2**30, 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
  """A chip."""

  name: str
  kinds: tuple[str, ...]  # What JAX calls its devices, `device.device_kind`.
  devices: int = 1  # Of JAX, a chip.
  flops: Mapping[str, float]  # Dense peak by type; float32 products on a TPU are made of bfloat16 ones.
  hbm: int  # Bytes.
  hbm_bandwidth: float
  vmem: int | None  # On-chip memory of the vector units (of a GPU: none that compares).
  clock: float | None  # Hz.
  cycles: float | None = None  # The compiler's estimate of a product of bfloat16[8192, 8192]: see `rate`.
  links: int | None  # To other chips.
  link_bandwidth: float | None  # Of one of them in one direction.
  dimensions: int = 0  # Of the torus; 0 is a switch, which joins every chip of a host with every other.
  wraps: int = 1  # A side of the torus is a ring if it is a multiple of that.
  dcn: float | None = None  # Bytes a second a chip through the data center's network, its part of the host's.
  chips_a_host: int = 4
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # Of the compiler.
  sources: Mapping[str, str]  # By field.

  def peak(self, dtype: str) -> float:
    """Returns the peak of a type that products are made in, bfloat16's for what the table doesn't name."""
    return self.flops.get(dtype, self.flops["bfloat16"])

  @property
  def rate(self) -> float | None:
    """The compiler's estimated cycles a second: those of a large product in the time that the published peak takes.

    Its estimates keep a margin: they come to 8% (v4), 11% (v5p) and 14% (v5e) more than the clock makes in that time.
    With one rule for all, a factor found on one chip means the same on another.
    """
    return self.clock if self.cycles is None else self.cycles / (2 * 8192**3 / (self.flops["bfloat16"] / self.devices))

  @property
  def unknown(self) -> tuple[str, ...]:
    """The figures that nobody has published."""
    figures = ("hbm", "hbm_bandwidth", "vmem", "clock", "links", "link_bandwidth", "dcn")
    return tuple(f for f in figures if getattr(self, f) is None)


# Set where a sharded step was compiled with them by libtpu 0.0.50, which refuses names that it doesn't know and options
# that it doesn't allow on a chip; elsewhere the compiler's defaults. The scheduler starts collectives early and waits
# for them late, the fusions spread one over the work beside it, https://openxla.org/xla/async_ops. Where they were
# tried, the defaults gave the same cycles and memory: a release with other defaults is to change nothing unnoticed.
_OVERLAP = {
  "xla_tpu_enable_latency_hiding_scheduler": True,
  "xla_tpu_overlap_compute_collective_tc": True,
  "xla_enable_async_all_gather": True,
  "xla_enable_async_collective_permute": True,
  "xla_tpu_enable_data_parallel_all_reduce_opt": True,
  "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
# Products in pieces, each with the part of a kernel that has just come (collective matmul; the compiler goes by
# the size of what is gathered): for Llama 3.1 8B on v5p:2x4x4, FSDP, it estimates 7.5e9 cycles with them and 4.9e9
# without, and the pieces send 2.4 times as much. So never.
_WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
# On a v5p or v6e the compiler refuses to gather so: "not supported/recommended on platforms other than TPU v5e".
_FUSIONS = {
  "xla_tpu_enable_async_collective_fusion": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
  "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
}
# The SparseCores send, beside the products, which a v5p or v6e has no other way to do; for it a step of Llama 3.1 8B on
# v6e:16x16 keeps 10.1 instead of 13.8 GiB. The options are those of MaxText's benchmarks, set by the name
# ENABLE_SPARSECORE_OFFLOADING_FOR_RS_AG_AR in benchmarks/xla_flags_library.py of github.com/AI-Hypercomputer/maxtext.
_SPARSECORE = {
  "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
  "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
  "xla_tpu_enable_all_gather_offload_tracing": True,
  "xla_tpu_use_tc_device_shape_on_sc": True,
  "xla_sc_disable_megacore_partitioning": True,
}
# Gathers along two and three sides of the torus too. They are then all under way beside fusions, and 2.8 GiB more is
# kept; the fusions take more cycles: on a v6e 1% more, less than the waiting was; on a v5p, whose links are faster, 2%
# more, and that is more than the waiting was.
_SIDES = {
  "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
}

PROFILES = {
  p.name: p
  for p in (
    Profile(
      name="v3",
      kinds=("TPU v3",),
      devices=2,
      flops={"bfloat16": 123e12},
      hbm=32 * GIB,
      hbm_bandwidth=900e9,
      vmem=2 * 16 * MIB,
      clock=940e6,
      links=4,
      link_bandwidth=100e9,
      dimensions=2,
      wraps=32,
      sources={
        **dict.fromkeys(("flops", "hbm", "hbm_bandwidth"), _DOCS + "v3"),
        "vmem": _JAX,
        "clock": "https://doi.org/10.1145/3360307, table 1",
        **dict.fromkeys(("links", "link_bandwidth"), _BOOK),
      },
    ),
    Profile(
      name="v4",
      kinds=("TPU v4",),
      flops={"bfloat16": 275e12, "int8": 275e12},
      hbm=32 * GIB,
      hbm_bandwidth=1200e9,
      vmem=2 * 16 * MIB,
      clock=1050e6,
      cycles=4_523_672.0,
      links=6,
      link_bandwidth=45e9,
      dimensions=3,
      wraps=4,
      sources={
        **dict.fromkeys(("flops", "hbm", "hbm_bandwidth"), _DOCS + "v4"),
        "vmem": _JAX,
        "clock": _V4_PAPER,
        **dict.fromkeys(("links", "link_bandwidth"), _BOOK),
      },
    ),
    Profile(
      name="v5e",
      kinds=("TPU v5 lite", "TPU v5e"),
      flops={"bfloat16": 197e12, "int8": 393e12},
      hbm=16 * GIB,
      hbm_bandwidth=819e9,
      vmem=128 * MIB,
      clock=1.5e9,
      cycles=9_557_312.0,
      links=4,
      link_bandwidth=400e9 / 4 / 2,
      dimensions=2,
      wraps=16,
      dcn=2 * 100e9 / 8 / 8,
      chips_a_host=8,
      options=_OVERLAP | _FUSIONS,
      sources={
        **dict.fromkeys(("flops", "hbm", "hbm_bandwidth", "links", "link_bandwidth", "dcn"), _DOCS + "v5e"),
        "vmem": _JAX,
        "clock": _BOOK,
      },
    ),
    Profile(
      name="v5p",
      kinds=("TPU v5", "TPU v5p"),
      flops={"bfloat16": 459e12, "int8": 918e12},
      hbm=95 * GIB,
      hbm_bandwidth=2765e9,
      vmem=2 * 64 * MIB,
      clock=1.75e9,
      cycles=4_652_072.0,
      links=6,
      link_bandwidth=1200e9 / 6 / 2,
      dimensions=3,
      wraps=4,
      dcn=50e9 / 8,
      options=_OVERLAP | _WHOLE | _SPARSECORE,
      sources={
        **dict.fromkeys(("flops", "hbm", "hbm_bandwidth", "links", "link_bandwidth", "dcn"), _DOCS + "v5p"),
        "vmem": _JAX,
        "clock": f"the peak over its 8 units of 128 x 128 multiply-adds, {_DOCS}v5p",
      },
    ),
    Profile(
      name="v6e",
      kinds=("TPU v6 lite", "TPU v6e"),
      flops={"bfloat16": 918e12, "int8": 1836e12, "float8": 918e12},
      hbm=32 * GIB,
      hbm_bandwidth=1638e9,
      vmem=128 * MIB,
      clock=None,
      cycles=2_977_840.0,
      links=4,
      link_bandwidth=800e9 / 4 / 2,
      dimensions=2,
      wraps=16,
      dcn=4 * 200e9 / 8 / 8,
      chips_a_host=8,
      options=_OVERLAP | _WHOLE | _SPARSECORE | _SIDES,
      sources={
        **dict.fromkeys(("flops", "hbm", "hbm_bandwidth", "links", "link_bandwidth", "dcn"), _DOCS + "v6e"),
        "vmem": _JAX,
      },
    ),
    Profile(
      name="tpu7x",
      kinds=("TPU7x",),
      devices=2,
      flops={"bfloat16": 2307e12, "float8": 4614e12},
      hbm=192 * GIB,
      hbm_bandwidth=7380e9,
      vmem=2 * 64 * MIB,
      clock=None,
      cycles=2_604_600.0,
      links=6,
      link_bandwidth=1200e9 / 6 / 2,
      dimensions=3,
      wraps=4,
      dcn=100e9 / 8,
      sources={
        **dict.fromkeys(("flops", "hbm", "hbm_bandwidth", "link_bandwidth", "links", "dcn"), _TPU7X),
        "vmem": _JAX,
      },
    ),
    Profile(
      name="a100",
      kinds=("NVIDIA A100-SXM4-80GB",),
      flops={"bfloat16": 312e12, "float32": 156e12, "int8": 624e12},  # float32 as TF32.
      hbm=80 * 10**9,
      hbm_bandwidth=2039e9,
      vmem=None,
      clock=None,
      links=12,
      link_bandwidth=600e9 / 12 / 2,
      chips_a_host=8,
      sources=dict.fromkeys(("flops", "hbm", "hbm_bandwidth", "links", "link_bandwidth"), _A100),
    ),
    Profile(
      name="h100",
      kinds=("NVIDIA H100 80GB HBM3",),
      flops={"bfloat16": 989e12, "float32": 494e12, "float8": 1979e12, "int8": 1979e12},  # Half of "with sparsity".
      hbm=80 * 10**9,
      hbm_bandwidth=3350e9,
      vmem=None,
      clock=None,
      links=18,
      link_bandwidth=900e9 / 18 / 2,
      chips_a_host=8,
      sources=dict.fromkeys(("flops", "hbm", "hbm_bandwidth", "links", "link_bandwidth"), _H100),
    ),
    Profile(
      name="h200",
      kinds=("NVIDIA H200",),
      flops={"bfloat16": 989e12, "float32": 494e12, "float8": 1979e12, "int8": 1979e12},
      hbm=141 * 10**9,
      hbm_bandwidth=4800e9,
      vmem=None,
      clock=None,
      links=18,
      link_bandwidth=900e9 / 18 / 2,
      chips_a_host=8,
      sources=dict.fromkeys(("flops", "hbm", "hbm_bandwidth", "links", "link_bandwidth"), _H200),
    ),
  )
}


def named(name: str) -> Profile:
  """Returns the profile of a chip by its short name, "v5e"; raises `UserError` for one that is not known."""
  if name not in PROFILES:
    raise UserError(f"there is no profile of a chip {name!r}.{suggest(name, PROFILES)} Known: {', '.join(PROFILES)}.")
  return PROFILES[name]


def of(device: Any) -> Profile | None:
  """Returns the profile of a device of JAX; None for a CPU or an unknown chip."""
  return next((p for p in PROFILES.values() if device.device_kind in p.kinds), None)


def compiler_options(device: Any) -> dict[str, Any] | None:
  """Returns what the compiler is told for a device, if anything: the same for a run as for its plan."""
  profile = of(device)
  return dict(profile.options) if profile and profile.options else None
