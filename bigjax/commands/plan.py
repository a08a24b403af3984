"""Compile a config's training step for TPUs that need not be there: memory, work, communication, time and cost."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bigjax import config as configs
from bigjax.errors import UserError


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax plan", description=__doc__, allow_abbrev=False)
  parser.add_argument("--config", required=True, metavar="FILE[:arg]", help="a config, or a workdir's config.json")
  parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:4x8, v5p:4x4x8, v6e:16x16")
  parser.add_argument("--num_slices", type=int, default=1, help="of this topology, joined by the data center's network")
  parser.add_argument("--price", type=float, help="of a chip for an hour, in any currency")
  parser.add_argument("--json", action="store_true", help="print JSON")
  parser.add_argument("--out", metavar="DIR", help="write plan.json and plan.html there")
  parser.add_argument("--against", metavar="PLAN.json", help="show what changed since another plan")
  args, overrides = parser.parse_known_args(argv)
  config = configs.read(args.config, overrides)
  other = _read(args.against) if args.against else None

  from bigjax.plan import topology

  topology.environment()
  from bigjax import notebook
  from bigjax.plan import text

  found = notebook.plan(config, args.topology, num_slices=args.num_slices, price=args.price)
  change = text.compare(found, other) if other else ""
  if args.json:
    print(json.dumps(found, indent=1))
  else:
    print("\n\n".join(filter(None, (text.table(found), change))))
  if args.out:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(found, indent=1))
    (out / "plan.html").write_text(text.page(found, change), encoding="utf-8")
  return 0


def _read(path):
  try:
    found = json.loads(Path(path).read_text())
  except (OSError, ValueError) as e:
    raise UserError(f"--against={path}: {e}") from e
  if not isinstance(found, dict) or "compiler_options" not in found:
    raise UserError(f"--against={path} is no plan; write one with bigjax plan --out=DIR, or --json.")
  return found
