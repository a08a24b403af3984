"""Looks after a run from a thread: a step that hangs ends it, a host that holds the others up is named.

Nothing is asked of the loop: its stopwatch says what it is at and since when. A step that takes many times the median,
or an evaluation or a save that takes hours, hangs; then the stacks of all threads are written down, the hosts are
named, and the process leaves with exit code 76, so that whatever started it starts it again.

Devices work in step, so that a slow host makes all of them slow alike. It is found by what its own side takes, input
and Python, which each process tells the others now and then. A chip that is slow by itself does not show here.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from bigjax import hosts, record
from bigjax.errors import LOST, UserError, say
from bigjax.metrics.stopwatch import TRAINING

WORDS = {"input": "waits for input", "device": "waits for the devices", "host": "is at work on the host"}
ROLL = 2.0  # Seconds between two looks at whether another process has found that the run hangs.
TOGETHER = 8.0  # Seconds in which all say what they are at then.


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
  """When something hangs, which ends the run with exit code 76; and when a host is slow, which is told of."""

  times: float = 20.0  # A step hangs when it takes so many times the median,
  at_least: float = 300.0  # and so many seconds.
  pause: float = 7200.0  # Seconds that an evaluation, a save, or the start of the loop may take.
  slow: float = 1.5  # A host is slow whose side of a step takes so many times that of the others.
  every: float = 60.0  # Seconds between two such comparisons.


class Watchdog:
  """Runs while it is entered.

  Args:
    config: When something hangs, and when a host is slow.
    progress: Of the run, with its step and its stopwatch.
    workdir: Where stacks are written.
    note: Called with what a person should know.
    ends: Whether to end the process; else what hangs is told of only.
  """

  def __init__(
    self, config: WatchdogConfig | None, progress: Any, workdir: str, note: Callable[[str], None], ends: bool
  ):
    self._config, self._progress, self._workdir, self._note, self._ends = config, progress, workdir, note, ends
    self._steps: collections.deque[float] = collections.deque(maxlen=101)  # Seconds of one, the last of them.
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._run, name="bigjax-watchdog", daemon=True)

  def __enter__(self) -> Watchdog:
    if self._config is not None:
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._over.set()
    if self._config is not None:
      self._thread.join()

  def _run(self):
    config, watch = self._config, self._progress.watch
    self._first = step = self._progress.step
    trained = watch.seconds(*TRAINING)
    told = looked = time.monotonic()
    before, suspect = self._pace(), None
    while not self._over.wait(min(1.0, config.at_least / 4)):
      now_at = watch.seconds(*TRAINING)
      if (at := self._progress.step) > step:
        self._steps.append((now_at - trained) / (at - step))
        step, trained = at, now_at
      bucket, since = seen = watch.bucket, watch.since
      hung = watch.clock() - since
      if hung > self._limit(bucket) and seen == suspect:  # Twice alike, or one was read while the other changed.
        self._hangs(bucket, hung)
      suspect = seen
      if time.monotonic() - looked > ROLL:
        looked = time.monotonic()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
          if hosts.told_below("hangs"):
            self._say(bucket, hung)
            self._over.wait()  # The other one ends the run.
      if time.monotonic() - told > config.every:
        told, pace = time.monotonic(), self._pace()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX's service is gone: hosts.py has that.
          self._compare(before, pace)
        before = pace

  def _limit(self, bucket):
    if bucket not in TRAINING or self._progress.step < self._first + 3:
      return self._config.pause
    return max(self._config.at_least, self._config.times * statistics.median(self._steps or [0.0]))

  # A step that hangs

  def _hangs(self, bucket, seconds):
    file = self._say(bucket, seconds)
    usual = f"; a step takes {statistics.median(self._steps):.3g} s" if self._steps else ""
    reason = f"step {self._progress.step + 1} hangs: {self._who()}{usual}. Stacks are in {file}"
    if not self._ends:
      self._note(reason)
      self._over.wait()
      return
    if hosts.place()[0] == 0:
      with contextlib.suppress(OSError, UserError):
        record.finish(self._workdir, "failed", error=reason)
    hosts.end(LOST, reason)

  def _say(self, bucket, seconds):
    """Writes the stacks down, and tells the other processes what this one is at."""
    doing = f"{WORDS.get(bucket, f'is at {bucket}')} for {seconds:.0f} s"
    self._mine = {"doing": doing, "on": socket.gethostname(), "waits": bucket == "device"}
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      hosts.tell_all(f"hangs/{hosts.place()[0]}", self._mine)
    return dump(self._workdir, f"the run hangs; this process {doing}")

  def _who(self):
    """Which process is at what; those that don't wait for others first."""
    me, count = hosts.place()
    if count == 1:
      return f"it {self._mine['doing']}"
    found, deadline = {me: self._mine}, time.monotonic() + TOGETHER
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      while len(found) < count and time.monotonic() < deadline:
        time.sleep(0.1)
        found |= hosts.told_below("hangs")
    named = sorted(found.items(), key=lambda item: (item[1]["waits"], item[0]))
    parts = [f"process {i} on {f['on']} {f['doing']}" for i, f in named[:8]]
    silent = [i for i in range(count) if i not in found]
    return "; ".join(parts) + (f"; nothing is known of {', '.join(map(str, silent[:8]))}" if silent else "")

  # A host that is slow

  def _pace(self):
    watch = self._progress.watch
    return {"step": self._progress.step} | {name: watch.seconds(name) for name in TRAINING}

  def _compare(self, before, now):
    """Tells the others this process's pace; process 0 names the slowest, where it is much slower than the others."""
    me, count = hosts.place()
    steps = now["step"] - before["step"]
    if count == 1 or steps < 1:
      return
    mine = {name: (now[name] - before[name]) / steps for name in TRAINING} | {"on": socket.gethostname()}
    hosts.tell_all(f"pace/{me}", mine)
    if me == 0 and (line := straggler(hosts.told_below("pace"), self._config.slow)):
      self._note(line)


def straggler(paces: dict[int, dict[str, Any]], slow: float) -> str | None:
  """Returns a line on the process that the others wait for, if there is one.

  Args:
    paces: Of each process its seconds a step for input, host and device, and its host.
    slow: How many times the others' time, their median, its own side has to take.
  """
  if len(paces) < 2:
    return None
  own = {i: p["input"] + p["host"] for i, p in paces.items()}
  slowest = max(own, key=own.get)
  others = statistics.median(t for i, t in own.items() if i != slowest)
  step = sum(paces[slowest][name] for name in TRAINING)
  if own[slowest] < slow * others or own[slowest] - others < 0.1 * step:
    return None
  part = max(("input", "host"), key=paces[slowest].get)
  return (
    f"process {slowest} on {paces[slowest]['on']} holds the others up: its side of a step takes "
    f"{1000 * own[slowest]:.3g} ms (most of it {part}), theirs {1000 * others:.3g} ms."
  )


def dump(workdir: str, why: str) -> str:
  """Writes the stacks of all threads to a file in `workdir`, and to the standard error stream; returns the file."""
  file = os.path.join(workdir, f"stacks-{socket.gethostname()}-{os.getpid()}.txt")
  say(f"bigjax: {why}; the stacks of all threads:")
  faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
  try:
    with open(file, "a", encoding="utf-8") as f:
      f.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {why}\n")
      f.flush()
      faulthandler.dump_traceback(f, all_threads=True)
  except OSError as e:  # The disk may be what hangs, or is full.
    return f"the log only ({e})"
  return file
