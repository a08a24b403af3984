"""Measure a checkpoint of a run by the config's evaluators, on whatever devices there are."""

from __future__ import annotations

import argparse
import os

from bigjax import config as configs
from bigjax import peers, record, workdirs
from bigjax.commands.train import default_cache, together, use_cache


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax eval", description=__doc__, allow_abbrev=False)
  parser.add_argument("--workdir", required=True, help="the directory of a run")
  parser.add_argument("--step", type=int, help="the step of a checkpoint; the last one otherwise")
  parser.add_argument("--compile_cache", default=default_cache(), metavar="DIR", help="'none' for none")
  peers.add_flags(parser)
  args, overrides = parser.parse_known_args(argv)
  with workdirs.opened(args.workdir) as workdir:
    _measure(args, overrides, workdir)
  from bigjax import hosts

  hosts.goodbye(0)
  return 0


def _measure(args, overrides, workdir) -> None:
  record.read_config(workdir)  # A directory that holds no run is said so before anything else.
  config = configs.read(os.path.join(workdir, "config.json"), overrides)

  use_cache(args.compile_cache)
  import jax

  from bigjax import experiment, train

  resolved = configs.resolve(config, experiment.TrainConfig)
  with together(args, resolved, workdir):
    step, results = train.evaluate(resolved, workdir, args.step)
    if jax.process_index() == 0:
      width = max(map(len, results), default=0)
      print(f"step {step:,} of {args.workdir}")
      print("\n".join(f"  {k:<{width}}  {v:.6g}" for k, v in results.items() if isinstance(v, int | float)))
      record.write_json(os.path.join(workdir, f"eval-{step:08d}.json"), results)
