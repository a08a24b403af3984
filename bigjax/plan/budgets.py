"""What a config says its step must fit, `config.plan`, held against its plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from bigjax import config as configs
from bigjax import notebook
from bigjax.plan import kept, prepare, report

GIB = 2**30


def check(spec: str, keep: kept.Kept) -> Iterator[tuple[str, bool]]:
  """Yields a line for each bound that a config states, and whether it is kept; nothing for a config that states none.

  Args:
    spec: a config's file, with `:arg` if it wants one.
    keep: where what compiled programs came to is kept.
  """
  config = notebook.resolve(configs.read(spec))
  budget = config.plan
  if budget is None:
    return
  config = dataclasses.replace(config, plan=None)
  found = report.make(prepare.prepare(config, budget.topology, budget.num_slices), keep=keep)
  where = f"{spec} on {budget.topology}" + (f" x {budget.num_slices}" if budget.num_slices > 1 else "")
  if "total" not in found["memory"]:
    yield f"OVER   {where}: {found['memory']['said']}", False
    return
  sent = found.get("communication")  # Not told where there is no compiler.
  for name, bound, value, most in (
    ("HBM, GiB", budget.hbm_gib, found["memory"]["total"] / GIB, True),
    ("collectives, GiB", budget.collective_gib, sent["bytes"] / GIB if sent else math.inf, True),
    ("MFU bound", budget.mfu_bound, found["time"]["mfu_bound"], False),
  ):
    if bound is not None:
      fine = value <= bound if most else value >= bound
      word = "fine" if fine else "OVER" if most else "BELOW"
      yield f"{word:<6} {where}: {name} {value:.4g}, at {'most' if most else 'least'} {bound:g}", fine
