import contextlib
import io
import math
import time

import pytest

from bigjax.metrics import Pace, Progress, Stopwatch


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  """A terminal without a size: lines are cut at 119 columns."""

  def isatty(self):
    return True

  @property
  def screen(self):
    """What stands on the last line."""
    return self.getvalue().rsplit("\r", 1)[-1].removesuffix("\x1b[K")


@pytest.fixture
def clock():
  return Clock()


def train(progress, clock, steps, seconds, metrics=None):
  for step in steps:
    clock.now += seconds
    progress.update(step, metrics)


def test_the_line_tells_where_how_well_how_fast_and_how_long_still(clock):
  screen = Terminal()
  progress = Progress(1000, batch_size=64, stream=screen, watch=Stopwatch(clock))
  clock.now += 8  # compilation
  progress.update(1)
  train(progress, clock, range(2, 301), 0.0125, {"loss": 0.25, "accuracy": 0.97, "examples_per_second": 1.0})
  with progress.pause("eval"):
    clock.now += 0.7 * 0.0125
  progress.note(250, {"test/loss": 0.05, "test/accuracy": 0.985, "test/confusion_matrix": [[1]], "test/recall/3": 1.0})
  left = 700 * (299 * 0.0125 + 0.7 * 0.0125) / 299
  assert round(left) == 9
  assert screen.screen == (
    "step   300/1,000  30%  loss 0.25  accuracy 0.97  5,120 examples/s  12.5 ms/step  ETA 0:09  "
    "| test/accuracy 0.985 at 250"
  )


def test_speed_leaves_out_the_first_step_and_pauses_but_not_a_stalled_input(clock):
  progress = Progress(1000, batch_size=10, watch=Stopwatch(clock), quiet=True)
  clock.now += 60
  progress.update(1)
  for step in range(2, 12):
    with progress.pause("input"):
      clock.now += 0.1
    clock.now += 0.3
    progress.update(step)
    with progress.pause("eval"):
      clock.now += 5
      with progress.pause("save"):
        clock.now += 2
  assert progress.steps_per_second() == pytest.approx(2.5)
  assert progress.watch.breakdown() == pytest.approx(
    {"start": 60, "host": 3, "input": 1, "device": 0, "eval": 50, "save": 20}
  )


def test_the_breakdown_adds_up_to_the_time_that_passed_also_when_a_pause_ends_in_an_error(clock):
  progress = Progress(10, watch=Stopwatch(clock), quiet=True)
  with progress.pause("restore"):
    clock.now += 3
  clock.now += 1
  progress.update(1)
  clock.now += 2
  with contextlib.suppress(RuntimeError), progress.pause("eval"):
    clock.now += 4
    raise RuntimeError
  clock.now += 8
  progress.close()
  clock.now += 100
  assert progress.watch.breakdown() == {
    "start": 1,
    "host": 10,
    "input": 0,
    "device": 0,
    "eval": 4,
    "save": 0,
    "restore": 3,
  }


def test_a_resumed_run_counts_only_its_own_steps_in_its_speed(clock):
  screen = Terminal()
  progress = Progress(1000, 900, batch_size=2, stream=screen, watch=Stopwatch(clock))
  clock.now += 5
  progress.update(901)
  train(progress, clock, range(902, 911), 0.5)
  assert screen.screen == "step   910/1,000  91%  4 examples/s  500 ms/step  ETA 0:45"


def test_off_a_terminal_lines_are_few_and_whole(clock):
  log = io.StringIO()
  progress = Progress(4500, batch_size=8, unit="tokens", stream=log, watch=Stopwatch(clock))
  train(progress, clock, range(1, 4501), 0.01, {"loss": 2.0})
  progress.note(4500, {"val/loss": 1.5})
  progress.close()
  lines = log.getvalue().splitlines()
  assert len(lines) == 5
  assert lines[1] == "step 2,000/4,500  44%  loss 2  800 tokens/s  10 ms/step  ETA 0:25"
  assert lines[-1] == "step 4,500/4,500 100%  loss 2  800 tokens/s  10 ms/step  | val/loss 1.5 at 4,500"
  assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()


def test_on_a_terminal_the_line_is_redrawn_at_most_five_times_a_second(clock):
  screen = Terminal()
  progress = Progress(10_000, stream=screen, watch=Stopwatch(clock))
  train(progress, clock, range(1, 5001), 0.001)
  assert 20 <= screen.getvalue().count("\r") <= 30
  assert "\n" not in screen.getvalue()
  progress.close()
  assert screen.getvalue().count("\n") == 1


def test_a_long_line_gives_up_metrics_first_and_the_speed_never(clock):
  screen = Terminal()
  progress = Progress(1000, stream=screen, watch=Stopwatch(clock))
  metrics = {f"a_metric_with_a_long_name_{i}": 0.5 for i in range(9)} | {"loss": 0.25}
  train(progress, clock, range(1, 101), 0.1, metrics)
  progress.note(100, {"test/accuracy": 0.5})
  assert len(screen.screen) <= 119
  assert "loss 0.25" in screen.screen and "10 examples/s" in screen.screen and "| test/accuracy" in screen.screen


def test_while_it_starts_and_pauses_the_terminal_says_so(clock):
  screen = Terminal()
  progress = Progress(10, stream=screen, watch=Stopwatch(clock))
  assert screen.screen == "step  0/10   0%  starting: the first step compiles"
  progress.update(1)
  with progress.pause("eval"):
    assert screen.screen.endswith("[eval]")


def test_a_message_does_not_break_the_line(clock):
  screen = Terminal()
  progress = Progress(10, stream=screen, watch=Stopwatch(clock))
  progress.say("saved")
  assert "\r\x1b[Ksaved\n\rstep" in screen.getvalue()


def test_a_loss_that_is_not_a_number_is_shown_as_such(clock):
  screen = Terminal()
  progress = Progress(10, stream=screen, watch=Stopwatch(clock))
  progress.update(1, {"loss": math.nan, "grad_norm": math.inf})
  progress.note(1, {"test/loss": math.nan})
  assert "loss nan  grad_norm inf" in screen.screen and "test/loss nan" in screen.screen


def test_a_terminal_that_goes_away_does_not_end_the_run(clock):
  screen = Terminal()
  progress = Progress(10, stream=screen, watch=Stopwatch(clock))
  screen.close()
  train(progress, clock, range(1, 11), 1.0)
  progress.close()
  assert progress.watch.breakdown()["host"] == 9.0


def test_an_update_that_prints_nothing_costs_less_than_20_microseconds():
  progress = Progress(10**9, stream=io.StringIO())
  progress.update(1)
  metrics = {"loss": 0.5}

  def once():
    start = time.thread_time()
    for step in range(2, 1002):
      progress.update(step, metrics)
    return (time.thread_time() - start) / 1000

  assert min(once() for _ in range(5)) < 20e-6


def test_what_a_step_took_lately_is_told_part_by_part(clock):
  watch = Stopwatch(clock)
  pace = Pace(watch)
  clock.now += 6
  assert pace.since(0) == {}
  for _ in range(4):
    for name, seconds in [("input", 0.1), ("host", 0.2), ("device", 0.7), ("eval", 0.5)]:
      watch.switch(name)
      clock.now += seconds
  assert pace.since(4) == pytest.approx(
    {"input_seconds": 0.1, "host_seconds": 0.2, "device_seconds": 0.7, "goodput": 4 * 0.9 / 12}
  )
  assert pace.since(4) == {}
