"""What the time of a whole run went to, over all its starts; kept in run.json while it trains.

A start that was killed can't say how long it was. What it had noted is known, and from then on until the last sign of
it in metrics.jsonl its time is counted as `lost`: the steps were made again.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Mapping
from typing import Any

from bigjax import record
from bigjax.metrics.stopwatch import Stopwatch, goodput

EVERY = 30.0  # Seconds between two notes, at most one a save.


class Spent:
  """Notes the time of one start of a run beside that of those before."""

  def __init__(self, workdir: str, watch: Stopwatch, primary: bool):
    self._workdir, self._watch, self._primary = workdir, watch, primary
    self._before, self._noted = (_closed(workdir) if primary else []), -EVERY

  def note(self) -> None:
    """Called when a state is safe; writes now and then."""
    if self._primary and time.monotonic() - self._noted > EVERY:
      self._noted = time.monotonic()
      with contextlib.suppress(OSError):  # The next note is of this time, too.
        run = record.read_run(self._workdir)
        record.write_json(os.path.join(self._workdir, "run.json"), run | self.facts())

  def facts(self, over: bool = False) -> dict[str, Any]:
    """What run.json is told."""
    mine = {"seconds": self._watch.breakdown(), "noted": record.now(), "over": over}
    spent = [*self._before, mine]
    seconds = totals(spent)
    return {"spent": spent, "seconds": seconds, "goodput": goodput(seconds)}


def totals(spent: list[Mapping[str, Any]]) -> dict[str, float]:
  """Seconds by what they went to, over several starts."""
  found: dict[str, float] = {}
  for start in spent:
    for name, seconds in start["seconds"].items():
      found[name] = found.get(name, 0.0) + seconds
  return found


def _closed(workdir):
  """The starts before this one; what the last of them did not live to note is lost."""
  spent = record.read_run(workdir).get("spent", [])
  if not spent or spent[-1]["over"]:
    return spent
  *before, last = spent
  try:
    seen = os.path.getmtime(os.path.join(workdir, "metrics.jsonl"))
  except OSError:
    return spent
  lost = max(0.0, seen - datetime.datetime.fromisoformat(last["noted"]).timestamp())
  return [*before, dict(last, seconds=dict(last["seconds"], lost=lost), over=True)]
