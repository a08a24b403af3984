"""Write the report page of a workdir anew."""

from __future__ import annotations

import argparse

from bigjax import record


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax report", description=__doc__, allow_abbrev=False)
  parser.add_argument("workdir", help="the directory of a run")
  args = parser.parse_args(argv)
  record.read_config(args.workdir)
  from bigjax import report

  print(report.write_report(args.workdir))
  return 0
