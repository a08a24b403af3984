"""Run a workdir's experiment again from what it recorded, and compare every number it wrote."""

from __future__ import annotations

import argparse
import os

from bigjax import config as configs
from bigjax import peers, record
from bigjax.commands import train as train_command
from bigjax.errors import UserError
from bigjax.stops import Stops

TIMINGS = ("seconds", "time", "examples_per_second", "steps_per_second")


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax repro", description=__doc__, allow_abbrev=False)
  parser.add_argument("workdir", help="the directory of a run")
  parser.add_argument("--into", metavar="DIR", help="where the new run goes; WORKDIR-repro otherwise")
  parser.add_argument("--compile_cache", default=train_command.default_cache(), metavar="DIR", help="'none' for none")
  peers.add_flags(parser)
  args = parser.parse_args(argv)
  into = args.into or args.workdir.rstrip("/") + "-repro"
  described = record.read_config(args.workdir)
  before = record.read_run(args.workdir)

  train_command.use_cache(args.compile_cache)
  from bigjax import experiment, hosts, train

  resolved = configs.resolve(configs.read(os.path.join(args.workdir, "config.json")), experiment.TrainConfig)
  if configs.describe(resolved) != described:
    raise UserError(f"--workdir={args.workdir}: the code now reads this config.json differently; see bigjax diff.")
  if os.path.isdir(into) and os.listdir(into):
    raise UserError(f"--into={into} is there already; a repetition starts from nothing. Remove it or name another.")
  with Stops(ends=True) as stop, train_command.together(args, resolved, into):
    import jax

    primary = jax.process_index() == 0
    for line in changes(before) if primary else ():
      print(f"note: {line}")
    code = train_command.after(into, train.train(resolved, into, stop))
    code = code or (verdict(args.workdir, into) if primary else 0)
  hosts.goodbye(code)
  return code


def changes(before) -> list[str]:
  """Returns what is not as a run recorded it: packages, code."""
  pairs = [
    ("package", before.get("versions", {}), record.versions()),
    ("code", before.get("git", {}), record.git_state()),
  ]
  return [f"{what} {k} was {was!r} and is {now!r}" for what, a, b in pairs for k, was, now in configs.diff(a, b)]


def verdict(workdir: str, into: str) -> int:
  """Says what differs between two runs; returns the exit code."""
  differences, compared = compare(workdir, into)
  for line in differences[:20]:
    print(line)
  found = "the same to the bit" if not differences else f"{len(differences)} differ"
  print(f"{compared} numbers of {workdir} compared with {into}: {found}")
  return int(bool(differences))


def compare(a: str, b: str) -> tuple[list[str], int]:
  """Returns (differences, numbers compared) between two runs' metrics.jsonl, timings left out."""
  old, new = _rows(a), _rows(b)
  if not old:
    raise UserError(f"{a} has no metrics.jsonl to compare with; config.writers must have 'jsonl'.")
  keys = [k for k in old if k[1].rpartition("/")[2] not in TIMINGS]
  missing = [f"step {s} {k}: not in {b}" for s, k in keys if (s, k) not in new]
  both = [(k, repr(old[k]), repr(new[k])) for k in keys if k in new]  # NaN is no other NaN, but reads the same.
  other = [f"step {s} {k}: {was} -> {now}" for (s, k), was, now in both if was != now]
  return missing + other, len(keys)


def _rows(workdir):
  from bigjax import metrics

  return {(r["step"], k): v for r in metrics.read_rows(workdir) for k, v in r.items() if k != "step"}
