"""Write the report page of a workdir anew."""

from __future__ import annotations

import argparse

from bigjax import record, workdirs


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax report", description=__doc__, allow_abbrev=False)
  parser.add_argument("workdir", help="the directory of a run")
  args = parser.parse_args(argv)
  from bigjax import report

  with workdirs.opened(args.workdir) as workdir:
    record.read_config(workdir)
    print(report.write_report(workdir))
  return 0
