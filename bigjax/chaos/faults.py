"""What can happen to a run, where, and a seeded choice of it."""

from __future__ import annotations

import dataclasses
import glob
import os
import random
from collections.abc import Sequence

from bigjax.errors import UserError, suggest

# Where in a run a fault strikes: "input" is while a batch is made, "step" between two steps, "commit" while a
# checkpoint that was written is completed, with an operation on the disk as the unit.
MOMENTS = ("start", "compile", "restore", "input", "step", "eval", "save", "commit", "end")
# What strikes a process where it is; and what happens to its files after a SIGKILL.
SIGNALS = ("SIGTERM", "SIGINT", "SIGKILL")
LIVE = (
  *SIGNALS,
  "freeze",
  "NaN",
  "slow input",
  "stalled input",
  "SIGTERM in a stall",
  "disk full",
  "disk full a while",
)
FILES = ("flip", "truncate", "delete", "torn line", "torn record")
KINDS = LIVE + FILES
ALL_AT_ONCE = SIGNALS + FILES
AT = {
  "NaN": ("input",),
  "slow input": ("input",),
  "stalled input": ("input",),
  "SIGTERM in a stall": ("input",),  # Of one process's input, to all.
  "disk full": ("step", "eval", "save", "commit"),
  "disk full a while": ("step", "eval", "save", "commit"),
}  # Others strike anywhere.
OPERATIONS = 48  # A checkpoint of a small model is completed in about as many.


@dataclasses.dataclass(frozen=True)
class Fault:
  """One fault."""

  kind: str
  moment: str
  count: int  # The how manieth time the moment comes in this start, from 1.
  delay: float  # Seconds after the moment.
  processes: tuple[int, ...]  # Those that are struck, at one moment: that of the first.

  def __str__(self) -> str:
    several = f", all {len(self.processes)} at once" if len(self.processes) > 1 else ""
    late = f" and {self.delay:.2f} s" if self.delay else ""
    return f"{self.kind} at {self.moment} {self.count}{late}, process {self.processes[0]}{several}"


def draw(rng: random.Random, kinds: Sequence[str], processes: int, steps: int) -> Fault:
  """Returns a fault; with the same generator the same.

  Args:
    rng: Where chance comes from.
    kinds: Some of `KINDS`.
    processes: Of the run.
    steps: How many may be taken before it.
  """
  for kind in kinds:
    if kind not in KINDS:
      raise UserError(f"--kinds: {kind!r} is not known.{suggest(kind, KINDS)}")
  kind = rng.choice(list(kinds))
  if kind == "freeze" and processes == 1:  # Nobody would be there to notice.
    kind = "SIGKILL"
  moment = rng.choice(AT.get(kind, MOMENTS))
  counts = {"input": max(1, steps), "step": max(1, steps), "commit": OPERATIONS, "save": 2, "eval": 2}
  count = rng.randint(1, counts.get(moment, 1))
  # Imports and the like take seconds, and have no moments of their own.
  delay = rng.uniform(0, {"start": 5.0, "compile": 0.5}.get(moment, 0.05)) if rng.random() < 0.5 else 0.0
  first = 0 if moment == "commit" else rng.randrange(processes)  # Only process 0 completes checkpoints.
  # All at once is a scheduler that ends the job, or power that goes.
  all_at_once = kind == "SIGTERM in a stall" or (kind in ALL_AT_ONCE and rng.random() < 0.5)
  others = tuple(i for i in range(processes) if i != first and all_at_once)
  return Fault(kind, moment, count, delay, (first, *others))


def damage(kind: str, workdir: str, rng: random.Random) -> str | None:
  """Damages a file of a run that stands still; returns what it did, or None where there is nothing to damage.

  A checkpoint is damaged only where there is another to go back to: a run that has no intact one left says so and
  stops. What is torn is what was being written when the process died, behind what was whole.
  """
  if kind in ("torn line", "torn record"):
    return _tear(kind, workdir, rng)
  steps = sorted(_steps(os.path.join(workdir, "checkpoints")))
  if len(steps) < 2:
    return None
  newest = os.path.join(workdir, "checkpoints", steps[-1])
  files = [os.path.join(folder, name) for folder, _, names in sorted(os.walk(newest)) for name in sorted(names)]
  files = [f for f in files if os.path.getsize(f) > 0]
  if not files:
    return None
  file = rng.choice(files)
  size = os.path.getsize(file)
  if kind == "delete":
    os.remove(file)
  elif kind == "truncate":
    os.truncate(file, rng.randrange(size))
  else:
    place, bit = rng.randrange(size), 1 << rng.randrange(8)
    with open(file, "r+b") as f:
      f.seek(place)
      byte = f.read(1)[0]
      f.seek(place)
      f.write(bytes([byte ^ bit]))
  return f"{kind} {os.path.relpath(file, workdir)}"


def _tear(kind, workdir, rng):
  """Adds a part of a line, or of a record of 24 bytes, to the file that grew last."""
  if kind == "torn line":
    files = [f for f in (os.path.join(workdir, name) for name in ("metrics.jsonl", "metrics.csv")) if os.path.exists(f)]
    more = rng.choice([b'{"step": 7, "lo', b"7,0.25,", b"\0" * 100, b'{"step"'])
  else:
    files = sorted(glob.glob(os.path.join(glob.escape(workdir), "ledger", "*.ledger")))[-1:]
    more = bytes(rng.randrange(256) for _ in range(rng.randint(1, 23)))
  if not files:
    return None
  file = rng.choice(files)
  with open(file, "ab") as f:
    f.write(more)
  return f"{len(more)} bytes more in {os.path.relpath(file, workdir)}"


def _steps(directory):
  return [n for n in os.listdir(directory) if n.isdigit()] if os.path.isdir(directory) else []
