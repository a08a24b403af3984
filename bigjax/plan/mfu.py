"""Model FLOPs utilisation while a run trains: the part of the chips' published peak that went into the model.

MFU = model FLOPs of a step * steps a second / (chips * peak), https://arxiv.org/abs/2204.02311, appendix B. FLOPs are
those of `work.py`, in which a causal query counts the keys it sees: Megatron and PaLM count all of them, so theirs is
the higher number for the same speed. The peak is that of the type that products are made in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bigjax import precision
from bigjax.plan import profiles, work


def of(run: Any) -> Callable[[float | None], dict[str, float]]:
  """Returns `steps a second -> {"mfu": ...}`; nothing where the chip has no profile, as a CPU, or no speed is known."""
  profile = profiles.of(run.mesh.devices.flat[0])
  if profile is None:
    return lambda rate: {}
  needed = work.of(run).total
  peak = profile.peak(precision.of(run.config.precision).compute) * run.mesh.size / profile.devices
  return lambda rate: {} if rate is None else {"mfu": needed * rate / peak}
