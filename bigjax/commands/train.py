"""Train a config, or go on where its workdir stopped."""

from __future__ import annotations

import argparse
import os

from bigjax import config as configs
from bigjax import peers, record, workdirs
from bigjax.errors import STOPPED, UserError
from bigjax.stops import Stops


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax train", description=__doc__, allow_abbrev=False)
  parser.add_argument(
    "--config", required=True, metavar="FILE[:arg]", help="a file with get_config(); --config.key=value overrides"
  )
  parser.add_argument(
    "--workdir",
    required=True,
    help="where checkpoints, metrics and the report go, a folder or gs://bucket/run; a run there is gone on with",
  )
  parser.add_argument(
    "--compile_cache",
    default=default_cache(),
    metavar="DIR",
    help="compiled programs kept between runs; 'none' for none",
  )
  parser.add_argument(
    "--max_hours", type=float, metavar="H", help="saves and leaves with 75 after so long, as when it is asked to stop"
  )
  peers.add_flags(parser)
  args, overrides = parser.parse_known_args(argv)
  config = configs.read(args.config, overrides)

  use_cache(args.compile_cache)
  with Stops(hours=args.max_hours, ends=True) as stop:
    from bigjax import experiment, hosts, train

    resolved = configs.resolve(config, experiment.TrainConfig)
    with workdirs.opened(args.workdir) as workdir, together(args, resolved, workdir):
      code = after(workdir, train.train(resolved, workdir, stop))
  hosts.goodbye(code)
  return code


def together(args, resolved, workdir: str):
  """Returns the context in which a command's processes, if it has several, start together and fail together."""
  from bigjax import hosts

  def note(reason):
    if record.read_run(workdir).get("status") == "running":
      record.finish(workdir, "failed", error=reason)

  versions = {"version of " + name: version for name, version in record.versions().items()}
  same = {"config": configs.digest(configs.describe(resolved))} | versions
  return hosts.joined(args, same, workdir, note)


def after(workdir: str, status: str) -> int:
  """Writes the report, tells the person what came out, and returns the exit code.

  One that was stopped has no time for a report: its machine may be about to go.
  """
  import jax

  from bigjax import metrics, report

  if jax.process_index() == 0:
    if status != "stopped":
      report.write_report(workdir)
    print(metrics.summary(workdir))
  return STOPPED if status == "stopped" else 0


def default_cache() -> str:
  """Compiled programs are kept in the user's cache directory, or where JAX_COMPILATION_CACHE_DIR says."""
  home = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
  return os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(home, "bigjax", "compiled"))


def use_cache(directory: str) -> None:
  import jax

  if directory == "none":
    return
  try:
    os.makedirs(directory, exist_ok=True)
  except OSError as e:
    raise UserError(f"--compile_cache={directory} can't be made: {e.strerror}; name another or none.") from e
  jax.config.update("jax_compilation_cache_dir", directory)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
