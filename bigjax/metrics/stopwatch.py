"""Where the time of a run goes: a stopwatch that runs in one bucket at a time, so that the buckets add up.

`start` is until the first step but for what has a name of its own, `compile` and `restore`. Then each moment of the
loop is one of four: it waits for `input`; it waits for the devices, which are behind it (`device`); the host works
(`host`); or the run pauses, for `eval`, `save` and the like. A healthy run is all `device`: where that is short, the
devices waited for something else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

TRAINING = ("host", "input", "device")  # A stalled input is slow training.
COMPUTING = ("device", "host", "train")  # Older runs have these two in one.


class Pace:
  """What a step took lately, part by part; for rows of timings."""

  def __init__(self, watch: Stopwatch):
    self._watch, self._step, self._before = watch, None, {}

  def since(self, step: int) -> dict[str, float]:
    """Returns seconds a step since the last call, by part of a step, and the start's goodput; {} at the first."""
    now = self._watch.breakdown()
    steps, before = step - (step if self._step is None else self._step), self._before
    self._step, self._before = step, now
    if steps < 1:
      return {}
    found = {f"{name}_seconds": (now[name] - before[name]) / steps for name in TRAINING}
    return found | {"goodput": goodput(now)}


class Stopwatch:
  """Seconds by what they were spent on.

  Args:
    clock: gives seconds; `time.perf_counter` unless a test has its own.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self.clock = clock
    self.bucket, self.since = "start", clock()  # What the time goes to, and from when on; read by other threads.
    self._seconds = dict.fromkeys(("start", *TRAINING, "eval", "save"), 0.0)

  def switch(self, bucket: str) -> None:
    """From now on time goes to `bucket`."""
    now = self.clock()
    self._seconds[self.bucket] = self._seconds.get(self.bucket, 0.0) + now - self.since
    self.bucket, self.since = bucket, now

  @contextlib.contextmanager
  def within(self, bucket: str) -> Iterator[None]:
    """Time inside goes to `bucket`."""
    before = self.bucket
    self.switch(bucket)
    try:
      yield
    finally:
      self.switch(before)

  def seconds(self, *buckets: str) -> float:
    """What went to these buckets so far, or to all there are."""
    running = self.clock() - self.since if not buckets or self.bucket in buckets else 0.0
    return running + sum(self._seconds.get(name, 0.0) for name in buckets or self._seconds)

  def breakdown(self) -> dict[str, float]:
    """Seconds by bucket; they add up to the time since the start."""
    return {name: self.seconds(name) for name in [*self._seconds, *{self.bucket} - self._seconds.keys()]}

  def stop(self) -> None:
    """No time passes any more."""
    now = self.clock()
    self.clock = lambda: now


def goodput(seconds: dict[str, float]) -> float:
  """The part of the time in which steps were computed: not started, waited for input, measured, saved, or lost."""
  total = sum(seconds.values())
  return sum(seconds.get(name, 0.0) for name in COMPUTING) / total if total else 0.0
