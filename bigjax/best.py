"""The best value of a metric so far, and since when it has not improved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Best:
  """A running best, small enough to lie beside a checkpoint, so that a resumed run decides as an unbroken one."""

  metric: str
  mode: str  # "max" or "min".
  min_delta: float = 0.0
  value: float | None = None
  step: int | None = None
  waited: int = 0  # Measurements since the best one.

  def seen(self, step: int, metrics: Mapping[str, Any]) -> Best:
    """Returns the best after a measurement; one that lacks the metric leaves it as it is."""
    value = metrics.get(self.metric)
    if value is None:
      return self
    sign = 1 if self.mode == "max" else -1
    better = not math.isnan(value) and (self.value is None or sign * (value - self.value) > self.min_delta)
    if better:
      return dataclasses.replace(self, value=float(value), step=step, waited=0)
    return dataclasses.replace(self, waited=self.waited + 1)

  def restored(self, saved: Mapping[str, Any] | None) -> Best:
    """Takes up what was saved, where it is of the same metric."""
    if saved and (saved["metric"], saved["mode"]) == (self.metric, self.mode):
      return dataclasses.replace(self, value=saved["value"], step=saved["step"], waited=saved["waited"])
    return self
