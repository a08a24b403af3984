"""Disturb a config's runs in every way at seeded moments, start them again, and compare what is left in the end.

Real processes are killed, their disk is filled, their files are damaged, their input stalls or turns to NaN. Each run
goes on from what it left, until it ends; then its last state, its metrics and its ledger are compared with those of a
run that nothing happened to: to the bit, unless places with different arithmetic were asked for (--also), where
rounding makes a difference: then, as closely as undisturbed runs on these places agree.

Time-outs are lowered (config.watchdog, --peer_timeout). Of a run's checkpoints never all are damaged: without an intact
one a run says so and ends with an error.
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
  parser.add_argument(
    "--tolerance",
    type=float,
    default=0.0,
    metavar="T",
    help="for --also: the most that states may differ by in the end, relative to a leaf's largest value. What is "
    "allowed is ten times what undisturbed runs on these places differ by; more than T is refused. 1e-4 suits float32, "
    "0.05 bfloat16, where training does not make rounding grow. What has no gradient but noise is left out, and said",
  )
  parser.add_argument("--limit", type=float, default=180, metavar="SECONDS", help="that a start may take")
  parser.add_argument(
    "--peer_timeout", type=float, default=20.0, metavar="SECONDS", help="after which a silent process counts as lost"
  )
  parser.add_argument("--jobs", type=int, default=1, help="runs that are disturbed at a time")
  parser.add_argument(
    "--out", metavar="DIR", help="for runs that differ, logs and faults.jsonl, from which the same command goes on"
  )
  args, overrides = parser.parse_known_args(argv)
  if min(args.faults, args.each, args.processes, args.devices, args.jobs) < 1:
    raise UserError("--faults, --each, --processes, --devices and --jobs must be positive.")

  os.environ["JAX_PLATFORMS"] = "cpu"
  from bigjax.chaos import faults, harness

  kinds = args.kinds.split(",") if args.kinds else list(faults.KINDS)
  faults.draw(random.Random(0), kinds, args.processes, 1)
  out = args.out or tempfile.mkdtemp(prefix="bigjax-chaos-")
  places = [(args.processes, args.devices), *map(_place, args.also)]
  run = harness.Harness(
    config=args.config,
    overrides=overrides,
    out=out,
    places=places,
    limit=args.limit,
    peer_timeout=args.peer_timeout,
    tolerance=args.tolerance,
    say=lambda line: print(line, flush=True),
  )
  same = ("config", "each", "kinds", "seed", "processes", "devices", "also", "tolerance")
  facts = {k: getattr(args, k) for k in same} | {"overrides": overrides}
  book, reference = harness.Book(out, facts), os.path.join(out, "undisturbed")
  if not book.begun:
    begun = time.monotonic()
    run.undisturbed()
    print(f"undisturbed: {time.monotonic() - begun:.1f} s; logs are in {out}", flush=True)
  book.begin()
  harness.disturb(run, book, reference, kinds=kinds, count=args.faults, each=args.each, seed=args.seed, jobs=args.jobs)
  print(harness.summary(book.outcomes))
  return int(not all(o.fine for o in book.outcomes))


def _place(text):
  processes, _, devices = text.partition("x")
  if not (processes.isdigit() and devices.isdigit()):
    raise UserError(f"--also={text} must be processes x devices, such as 1x2.")
  return int(processes), int(devices)
