"""The best values of a run so far: which checkpoint to keep, and when it is time to stop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from bigjax.errors import UserError


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


@dataclasses.dataclass(frozen=True)
class Watch:
  """What the loop remembers of its measurements; saved beside each checkpoint."""

  keep: Best | None = None  # Decides which checkpoint is the best.
  stop: Best | None = None  # Decides when to stop early.
  patience: int = 0

  @classmethod
  def of(cls, keep, early_stop, evals: Collection[str], saved: Mapping[str, Any]) -> Watch:
    """Watches `config.keep.best` and `config.early_stop`, going on from what was saved."""
    for where, metric in [("keep.best", keep.best), ("early_stop.metric", early_stop and early_stop.metric)]:
      if metric and metric.split("/")[0] not in evals:
        raise UserError(f"config.{where}: {metric!r} is no metric of config.evals ({', '.join(evals) or 'none'}).")
    stop = early_stop and Best(early_stop.metric, early_stop.mode, early_stop.min_delta)
    return cls(
      keep=Best(keep.best, keep.mode).restored(saved.get("keep")) if keep.best else None,
      stop=stop and stop.restored(saved.get("stop")),
      patience=early_stop.patience if early_stop else 0,
    )

  def seen(self, step: int, metrics: Mapping[str, Any]) -> Watch:
    """Returns the watch after a measurement; a watched metric of a measured name that is not there is an error."""
    for best in filter(None, (self.keep, self.stop)):
      measured = any(m.startswith(best.metric.split("/")[0] + "/") for m in metrics)
      if measured and best.metric not in metrics:
        given = ", ".join(metrics)
        raise UserError(f"{best.metric!r} is watched (config.keep.best, config.early_stop), but there is only {given}.")
    after = lambda b: b and b.seen(step, metrics)
    return dataclasses.replace(self, keep=after(self.keep), stop=after(self.stop))

  @property
  def tired(self) -> bool:
    return self.stop is not None and self.stop.waited >= self.patience

  def improved_at(self, step: int) -> bool:
    return self.keep is not None and self.keep.step == step

  def metric_at(self, step: int) -> float | None:
    return self.keep.value if self.improved_at(step) else None

  def to_json(self) -> dict[str, Any]:
    return {k: dataclasses.asdict(v) for k, v in (("keep", self.keep), ("stop", self.stop)) if v is not None}
