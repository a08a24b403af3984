import json
import math

import pytest

from bigjax.metrics import best_and_last, direction, format_seconds, format_value, is_per_class, is_timing, summary


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("loss", "min"),
    ("val/perplexity", "min"),
    ("test/ema/top5_accuracy", "max"),
    ("val/bits_per_byte", "min"),
    ("error_rate", "min"),
    ("fewshot/top_1", "max"),
    ("r2", "max"),
    ("fewshot/10shot", "max"),
    ("learning_rate", None),
    ("grad_norm", None),
    ("accuracy/examples", None),
  ],
)
def test_the_last_part_of_a_name_tells_which_way_is_better(name, expected):
  assert direction(name) == expected


def test_one_class_of_a_metric_is_told_from_a_metric_of_a_view():
  assert is_per_class("test/recall/3") and is_per_class("test/f1/cat")
  assert not is_per_class("test/ema/accuracy") and not is_per_class("recall")


def test_timing_is_told_from_measurements():
  assert is_timing("examples_per_second") and is_timing("train/step_time") and is_timing("mfu")
  assert not is_timing("loss") and not is_timing("val/accuracy")


def test_best_is_the_smallest_loss_and_the_largest_accuracy_and_never_nan():
  rows = [
    {"step": 1, "loss": 2.0, "learning_rate": 0.1},
    {"step": 2, "loss": 0.5, "learning_rate": 0.2},
    {"step": 2, "test/accuracy": 0.75, "test/recall/3": 1.0, "test/confusion_matrix": [[1]]},
    {"step": 3, "loss": math.nan, "examples_per_second": 5.0},
    {"step": 4, "test/accuracy": 0.5},
  ]
  table = best_and_last(rows)
  assert math.isnan(table["loss"].pop("last"))
  assert table == {
    "loss": {"last_step": 3, "best": 0.5, "best_step": 2},
    "learning_rate": {"last": 0.2, "last_step": 2},
    "test/accuracy": {"last": 0.5, "last_step": 4, "best": 0.75, "best_step": 2},
  }


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0, "0"),
    (1.0, "1"),
    (0.123456, "0.1235"),
    (0.97, "0.97"),
    (12.3456, "12.35"),
    (999.96, "1,000"),
    (5120.4, "5,120"),
    (1234567, "1,234,567"),
    (-0.5, "-0.5"),
    (1.234e-5, "1.234e-05"),
    (1e-9, "1e-09"),
    (6.02214e23, "6.022e+23"),
    (math.nan, "nan"),
    (-math.inf, "-inf"),
  ],
)
def test_numbers_for_people_have_four_digits(value, text):
  assert format_value(value) == text


@pytest.mark.parametrize(
  ("seconds", "text"), [(0.4, "0:00"), (32, "0:32"), (59.7, "1:00"), (3723, "1:02:03"), (183845, "2d 03:04:05")]
)
def test_durations_read_as_on_a_clock(seconds, text):
  assert format_seconds(seconds) == text


def test_the_summary_tells_how_far_how_fast_how_good_and_where_to_look(tmp_path):
  rows = [{"step": 50, "loss": 0.5}, {"step": 100, "test/accuracy": 0.99}, {"step": 200, "test/accuracy": 0.985}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  run = {
    "status": "finished",
    "step": 200,
    "total_steps": 200,
    "starts": ["2026-11-22T03:00:00+00:00"],
    "seconds": {"start": 5.0, "train": 9.0, "input": 1.0, "eval": 2.0, "save": 0.1},
  }
  config = {"batch_size": 64, "claim": {"metric": "test/accuracy", "at_least": 0.985, "at_most": None}}
  (tmp_path / "run.json").write_text(json.dumps(run))
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "report.html").write_text("")
  assert summary(tmp_path).replace(str(tmp_path), "DIR") == (
    "Finished at step 200 of 200 in 0:17, 1,280 examples/s, 50 ms/step\n"
    "\n"
    "                   last   best   at step\n"
    "  loss              0.5    0.5        50\n"
    "  test/accuracy   0.985   0.99       100\n"
    "\n"
    "  time       start 0:05  train 0:09  input 0:01  eval 0:02\n"
    "  claim      test/accuracy at least 0.985: reached, 0.985 at step 200\n"
    "  report     DIR/report.html\n"
    "  metrics    DIR/metrics.jsonl\n"
    "\n"
    "  look next  open DIR/report.html in a browser\n"
    "             bigjax eval --workdir=DIR"
  )


def test_a_claim_that_was_missed_and_a_stop_are_said(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 5, "val/loss": 2.0}\n')
  (tmp_path / "run.json").write_text('{"status": "stopped", "step": 5, "total_steps": 10}')
  (tmp_path / "config.json").write_text('{"claim": {"metric": "val/loss", "at_most": 1.88}}')
  text = summary(tmp_path)
  assert text.startswith("Stopped at step 5 of 10\n")
  assert "val/loss at most 1.88: not reached, 2 at step 5" in text
  assert "the same command again goes on" in text


def test_the_summary_of_an_empty_folder_is_no_error(tmp_path):
  assert "bigjax eval" in summary(tmp_path)
