"""Compile a config's training step for TPUs that need not be there: memory, work, communication, time and cost."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bigjax import config as configs
from bigjax.errors import UserError

KEPT = ".cache/plan"


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax plan", description=__doc__, allow_abbrev=False)
  parser.add_argument("--config", metavar="FILE[:arg]", help="a config, or a workdir's config.json")
  parser.add_argument(
    "--topology", metavar="CHIP:SHAPE", help="such as v5e:4x8, v5p:4x4x8, v6e:16x16; h100:4x8 for estimates alone"
  )
  parser.add_argument("--num_slices", type=int, default=1, help="of this topology, joined by the data center's network")
  parser.add_argument("--price", type=float, help="of a chip for an hour, in any currency")
  parser.add_argument("--json", action="store_true", help="print JSON")
  parser.add_argument("--out", metavar="DIR", help="write plan.json and plan.html there")
  parser.add_argument("--against", metavar="PLAN.json", help="show what changed since another plan")
  parser.add_argument("--estimate", action="store_true", help="don't compile")
  parser.add_argument("--keep", metavar="DIR", default=KEPT, help=f"where compiled results are kept [{KEPT}]")
  parser.add_argument("--check", nargs="+", metavar="FILE[:arg]", help="hold configs to the budgets that they state")
  parser.add_argument("--search", action="store_true", help="find the mesh, remat and batch of the least time a token")
  parser.add_argument("--budget", type=float, default=30.0, metavar="MINUTES", help="for the search [30]")
  parser.add_argument("--jobs", type=int, help="compiles at a time, in the search; as memory allows by default")
  args, overrides = parser.parse_known_args(argv)
  if args.check:
    return _check(args)
  config = configs.read(_given(args, "config"), overrides)
  other = _read(args.against) if args.against else None

  from bigjax.plan import topology

  topology.environment(_given(args, "topology"))
  from bigjax import notebook
  from bigjax.plan import kept, page, prepare, report, text

  resolved = notebook.resolve(config)
  if args.search:
    return _search(args, resolved, overrides)
  prepared = prepare.prepare(resolved, args.topology, args.num_slices)
  found = report.make(prepared, args.price, kept.Kept(args.keep), compile=not args.estimate)
  change = text.compare(found, other) if other else ""
  if args.json:
    print(json.dumps(found, indent=1))
  else:
    print("\n\n".join(filter(None, (text.table(found), change))))
  if args.out:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(found, indent=1))
    (out / "plan.html").write_text(page.html(found, change), encoding="utf-8")
  return 0


def _given(args, name):
  if not getattr(args, name):
    raise UserError(f"--{name} is missing: bigjax plan --config=FILE --topology=v5e:2x4, or --check FILE ...")
  return getattr(args, name)


def _check(args) -> int:
  """Holds configs to their budgets; 1 if one is over."""
  from bigjax.plan import topology

  topology.environment()
  from bigjax.plan import budgets, kept

  over = 0
  for spec in args.check:
    for line, fine in budgets.check(spec, kept.Kept(args.keep)):
      print(line, flush=True)
      over += not fine
  return 1 if over else 0


def _search(args, config, overrides) -> int:
  from bigjax.plan import kept, search

  command = [f"--config={args.config}", *overrides]
  for line in search.run(
    config, command, (args.topology, args.num_slices), kept.Kept(args.keep), 60 * args.budget, args.jobs
  ):
    print(line, flush=True)
  return 0


def _read(path):
  try:
    found = json.loads(Path(path).read_text())
  except (OSError, ValueError) as e:
    raise UserError(f"--against={path}: {e}") from e
  if not isinstance(found, dict) or "compiler_options" not in found:
    raise UserError(f"--against={path} is no plan; write one with bigjax plan --out=DIR, or --json.")
  return found
