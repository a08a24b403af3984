"""Checkpoints every few minutes on a near disk, beside the permanent ones: a killed run loses no more than that.

There is one at a time, it goes when the run ends, and nothing depends on its being there. A run goes on from the newest
checkpoint of either kind. The disk may be this machine's own for a run of one process; several have to share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from bigjax import hosts, record
from bigjax.checkpoint import Checkpoints
from bigjax.commits import Damaged, Keep
from bigjax.errors import UserError

MARGIN = 0.8  # Of the interval: the rest is for writing.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporaryConfig:
  """Temporary checkpoints."""

  directory: str  # On a disk that is there again after a restart, such as "/mnt/disks/local".
  every: str = "5m"  # What a killed run loses at most: "30s", "5m", "1h".

  def __post_init__(self):
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", self.every)) is None or not float(match[1]):
      raise UserError(f"config.keep.temporary.every: {self.every!r} is no time; give '30s', '5m' or '1h'.")

  @property
  def seconds(self) -> float:
    number, unit = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", self.every).groups()
    return float(number) * {"s": 1, "m": 60, "h": 3600}[unit]


def of(config: TemporaryConfig | None, workdir: str, note: Callable[[str], None]) -> Off | Temporary:
  """Returns the temporary checkpoints of a run, as `config.keep.temporary` has them."""
  return Off() if config is None else Temporary(config, workdir, note)


class Off:
  """No temporary checkpoints."""

  def __enter__(self) -> Off:
    return self

  def __exit__(self, *_) -> None:
    return None

  def due(self, step: int) -> bool:
    """Whether one is to be saved."""
    del step
    return False

  def newest(self, checkpoints: Checkpoints) -> Checkpoints:
    """Returns the checkpoints that the run goes on from: these, or the permanent ones."""
    return checkpoints

  def settle(self) -> None:
    """Returns when none is being written, which is at once."""

  def clear(self) -> None:
    """Removes those there are, which is none."""


class Temporary:
  """The temporary checkpoints of a run; entered for as long as it trains, cleared when it has come to an end."""

  def __init__(self, config: TemporaryConfig, workdir: str, note: Callable[[str], None]):
    self._every, workdir = config.seconds, os.path.abspath(workdir)
    # Runs may share the disk.
    name = f"{os.path.basename(workdir)}-{hashlib.sha256(workdir.encode()).hexdigest()[:8]}"
    self.directory, self._started = os.path.join(os.path.abspath(config.directory), name), _started(workdir)
    if not hosts.shared(config.directory):
      raise UserError(
        f"config.keep.temporary.directory={config.directory} is not there for all processes as one and the same "
        "directory. Name one that they share, or leave keep.temporary out."
      )
    self._workdir, self._mark = workdir, os.path.join(self.directory, "of.json")
    if jax.process_index() == 0 and not self._is_of_this_run():
      shutil.rmtree(self.directory, ignore_errors=True)
    hosts.agreed(None)  # Nobody looks at what is about to go.
    self._checkpoints = Checkpoints(self.directory, Keep(last=1), where="config.keep.temporary", note=note)
    self._saved, self._looked, self._look_at = time.monotonic(), (0, time.monotonic()), 0

  def __enter__(self) -> Temporary:
    self._checkpoints.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self._checkpoints.__exit__(*error)

  def newest(self, checkpoints: Checkpoints) -> Checkpoints:
    """Returns the checkpoints that the run goes on from: these, or the permanent ones."""
    mine, theirs = self._latest(), checkpoints.latest()
    return self._checkpoints if mine is not None and (theirs is None or mine > theirs) else checkpoints

  def _latest(self):
    with contextlib.suppress(Damaged):  # Then there is none worth a word.
      return self._checkpoints.latest()
    return None

  def due(self, step: int) -> bool:
    """Whether one is to be saved; every process has to ask after every step, and gets the same."""
    if step < self._look_at:
      return False
    now, (before, then) = time.monotonic(), self._looked
    # Alone, there is nothing to agree on, and every step is looked at.
    a_step = (now - then) / max(1, step - before)
    ahead = 1 if jax.process_count() == 1 else max(1, int(self._every / 8 / max(a_step, 1e-6)))
    save = now - self._saved + a_step * ahead > MARGIN * self._every
    save, ahead = hosts.agreed((save, ahead)) if before else (False, 1)  # The first step says nothing of the others.
    self._looked, self._look_at = (step, now), step + ahead
    return save

  def save(self, step: int, state: Any, loop: Mapping[str, Any]) -> None:
    """Writes one in the background; the one before it goes once it is there."""
    if jax.process_index() == 0 and not os.path.exists(self._mark):
      record.write_json(self._mark, {"started": _started(self._workdir)})
    self._saved = time.monotonic()
    self._checkpoints.save(step, state, loop)

  def settle(self) -> None:
    """Returns when none is being written any more."""
    self._checkpoints.settle()

  def clear(self) -> None:
    """Removes them: there is a newer permanent one."""
    if jax.process_index() == 0:
      shutil.rmtree(self.directory, ignore_errors=True)

  def _is_of_this_run(self):
    """A workdir may have been removed since, and another run begun in it."""
    with contextlib.suppress(OSError, ValueError), open(self._mark, encoding="utf-8") as f:
      return self._started is not None and json.load(f)["started"] == self._started
    return False


def _started(workdir):
  return record.read_run(workdir).get("started")
