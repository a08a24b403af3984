"""Show what differs between two configs or workdirs, defaults included."""

from __future__ import annotations

import argparse
import os

from bigjax import config as configs
from bigjax import record


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax diff", description=__doc__, allow_abbrev=False)
  parser.add_argument("a", help="a workdir, or FILE[:arg]")
  parser.add_argument("b", help="a workdir, or FILE[:arg]")
  args = parser.parse_args(argv)
  a, b = described(args.a), described(args.b)
  changes = configs.diff(a, b)
  runs = [record.read_run(p) if os.path.isdir(p) else {} for p in (args.a, args.b)]
  facts = [{k: r[k] for k in ("versions", "git", "python") if k in r} for r in runs]
  changes += configs.diff(*facts) if all(facts) else []
  for key, old, new in changes:
    print(f"{key}\n  - {show(old)}\n  + {show(new)}")
  print(
    f"{len(changes)} difference{'s' * (len(changes) != 1)}; config hashes {configs.digest(a)} and {configs.digest(b)}"
  )
  return 0


def described(path: str):
  """The described config of a workdir or a config file."""
  if os.path.isdir(path):
    return record.read_config(path)
  from bigjax import experiment

  return configs.describe(configs.resolve(configs.read(path), experiment.TrainConfig))


def show(value) -> str:
  return "(not there)" if value is ... else repr(value)
