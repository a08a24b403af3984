"""Show every leaf of a config's state: shape, the rule that matched, its layout, and bytes a device."""

from __future__ import annotations

import argparse

from bigjax import config as configs


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax explain", description=__doc__, allow_abbrev=False)
  parser.add_argument("--config", required=True, metavar="FILE[:arg]", help="a config, or a workdir's config.json")
  parser.add_argument("--devices", type=int, help="pretend to have this many devices (CPU)")
  args, overrides = parser.parse_known_args(argv)
  config = configs.read(args.config, overrides)
  if args.devices:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
  from bigjax import experiment, overview

  run = experiment.build(configs.resolve(config, experiment.TrainConfig))
  print(overview.table(run))
  batch = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in run.batch.items())
  print(f"batch      {batch}\nsteps      {run.total_steps:,} over {len(run.data.source):,} examples")
  return 0
