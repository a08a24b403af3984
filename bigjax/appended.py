"""Files that only grow, and outlive a disk that is full or gone for a while: what can't be written waits in memory.

What a run writes down of itself, rows and records, is no reason to end it. It is said once that there is no room, it is
tried again less and less often, and all of it is written, in order, when there is. Only checkpoints wait: `settle`
comes before one counts, so that none is ever ahead of what belongs to its steps.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from typing import Any

from bigjax.errors import say

KEPT = 64 * 2**20  # Bytes of a file that may wait; beyond that the run ends.
TOGETHER = 2**20  # Bytes after which what was written is brought to the disk itself, and forgotten here.
BACK_OFF = (1.0, 60.0)  # Seconds until the first attempt after one that failed, and the most there are after many.

_open: weakref.WeakSet[Any] = weakref.WeakSet()


def enrol(file: Any) -> None:
  """Has `settle` call the file's own, until `leave`."""
  _open.add(file)


def leave(file: Any) -> None:
  """Ends what `enrol` began."""
  _open.discard(file)


def settle() -> None:
  """Returns when all that was added to files here is on the disk.

  Raises:
    OSError: Some of it can't be written at the moment.
  """
  for file in list(_open):
    file.settle()


def unsettled() -> str | None:
  """Returns why that can't be at the moment; None if it was done, and a checkpoint may follow."""
  try:
    settle()
  except OSError as e:
    return os.strerror(e.errno) if e.errno else str(e)
  return None


class Patience:
  """Says once that a file can't be written, and when to try again."""

  def __init__(self, path: str):
    self._path, self._failures, self._next = path, 0, 0.0

  def due(self) -> bool:
    """Whether to try."""
    return not self._failures or time.monotonic() >= self._next

  def failed(self, error: OSError) -> None:
    """Takes note of an attempt that failed."""
    self._failures += 1
    first, most = BACK_OFF
    self._next = time.monotonic() + min(most, first * 2 ** min(self._failures - 1, 20))
    if self._failures == 1:
      say(
        f"{self._path} can't be written: {os.strerror(error.errno) if error.errno else error}. The run goes on; what "
        f"belongs there is kept in memory, up to {KEPT // 2**20} MB, and written when there is room. Checkpoints wait "
        "for it."
      )

  def worked(self) -> None:
    """Takes note of one that did not."""
    if self._failures:
      say(f"{self._path} is written again.")
    self._failures = 0


class Appended:
  """A file that only grows, whose every addition reaches the operating system at once, if it can.

  Until it's on the disk itself it is kept here: a network's disk may refuse it as late as that.
  """

  def __init__(self, path: str | os.PathLike):
    self._path, self._descriptor = os.fspath(path), None
    self._tail, self._written = bytearray(), 0  # What may not be on the disk, and how much of it the system has.
    self._start = 0  # Where in the file it begins.
    self._patience, self._broken = Patience(self._path), False

  def open(self) -> Appended:
    """Makes the file if it's not there; done by the first addition otherwise.

    Raises:
      OSError: It can't be opened.
    """
    if self._descriptor is None:
      with contextlib.suppress(FileExistsError):
        os.mkdir(os.path.dirname(self._path))  # Not what is above: where that is gone, so is the disk.
      self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
      self._start = os.fstat(self._descriptor).st_size
      enrol(self)
    return self

  def append(self, data: bytes) -> None:
    """Adds to the file, now or when it can be.

    Raises:
      OSError: Too much waits already.
    """
    self._tail += data
    enrol(self)
    if self._patience.due():
      with contextlib.suppress(OSError):  # It was said.
        self._attempt(durable=len(self._tail) > TOGETHER)
    if len(self._tail) > KEPT:
      raise OSError(
        f"{self._path} could not be written for so long that {KEPT // 2**20} MB wait in memory. Mend that and start "
        "the same command again: it goes on from the last checkpoint"
      )

  def flush(self) -> None:
    """Has all of it on the disk, if it can be."""
    with contextlib.suppress(OSError):  # It was said.
      self.settle()

  def settle(self) -> None:
    """Has all of it on the disk; raises `OSError` if it can't be."""
    if self._tail:
      self._attempt(durable=True)

  def close(self) -> None:
    """Closes the file; raises `OSError` if something is not on the disk."""
    try:
      self.settle()
    finally:
      leave(self)
      if self._descriptor is not None:
        os.close(self._descriptor)
      self._descriptor = None

  def _attempt(self, durable):
    try:
      self.open()
      if self._broken:  # What the system had taken, it may have dropped.
        os.ftruncate(self._descriptor, self._start)
        self._written, self._broken = 0, False
      while self._written < len(self._tail):
        self._written += os.write(self._descriptor, self._tail[self._written :])
      if durable:
        self._broken = True
        os.fsync(self._descriptor)
        self._start, self._written, self._broken = self._start + len(self._tail), 0, False
        self._tail.clear()
    except OSError as e:
      self._patience.failed(e)
      raise OSError(e.errno, f"{self._path}: {os.strerror(e.errno) if e.errno else e}") from e
    self._patience.worked()
