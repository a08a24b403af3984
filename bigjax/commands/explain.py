"""Show every leaf of a config's state: shape, rule, layout, bytes a device; and what a step sends between devices."""

from __future__ import annotations

import argparse
import contextlib
import json

from bigjax import config as configs
from bigjax.errors import UserError


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax explain", description=__doc__, allow_abbrev=False)
  parser.add_argument("--config", required=True, metavar="FILE[:arg]", help="a config, or a workdir's config.json")
  parser.add_argument("--devices", type=int, help="pretend to have this many devices (CPU)")
  parser.add_argument(
    "--compiled",
    action="store_true",
    help="compile the step as train would, and list each collective: mesh axis, bytes, the line that caused it",
  )
  parser.add_argument(
    "--topology", metavar="CHIP:SHAPE", help="lay it out on TPUs that need not be there, such as v5p:4x4x8"
  )
  parser.add_argument("--num_slices", type=int, default=1, help="of this topology, joined by the data center's network")
  parser.add_argument("--json", action="store_true", help="print JSON")
  args, overrides = parser.parse_known_args(argv)
  config = configs.read(args.config, overrides)
  if args.devices and args.topology:
    raise UserError("--devices and --topology: name one of them.")
  if args.topology:
    from bigjax.plan import topology

    topology.environment()
  if args.devices:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
  from bigjax import experiment, overview

  devices = topology.devices(args.topology, args.num_slices) if args.topology else None
  run = experiment.build(configs.resolve(config, experiment.TrainConfig), devices)
  batch = {k: f"{v.dtype}{list(v.shape)}" for k, v in run.batch.items()}
  sent = overview.collectives(run, compiled_text(run)) if args.compiled else None
  pipeline = overview.pipeline(run)
  if args.json:
    found = dict(mesh=dict(run.mesh.shape), words=overview.words(run), leaves=overview.rows(run), pipeline=pipeline)
    found |= dict(batch=batch, total_steps=run.total_steps, examples=len(run.data.source))
    print(json.dumps(found | (dict(collectives=sent) if args.compiled else {}), indent=1))
    return 0
  print(overview.table(run))
  print(f"words      {overview.words_line(run)}")
  print(f"batch      {', '.join(f'{k} {v}' for k, v in batch.items())}")
  print(f"steps      {run.total_steps:,} over {len(run.data.source):,} examples")
  if pipeline:
    turns = f" x {pipeline['repeats']}" if pipeline["repeats"] > 1 else ""
    parts = f"{pipeline['stages']} stages, {pipeline['microbatches']} microbatches{turns}"
    print(f"pipeline   {parts}: a device waits {pipeline['bubble']:.1%} of the time")
  if args.compiled:
    print(f"\n{overview.collectives_table(sent)}")
  return 0


def compiled_text(run) -> str:
  """Returns the program of the step that `bigjax train` would run, as the compiler prints it."""
  from bigjax import train

  with _lines_in_cache_keys():
    return train.compile_step(run).compiled.as_text()


@contextlib.contextmanager
def _lines_in_cache_keys():
  """A program found in the compilation cache would show the lines of the code it was first compiled from."""
  import jax

  before = jax.config.jax_compilation_cache_include_metadata_in_key
  jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
  try:
    yield
  finally:
    jax.config.update("jax_compilation_cache_include_metadata_in_key", before)
