"""What a run writes down while it trains: rows of numbers, in files.

A row is a step and named numbers. `metrics.jsonl` is the record: one JSON object a line, only ever appended to, and a
function of the run alone, so that a run which was stopped and resumed leaves the same rows as one which was not.
`metrics.csv` is the same for spreadsheets, TensorBoard's event files the same for TensorBoard.

What tells of the machine and not of the run, such as the time of a step, goes to `timings.jsonl` and TensorBoard only.

A number that is not finite is `null` in `metrics.jsonl` (JSON has no NaN; pandas reads NaN), and `nan`, `inf` or `-inf`
in `metrics.csv`, which every CSV reader knows. A value may be a nested list, such as a confusion matrix: only
`metrics.jsonl` takes it.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsInt

from bigjax.appended import Appended, Patience, enrol, leave
from bigjax.data import tfdata
from bigjax.errors import UserError, suggest
from bigjax.metrics.reading import format_value, parsed_lines

KINDS = ("jsonl", "csv", "tensorboard", "console")
ROWS = 100_000  # That wait for room on the disk at most, where they wait as rows.


class Writers:
  """Writes each row of metrics wherever `kinds` says: `"jsonl"`, `"csv"`, `"tensorboard"`, `"console"`.

  Args:
    workdir: where the files go; made if missing.
    kinds: which of `KINDS` to write.
    resume_step: the step the run goes on from. Rows after it are dropped, and a last line that a crash cut short is
      mended, before anything is written; the files change as a whole or not at all. None starts anew: an earlier
      `metrics.jsonl` or `metrics.csv` is kept beside the new one as `metrics.previous.*`.
    again: evaluations that are made again at `resume_step`: their rows of that step are dropped too.
    primary: False on all hosts but one; nothing is written there.

  Raises:
    UserError: for an unknown kind, or a workdir that cannot be written.
    OSError: from `close`, when the disk refuses (full, gone). Until then rows wait in memory, and are written when
      there is room; `write` raises it when too many do. Checkpoints wait for them, see `bigjax.appended`.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    kinds: Sequence[str] = ("jsonl", "csv", "tensorboard"),
    resume_step: int | None = None,
    primary: bool = True,
    again: Sequence[str] = (),
  ):
    self._writers: dict[str, Any] = {}
    if unknown := [kind for kind in kinds if kind not in KINDS]:
      raise UserError(f"metrics: no writer is called {unknown[0]!r}.{suggest(unknown[0], KINDS)}")
    if not primary:
      return
    measured = tuple(f"{name}/" for name in again)
    stays = lambda step, names: (
      step < resume_step or (step == resume_step and not any(name.startswith(measured) for name in names))
    )
    makers = {
      "jsonl": lambda: _Jsonl(workdir / "metrics.jsonl", resume_step, stays),
      "csv": lambda: _Csv(workdir / "metrics.csv", resume_step, stays),
      "tensorboard": lambda: _TensorBoard(workdir, resume_step),
      "console": _Console,
    }
    workdir = Path(workdir)
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      for kind in dict.fromkeys(kinds):
        self._writers[kind] = makers[kind]()
      if "jsonl" in kinds:  # Rows of a start that was killed stay: its steps did take that time.
        self._writers["timings"] = _Jsonl(workdir / "timings.jsonl", resume_step, lambda step, names: True)
    except OSError as error:
      self.close()
      raise UserError(
        f"workdir: {str(workdir)!r} cannot be written: {error.strerror or error}. Give a folder that this user may "
        "write to with --workdir=DIR, or mend its permissions."
      ) from error

  def write(self, step: SupportsInt, values: Mapping[str, Any]) -> None:
    """Adds a row: numbers by name (nested lists of numbers are allowed), all measured at `step`."""
    if not values:
      return
    if "step" in values:
      raise ValueError("A metric cannot be called 'step': that is the row's own column.")
    values = {str(name): _plain(str(name), value) for name, value in values.items()}
    for name, writer in self._writers.items():
      if name != "timings":
        writer.write(int(step), values)

  def time(self, step: SupportsInt, values: Mapping[str, float]) -> None:
    """Adds a row of timings; in TensorBoard they are under `time/`."""
    if not values:
      return
    if "timings" in self._writers:
      self._writers["timings"].write(int(step), values)
    if "tensorboard" in self._writers:
      self._writers["tensorboard"].write(int(step), {f"time/{name}": value for name, value in values.items()})

  def flush(self) -> None:
    """Has what was written reach the disk, if it can. TensorBoard's thread does its part without being waited for."""
    for writer in self._writers.values():
      writer.flush()

  def close(self) -> None:
    """Writes out what is left, closes every file, and raises the first error any of it met."""
    with contextlib.ExitStack() as stack:
      for writer in reversed(self._writers.values()):
        stack.callback(writer.close)
      self._writers = {}

  def __enter__(self) -> Writers:
    return self

  def __exit__(self, kind, *_) -> None:
    # After an error only the rows since the last checkpoint can be missing, and the next start writes those again.
    with contextlib.suppress(*[OSError] if kind else []):
      self.close()


def _plain(name: str, value: Any) -> Any:
  """`value` as int, float or nested lists of them."""
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(value, (list, tuple)):
    return [_plain(name, item) for item in value]
  if isinstance(value, int) and not isinstance(value, bool):
    return value
  if isinstance(value, (str, bytes)) or value is None:
    raise TypeError(f"The metric {name!r} must be a number or nested lists of numbers, not {value!r}.")
  return float(value)


def _json_safe(value: Any) -> Any:
  if isinstance(value, list):
    return [_json_safe(item) for item in value]
  return value if math.isfinite(value) else None


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
  return {name: value for name, value in values.items() if not isinstance(value, list)}


class _Jsonl:
  """One JSON object a line: `{"step": 100, "loss": 0.25}`."""

  def __init__(self, path: Path, resume_step: int | None, stays: Callable[[int, Iterable[str]], bool]):
    if resume_step is None:
      _set_aside(path)
    elif path.exists():
      kept = [line for row, line in parsed_lines(path) if stays(row["step"], row)]
      _replace(path, b"".join(kept))
    self._file = Appended(path).open()

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    row = {"step": step, **{name: _json_safe(value) for name, value in values.items()}}
    self._file.append((json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n").encode())

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class _Csv:
  """One row a line under one header: `step` and then the metrics in order of their first appearance.

  When a row brings names that the header lacks (the first evaluation, usually), the file is written again with the
  longer header, at once or not at all, so that what lies on the disk is a well-formed table at any time.
  """

  def __init__(self, path: Path, resume_step: int | None, stays: Callable[[int, Iterable[str]], bool]):
    self._path = path
    self._columns = ["step"]
    self._waiting: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
    self._patience = Patience(f"{path} with another column")
    if resume_step is None:
      _set_aside(path)
    elif path.exists():
      header, *rows = self._read() or [self._columns]
      self._columns = header
      named = lambda row: [name for name, cell in zip(header, row, strict=True) if cell]
      _replace(path, _csv_text([header, *(row for row in rows if stays(int(row[0]), named(row)))]))
    self._file = Appended(path).open()
    enrol(self)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    if values := _scalars(values):
      self._waiting.append((step, values))
    if len(self._waiting) > ROWS:
      raise OSError(f"{self._path} could not be written for so long that {ROWS} rows wait in memory")
    if self._patience.due():
      with contextlib.suppress(OSError):  # It was said.
        self._drain()

  def _drain(self) -> None:
    """Adds the rows that wait, with their columns before them."""
    try:
      while self._waiting:
        step, values = self._waiting[0]
        if new := [name for name in values if name not in self._columns]:
          self._widen(new)
        cells = [step, *(repr(values[name]) if name in values else "" for name in self._columns[1:])]
        self._file.append(_csv_text([cells]))
        self._waiting.popleft()
    except OSError as error:
      self._patience.failed(error)
      raise
    self._patience.worked()

  def _widen(self, new: list[str]) -> None:
    self._file.settle()
    _, *rows = self._read() or [None]
    columns = self._columns + new
    _replace(self._path, _csv_text([columns, *(row + [""] * len(new) for row in rows)]))
    self._file.close()
    self._columns, self._file = columns, Appended(self._path)

  def _read(self) -> list[list[str]]:
    """The lines of the file that were written whole."""
    with open(self._path, encoding="utf-8", newline="") as file:
      text = file.read()
    rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    width = max(map(len, rows[:1]), default=0)
    return rows[:1] + [row for row in rows[1:] if len(row) == width and row[0].isdecimal()]

  def flush(self) -> None:
    with contextlib.suppress(OSError):  # It was said.
      self.settle()

  def settle(self) -> None:
    """Has all rows on the disk; raises `OSError` if they can't be."""
    self._drain()
    self._file.settle()

  def close(self) -> None:
    leave(self)
    with contextlib.closing(self._file):
      self.settle()


def _csv_text(rows: Iterable[Iterable[Any]]) -> bytes:
  out = io.StringIO(newline="")
  csv.writer(out, lineterminator="\n").writerows(rows)
  return out.getvalue().encode()


class _TensorBoard:
  """clu's TensorBoard writer in a thread of its own, which is started by the first row and fed by a queue.

  It imports TensorFlow, which takes seconds: the loop does not wait for them, `close` does.
  """

  def __init__(self, workdir: Path, resume_step: int | None):
    for module in ("clu", "tensorboard", "tensorflow"):
      if importlib.util.find_spec(module) is None:
        raise UserError(f"metrics: the 'tensorboard' writer needs {module}: pip install {module}, or leave it out.")
    self._workdir, self._first_step = workdir, 0 if resume_step is None else resume_step + 1
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    values = _scalars(values)
    if values and self._thread is None:
      self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
      self._thread.start()
    if values:
      self._queue.put((step, values))

  def flush(self) -> None:
    """Its thread does that."""

  def close(self) -> None:
    if self._thread is None:
      return
    self._queue.put(None)
    self._thread.join()
    if self._error is not None:
      raise OSError(f"TensorBoard's files in {self._workdir} could not be written: {self._error}") from self._error

  def _run(self) -> None:
    """Writes what comes, until None does; what it can't write it tries again, from another file."""
    writer, unflushed, over = None, collections.deque(maxlen=ROWS), False
    patience = Patience(f"TensorBoard's file in {self._workdir}")
    while not over:
      fresh = None
      with contextlib.suppress(queue.Empty):
        # A row must not wait in TensorFlow's buffer for the next one, which may be an epoch away.
        fresh = self._queue.get(timeout=5)
        over = fresh is None
        unflushed += [] if over else [fresh]
      if not unflushed or not (over or patience.due()):
        continue
      try:
        rows = unflushed if writer is None else [fresh] if fresh else []
        writer = writer or self._open()
        for row in rows:
          writer.write_scalars(*row)
        if fresh is None:  # Nothing came for a while, or nothing will.
          writer.flush()
          unflushed.clear()
        self._error = None
        patience.worked()
      except Exception as error:  # TensorFlow's own are of many types.
        self._error, writer = error, None
        patience.failed(error if isinstance(error, OSError) else OSError(str(error)))
    try:
      if writer is not None:
        writer.close()
    except Exception as error:
      self._error = error

  def _open(self):
    tfdata.tensorflow()  # quiet, and kept off the accelerators
    from clu import metric_writers

    self._note_start()
    return metric_writers.SummaryWriter(os.fspath(self._workdir))

  def _note_start(self) -> None:
    """Tells TensorBoard in its own words that a run starts or starts again here, so that it drops the rows to come."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    writer = EventFileWriter(os.fspath(self._workdir))
    writer.add_event(event_pb2.Event(step=self._first_step, session_log=start))
    writer.close()


class _Console:
  """A line a row on the standard output, for logs without a progress line."""

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # The log may be on the disk that is full.
      print(f"step {step:,}  " + "  ".join(f"{name} {format_value(value)}" for name, value in _scalars(values).items()))

  def flush(self) -> None:
    with contextlib.suppress(OSError):
      sys.stdout.flush()

  def close(self) -> None:
    self.flush()


def _set_aside(path: Path) -> None:
  if path.exists() and path.stat().st_size:
    os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))


def _replace(path: Path, content: bytes) -> None:
  """Gives `path` the `content`, all of it or none, also if the power fails."""
  if path.exists() and path.stat().st_size == len(content) and path.read_bytes() == content:
    return
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
