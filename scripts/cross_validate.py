"""Trains one config on every fold and prints the mean of each final metric.

Usage: python scripts/cross_validate.py --config=configs/binary_mlp.py --workdir=runs/binary_mlp [--folds=5]

The config file takes `fold` and `folds` as arguments, as configs/binary_mlp.py does. Each fold is a run of its own in
WORKDIR/fold0, WORKDIR/fold1, ...; an unfinished one is gone on with.
"""

import argparse
import os
import statistics
import sys

from bigjax import main as bigjax
from bigjax import metrics, record


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--config", required=True)
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--folds", type=int, default=5)
  args, overrides = parser.parse_known_args()
  found: dict[str, list[float]] = {}
  for fold in range(args.folds):
    workdir = os.path.join(args.workdir, f"fold{fold}")
    separator = "," if ":" in args.config else ":"
    config = f"{args.config}{separator}fold={fold},folds={args.folds}"
    if code := bigjax.main(["train", f"--config={config}", f"--workdir={workdir}", *overrides]):
      return code
    last = metrics.best_and_last(metrics.read_rows(workdir))
    for name, values in last.items():
      if "/" in name:
        found.setdefault(name, []).append(values["last"])
  summary = {
    name: {"mean": statistics.mean(values), "stdev": statistics.stdev(values), "folds": values}
    for name, values in found.items()
    if len(values) == args.folds > 1
  }
  record.write_json(os.path.join(args.workdir, "folds.json"), summary)
  width = max(map(len, summary), default=0)
  print(f"\n{args.folds} folds of {args.config}")
  for name, values in summary.items():
    shown = " ".join(f"{v:.4f}" for v in values["folds"])
    print(f"  {name:<{width}}  mean {values['mean']:.4f}  stdev {values['stdev']:.4f}  ({shown})")
  return 0


if __name__ == "__main__":
  sys.exit(main())
