"""Check which examples the steps of a run were fed, against the config's own order, or list those of a step."""

from __future__ import annotations

import argparse
import dataclasses
import os

import numpy as np

from bigjax import config as configs
from bigjax import record, workdirs
from bigjax.errors import UserError

SHOWN = 20


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax ledger", description=__doc__, allow_abbrev=False)
  parser.add_argument("workdir", help="the directory of a run")
  parser.add_argument("--step", type=int, metavar="N", help="list what this step was fed")
  args = parser.parse_args(argv)
  args.workdir = workdirs.fetched(args.workdir)
  record.read_config(args.workdir)  # A directory that holds no run is said so before anything else.
  from bigjax import experiment, ledger

  config = configs.resolve(configs.read(os.path.join(args.workdir, "config.json")), experiment.TrainConfig)
  plan, history = experiment.order(config), ledger.History.of(args.workdir)
  if not history.steps:
    raise UserError(f"{args.workdir} has no ledger: no step was taken there, or by a version of bigjax without one.")
  lines, wrong = verified(plan, history) if args.step is None else listed(plan, history, args.step)
  print("\n".join(lines))
  return int(wrong)


def listed(plan, history, step: int) -> tuple[list[str], bool]:
  """Returns what a step was fed, and whether its record says otherwise."""
  from bigjax import ledger

  if step not in history.steps:
    raise UserError(f"--step={step}: the ledger has steps {min(history.steps):,} to {max(history.steps):,}.")
  attempt = history.steps[step]
  own = dataclasses.replace(plan, skips=attempt.skips)
  epochs, ids, mask = own.examples((step - 1) * plan.batch_size + np.arange(plan.batch_size))
  sizes, starts = _parts(plan.source)
  part = np.searchsorted(starts, ids, side="right") - 1
  describe = getattr(plan.source, "spans", lambda ids: [""] * len(ids))
  lines = [f"row{'':>4}  epoch  {'source  ' * (len(sizes) > 1)}example"]
  for row in np.flatnonzero(mask):
    source = f"{part[row]:>6}  " if len(sizes) > 1 else ""
    (span,) = describe(ids[row : row + 1])
    lines.append(f"{row:>7}  {epochs[row]:>5}  {source}{ids[row] - starts[part[row]]:>7}{span and '  ' + span}")
  at = np.flatnonzero(attempt.steps == step)
  wrong = ledger.differing(own, attempt.steps[at], attempt.sums[at]).size > 0
  sums = "".join(f"{int(s):016x}" for s in attempt.sums[at[0]])
  end = "which is NOT what was recorded" if wrong else "as recorded"
  return [*lines, f"step {step:,}, start {attempt.number}: {int(mask.sum()):,} examples, {end} ({sums})"], wrong


def verified(plan, history) -> tuple[list[str], bool]:
  """Returns what there is to say of a run's ledger, and whether anything is wrong with it."""
  from bigjax import ledger

  lines, wrong = [], False
  for attempt in history.attempts:
    facts = {k: (getattr(attempt, k), now) for k, now in _facts(plan).items() if getattr(attempt, k) != now}
    if facts:
      shown = ", ".join(f"{k} {then:,} (now {now:,})" for k, (then, now) in facts.items())
      lines.append(f"start {attempt.number} was fed with another {shown}")
    bad = ledger.differing(dataclasses.replace(plan, skips=attempt.skips), attempt.steps, attempt.sums)
    if bad.size:
      shown = ", ".join(f"{s:,}" for s in bad[:SHOWN]) + (" ..." if bad.size > SHOWN else "")
      lines.append(f"start {attempt.number}: {bad.size:,} steps were fed other examples than the order says: {shown}")
    wrong = wrong or bool(facts) or bad.size > 0
  taken = np.array(sorted(history.steps), np.int64)
  missing = np.setdiff1d(np.arange(1, taken[-1] + 1), taken)
  if missing.size:
    lines.append(f"{missing.size:,} steps have no record, from step {missing[0]:,} to {missing[-1]:,}")
  count = sum(len(a.steps) for a in history.attempts)
  good = not wrong and not missing.size
  lines.append(
    f"steps 1 to {taken[-1]:,} of {len(history.attempts)} start{'s' * (len(history.attempts) != 1)}: "
    + (f"all {count:,} records are as the order of the config says" if good else "NOT as the order of the config says")
  )
  if good:
    more, wrong = coverage(plan, history, taken)
    lines += more
  return lines, wrong or not good


def coverage(plan, history, taken: np.ndarray) -> tuple[list[str], bool]:
  """Returns how often each example was seen in each epoch of its source, and whether one is missing or came twice."""
  sizes, starts = _parts(plan.source)
  seen: dict[tuple[int, int], np.ndarray] = {}

  def add(one, steps):
    for chunk in np.array_split(steps, -(-len(steps) * plan.batch_size // 2**20)):
      places = ((chunk[:, None] - 1) * plan.batch_size + np.arange(plan.batch_size)).reshape(-1)
      epochs, ids, mask = one.examples(places)
      epochs, ids = epochs[mask != 0], ids[mask != 0]
      part = np.searchsorted(starts, ids, side="right") - 1
      for p, e in np.unique(np.stack([part, epochs]), axis=1).T.tolist():
        own = ids[(part == p) & (epochs == e)] - starts[p]
        np.add.at(seen.setdefault((p, e), np.zeros(sizes[p], np.int8)), own, 1)

  for attempt, steps in history.by_attempt(taken):
    add(dataclasses.replace(plan, skips=attempt.skips), steps)
  skips = history.steps[int(taken[-1])].skips
  passed = [np.arange(first, stop) + 1 for first, stop in skips]
  for steps in passed:
    add(plan, steps)
  lines, wrong = [], False
  if skips:
    shown = ", ".join(f"{first + 1:,}" + (f" to {stop:,}" if stop > first + 1 else "") for first, stop in skips)
    lines.append(f"batches of the order that were passed over after a fault, counted below as seen: {shown}")
  for p, size in enumerate(sizes):
    whose = f"source {p}, {size:,} examples" if len(sizes) > 1 else f"{size:,} examples"
    epochs = sorted(e for q, e in seen if q == p)
    whole = [e for e in epochs if e < epochs[-1] or seen[p, e].sum() >= size]
    faults = [(e, i) for e in whole for i in np.flatnonzero(seen[p, e] != 1)[:SHOWN].tolist()]
    faults += [(e, i) for e in set(epochs) - set(whole) for i in np.flatnonzero(seen[p, e] > 1)[:SHOWN].tolist()]
    for e, i in faults[:SHOWN]:
      lines.append(f"{whose}: example {i} was seen {seen[p, e][i]} times in epoch {e}")
    wrong = wrong or bool(faults)
    rest = sum(int(seen[p, e].sum()) for e in epochs if e not in whole)
    so_far = f"; {rest:,} of the next so far" if rest else ""
    each = ", each example once" if whole and not faults else ""
    lines.append(f"{whose}: {len(whole)} whole epoch{'s' * (len(whole) != 1)}{each}{so_far}")
  return lines, wrong


def _facts(plan):
  return {"examples": len(plan.source), "batch_size": plan.batch_size, "seed": plan.seed}


def _parts(source):
  """The sizes of the parts of a source that have epochs of their own, and the first id of each."""
  sizes = source.sizes() if hasattr(source, "sizes") else [len(source)]
  return sizes, np.cumsum([0, *sizes])[:-1]
