"""Runs a config undisturbed and disturbed, as real processes, and compares what is left in the end, to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigjax import metrics
from bigjax.chaos import faults
from bigjax.chaos.faults import Fault
from bigjax.checkpoint import Checkpoints
from bigjax.commands import repro
from bigjax.errors import LOST, STOPPED, UserError

# How a process may leave: by itself as errors.py says, or by the signal that was sent.
EXPECTED = {0, 1, STOPPED, LOST, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """One start of a run, and what came of it."""

  fault: str | None
  processes: int
  devices: int  # Of each process.
  codes: tuple[int | None, ...]  # Exit codes; None for a process that had to be killed because it hung.
  seconds: float
  started: int | None  # The step it went on from.
  struck: int | None  # The step at which the fault struck, None where its moment did not come.
  leaving: float | None  # Seconds from the strike to the end of the last process.
  damage: str | None = None  # What was done to the files afterwards.
  said: str = ""  # The last lines of the process that failed first.

  @property
  def hung(self) -> bool:
    return None in self.codes

  @property
  def crashed(self) -> bool:
    """Whether a process left in a way that nothing accounts for."""
    return any(c is not None and c not in EXPECTED for c in self.codes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """A disturbed run, from its first start to its end."""

  starts: tuple[Start, ...]
  finished: bool
  differences: tuple[str, ...]
  compared: int  # Numbers.

  @property
  def faults(self) -> list[Start]:
    """The starts in which a fault struck."""
    return [s for s in self.starts if s.struck is not None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harness:
  """How runs are started."""

  config: str  # As --config has it.
  overrides: Sequence[str]
  out: str  # Folder for all of it.
  places: Sequence[tuple[int, int]]  # Processes and devices of each, taken in turn.
  limit: float  # Seconds after which a start counts as hung.
  peer_timeout: float = 20
  tolerance: float = (
    0.0  # Relative, of the states in the end: above 0 where places differ and the arithmetic with them.
  )
  say: Callable[[str], None] = print

  def undisturbed(self) -> str:
    """Returns the folder of a run that nothing happens to."""
    workdir = os.path.join(self.out, "undisturbed")
    start = self._start(workdir, 0, None, self.places[0])
    if any(c != 0 for c in start.codes):
      raise UserError(
        f"--config={self.config}: it does not end well undisturbed (exit codes {start.codes}):\n{start.said}"
      )
    return workdir

  def disturbed(self, number: int, rng: random.Random, kinds: Sequence[str], most: int, reference: str) -> Outcome:
    """Returns what became of a run whose first `most` starts have a fault each."""
    workdir = os.path.join(self.out, f"run{number:03d}")
    steps = max(r["step"] for r in metrics.read_rows(reference))
    starts, at = [], 0
    while len(starts) < most + 3:  # One to end in, and two that may go wrong through what came before.
      fault = (
        faults.draw(rng, kinds, self.places[len(starts) % len(self.places)][0], steps - at)
        if len(starts) < most
        else None
      )
      start = self._start(workdir, len(starts), fault, self.places[len(starts) % len(self.places)])
      if fault and fault.kind in faults.FILES and start.struck is not None:
        start = dataclasses.replace(start, damage=faults.damage(fault.kind, workdir, rng))
      starts.append(start)
      self.say(_line(number, start))
      at = max([s.struck or 0 for s in starts])
      if start.hung or not any(start.codes):  # None is no exit code.
        break
    finished = not any(starts[-1].codes)
    differences, compared = self.compare(reference, workdir) if finished else (["it did not end"], 0)
    for line in differences[:5]:
      self.say(f"    {line}")
    if finished and not differences:
      shutil.rmtree(workdir)
    return Outcome(starts=tuple(starts), finished=finished, differences=tuple(differences), compared=compared)

  def compare(self, reference: str, workdir: str) -> tuple[list[str], int]:
    """Returns (differences, numbers compared) of two ended runs: the last state, the metrics, the ledger."""
    (old, loop), (new, other) = (_last(w) for w in (reference, workdir))
    found = [f"{n}: only in one of them" for n in old.keys() ^ new.keys()]
    found += [n for n in old.keys() & new.keys() if not self._same(old[n], new[n])]
    found += [f"loop: {loop} -> {other}"] if loop != other and not self.tolerance else []
    if self.tolerance:
      rows, count = _rows_close(reference, workdir, self.tolerance)
    else:
      rows, count = repro.compare(reference, workdir)
    ledger = subprocess.run([sys.executable, "-m", "bigjax", "ledger", workdir], capture_output=True, text=True)
    found += [f"ledger: {ledger.stdout[-300:]}{ledger.stderr[-300:]}"] if ledger.returncode else []
    return found + rows, count + sum(x.size for x in old.values())

  def _same(self, a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
      return False
    if self.tolerance and np.issubdtype(a.dtype, np.floating):
      a, b = a.astype(np.float64), b.astype(np.float64)
      return bool(np.abs(a - b).max(initial=0) <= self.tolerance * max(np.abs(a).max(initial=0), 1e-30))
    return a.tobytes() == b.tobytes()

  def _start(self, workdir: str, number: int, fault: Fault | None, place: tuple[int, int]) -> Start:
    """Starts all processes of a run once, and waits for their end."""
    count, devices = place
    logs = os.path.join(self.out, "logs", os.path.basename(workdir))
    os.makedirs(logs, exist_ok=True)
    name = lambda i, what: os.path.join(logs, f"{number:02d}.{i}.{what}")
    port, started, begun = _free_port(), [], time.time()
    for i in range(count):
      here = dataclasses.asdict(fault) if fault is not None and fault.process == i else None
      with open(name(i, "json"), "w", encoding="utf-8") as f:
        json.dump({"fault": here, "log": name(i, "events")}, f)
      peers = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}"] if count > 1 else []
      peers += [f"--peer_timeout={self.peer_timeout:g}"] if count > 1 else []
      command = [sys.executable, "-m", "bigjax.chaos.worker", name(i, "json"), "train", f"--config={self.config}"]
      with open(name(i, "out"), "wb") as out:
        process = subprocess.Popen(
          [*command, f"--workdir={workdir}", *self.overrides, *peers],
          stdout=out,
          stderr=subprocess.STDOUT,
          env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"},
        )
      started.append(process)
    codes = _wait(started, begun + self.limit)
    ended = time.time()
    events = [e for i in range(count) for e in _events(name(i, "events"))]
    struck = next((e for e in events if "struck" in e), None)
    failed = next((i for i, code in enumerate(codes) if code), 0)
    with open(name(failed, "out"), encoding="utf-8", errors="replace") as f:
      said = f.read()[-2000:]
    return Start(
      fault=None if fault is None else str(fault),
      processes=count,
      devices=devices,
      codes=tuple(codes),
      seconds=ended - begun,
      started=next((e["start"] for e in events if "start" in e), None),
      struck=None if struck is None else struck["step"] + (next((e["start"] for e in events if "start" in e), 0) or 0),
      leaving=None if struck is None else ended - struck["time"],
      said=said,
    )


def summary(outcomes: Sequence[Outcome]) -> str:
  """Returns a table of what was done and what came of it, in Markdown."""
  kinds: dict[str, list[Start]] = {}
  for outcome in outcomes:
    for start in outcome.faults:
      kinds.setdefault(start.fault.split(" at ")[0], []).append(start)
  lines = [
    "| fault | times | exit codes | longest to the end, s | steps done twice, most |",
    "| --- | --- | --- | --- | --- |",
  ]
  again = {id(s): lost for o in outcomes for s, lost in _lost(o)}
  for kind, starts in sorted(kinds.items()):
    codes = sorted({c for s in starts for c in s.codes if c is not None})
    leaving = max((s.leaving or 0.0) for s in starts)
    most = max((again.get(id(s), 0) for s in starts), default=0)
    lines.append(f"| {kind} | {len(starts)} | {', '.join(map(str, codes))} | {leaving:.1f} | {most} |")
  struck = sum(len(o.faults) for o in outcomes)
  recovered = sum(len(o.faults) for o in outcomes if o.finished and not o.differences)
  hung, crashed = (sum(getattr(s, what) for o in outcomes for s in o.starts) for what in ("hung", "crashed"))
  numbers = sum(o.compared for o in outcomes)
  different = sum(len(o.differences) for o in outcomes if o.finished)
  lines += [
    "",
    f"{struck} faults in {len(outcomes)} runs of {sum(len(o.starts) for o in outcomes)} starts: {recovered} recovered, "
    f"{different} differences in {numbers:,} numbers, {hung} hangs, {crashed} crashes",
  ]
  return "\n".join(lines)


def _lost(outcome):
  """Yields (start, steps that the next start has to do again)."""
  for start, after in zip(outcome.starts, outcome.starts[1:]):
    if start.struck is not None and after.started is not None:
      yield start, max(0, start.struck - after.started)


def _line(number, start):
  codes = ", ".join("hung" if c is None else str(c) for c in start.codes)
  what = start.fault or "undisturbed"
  what += "" if start.fault is None or start.struck is not None else " (did not come)"
  place = f"{start.processes} x {start.devices}"
  origin = "-" if start.started is None else start.started
  ended = f"exit {codes:<10} {start.seconds:5.1f} s  {start.damage or ''}"
  return f"run {number:3d}  {place}  from {origin:>4}  {what:<44} {ended}"


def _wait(processes, deadline) -> list[int | None]:
  """Returns exit codes; kills what is still there at the deadline, which gives None."""
  while any(p.poll() is None for p in processes) and time.time() < deadline:
    time.sleep(0.02)
  codes = [p.poll() for p in processes]
  for process, code in zip(processes, codes, strict=True):
    if code is None:
      process.send_signal(signal.SIGKILL)
      process.wait()
  return codes


def _events(file):
  with contextlib.suppress(FileNotFoundError), open(file, encoding="utf-8") as f:
    return [json.loads(line) for line in f if line.endswith("\n")]
  return []


def _last(workdir) -> tuple[dict[str, np.ndarray], Any]:
  with Checkpoints(workdir, read_only=True) as checkpoints:
    step = max(checkpoints.steps())
    leaves = checkpoints.read(step)
  return {n: np.asarray(x) for n, x in leaves.items()}, step


def _rows_close(a, b, tolerance):
  old, new = ({(r["step"], k): v for r in metrics.read_rows(w) for k, v in r.items()} for w in (a, b))
  keys = [k for k in old if k[1].rpartition("/")[2] not in repro.TIMINGS]
  far = lambda x, y: isinstance(x, float) and abs(x - y) > 100 * tolerance * max(abs(x), 1e-3)
  return [
    f"step {s} {k}: {old[s, k]} -> {new.get((s, k))}" for s, k in keys if (s, k) not in new or far(old[s, k], new[s, k])
  ], len(keys)


def _free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]
