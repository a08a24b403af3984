"""Chips that are not here: devices of any slice of TPUs, for the compiler, which needs none of them; and GPUs.

The compiler is in the `libtpu` wheel, https://docs.jax.dev/en/latest/aot.html. What it knows is told before JAX is
imported, by `environment`; `devices` are then devices like others, on which nothing can run. That of GPUs is in JAX's
CUDA plugin (gpus.py). Without it as many devices of the CPU stand for them, which a step is laid out on but not
compiled for.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any

from bigjax.errors import UserError, suggest
from bigjax.plan import gpus, profiles

# The slices that are rented out, chips along each dimension of the torus. https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {
  "v3": ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),
  "v4": (*CUBES, "12x16x16"),
  "v5e": FLAT,
  "v5p": (*CUBES, "16x16x16", "16x16x24"),
  "v6e": FLAT,
  "tpu7x": (*CUBES, "16x16x16"),
}
GPUS = dict.fromkeys(("a100", "h100", "h200"), ("8", "2x8", "4x8", "8x8", "16x8"))  # Hosts x GPUs of one.


def environment(topology: str = "") -> None:
  """Sets what the compiler has to be told where there is no TPU; call it before JAX is imported.

  Raises:
    UserError: There is no such topology, or its compiler is not installed.
  """
  if topology:
    check(topology)
  if topology.partition(":")[0] in GPUS:
    os.environ["JAX_PLATFORMS"] = "cpu"
    return
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "--topology needs the TPU's compiler, which is not installed: uv pip install 'bigjax[plan]', or libtpu alone."
    )
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # There is no metadata server to ask.
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"  # It holds no chip that another process might want.
  found = dict(TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
  for name, value in found.items():
    os.environ.setdefault(name, value)


def profile(topology: str) -> profiles.Profile:
  """Returns the profile of a topology's chip."""
  return profiles.named(topology.partition(":")[0])


def compiles(topology: str) -> bool:
  """Whether there is a compiler for it that needs no device."""
  return topology.partition(":")[0] in SLICES or gpus.compiler() is not None


def devices(topology: str, slices: int = 1) -> list[Any]:
  """Returns the devices of `slices` slices of a topology such as `v5e:4x8`, `v5p:4x4x8`, `v6e:16x16` or `h100:4x8`.

  A chip is one device, of tpu7x and v3 two.

  Raises:
    UserError: There is no such topology.
  """
  chip, shape = check(topology, slices)
  if chip in GPUS:
    return _gpus(topology, chip, shape)
  import jax
  from jax.experimental import topologies

  options = dict(num_slices=slices) if slices > 1 else {}
  options |= dict(chip_config_name="megacore") if chip == "v4" else {}  # Two cores are one device, as they are rented.
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
  except jax.errors.JaxRuntimeError as e:
    reason = str(e).strip().splitlines()[0]
    raise UserError(f"--topology={topology}: {reason} Known for a {chip}: {_listed(chip)}.") from e
  return list(found.devices)


def check(topology: str, slices: int = 1) -> tuple[str, str]:
  """Returns the chip and the shape that a topology names.

  Raises:
    UserError: There is no such chip, or none in such a shape.
  """
  chip, _, shape = topology.partition(":")
  if chip not in SLICES | GPUS:
    known = "\n".join(f"  {name}: {_listed(name)}" for name in SLICES | GPUS)
    raise UserError(
      f"--topology={topology}: there is no chip {chip!r}.{suggest(chip, SLICES | GPUS)} Chips along each side:\n{known}"
    )
  sides = len(SLICES[chip][0].split("x")) if chip in SLICES else None
  if sides and not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (sides - 1), shape):
    raise UserError(f"--topology={topology}: a {chip} has {sides} dimensions, write it as one of {_listed(chip)}.")
  if not sides and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", shape):
    raise UserError(f"--topology={topology}: write GPUs, or hosts x GPUs of one, such as {_listed(chip)}.")
  if slices < 1:
    raise UserError(f"--num_slices={slices} must be positive.")
  if not sides and slices != 1:
    raise UserError(f"--num_slices={slices}: GPUs have no slices; name all hosts in --topology.")
  return chip, shape


def _gpus(topology, chip, shape):
  *hosts, each = map(int, shape.split("x"))
  if gpus.compiler() is None:
    return _standing_in(topology, math.prod(hosts) * each)
  return gpus.devices(chip, profiles.named(chip).kinds[0], math.prod(hosts), each)


def _standing_in(topology, count):
  """As many devices of the CPU as there are GPUs."""
  import jax

  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError as e:
    if len(jax.devices("cpu")) < count:
      raise UserError(f"--topology={topology}: JAX has started with fewer devices; plan that first.") from e
  return jax.devices("cpu")[:count]


def _listed(chip):
  return ", ".join(f"{s} ({math.prod(map(int, s.split('x')))} chips)" for s in (SLICES | GPUS)[chip])
