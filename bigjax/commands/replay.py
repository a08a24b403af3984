"""Take a fault's steps again on one CPU, and name the first tensor that is not finite, its module and its line."""

from __future__ import annotations

import argparse
import os

from bigjax import bundles
from bigjax.commands.repro import changes
from bigjax.commands.train import default_cache, use_cache


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax replay", description=__doc__, allow_abbrev=False)
  parser.add_argument("bundle", help="a folder in WORKDIR/bundles")
  parser.add_argument("--workdir", metavar="DIR", help="where the run's checkpoints are now")
  parser.add_argument("--from_start", action="store_true", help="from the first state, where the checkpoint is gone")
  parser.add_argument("--compile_cache", default=default_cache(), metavar="DIR", help="'none' for none")
  args = parser.parse_args(argv)
  bundle = bundles.read(args.bundle)
  os.environ["JAX_PLATFORMS"] = "cpu"
  use_cache(args.compile_cache)
  import jax

  jax.config.update("jax_platforms", "cpu")
  from bigjax import replay

  first, last = bundle["steps"]
  steps = f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"
  measured = "  ".join(f"{k} {v:.6g}" for k, v in bundle["measured"].items())
  print(
    f"{bundle['kind']} at {steps} on {bundle.get('devices', '?')}: {measured}; the answer was to {bundle['action']}"
  )
  for line in changes(bundle):
    print(f"note: {line}")
  found = replay.again(bundle, from_start=args.from_start, workdir=args.workdir)
  lines, there = replay.verdict(found, bundle["kind"])
  print("\n".join(lines))
  return 0 if there else 1
