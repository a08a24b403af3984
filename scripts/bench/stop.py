"""Seconds from a SIGTERM to a durable checkpoint and to the end of the process, at every moment of a run.

Command   python scripts/bench/stop.py [--config=configs/digits_vit.py] [--times=5] [--only=MOMENT] [--out=DIR]
Hardware  any

Each moment is met `times` times by a run that is started again and again in one workdir, as a real process, without a
cache of compiled programs, so that what compiles takes its time. Before the first step of a start there is nothing to
save, and it leaves at once. The input takes 2 s where the signal comes while the loop waits for it.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile

FOR_GOOD = "input that stands still for good"
MOMENTS = {  # Which one, how often it comes first, and seconds after it.
  "importing": ("start", 1, (0.5, 1.0, 1.5, 2.0, 2.5)),
  "compiling": ("compile", 1, (0.0, 0.2, 0.5, 1.0, 2.0)),
  "restoring": ("restore", 1, (0.0, 0.01, 0.02, 0.05, 0.1)),
  "between steps": ("step", 7, (0.0,) * 5),
  "waiting for input": ("input", 9, (0.0,) * 5),
  FOR_GOOD: ("input", 9, (0.0,) * 5),
  "evaluating": ("eval", 1, (0.0, 0.01, 0.03, 0.1, 0.2)),
  "beginning to save": ("save", 1, (0.0,) * 5),
  "writing a checkpoint": ("commit", 2, (0.0, 0.005, 0.01, 0.02, 0.03)),
  "completing it": ("commit", 20, (0.0, 0.005, 0.01, 0.02, 0.03)),
}


def main(argv):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/digits_vit.py")
  parser.add_argument("--times", type=int, default=5)
  parser.add_argument("--out")
  parser.add_argument("--only", choices=MOMENTS, help="this moment")
  args, overrides = parser.parse_known_args(argv)
  os.environ["JAX_PLATFORMS"] = "cpu"
  from bigjax.chaos import faults, harness

  out = args.out or tempfile.mkdtemp(prefix="bigjax-stop-")
  # An evaluation and a checkpoint soon come in every start, and the run does not end before all is met.
  short = ["--config.total_steps=100000", "--config.evals.test.every=20", "--config.checkpoint_every=15"]
  run = harness.Harness(
    config=args.config, overrides=[*short, "--compile_cache=none", *overrides], out=out, places=[(1, 1)], limit=300.0
  )
  workdir, number = os.path.join(out, "run"), 0
  first = faults.Fault("SIGTERM", "step", 20, 0.0, (0,))  # So that there is something to restore.
  print(f"the first start: {run.start(workdir, number, first, (1, 1)).seconds:.1f} s; logs are in {out}", flush=True)
  print("| moment | times | exit codes | durable after, s: median, most | process gone after, s: median, most |")
  print("| --- | --- | --- | --- | --- |")
  for name, (moment, count, delays) in MOMENTS.items():
    starts, saved = [], []
    if args.only not in (None, name):
      continue
    for i in range(args.times):
      number += 1
      kind, late = ("SIGTERM in a stall", 1.0) if name == FOR_GOOD else ("SIGTERM", 0.0)
      start = run.start(workdir, number, faults.Fault(kind, moment, count, delays[i % len(delays)], (0,)), (1, 1))
      start = dataclasses.replace(start, time=start.time + late, leaving=start.leaving - late)
      starts.append(start)
      saved += [newest(workdir) - start.time] if start.codes == (75,) and newest(workdir) > start.time else []
    codes = ", ".join(sorted({str(c) for s in starts for c in s.codes}))
    durable = shown(saved) if saved else "nothing to save"
    print(
      f"| {name} | {sum(s.struck for s in starts)} | {codes} | {durable} | {shown([s.leaving for s in starts])} |",
      flush=True,
    )
  return 0


def newest(workdir):
  """When the newest checkpoint was complete."""
  folder = os.path.join(workdir, "checkpoints")
  return max(os.path.getmtime(os.path.join(folder, name, "checkpoint.json")) for name in os.listdir(folder))


def shown(seconds):
  seconds = [s for s in seconds if s is not None]
  return f"{statistics.median(seconds):.2f}, {max(seconds):.2f}" if seconds else "-"


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
