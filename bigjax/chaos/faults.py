"""What can happen to a run, where, and a seeded choice of it."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence

from bigjax.errors import UserError, suggest

# Where in a run a fault strikes. "commit" is while files of a checkpoint are being written.
MOMENTS = ("start", "compile", "restore", "input", "eval", "save", "commit", "end")
# What strikes a process where it is; and what happens to its files after a SIGKILL.
LIVE = ("SIGTERM", "SIGINT", "SIGKILL", "NaN", "stall", "disk full")
FILES = ("flip", "truncate", "delete", "torn line")
KINDS = LIVE + FILES


@dataclasses.dataclass(frozen=True)
class Fault:
  """One fault."""

  kind: str
  moment: str
  count: int  # The how manieth time the moment comes in this start, from 1.
  delay: float  # Seconds after the moment.
  process: int  # The one that is struck.

  def __str__(self) -> str:
    return f"{self.kind} at {self.moment} {self.count}, process {self.process}"


def draw(rng: random.Random, kinds: Sequence[str], processes: int, steps: int) -> Fault:
  """Returns a fault; with the same generator the same.

  Args:
    rng: Where chance comes from.
    kinds: Some of `KINDS`.
    processes: Of the run.
    steps: That the next start may have before it.
  """
  for kind in kinds:
    if kind not in KINDS:
      raise UserError(f"--faults: {kind!r} is not known.{suggest(kind, KINDS)}")
  kind = rng.choice(list(kinds))
  moments = {"NaN": ("input",), "stall": ("input",), "disk full": ("input",)}.get(kind, MOMENTS)
  moment = rng.choice(moments)
  often = moment == "input"
  count = rng.randint(1, max(1, steps)) if often else rng.randint(1, 2) if moment in ("eval", "save", "commit") else 1
  delay = rng.choice((0.0, 0.0, rng.uniform(0, 0.05)))
  return Fault(kind, moment, count, delay, rng.randrange(processes))


def damage(kind: str, workdir: str, rng: random.Random) -> str | None:
  """Damages a file of a run that stands still; returns what it did, or None where there is nothing to damage.

  A checkpoint is damaged only where there is another to go back to: a run that has no intact one left says so and
  stops.
  """
  if kind == "torn line":
    file = os.path.join(workdir, "metrics.jsonl")
    if not os.path.exists(file) or os.path.getsize(file) < 2:
      return None
    with open(file, "r+b") as f:
      size = os.path.getsize(file) - rng.randint(1, min(40, os.path.getsize(file) - 1))
      f.truncate(size)
    return f"metrics.jsonl cut to {size} bytes"
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


def _steps(directory):
  return [n for n in os.listdir(directory) if n.isdigit()] if os.path.isdir(directory) else []
