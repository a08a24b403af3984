"""What Google calls its TPUs, as VMs and on GKE. A topology is written as for `bigjax plan`: v5e:4x4, v5p:2x2x4.

https://cloud.google.com/tpu/docs/runtimes, https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
"""

from __future__ import annotations

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Chip:
  """A generation; `vm` and `runtime` are None where it is not offered as a TPU VM, `gke` where not on GKE."""

  rank: int  # numbers in a shape
  vm: str | None
  runtime: str | None
  gke: str | None


CHIPS = {
  "v2": Chip(2, "v2", "tpu-ubuntu2204-base", None),
  "v3": Chip(2, "v3", "tpu-ubuntu2204-base", "tpu-v3-slice"),
  "v4": Chip(3, "v4", "tpu-ubuntu2204-base", "tpu-v4-podslice"),
  "v5e": Chip(2, "v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
  "v5p": Chip(3, "v5p", "v2-alpha-tpuv5", "tpu-v5p-slice"),
  "v6e": Chip(2, "v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice"),
  "tpu7x": Chip(3, None, None, "tpu7x"),
}


def parse(topology: str) -> tuple[str, list[int]]:
  """Returns the generation and the numbers of chips along each side."""
  name, _, shape = topology.partition(":")
  if name not in CHIPS:
    raise ValueError(f"--topology={topology}: the chip is none of {', '.join(CHIPS)}.")
  if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{CHIPS[name].rank - 1}}}", shape):
    raise ValueError(
      f"--topology={topology}: it is written like {name}:{'x'.join('224'[-CHIPS[name].rank :])}, in chips."
    )
  return name, [int(n) for n in shape.split("x")]


def vm(accelerator_type: str | None, topology: str | None) -> tuple[list[str], str, str]:
  """Returns gcloud's flags for that TPU, its release track ("" or "alpha"), and the runtime for JAX."""
  if (accelerator_type is None) == (topology is None):
    raise ValueError("which TPU? Name one of --accelerator_type=v5litepod-16 and --topology=v5e:4x4.")
  if topology is None:
    name, _, number = accelerator_type.partition("-")
    if name == "v5e":
      raise ValueError(f"--accelerator_type={accelerator_type}: gcloud calls it v5litepod-{number or 16}.")
    chip = next((c for c in CHIPS.values() if c.vm == name), None)
    if not chip or not number.isdigit():
      known = ", ".join(f"{c.vm}-N" for c in CHIPS.values() if c.vm)
      raise ValueError(f"--accelerator_type={accelerator_type}: it is none of {known}. Later chips are on GKE only.")
    return [f"--accelerator-type={accelerator_type}"], "", chip.runtime
  name, sizes = parse(topology)
  chip = CHIPS[name]
  if not chip.vm:
    raise ValueError(f"--topology={topology}: Google offers this chip on GKE only: scripts/launch/render.py gke-tpu.")
  if name in ("v5e", "v6e"):  # of a number of chips there is one shape
    return [f"--accelerator-type={chip.vm}-{math.prod(sizes)}"], "", chip.runtime
  # The released gcloud knows --type up to v4.
  flags = [f"--type={chip.vm}", f"--topology={'x'.join(map(str, sizes))}"]
  return flags, "alpha" if name == "v5p" else "", chip.runtime


def hosts(topology: str, chips_per_host: int | None = None, num_slices: int = 1) -> tuple[int, int]:
  """Returns the hosts of a slice on GKE, and the chips of each: 4, but all of a slice of 1 or (v5e, v6e) 8."""
  name, sizes = parse(topology)
  chips = math.prod(sizes)
  if chips_per_host is None:
    small = (1, 4, 8) if name in ("v5e", "v6e") and num_slices == 1 else (1, 4)
    chips_per_host = chips if chips in small else 4
  if chips % chips_per_host:
    raise ValueError(f"--topology={topology}: its {chips} chips are not hosts of {chips_per_host} each.")
  if num_slices > 1 and chips == chips_per_host:
    raise ValueError(f"--topology={topology} is one host; GKE joins slices of two or more (--num_slices={num_slices}).")
  return chips // chips_per_host, chips_per_host
