"""Disturb a config's runs in every way at seeded moments, start them again, and compare what is left in the end.

Real processes are killed, their disk is filled, their files are damaged, their input stalls or turns to NaN. Each run
goes on from what it left, until it ends; then its last state, its metrics and its ledger are compared with those of a
run that nothing happened to: to the bit, unless places with different arithmetic were asked for.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time

from bigjax.errors import UserError


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="bigjax chaos", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--config", required=True, metavar="FILE[:arg]", help="as for train; --config.key=value overrides"
  )
  parser.add_argument("--faults", type=int, default=20, metavar="N", help="to be made in all")
  parser.add_argument("--each", type=int, default=5, metavar="N", help="faults in a run, one after another")
  parser.add_argument("--kinds", metavar="K,K", help="of faults; all unless given")
  parser.add_argument("--seed", type=int, default=0, help="of the choice of faults")
  parser.add_argument("--processes", type=int, default=1, help="of a run")
  parser.add_argument("--devices", type=int, default=1, help="of each process, on CPU")
  parser.add_argument(
    "--also",
    action="append",
    default=[],
    metavar="PxD",
    help="start in turn with P processes of D devices as well; needs determinism='topology' or --tolerance",
  )
  parser.add_argument("--tolerance", type=float, default=0.0, help="relative, of states in the end")
  parser.add_argument("--limit", type=float, default=180, metavar="SECONDS", help="that a start may take")
  parser.add_argument("--out", metavar="DIR", help="for runs that differ, and logs; a new folder otherwise")
  args, overrides = parser.parse_known_args(argv)
  if args.faults < 1 or args.each < 1 or args.processes < 1 or args.devices < 1:
    raise UserError("--faults, --each, --processes and --devices must be positive.")

  from bigjax.chaos import faults, harness

  kinds = args.kinds.split(",") if args.kinds else list(faults.KINDS)
  faults.draw(random.Random(0), kinds, args.processes, 1)
  out = args.out or tempfile.mkdtemp(prefix="bigjax-chaos-")
  if os.path.isdir(os.path.join(out, "undisturbed")):
    raise UserError(f"--out={out} has runs already; name another.")
  places = [(args.processes, args.devices), *map(_place, args.also)]
  run = harness.Harness(
    config=args.config, overrides=overrides, out=out, places=places, limit=args.limit, tolerance=args.tolerance
  )
  begun = time.monotonic()
  reference = run.undisturbed()
  print(f"undisturbed: {time.monotonic() - begun:.1f} s; logs are in {out}", flush=True)
  outcomes, rng = [], random.Random(args.seed)
  while (left := args.faults - sum(len(o.faults) for o in outcomes)) > 0 and len(outcomes) < 3 * args.faults:
    outcomes.append(run.disturbed(len(outcomes), rng, kinds, min(args.each, left), reference))
  print(harness.summary(outcomes))
  return int(any(not o.finished or o.differences or any(s.crashed for s in o.starts) for o in outcomes))


def _place(text):
  processes, _, devices = text.partition("x")
  if not (processes.isdigit() and devices.isdigit()):
    raise UserError(f"--also={text} must be processes x devices, such as 1x2.")
  return int(processes), int(devices)
