"""Which examples every step was fed: a digest a step, the same whatever number of hosts fed it.

A row of a batch is told by its place in it, the epoch and the example. The digest of a step is the sum of hashes of its
rows, padding left out, modulo 2**64, twice with different hashes: 128 bits. A host writes the sum of the rows that it
fetched, and the sums of all hosts add up to that of the step. Rows are told by what was asked of the source, beside the
batch, so no device sees any of it.

Under `workdir/ledger`, each start of a run leaves a file for each host that feeds: a line of JSON, then 24 bytes for
each step. What a crash cut short at the end of a file is ignored; what a checkpoint holds was written before it. A run
that starts again checks the last steps before it and those it will feed again, and `bigjax ledger` checks all of them
against the config's own order, which takes no data.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import glob
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from bigjax import appended, hosts, sharding, stores, workdirs
from bigjax.data import order, pipeline
from bigjax.errors import UserError

VERSION = 1
RECORD = np.dtype([("step", "<u4"), ("check", "<u4"), ("sums", "<u8", (2,))])
LOOKED_BACK = 256  # Steps before a start that are checked, so that other data is noticed whether it stopped or fell.
PATIENCE = 1.0  # Seconds that records wait to be written together.
_LANES = (0x243F6A8885A308D3, 0x13198A2E03707344)  # Digits of pi.


# Digests


def digest(rows: np.ndarray, epochs: np.ndarray, ids: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
  """Returns the sums of batches of `size` rows each, [batches, 2] of uint64; rows of `mask` 0 count nothing."""
  sums = []
  for lane in _LANES:
    keys = order.fold(np.full(len(rows), lane, np.uint64), rows)
    keys = order.fold(order.fold(keys, epochs), ids)
    sums.append(np.where(mask != 0, keys, np.uint64(0)).reshape(-1, size).sum(axis=1, dtype=np.uint64))
  return np.stack(sums, axis=1)


def expected(plan: pipeline.Plan, steps: np.ndarray) -> np.ndarray:
  """Returns the sums that a plan's rows have at `steps`, counted from 1; no data is read."""
  places = (steps[:, None] - 1) * plan.local_size + np.arange(plan.local_size)
  return digest(np.tile(plan.rows, len(steps)), *plan.examples(places.reshape(-1)), plan.local_size)


def differing(plan: pipeline.Plan, steps: np.ndarray, sums: np.ndarray) -> np.ndarray:
  """Returns those of `steps` whose sums are not what a plan has."""
  several = -(-len(steps) * plan.local_size // 2**20) or 1  # A few million examples at a time.
  return np.concatenate(
    [
      own[(expected(plan, own) != there).any(axis=1)]
      for own, there in zip(np.array_split(steps, several), np.array_split(sums, several))
    ]
  )


def _records(steps: np.ndarray, sums: np.ndarray) -> np.ndarray:
  made = np.empty(len(steps), RECORD)
  made["step"], made["sums"], made["check"] = steps, sums, _check(steps, sums)
  return made


def _check(steps, sums):
  """Says whether a record was written whole."""
  keys = order.fold(order.fold(sums[:, 0], steps.astype(np.int64)), sums[:, 1].view(np.int64))
  return (keys >> np.uint64(32)).astype(np.uint32)


# Writing


class Ledger:
  """Takes down what the steps of a run are fed, and checks what was fed before.

  Args:
    workdir: The directory of the run.
    plan: Which rows this process fetches.
    first: The step that the run begins after.
    writes: False where another process feeds the same rows.

  Raises:
    UserError: The data or their order are no longer those that the run was fed.
  """

  def __init__(self, workdir: str, plan: pipeline.Plan, first: int, writes: bool = True):
    self._workdir, self._plan, self._first, self._writes = workdir, plan, first, writes
    self._coming: dict[int, np.ndarray] = {}
    before = attempts(workdir, since=first - LOOKED_BACK)
    if jax.process_index() == 0:
      self._check_before(before)
    self._number = hosts.agreed(max(_files(workdir), default=0) + 1)  # Also beside what one host alone began.
    self._last = max((a.last for a in before if a.number < self._number), default=0)
    name = f"{self._number:05d}-{jax.process_index():05d}.ledger"
    self._path = os.path.join(_folder(workdir), name)
    self._file = appended.Appended(self._path)
    self._began = False
    self._steps: list[int] = []
    self._sums: list[np.ndarray] = []
    self._written = time.monotonic()

  @classmethod
  def of(cls, run, workdir: str, first: int, skips: pipeline.Skips) -> Ledger:
    """Returns the ledger of an experiment that goes on after step `first`."""
    mine, parts = sharding.data_part(run.mesh)
    ways, held = sharding.batch_ways(run.mesh), collections.defaultdict(set)
    for device, (rows,) in sharding.batch_sharding(run.mesh).devices_indices_map((ways,)).items():
      held[device.process_index].add(rows.indices(ways)[0])
    writer = min(p for p, rows in held.items() if rows == held[jax.process_index()])
    config = run.config
    plan = pipeline.Plan(
      run.data.source, config.batch_size, mine, parts, seed=config.seed, growth=run.growth, skips=skips
    )
    return cls(workdir, plan, first, writer == jax.process_index())

  def following(self, step: int) -> Callable[..., None]:
    """Returns what is to be told, by the thread that makes them, what the batches are of that follow those of `step`.

    It takes (epochs, ids, mask) of one after the other.
    """
    steps = itertools.count(step + 1)

    def fetched(epochs: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> None:
      sums, step = digest(self._plan.rows, epochs, ids, mask, self._plan.local_size)[0], next(steps)
      if step <= self._last:
        (wanted,) = expected(self._plan, np.array([step]))
        if (sums != wanted).any():
          raise RuntimeError(f"Step {step} was fed other examples than its place in the order says.")
      self._coming[step] = sums

    return fetched

  def note(self, step: int) -> None:
    """Takes down that `step` was taken with its batch."""
    self._steps.append(step)
    self._sums.append(self._coming.pop(step))
    if time.monotonic() - self._written > PATIENCE:
      self._write()

  def flush(self) -> None:
    """Has all that was noted on its way to the disk; a checkpoint waits until it's there."""
    self._write()

  def settle(self) -> None:
    """Has it on the disk; raises `OSError` if it can't be."""
    self._write()
    self._file.settle()
    home = workdirs.home(self._workdir)
    if self._began and home != self._workdir and jax.process_index() != 0:
      with open(self._path, "rb") as file:  # Process 0 puts into a store what it has itself.
        (stores.place(_folder(home)) / os.path.basename(self._path)).write_bytes(file.read())

  def _write(self):
    self._written = time.monotonic()
    if not self._steps or not self._writes:
      self._steps, self._sums = [], []
      return
    data = _records(np.array(self._steps), np.stack(self._sums)).tobytes()
    if not self._began:
      data = json.dumps(self._header()).encode() + b"\n" + data
    self._began = True
    self._file.append(data)
    self._steps, self._sums = [], []

  def _header(self):
    p = self._plan
    return {
      "ledger": VERSION,
      "after": self._first,
      "part": p.parts.tolist(),
      "parts": p.hosts,
      "skips": [list(s) for s in p.skips],
      "examples": len(p.source),
      "batch_size": p.batch_size,
      "seed": p.seed,
    }

  def _check_before(self, before):
    """Refuses data that are not what they were, or come in another order."""
    for attempt in before:
      late = attempt.steps > self._first - LOOKED_BACK
      if not late.any():
        continue
      whole = dataclasses.replace(self._plan, host=0, hosts=1, skips=attempt.skips)
      if attempt.examples != len(whole.source):
        raise UserError(
          f"config.data: the source has {len(whole.source):,} examples, and this run was fed from "
          f"{attempt.examples:,}. Bring back the data it was started with, or name another --workdir."
        )
      if (wrong := differing(whole, attempt.steps[late], attempt.sums[late])).size:
        raise UserError(
          f"config.data: at step {wrong[0]} this run was fed other examples than that step would be now, so it would "
          "not go on where it stopped. Bring back the data and the version of bigjax it was started with, or name "
          "another --workdir."
        )

  def __enter__(self) -> Ledger:
    appended.enrol(self)
    return self

  def __exit__(self, kind, *_) -> None:
    appended.leave(self)
    # What follows the last checkpoint is recorded again by the next start.
    with contextlib.suppress(*[OSError] if kind else []):
      self._write()
      self._file.close()


# Reading


@dataclasses.dataclass(frozen=True)
class Attempt:
  """What one start of a run was fed."""

  number: int
  after: int  # The step it began after.
  skips: pipeline.Skips
  examples: int
  batch_size: int
  seed: int
  steps: np.ndarray  # In order; those that all its hosts recorded.
  sums: np.ndarray  # [steps, 2]

  @property
  def last(self) -> int:
    return int(self.steps[-1]) if len(self.steps) else 0


def attempts(workdir: str, since: int | None = None) -> list[Attempt]:
  """Returns the starts of a run, in order, from the last one before step `since` on; `UserError` if it's no ledger."""
  files, found = _files(workdir), []
  for number in sorted(files, reverse=True):
    if since is not None and found and found[-1].after <= since:
      break  # A run that was preempted a thousand times has as many files.
    attempt = _attempt(number, [part for path in files[number] if (part := _part(path))])
    found += [] if attempt is None else [attempt]
  return found[::-1]


def _files(workdir) -> dict[int, list[str]]:
  """What each start left, by its number."""
  files: dict[int, list[str]] = {}
  for path in sorted(glob.glob(os.path.join(glob.escape(_folder(workdir)), "*.ledger"))):
    if re.fullmatch(r"\d{5,}-\d{5,}\.ledger", os.path.basename(path)):
      files.setdefault(int(os.path.basename(path).partition("-")[0]), []).append(path)
  return files


def _part(path):
  """Returns (header, steps, sums) of a file, up to where a crash cut it short; None if that was in its first line."""
  try:
    with open(path, "rb") as file:
      line, end, data = file.read().partition(b"\n")
    if not end:
      return None
    header = json.loads(line)
    if header.get("ledger") != VERSION:
      raise ValueError(f"it says version {header.get('ledger')!r}")
    numbers = [header[k] for k in ("after", "parts", "examples", "batch_size", "seed")]
    numbers += [*header["part"], *(n for first, stop in header["skips"] for n in (first, stop))]
    if not all(type(n) is int and abs(n) < 2**64 for n in numbers) or not 0 < header["parts"] < 2**20:
      raise ValueError("its first line has other values than numbers")
  except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as e:
    raise UserError(f"{path} can't be read as a ledger: {e}. Bring it back from a copy, or remove it.") from e
  records = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)
  steps, sums = records["step"].astype(np.int64), np.ascontiguousarray(records["sums"])
  wrong = _check(steps, sums) != records["check"]
  whole = int(wrong.argmax()) if wrong.any() else len(records)
  return header, steps[:whole], sums[:whole]


def _attempt(number, parts):
  """Adds up what the hosts of a start wrote."""
  header = parts[0][0] if parts else None
  if header is None or {i for h, *_ in parts for i in h["part"]} != set(range(header["parts"])):
    return None  # A host had not begun.
  count = min(len(steps) for _, steps, _ in parts)
  sums = np.sum([sums[:count] for *_, sums in parts], axis=0, dtype=np.uint64)
  skips = tuple(tuple(s) for s in header["skips"])
  facts = [header[k] for k in ("examples", "batch_size", "seed")]
  return Attempt(number, header["after"], skips, *facts, parts[0][1][:count], sums)


@dataclasses.dataclass(frozen=True)
class History:
  """The steps that made a run what it is: of each, what the last start that took it recorded."""

  steps: dict[int, Attempt]
  attempts: list[Attempt]

  @classmethod
  def of(cls, workdir: str) -> History:
    """Reads the ledger of a run."""
    found, steps, until = attempts(workdir), {}, math.inf
    for attempt in reversed(found):
      steps |= dict.fromkeys(attempt.steps[attempt.steps <= until].tolist(), attempt)
      until = min(until, attempt.after)  # What came later than that was taken again.
    return cls(steps, found)

  def by_attempt(self, steps: np.ndarray) -> Iterator[tuple[Attempt, np.ndarray]]:
    """Yields each start, and those of `steps` that are its."""
    numbers = np.array([self.steps[s].number for s in steps.tolist()], np.int64)
    for attempt in self.attempts:
      if (own := steps[numbers == attempt.number]).size:
        yield attempt, own


def _folder(workdir):
  return os.path.join(workdir, "ledger")
