import csv
import errno
import json
import math
import os
import resource
import threading
import time

import numpy as np
import pytest

from bigjax import appended
from bigjax.errors import UserError
from bigjax.metrics import Writers, read_rows

TEXT = ("jsonl", "csv")


def write_run(workdir, steps, kinds=TEXT, **kwargs):
  """A run of 5 logged steps with an evaluation at each second one, cut to `steps`."""
  with Writers(workdir, kinds, **kwargs) as writers:
    for step in steps:
      write_step(writers, step)


def write_step(writers, step):
  writers.write(step, {"loss": 1 / step, "accuracy": 1 - 0.5**step})
  if step % 2 == 0:
    writers.write(step, {"test/loss": 2 / step, "test/confusion_matrix": [[step, 0], [1, 2]]})


def lines(path):
  return path.read_text().splitlines()


def table(workdir):
  with open(workdir / "metrics.csv", newline="") as file:
    return list(csv.DictReader(file))


def test_each_row_is_a_json_object_on_a_line(tmp_path):
  write_run(tmp_path, [1, 2])
  rows = [json.loads(line) for line in lines(tmp_path / "metrics.jsonl")]
  assert rows == [
    {"step": 1, "loss": 1.0, "accuracy": 0.5},
    {"step": 2, "loss": 0.5, "accuracy": 0.75},
    {"step": 2, "test/loss": 1.0, "test/confusion_matrix": [[2, 0], [1, 2]]},
  ]


def test_rows_can_be_read_while_the_run_goes_on(tmp_path):
  with Writers(tmp_path, TEXT) as writers:
    writers.write(1, {"loss": 0.25})
    assert read_rows(tmp_path) == [{"step": 1, "loss": 0.25}]
    assert table(tmp_path) == [{"step": "1", "loss": "0.25"}]


def test_values_keep_every_bit(tmp_path):
  values = {"a": 0.1, "b": 1 / 3, "c": 5e-324, "d": 1.7976931348623157e308, "e": float(np.float32(0.1))}
  with Writers(tmp_path, TEXT) as writers:
    writers.write(7, values)
  assert read_rows(tmp_path) == [{"step": 7, **values}]
  assert {name: float(cell) for name, cell in table(tmp_path)[0].items()} == {"step": 7, **values}


def test_numpy_and_jax_numbers_are_written_as_numbers(tmp_path):
  import jax.numpy as jnp

  with Writers(tmp_path, TEXT) as writers:
    writers.write(np.int64(3), {"a": np.float32(0.5), "b": jnp.float32(0.25), "c": np.eye(2, dtype=int)})
  assert read_rows(tmp_path) == [{"step": 3, "a": 0.5, "b": 0.25, "c": [[1, 0], [0, 1]]}]


def test_what_is_not_finite_keeps_the_json_valid_and_the_csv_exact(tmp_path):
  with Writers(tmp_path, TEXT) as writers:
    writers.write(1, {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "matrix": [[1.0, math.nan]]})

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  (line,) = lines(tmp_path / "metrics.jsonl")
  row = json.loads(line, parse_constant=refuse)
  assert row == {"step": 1, "loss": None, "grad_norm": None, "low": None, "matrix": [[1.0, None]]}
  assert lines(tmp_path / "metrics.csv") == ["step,loss,grad_norm,low", "1,nan,inf,-inf"]
  assert math.isnan(read_rows(tmp_path)[0]["loss"])


@pytest.mark.parametrize("value", ["0.5", None, b"1"])
def test_a_value_that_is_no_number_is_named(tmp_path, value):
  with Writers(tmp_path, TEXT) as writers, pytest.raises(TypeError, match="'loss'"):
    writers.write(1, {"loss": value})


def test_csv_columns_are_added_when_later_rows_bring_them(tmp_path):
  write_run(tmp_path, [1, 2, 3])
  assert lines(tmp_path / "metrics.csv") == [
    "step,loss,accuracy,test/loss",
    "1,1.0,0.5,",
    "2,0.5,0.75,",
    "2,,,1.0",
    f"3,{1 / 3!r},0.875,",
  ]


def test_csv_quotes_what_a_name_may_contain(tmp_path):
  with Writers(tmp_path, TEXT) as writers:
    writers.write(1, {'a, "b"': 1.0})
    writers.write(2, {"c": 2.0})
  assert table(tmp_path) == [{"step": "1", 'a, "b"': "1.0", "c": ""}, {"step": "2", 'a, "b"': "", "c": "2.0"}]


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step"', "\0\0\0\0\0"])
def test_a_resumed_run_leaves_the_rows_of_an_undisturbed_one(tmp_path, torn):
  write_run(tmp_path / "whole", range(1, 9))
  write_run(tmp_path / "resumed", range(1, 6))
  for name in ("metrics.jsonl", "metrics.csv"):
    with open(tmp_path / "resumed" / name, "a") as file:
      file.write(torn)
  write_run(tmp_path / "resumed", range(4, 9), resume_step=3)
  for name in ("metrics.jsonl", "metrics.csv"):
    assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_kill_at_any_byte_of_the_last_line_changes_nothing(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  write_run(whole, range(1, 7))
  write_run(parts, range(1, 6))
  names = ("metrics.jsonl", "metrics.csv")
  at_kill = {name: (parts / name).read_bytes() for name in names}
  last = {name: len(content.splitlines(keepends=True)[-1]) for name, content in at_kill.items()}
  for cut in range(max(last.values()) + 1):
    for name, content in at_kill.items():
      (parts / name).write_bytes(content[: len(content) - min(cut, last[name])])
    write_run(parts, range(5, 7), resume_step=4)
    assert all((parts / name).read_bytes() == (whole / name).read_bytes() for name in names), cut


def test_an_evaluation_that_is_made_again_leaves_its_rows_once(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  write_run(whole, range(1, 7))
  write_run(parts, range(1, 6))
  with Writers(parts, TEXT, resume_step=4, again=("test", "other")) as writers:
    writers.write(4, {"test/loss": 2 / 4, "test/confusion_matrix": [[4, 0], [1, 2]]})
  write_run(parts, range(5, 7), resume_step=4)
  assert all((parts / name).read_bytes() == (whole / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv"))


def test_a_row_cut_in_the_middle_is_dropped_even_if_it_would_parse(tmp_path):
  write_run(tmp_path, [1])
  path = tmp_path / "metrics.csv"
  path.write_text(path.read_text() + "2,0.123,0.9")  # of 0.9375: the line has no end
  write_run(tmp_path, [2], resume_step=2)
  assert [row["accuracy"] for row in table(tmp_path)] == ["0.5", "0.75", ""]


def test_a_damaged_line_in_the_middle_is_told_of(tmp_path, caplog):
  write_run(tmp_path, [1, 3])
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text().replace('{"step": 1', '{"st\0p": 1'))
  write_run(tmp_path, [5], resume_step=3)
  assert [row["step"] for row in read_rows(tmp_path)] == [3, 5]
  assert "metrics.jsonl: line 1" in caplog.text


def test_a_resume_that_dies_while_it_mends_the_file_loses_nothing(tmp_path, monkeypatch):
  write_run(tmp_path, range(1, 6))
  before = (tmp_path / "metrics.jsonl").read_bytes()

  def die(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "replace", die)
  with pytest.raises(KeyboardInterrupt):
    Writers(tmp_path, TEXT, resume_step=2)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_fresh_start_keeps_the_rows_that_were_there(tmp_path):
  write_run(tmp_path, [1, 2])
  write_run(tmp_path, [1])
  assert [row["step"] for row in read_rows(tmp_path)] == [1]
  assert len(lines(tmp_path / "metrics.previous.jsonl")) == 3
  assert len(lines(tmp_path / "metrics.previous.csv")) == 4


def test_other_hosts_write_nothing(tmp_path):
  write_run(tmp_path / "host1", [1, 2], primary=False)
  assert not (tmp_path / "host1").exists()


def test_an_unknown_writer_is_named_with_the_closest_one(tmp_path):
  with pytest.raises(UserError, match="Did you mean 'tensorboard'"):
    Writers(tmp_path, ("tensorbord",))


def test_a_workdir_that_cannot_be_written_is_the_users_to_mend(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="--workdir"):
    Writers(tmp_path / "file" / "run", TEXT)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_told_once_and_ends_nothing_before_the_end(tmp_path, capsys):
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  writers = Writers(tmp_path, ("jsonl",))
  for step in range(3):
    writers.write(step, {"loss": 1.0})
    writers.flush()
  with pytest.raises(OSError, match="No space left") as caught:
    writers.close()
  assert caught.value.errno == errno.ENOSPC
  told = capsys.readouterr().err
  assert told.count("metrics.jsonl can't be written: No space left") == 1 and "kept in memory, up to 64 MB" in told


def test_rows_and_columns_that_come_while_the_disk_is_full_are_written_when_there_is_room(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(appended, "BACK_OFF", (0, 0))
  write_run(tmp_path / "whole", range(1, 40))
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  with Writers(tmp_path / "full", TEXT) as writers:
    write_step(writers, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
      for step in range(2, 30):
        write_step(writers, step)
      assert len(lines(tmp_path / "full" / "metrics.jsonl")) < 5
      with pytest.raises(OSError, match="File too large"):
        appended.settle()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for step in range(30, 40):
      write_step(writers, step)
  for name in ("metrics.jsonl", "metrics.csv"):
    assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
  assert capsys.readouterr().err.count("is written again") == 2


def test_console_prints_a_row_a_line(tmp_path, capsys):
  with Writers(tmp_path, ("console",)) as writers:
    writers.write(1200, {"loss": 0.123456, "examples_per_second": 5120.4})
  assert capsys.readouterr().out == "step 1,200  loss 0.1235  examples_per_second 5,120\n"


def tensorboard_scalars(workdir):
  from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
  from tensorboard.util.tensor_util import make_ndarray

  found = EventAccumulator(str(workdir), tensor_size_guidance={"scalars": 0})
  found.Reload()
  return {
    tag: [(event.step, float(make_ndarray(event.tensor_proto))) for event in found.Tensors(tag)]
    for tag in found.Tags()["tensors"]
  }


def test_tensorboard_reads_back_what_was_written_also_after_a_resume(tmp_path):
  write_run(tmp_path, range(1, 6), ("tensorboard",))
  found = tensorboard_scalars(tmp_path)
  assert set(found) == {"loss", "accuracy", "test/loss"}
  assert found["loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 6)]

  time.sleep(1.1)  # TensorBoard orders the files by the second in their names
  with Writers(tmp_path, ("tensorboard",), resume_step=3) as writers:
    writers.write(4, {"loss": 40.0})
    writers.write(6, {"loss": math.nan})
  steps = tensorboard_scalars(tmp_path)["loss"]
  assert steps[:4] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 40.0)]
  assert steps[4][0] == 6 and math.isnan(steps[4][1])


def test_tensorboard_errors_reach_the_loop(tmp_path):
  workdir = tmp_path / "run"
  writers = Writers(workdir, ("tensorboard",))
  workdir.rmdir()
  workdir.write_text("a file where the folder was")
  writers.write(1, {"loss": 1.0})
  with pytest.raises(OSError, match="TensorBoard"):
    writers.close()


def test_tensorboard_s_rows_wait_for_room_and_go_to_another_file_then(tmp_path, monkeypatch):
  monkeypatch.setattr(appended, "BACK_OFF", (0, 0))
  full, files, refused = threading.Event(), [], threading.Event()

  class File:
    def __init__(self):
      self.rows = []
      files.append(self.rows)

    def write_scalars(self, step, values):
      if full.is_set():
        refused.set()
        raise RuntimeError("No space left on device")  # TensorFlow's own are no OSErrors.
      self.rows.append((step, values["loss"]))

    def flush(self):
      pass

    close = flush

  monkeypatch.setattr("bigjax.metrics.writers._TensorBoard._open", lambda self: File())
  with Writers(tmp_path, ("tensorboard",)) as writers:
    writers.write(1, {"loss": 1.0})
    while not files or not files[0]:
      time.sleep(0.01)
    full.set()
    writers.write(2, {"loss": 2.0})
    assert refused.wait(30)
    full.clear()
    writers.write(3, {"loss": 3.0})
  assert files[-1] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_run_that_writes_nothing_starts_no_thread(tmp_path):
  before = threading.active_count()
  with Writers(tmp_path):
    assert threading.active_count() == before


def test_timings_go_to_a_file_of_their_own(tmp_path):
  with Writers(tmp_path, TEXT) as writers:
    writers.write(1, {"loss": 0.5})
    writers.time(1, {})
    writers.write(2, {"loss": 0.25})
    writers.time(2, {"device_seconds": 0.125})
  with open(tmp_path / "timings.jsonl", "a") as file:
    file.write('{"step": 3, "dev')  # Killed here.
  with Writers(tmp_path, TEXT, resume_step=1) as writers:
    writers.time(2, {"device_seconds": 0.25})
  timings = [json.loads(line) for line in lines(tmp_path / "timings.jsonl")]
  assert timings == [{"step": 2, "device_seconds": 0.125}, {"step": 2, "device_seconds": 0.25}]
  assert [json.loads(line) for line in lines(tmp_path / "metrics.jsonl")] == [{"step": 1, "loss": 0.5}]
