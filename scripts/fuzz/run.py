"""Files damaged in ten thousand ways, read by the program's own readers: refused in words, or harmless.

Usage: python scripts/fuzz/run.py [--cases=10000] [--seed=0] [--only=GGUF,...] [--show=20]

Each case damages a copy of whole files (see damage.py) and reads them to the end in a process with bounded time and
memory (see cases.py, which says what the columns mean). Checkpoints have their own, checkpoints.py. Leaves with 1
if a case ended in anything but a clear message, the same values, or other values that the format can't tell.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cases
import data
import runs
import weights

TARGETS = {t.name: t for t in (*weights.TARGETS, *data.TARGETS, *runs.TARGETS)}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cases", type=int, default=10_000, help="in all")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", default="", help="targets, separated by semicolons")
  parser.add_argument("--show", type=int, default=20, help="failures")
  parser.add_argument("--said", action="store_true", help="list the messages, how often each came")
  args = parser.parse_args()
  names = [n for n in args.only.split(";") if n] or list(TARGETS)
  if wrong := [n for n in names if n not in TARGETS]:
    parser.error(f"{wrong[0]!r} is none of {'; '.join(TARGETS)}")
  start = time.perf_counter()
  counts = {n: args.cases // len(names) + (i < args.cases % len(names)) for i, n in enumerate(names)}
  found = cases.run(TARGETS, counts, args.seed)
  print(cases.table(found))
  bad = [e for e in found if e.outcome not in cases.FINE]
  alike = collections.defaultdict(list)
  for e in bad:  # What was raised, and the line that did.
    alike[
      e.target, e.outcome, e.why.partition(":")[0], e.why.rpartition("File ")[2] if "File " in e.why else ""
    ].append(e)
  for some in list(alike.values())[: args.show]:
    e = some[0]
    print(f"\n{e.target}, {len(some)} such as case {e.case} ({', '.join(e.kinds)}): {e.outcome}: {e.why[:500]}")
  if args.said:
    for text, count in collections.Counter(e.why.splitlines()[0][:150] for e in found if e.why).most_common():
      print(f"{count:>6}  {text}")
  print(f"{len(found):,} cases, {len(bad)} failures, seed {args.seed}, {cases.timed(start)}")
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
