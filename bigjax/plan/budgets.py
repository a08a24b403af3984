"""What a config says its step must fit, `config.plan`, held against its plan."""

from __future__ import annotations

import dataclasses
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
  for name, bound, value, fine in (
    ("HBM, GiB", budget.hbm_gib, found["memory"]["total"] / GIB, lambda value, bound: value <= bound),
    (
      "collectives, GiB",
      budget.collective_gib,
      found["communication"]["bytes"] / GIB,
      lambda value, bound: value <= bound,
    ),
    ("MFU bound", budget.mfu_bound, found["time"]["mfu_bound"], lambda value, bound: value >= bound),
  ):
    if bound is not None:
      how = "at least" if name == "MFU bound" else "at most"
      word = "fine" if fine(value, bound) else "OVER" if how == "at most" else "BELOW"
      yield f"{word:<6} {where}: {name} {value:.4g}, {how} {bound:g}", fine(value, bound)
