"""What a person sees while a run trains: one line that keeps itself up to date.

  step 300/1,000 30%  loss 0.123  accuracy 0.97  5,120 examples/s  12.3 ms/step  ETA 0:32  | val/accuracy 0.985 at 250

It reads the run's stopwatch; the speed counts only what belongs to training.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from bigjax.metrics.reading import direction, format_rate, format_seconds, format_value, is_per_class, is_timing
from bigjax.metrics.stopwatch import TRAINING, Stopwatch


class Progress:
  """The progress line of a run.

  On a terminal the line is redrawn in place; elsewhere a line is printed every ten seconds and at each `note`.
  The time until the first `update` is "start" (building, compiling), and counts in no speed. A stream that breaks, such
  as the terminal of a closed connection, ends the line but not the run.

  Args:
    total_steps: where the run ends.
    start_step: where it begins, when resumed.
    batch_size: how many `unit`s a step takes.
    unit: what the speed is told in: examples, tokens.
    stream: where the line goes; the standard error stream if None.
    watch: the run's stopwatch; a new one if None.
    quiet: turns the stopwatch but prints nothing, as hosts other than the first do.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    batch_size: int = 1,
    unit: str = "examples",
    stream: io.TextIOBase | None = None,
    watch: Stopwatch | None = None,
    quiet: bool = False,
  ):
    self.total_steps, self.step, self.batch_size, self.unit = total_steps, start_step, batch_size, unit
    self._stream = None if quiet else stream or sys.stderr
    self._in_place = self._stream is not None and self._stream.isatty()
    self.watch, self._metrics, self._note = watch or Stopwatch(), {}, []
    # (step, seconds of training) at the first update, and at redraws within the last `_WINDOW` seconds of training.
    self._first: tuple[int, float] | None = None
    self._marks: deque[tuple[int, float]] = deque()
    self._drawn = (start_step, [])
    self._next_draw = self.watch.clock() + (0 if self._in_place else _PLAIN_INTERVAL)
    self._draw(self.watch.clock())

  def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
    """Tells that `step` steps are done, and the newest metrics if there are any; prints when it is time to."""
    self.step = max(self.step, step)  # metrics may be those of the step before
    if metrics:
      self._metrics = metrics
    if self._first is None:
      self.watch.switch("host")
      self._first = step, self._trained()
      self._marks.append(self._first)
    now = self.watch.clock()
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
    self._draw(self.watch.clock())

  def say(self, text: str) -> None:
    """Prints `text` on a line of its own without breaking the progress line."""
    self._print(f"\r\x1b[K{text}\n" if self._in_place else f"{text}\n")
    if self._in_place:
      self._draw(self.watch.clock())

  @contextlib.contextmanager
  def pause(self, name: str) -> Iterator[None]:
    """Time inside goes to `name`: "eval", "save", ..., which count in no speed, or "input" or "device", which do."""
    shown = name not in TRAINING
    with self.watch.within(name):
      if self._in_place and shown:
        self._draw(self.watch.since)
      yield
    # What was found meanwhile is about to come: a line before it would be out of date at once.
    if shown and not self._in_place:
      self._next_draw = max(self._next_draw, self.watch.since + 1.0)

  def steps_per_second(self) -> float | None:
    """Over the whole run, pauses and the first step (the compilation) left out; None before the second step."""
    return self._rate(self._first)

  def close(self) -> None:
    """Prints the line a last time, leaves it standing, and stops the watch."""
    now = self.watch.clock()
    if self._in_place or self._drawn != (self.step, self._note):
      self._draw(now)
    if self._in_place:
      self._print("\n")
    self._stream = None
    self.watch.stop()

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _trained(self) -> float:
    return self.watch.seconds(*TRAINING)

  def _rate(self, mark: tuple[int, float] | None) -> float | None:
    if mark is None or self.step <= mark[0]:
      return None
    seconds = self._trained() - mark[1]
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
      self._print(f"\r{self._line(_width(self._stream))}\x1b[K")
    elif self._first is not None:
      self._next_draw = now + _PLAIN_INTERVAL
      self._print(self._line(_PLAIN_WIDTH) + "\n")

  def _line(self, width: int) -> str:
    """The line in at most `width` characters: metrics give way first, but one, then the note."""
    total = f"{self.total_steps:,}"
    done = 100 * self.step // self.total_steps if self.total_steps else 100
    head = f"step {self.step:>{len(total)},}/{total} {done:3d}%"
    tail = []
    if self._first is None:
      tail.append("starting: the first step compiles" if self.watch.bucket in _STARTING else f"[{self.watch.bucket}]")
    else:
      while len(self._marks) > 1 and self._trained() - self._marks[0][1] > _WINDOW:
        self._marks.popleft()
      if rate := self._rate(self._marks[0]) or self._rate(self._first):
        tail += self._speed(rate)
        if self.step < self.total_steps:
          tail.append(f"ETA {format_seconds(self._remaining())}")
      if self._marks[-1][0] < self.step:
        self._marks.append((self.step, self._trained()))
      if self.watch.bucket not in TRAINING:
        tail.append(f"[{self.watch.bucket}]")
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

  def _remaining(self) -> float:
    """Seconds left, if the rest goes like the run so far, its pauses included but not its start."""
    first_step, trained = self._first
    spent = self.watch.seconds() - self.watch.seconds(*_STARTING) - trained
    return (self.total_steps - self.step) * spent / (self.step - first_step)

  def _print(self, text: str) -> None:
    if self._stream is None:
      return
    try:
      self._stream.write(text)
      self._stream.flush()
    except (OSError, ValueError):  # the terminal went away or the stream was closed: no reason to lose the run
      self._stream = None


_STARTING = ("start", "compile", "restore")
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
