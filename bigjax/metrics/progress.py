"""What a person sees while a run trains: one line that keeps itself up to date.

  step 300/1,000 30%  loss 0.123  accuracy 0.97  5,120 examples/s  12.3 ms/step  ETA 0:32  | val/accuracy 0.985 at 250

The same clock tells where the time went. It runs in one bucket at a time (start, train, input, eval, save, ...), so the
buckets add up to the time that passed, and the speed counts only what belongs to training.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bigjax.metrics.reading import direction, format_rate, format_seconds, format_value, is_per_class, is_timing


class Progress:
  """The progress line of a run, and its stopwatch.

  On a terminal the line is redrawn in place; elsewhere a line is printed every ten seconds and at each `note`.
  The time until the first `update` is "start" (building, compiling), and counts in no speed. A stream that breaks, such
  as the terminal of a closed connection, ends the line but not the run.

  Args:
    total_steps: where the run ends.
    start_step: where it begins, when resumed.
    batch_size: how many `unit`s a step takes.
    unit: what the speed is told in: examples, tokens.
    stream: where the line goes; the standard error stream if None.
    clock: gives seconds; `time.perf_counter` unless a test has its own.
    quiet: keeps the stopwatch but prints nothing, as hosts other than the first do.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    batch_size: int = 1,
    unit: str = "examples",
    stream: io.TextIOBase | None = None,
    clock: Callable[[], float] = time.perf_counter,
    quiet: bool = False,
  ):
    self.total_steps, self.step, self.batch_size, self.unit = total_steps, start_step, batch_size, unit
    self._stream = None if quiet else stream or sys.stderr
    self._in_place = self._stream is not None and self._stream.isatty()
    self._clock, self._metrics, self._note = clock, {}, []
    self._bucket, self._since = "start", clock()
    self._seconds = dict.fromkeys(("start", "train", "input", "eval", "save"), 0.0)
    # (step, seconds of training) at the first update, and at redraws within the last `_WINDOW` seconds of training.
    self._first: tuple[int, float] | None = None
    self._marks: deque[tuple[int, float]] = deque()
    self._drawn = (start_step, [])
    self._next_draw = self._since + (0 if self._in_place else _PLAIN_INTERVAL)
    self._draw(self._since)

  def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
    """Tells that `step` steps are done, and the newest metrics if there are any; prints when it is time to."""
    self.step = max(self.step, step)  # metrics may be those of the step before
    if metrics:
      self._metrics = metrics
    now = self._clock()
    if self._first is None:
      self._switch("train", now)
      self._first = step, self._trained(now)
      self._marks.append(self._first)
    if now >= self._next_draw or (step >= self.total_steps and self._in_place):
      self._draw(now)

  def note(self, step: int, eval_metrics: Mapping[str, Any]) -> None:
    """Keeps what an evaluation at `step` found at the end of the line, the headline numbers first."""
    known = [name for name in eval_metrics if direction(name) is not None]
    shown = {name: eval_metrics[name] for name in known or eval_metrics if not isinstance(eval_metrics[name], list)}
    # Higher-is-better values say more to most people than the loss, which the line shows for training already.
    names = sorted(shown, key=lambda name: direction(name) != "max")[:3]
    self._note = [
      f"| {_pairs({name: shown[name] for name in names[:n]})} at {step:,}" for n in range(len(names), 0, -1)
    ]
    self._draw(self._clock())

  def say(self, text: str) -> None:
    """Prints `text` on a line of its own without breaking the progress line."""
    self._print(f"\r\x1b[K{text}\n" if self._in_place else f"{text}\n")
    if self._in_place:
      self._draw(self._clock())

  @contextlib.contextmanager
  def pause(self, name: str) -> Iterator[None]:
    """Time inside goes to `name`: "eval", "save", ..., which count in no speed, or "input", which does."""
    before = self._bucket
    self._switch(name, self._clock())
    if self._in_place and name not in _TRAINING:
      self._draw(self._since)
    try:
      yield
    finally:
      self._switch(before, self._clock())
      # What was found meanwhile is about to come: a line before it would be out of date at once.
      if name not in _TRAINING and not self._in_place:
        self._next_draw = max(self._next_draw, self._since + 1.0)

  def breakdown(self) -> dict[str, float]:
    """Seconds by what they were spent on; they add up to the time since the start."""
    seconds = dict(self._seconds)
    seconds[self._bucket] = seconds.get(self._bucket, 0.0) + self._clock() - self._since
    return seconds

  def steps_per_second(self) -> float | None:
    """Over the whole run, pauses and the first step (the compilation) left out; None before the second step."""
    return self._rate(self._first, self._clock())

  def close(self) -> None:
    """Prints the line a last time, leaves it standing, and stops the watch."""
    now = self._clock()
    if self._in_place or self._drawn != (self.step, self._note):
      self._draw(now)
    if self._in_place:
      self._print("\n")
    self._stream, self._clock = None, lambda: now

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _switch(self, bucket: str, now: float) -> None:
    self._seconds[self._bucket] = self._seconds.get(self._bucket, 0.0) + now - self._since
    self._bucket, self._since = bucket, now

  def _trained(self, now: float) -> float:
    running = now - self._since if self._bucket in _TRAINING else 0.0
    return running + sum(self._seconds.get(name, 0.0) for name in _TRAINING)

  def _rate(self, mark: tuple[int, float] | None, now: float) -> float | None:
    if mark is None or self.step <= mark[0]:
      return None
    seconds = self._trained(now) - mark[1]
    return (self.step - mark[0]) / seconds if seconds > 0 else None

  def _speed(self, rate: float) -> tuple[str, str]:
    milliseconds = 1000 / rate
    a_step = f"{format_rate(milliseconds)} ms" if milliseconds < 10_000 else f"{milliseconds / 1000:.1f} s"
    return f"{format_rate(rate * self.batch_size)} {self.unit}/s", f"{a_step}/step"

  def _draw(self, now: float) -> None:
    if self._stream is None:
      return
    self._drawn = (self.step, self._note)
    if self._in_place:
      self._next_draw = now + _REDRAW_INTERVAL
      self._print(f"\r{self._line(now, _width(self._stream))}\x1b[K")
    elif self._first is not None:
      self._next_draw = now + _PLAIN_INTERVAL
      self._print(self._line(now, _PLAIN_WIDTH) + "\n")

  def _line(self, now: float, width: int) -> str:
    """The line in at most `width` characters: metrics give way first, but one, then the note."""
    total = f"{self.total_steps:,}"
    done = 100 * self.step // self.total_steps if self.total_steps else 100
    head = f"step {self.step:>{len(total)},}/{total} {done:3d}%"
    tail = []
    if self._first is None:
      tail.append("starting: the first step compiles" if self._bucket == "start" else f"[{self._bucket}]")
    else:
      while len(self._marks) > 1 and self._trained(now) - self._marks[0][1] > _WINDOW:
        self._marks.popleft()
      if rate := self._rate(self._marks[0], now) or self._rate(self._first, now):
        tail += self._speed(rate)
        if self.step < self.total_steps:
          tail.append(f"ETA {format_seconds(self._remaining(now))}")
      if self._marks[-1][0] < self.step:
        self._marks.append((self.step, self._trained(now)))
      if self._bucket not in _TRAINING:
        tail.append(f"[{self._bucket}]")
    shown = {name: v for name, v in self._metrics.items() if not (is_timing(name) or isinstance(v, list))}
    names = sorted((name for name in shown if not is_per_class(name)), key=_rank)
    line = ""
    for note in [*self._note, ""]:
      for count in range(len(names), -1 if not note else min(1, len(names)) - 1, -1):
        metrics = _pairs({name: shown[name] for name in names[:count]})
        line = "  ".join(part for part in (head, metrics, *tail, note) if part)
        if len(line) <= width:
          return line
    return line[:width]

  def _remaining(self, now: float) -> float:
    """Seconds left, if the rest goes like the run so far, its pauses included but not its start."""
    first_step, trained = self._first
    paused = sum(s for name, s in self._seconds.items() if name != "start" and name not in _TRAINING)
    return (self.total_steps - self.step) * (self._trained(now) - trained + paused) / (self.step - first_step)

  def _print(self, text: str) -> None:
    if self._stream is None:
      return
    try:
      self._stream.write(text)
      self._stream.flush()
    except (OSError, ValueError):  # the terminal went away or the stream was closed: no reason to lose the run
      self._stream = None


_TRAINING = ("train", "input")  # a stalled input is slow training
_REDRAW_INTERVAL = 0.2
_PLAIN_INTERVAL = 10.0
_PLAIN_WIDTH = 160
_WINDOW = 30.0


def _width(stream: io.TextIOBase) -> int:
  """Columns of the terminal, less one: some terminals wrap at the last."""
  try:
    return max(20, os.get_terminal_size(stream.fileno()).columns - 1)
  except (OSError, ValueError):
    return 119


def _rank(name: str) -> tuple[bool, bool]:
  return name != "loss", direction(name) is None


def _pairs(values: Mapping[str, Any]) -> str:
  return "  ".join(f"{name} {format_value(value)}" for name, value in values.items())
