"""Runs a config undisturbed and disturbed, as real processes, and compares what is left in the end, to the bit.

Every start is a row of `faults.jsonl`, and so is every run that was compared; a harness that is cut off goes on after
the last of these.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bigjax.chaos import compare, faults
from bigjax.chaos.faults import Fault
from bigjax.checkpoint import Checkpoints
from bigjax.errors import LOST, STOPPED, UserError

# What hangs is to be found in seconds here, not minutes.
QUICK = ("--config.watchdog.at_least=10", "--config.watchdog.pause=60")
GONE = {-signal.SIGKILL, 1, LOST}  # How a process may leave that lost a peer.
ASKED = {0, STOPPED, 130, 143, -signal.SIGTERM, -signal.SIGINT}  # By a signal's own doing before anything listens.
# How the processes that are struck may leave, and their peers.
ENDINGS = {
  "SIGTERM": (ASKED, ASKED | GONE),
  "SIGINT": (ASKED, ASKED | GONE),
  "NaN": ({0, 1}, {0, 1}),  # 0: it is in a batch that was made ahead and is not taken.
  "slow input": ({0}, {0}),
  "stalled input": ({0, LOST}, {0, LOST}),
  "SIGTERM in a stall": (ASKED | {LOST}, ASKED | {LOST}),  # LOST: others wait in a step that one has no batch for.
  "disk full": ({0, 1}, {0, 1}),
  "disk full a while": ({0}, {0}),
}
KILLED = ({-signal.SIGKILL}, GONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """One start of a run, and what came of it."""

  fault: Fault | None
  processes: int
  devices: int  # Of each process.
  codes: tuple[int | None, ...]  # Exit codes; None for a process that had to be killed because it hung.
  seconds: float
  started: int | None  # The step it went on from; None where it did not get that far.
  struck: bool  # Whether the fault's moment came.
  at: int | None  # The last step that was taken before that.
  time: float | None  # When it struck, seconds since 1970.
  leaving: float | None  # Seconds from the strike to the end of the last process.
  ready: float | None = None  # Seconds from its beginning until it was about to take a step.
  damage: str | None = None  # What was done to the files afterwards.
  said: str = ""  # The last lines of the process that failed first.

  @property
  def kind(self) -> str:
    """What the fault was in effect."""
    bare = self.fault.kind in faults.FILES and self.damage is None  # There was nothing to damage yet.
    return "SIGKILL" if bare else self.fault.kind

  @property
  def hung(self) -> bool:
    return None in self.codes

  @property
  def crashed(self) -> bool:
    """Whether a process left in a way that nothing accounts for."""
    if not self.struck:
      return any(self.codes)
    mine, theirs = ENDINGS.get(self.fault.kind, KILLED)
    first, *others = self.fault.processes
    at_once = mine
    if self.fault.moment == "end":  # All was done.
      theirs, at_once = theirs | {0}, mine | {0}
    allowed = [mine if i == first else at_once if i in others else theirs for i in range(self.processes)]
    return any(code is not None and code not in each for code, each in zip(self.codes, allowed, strict=True))

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def of(cls, row: dict[str, Any]) -> Start:
    """Returns what `to_json` gave."""
    fault = row["fault"] and Fault(**row["fault"] | {"processes": tuple(row["fault"]["processes"])})
    return cls(**row | {"fault": fault, "codes": tuple(row["codes"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """A disturbed run, from its first start to its end."""

  run: int
  starts: tuple[Start, ...]
  finished: bool
  differences: tuple[str, ...]
  compared: int  # Numbers.

  @property
  def faults(self) -> list[Start]:
    """The starts in which a fault struck."""
    return [s for s in self.starts if s.struck]

  @property
  def fine(self) -> bool:
    return self.finished and not self.differences and not any(s.crashed for s in self.starts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harness:
  """How runs are started."""

  config: str  # As --config has it.
  overrides: Sequence[str]
  out: str  # Folder for all of it.
  places: Sequence[tuple[int, int]]  # Processes and devices of each, taken in turn.
  limit: float  # Seconds after which a start counts as hung.
  peer_timeout: float = 20.0
  tolerance: float = 0.0  # Above 0 where places differ and the arithmetic with them: see compare.py.
  say: Callable[[str], None] = print

  def undisturbed(self) -> str:
    """Returns the folder of a run that nothing happens to.

    Where rounding is to be allowed for, there is one more on each of the other places.

    Raises:
      UserError: It does not end well, or rounding alone is too much.
    """
    for place in dict.fromkeys(self.places if self.tolerance else self.places[:1]):
      workdir = self._undisturbed(place)
      shutil.rmtree(workdir, ignore_errors=True)
      start = self.start(workdir, 0, None, place)
      if any(c != 0 for c in start.codes):
        raise UserError(
          f"--config={self.config}: it does not end well undisturbed (exit codes {start.codes}):\n{start.said}"
        )
    if self.tolerance:
      self._rounding.check(", ".join(f"{p} x {d}" for p, d in dict.fromkeys(self.places)))
    return self._undisturbed(self.places[0])

  def disturbed(self, number: int, rng: random.Random, kinds: Sequence[str], most: int, reference: str) -> Outcome:
    """Returns what became of a run that `most` faults strike, one a start, or fewer if it ends before."""
    workdir = os.path.join(self.out, f"run{number:03d}")
    shutil.rmtree(workdir, ignore_errors=True)
    steps = _last_step(reference)
    starts, at = [], 0
    while len(starts) < 3 * most + 3:  # More than enough for faults whose moment does not come.
      place = self.places[(number + len(starts)) % len(self.places)]
      fault = None
      if sum(s.struck for s in starts) < most:
        # So far apart that the run lasts for all of them.
        fault = faults.draw(rng, kinds, place[0], min(steps - at, 1 + 2 * steps // most))
      start = self.start(workdir, len(starts), fault, place)
      if fault and fault.kind in faults.FILES and start.struck:
        start = dataclasses.replace(start, damage=faults.damage(fault.kind, workdir, rng))
      starts.append(start)
      self.say(_line(number, start))
      at = max((s.at or 0) for s in starts)
      if start.hung or not any(start.codes):  # None is no exit code.
        break
    finished = not starts[-1].hung and not any(starts[-1].codes)
    differences, compared = self.compare(reference, workdir) if finished else (["it did not end"], 0)
    for line in differences[:5]:
      self.say(f"    {line}")
    if finished and not differences:
      shutil.rmtree(workdir)
    return Outcome(
      run=number, starts=tuple(starts), finished=finished, differences=tuple(differences), compared=compared
    )

  def compare(self, reference: str, workdir: str) -> tuple[list[str], int]:
    """Returns (differences, numbers compared) of two ended runs."""
    return compare.compare(reference, workdir, self._rounding if self.tolerance else None, self.say)

  @functools.cached_property
  def _rounding(self):
    first, *others = (self._undisturbed(place) for place in dict.fromkeys(self.places))
    return compare.Rounding.between(first, others, self.tolerance)

  def _undisturbed(self, place):
    name = "undisturbed" if place == self.places[0] else f"undisturbed-{place[0]}x{place[1]}"
    return os.path.join(self.out, name)

  def start(self, workdir: str, number: int, fault: Fault | None, place: tuple[int, int]) -> Start:
    """Starts all processes of a run once, and waits for their end."""
    count, devices = place
    logs = os.path.join(self.out, "logs", os.path.basename(workdir))
    os.makedirs(logs, exist_ok=True)
    name = lambda i, what: os.path.join(logs, f"{number:02d}.{i}.{what}")
    port, started, begun, pids = _free_port(), [], time.time(), os.path.join(logs, f"{number:02d}.pids")
    with contextlib.suppress(FileNotFoundError):  # Of a harness that was cut off.
      os.remove(pids)
    for i in range(count):
      here = dataclasses.asdict(fault) if fault is not None and i == fault.processes[0] else None
      with open(name(i, "json"), "w", encoding="utf-8") as f:
        json.dump({"fault": here, "log": name(i, "events"), "pids": pids}, f)
      peers = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}"] if count > 1 else []
      peers += [f"--peer_timeout={self.peer_timeout:g}"] if count > 1 else []
      command = [sys.executable, "-m", "bigjax.chaos.worker", name(i, "json"), "train", f"--config={self.config}"]
      with contextlib.suppress(FileNotFoundError):
        os.remove(name(i, "events"))
      with open(name(i, "out"), "wb") as out:
        process = subprocess.Popen(
          [*command, f"--workdir={workdir}", *QUICK, *self.overrides, *peers],
          stdout=out,
          stderr=subprocess.STDOUT,
          env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"},
        )
      started.append(process)
    with open(f"{pids}.tmp", "w", encoding="utf-8") as f:
      json.dump([p.pid for p in started], f)
    os.replace(f"{pids}.tmp", pids)
    frozen = fault.processes if fault is not None and fault.kind == "freeze" else ()
    codes = _wait(started, begun + self.limit, frozen)
    ended = time.time()
    events = sorted((e for i in range(count) for e in _events(name(i, "events"))), key=lambda e: e["time"])
    struck, begin = (next((e for e in events if word in e), None) for word in ("struck", "start"))
    failed = next((i for i, code in enumerate(codes) if code), 0)
    with open(name(failed, "out"), encoding="utf-8", errors="replace") as f:
      said = f.read()[-1000:]
    return Start(
      fault=fault,
      processes=count,
      devices=devices,
      codes=tuple(codes),
      seconds=round(ended - begun, 3),
      started=None if begin is None else begin["start"],
      ready=None if begin is None else round(begin["time"] - begun, 3),
      struck=struck is not None,
      at=None if struck is None else struck["step"],
      time=None if struck is None else struck["time"],
      leaving=None if struck is None else round(ended - struck["time"], 3),
      said=said,
    )


class Book:
  """The rows of `faults.jsonl`, by which a harness that was cut off goes on.

  Args:
    out: Its folder.
    facts: What has to be the same for that.
  """

  def __init__(self, out: str, facts: dict[str, Any]):
    self._file, self._lock, self.outcomes = os.path.join(out, "faults.jsonl"), threading.Lock(), []
    rows, self._facts = _events(self._file), json.loads(json.dumps(facts))
    if rows and rows[0] != self._facts:
      raise UserError(f"--out={out} is of another command ({rows[0]}); name another.")
    self.begun = bool(rows)
    starts: dict[int, list[Start]] = {}
    for row in rows[1:]:
      number = row.pop("run")
      if "start" in row:
        starts.setdefault(number, []).append(Start.of(row["start"]))
      else:
        row["differences"] = tuple(row["differences"])
        self.outcomes.append(Outcome(run=number, starts=tuple(starts[number]), **row))

  def begin(self) -> None:
    """Writes down what is known, once there is a run to compare with; not what was cut off."""
    rows = [self._facts, *(row for outcome in self.outcomes for row in _rows(outcome))]
    with open(f"{self._file}.tmp", "w", encoding="utf-8") as f:
      f.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(f"{self._file}.tmp", self._file)

  def add(self, outcome: Outcome) -> None:
    """Writes down a run that is over."""
    text = "".join(json.dumps(row) + "\n" for row in _rows(outcome))
    with self._lock, open(self._file, "a", encoding="utf-8") as f:
      self.outcomes.append(outcome)
      f.write(text)


def _rows(outcome):
  """A row for each start, with its fault, and one for what came of all."""
  for start in outcome.starts:
    yield {"run": outcome.run, "start": start.to_json()}
  said = {k: getattr(outcome, k) for k in ("finished", "differences", "compared")}
  yield {"run": outcome.run, **said}


def disturb(
  harness: Harness, book: Book, reference: str, *, kinds: Sequence[str], count: int, each: int, seed: int, jobs: int
) -> None:
  """Disturbs runs, `jobs` at a time, until `count` faults have struck; each is a row of the book."""
  numbers = iter(n for n in range(3 * count) if n not in {o.run for o in book.outcomes})
  one = lambda n: book.add(harness.disturbed(n, random.Random(f"{seed}/{n}"), kinds, each, reference))
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    running: set[concurrent.futures.Future] = set()
    while (left := count - sum(len(o.faults) for o in book.outcomes)) > 0:
      while len(running) < jobs and len(running) * each < left and (number := next(numbers, None)) is not None:
        running.add(pool.submit(one, number))
      if not running:
        return
      done, running = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
      for future in done:
        future.result()


def summary(outcomes: Sequence[Outcome]) -> str:
  """Returns a table of what was done and what came of it, in Markdown."""
  found: dict[tuple[str, str], list[tuple[Outcome, Start]]] = {}
  for outcome in outcomes:
    for start in outcome.faults:
      found.setdefault((start.kind, start.fault.moment), []).append((outcome, start))
  moments = [m for m in faults.MOMENTS if any(m == at for _, at in found)]
  titles = ["fault", *moments, "in all", "recovered", "differences", "hangs", "to the end, s, most", "steps lost, most"]
  lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
  again = {id(s): lost for o in outcomes for s, lost in _lost(o)}
  for kind in sorted({k for k, _ in found}, key=lambda k: faults.KINDS.index(k)):
    at = [found.get((kind, m), []) for m in moments]
    cells = [kind, *(len(pairs) or "" for pairs in at), *_cells([pair for pairs in at for pair in pairs], again)]
    lines.append(f"| {' | '.join(map(str, cells))} |")
  struck = [(o, s) for o in outcomes for s in o.faults]
  places = sorted({f"{s.processes} x {s.devices}" for o in outcomes for s in o.starts})
  starts = [s for o in outcomes for s in o.starts]
  lines += [
    "",
    f"{len(struck)} faults in {len(outcomes)} runs of {len(starts)} starts (processes x devices: {', '.join(places)}): "
    f"{sum(o.fine for o, _ in struck)} recovered, {sum(len(o.differences) for o in outcomes if o.finished)} "
    f"differences in {sum(o.compared for o in outcomes):,} numbers, {sum(s.hung for s in starts)} hangs, "
    f"{sum(s.crashed for s in starts)} crashes",
  ]
  return "\n".join(lines)


def _cells(struck, again):
  """What came of some faults, each with the run that it was in."""
  different = sum(len(o.differences) for o in {id(o): o for o, _ in struck}.values() if o.finished)
  return [
    len(struck),
    sum(o.fine for o, _ in struck),
    different,
    sum(s.hung for _, s in struck),
    f"{max(s.leaving or 0.0 for _, s in struck):.1f}",
    max(again.get(id(s), 0) for _, s in struck),
  ]


def _lost(outcome) -> Iterator[tuple[Start, int]]:
  """Yields (start, steps that the next start has to do again)."""
  for start, after in zip(outcome.starts, outcome.starts[1:]):
    if start.struck and start.at is not None and after.started is not None:
      yield start, max(0, start.at - after.started)


def _line(number, start):
  codes = ", ".join("hung" if c is None else str(c) for c in start.codes)
  what = str(start.fault or "undisturbed")
  what += "" if start.fault is None or start.struck else " (did not come)"
  place = f"{start.processes} x {start.devices}"
  origin, at = ("-" if x is None else x for x in (start.started, start.at))
  ended = f"exit {codes:<10} {start.seconds:5.1f} s  {start.damage or ''}{'  CRASHED' if start.crashed else ''}"
  return f"run {number:3d}  {place}  {origin:>4} to {at:>4}  {what:<58} {ended}"


def _wait(processes, deadline, frozen: Sequence[int]) -> list[int | None]:
  """Returns exit codes; kills what is still there at the deadline, which gives None.

  Those that are `frozen` are killed when the others have left.
  """
  others = [p for i, p in enumerate(processes) if i not in frozen]
  while any(p.poll() is None for p in processes) and time.time() < deadline:
    if all(p.poll() is not None for p in others):
      for i in frozen:
        if _is_stopped(processes[i]):
          processes[i].send_signal(signal.SIGKILL)
    time.sleep(0.02)
  codes = [p.poll() for p in processes]
  for process, code in zip(processes, codes, strict=True):
    if code is None:
      process.send_signal(signal.SIGKILL)
      process.wait()
  return codes


def _is_stopped(process):
  with contextlib.suppress(OSError), open(f"/proc/{process.pid}/stat", encoding="utf-8") as f:
    return f.read().rpartition(")")[2].split()[0] == "T"
  return process.poll() is None


def _events(file):
  with contextlib.suppress(FileNotFoundError), open(file, encoding="utf-8") as f:
    return [json.loads(line) for line in f if line.endswith("\n")]
  return []


def _last_step(workdir):
  with Checkpoints(workdir, read_only=True) as checkpoints:
    return max(checkpoints.steps())


def _free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]
