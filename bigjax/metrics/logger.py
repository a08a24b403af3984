"""The numbers of a step on their way from the devices to the writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from bigjax.metrics.progress import Progress
from bigjax.metrics.stopwatch import Pace
from bigjax.metrics.writers import Writers


class Logger:
  """Fetches a step's metrics once the next step is on its way, so that the devices never wait for the host."""

  def __init__(self, writers: Writers, progress: Progress, speed: Callable[[Any], Mapping[str, float]]):
    self._writers, self._progress, self._pending = writers, progress, None
    self._speed = speed  # What there is to say of so many steps a second.
    self._pace, self.pause = Pace(progress.watch), progress.pause

  def step(self, step: int, measured: Mapping[str, jax.Array] | None) -> None:
    self.flush()
    self._pending = None if measured is None else (step, measured)
    self._progress.update(step, None)

  def evals(self, step: int, measurements: Mapping[str, Any]) -> None:
    self.flush()
    self._writers.write(step, measurements)
    self._progress.note(step, measurements)

  def flush(self) -> None:
    """Writes the metrics that are waiting."""
    if self._pending is None:
      return
    (step, measured), self._pending = self._pending, None
    with self.pause("device"):
      values = {k: float(v) for k, v in jax.device_get(measured).items()}
    values |= self._speed(self._progress.steps_per_second())
    self._writers.write(step, values)
    self._writers.time(step, self._pace.since(step))
    self._progress.update(step, values)
