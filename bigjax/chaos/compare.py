"""Compares what two runs left in the end: to the bit, or as closely as rounding allows on other places.

Another number of devices adds up in another order. In one step that is a few roundings, of float32 or of bfloat16; what
it is in the end is the training's doing, which may damp it or make it grow. The moments of a small GPT were 6e-7 of
their size apart after a step, and after 30 steps 2e-7 at a peak rate of 1e-4 but 4e-2 at 4e-3; with products in
bfloat16 they were 1e-2, 2e-3 and more than their size apart. So no number goes with a precision, and none is assumed:
undisturbed runs on each of the places say how far rounding takes them, and a disturbed one, which changes places in
between, may come `MARGIN` times as far. Where that is more than what is asked for, there is nothing to be told from a
comparison, and `Rounding.check` says so.

What runs were fed is compared to the bit in any case.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bigjax import config as configs
from bigjax import experiment, ledger, metrics
from bigjax.checkpoint import Checkpoints
from bigjax.commands import ledger as ledger_command
from bigjax.commands import repro
from bigjax.errors import UserError

MARGIN = 10.0
LEAST = 1e-6  # Relative, about 16 roundings of float32: what a leaf may differ by where undisturbed runs happen not to.
COUNTED = 0.05  # Relative: what a metric may differ by, at most, for such as count examples, where one is much.
# Gradients so far below the largest of their leaf, or of all, are what rounding leaves of sums that cancel.
NOISE = (1e-5, 1e-7)


@dataclasses.dataclass(frozen=True)
class Rounding:
  """How far runs may be apart.

  Args:
    tolerance: The most, relative to the largest of a leaf.
    parts: By a part of the state, such as the parameters or a moment of them, how far undisturbed runs are.
    metrics: By the name of a metric.
  """

  tolerance: float
  parts: Mapping[str, float]
  metrics: Mapping[str, float]

  @classmethod
  def between(cls, reference: str, others: Sequence[str], tolerance: float) -> Rounding:
    """Measures it: how far undisturbed runs on other places are from the first."""
    parts: dict[str, float] = {}
    rows: dict[str, float] = {}
    for other in others:
      old, new = last(reference)[0], last(other)[0]
      left_out = noise(old)
      for name in (n for n in old.keys() & new.keys() if _may_round(old[n], new[n])):
        apart, size = _apart(old[name], new[name]), _size(old[name])
        most = apart[~_noise_of(name, left_out, apart.shape)].max(initial=0) / size
        parts[_part(name, old)] = max(parts.get(_part(name, old), 0.0), float(most))
      for _, name, x, y in _pairs(reference, other):
        if np.isfinite(distance := _distance(x, y)):
          rows[name] = max(rows.get(name, 0.0), distance)
    return cls(tolerance, parts, rows)

  def check(self, places: str) -> None:
    """Raises `UserError` where runs are so far apart by rounding alone that a difference would not be seen."""
    part, most = max(self.parts.items(), key=lambda item: item[1], default=("", 0.0))
    if MARGIN * most > self.tolerance:
      raise UserError(
        f"--tolerance={self.tolerance:g}: undisturbed runs on {places} are {most:.2g} of a leaf's largest value apart "
        f"in {part}, by rounding alone, which training made grow; disturbed ones would be allowed {MARGIN:g} times "
        "that. Take fewer steps, a lower peak of config.schedule, config.precision='float32', "
        "config.determinism='topology', or a higher --tolerance."
      )

  def of_part(self, name: str, state: Mapping[str, Any]) -> float:
    """What a leaf may differ by, relative to its largest value."""
    return max(MARGIN * self.parts.get(_part(name, state), 0.0), LEAST)

  def of_metric(self, name: str) -> float:
    return max(MARGIN * self.metrics.get(name, 0.0), min(100 * self.tolerance, COUNTED))


def compare(
  reference: str, workdir: str, rounding: Rounding | None = None, say: Callable[[str], None] = print
) -> tuple[list[str], int]:
  """Returns (differences, numbers compared) of two ended runs: the last state, the metrics, the ledger."""
  (old, step, beside), (new, *other) = (last(w) for w in (reference, workdir))
  found = [f"{n}: only in one of them" for n in sorted(old.keys() ^ new.keys())]
  found += states(old, new, rounding, say)
  found += [f"the last step: {step} -> {other[0]}"] if step != other[0] else []
  if rounding:
    rows, count = _rows_close(reference, workdir, rounding)
  else:
    rows, count = repro.compare(reference, workdir)
    found += [] if rows else _files_same(reference, workdir)
    found += [f"beside the state: {beside} -> {other[1]}"] if beside != other[1] else []
  fed, records = _fed(reference, workdir)
  return found + rows + fed, count + records + sum(x.size for x in old.values())


def states(
  old: Mapping[str, np.ndarray],
  new: Mapping[str, np.ndarray],
  rounding: Rounding | None = None,
  say: Callable[[str], None] = print,
) -> list[str]:
  """Returns what differs between the leaves that both have."""
  left_out, found = noise(old) if rounding else {}, []
  for name in sorted(old.keys() & new.keys()):
    a, b = old[name], new[name]
    if not (rounding and _may_round(a, b)):
      same = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
      found += [] if same else [name]
      continue
    apart, allowed = _apart(a, b), rounding.of_part(name, old) * _size(a)
    where = _noise_of(name, left_out, a.shape)
    most = apart[~where].max(initial=0)
    if (apart[where] > allowed).any():
      say(
        f"    left out: {where.sum()} of {a.size} of {name}, whose gradients are rounding noise; they differ by up to "
        f"{apart[where].max():.2g}, the others by {most:.2g}"
      )
    if not most <= allowed:
      found.append(f"{name}: {most / _size(a):.2g} of its largest apart, more than {allowed / _size(a):.2g}")
  return found


def last(workdir: str) -> tuple[dict[str, np.ndarray], int, dict[str, Any]]:
  """Returns the last state, its step, and what was remembered beside it."""
  with Checkpoints(workdir, read_only=True) as checkpoints:
    step = max(checkpoints.steps())
    return checkpoints.read(step), step, checkpoints.loop(step)


def noise(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns which elements of leaves have gradients that are nothing but rounding, by the end of the leaves' names.

  Where an exact gradient is zero, as that of a bias of keys, which softmax does not see, what is computed is noise. An
  optimizer that divides gradients by their own size steps at its full rate in the direction of that noise, which is
  another on other places, and nothing that the model says depends on it. Such an optimizer has their second moment.
  """
  sizes = {n.rpartition("/nu/")[2]: np.sqrt(x.astype(np.float64)) for n, x in state.items() if "/nu/" in n and x.size}
  most = max((x.max() for x in sizes.values()), default=0.0)
  low = {name: (x > 0) & (x < max(NOISE[0] * x.max(), NOISE[1] * most)) for name, x in sizes.items()}
  return {name: where for name, where in low.items() if where.any()}


def _noise_of(name, left_out, shape):
  return next((where for end, where in left_out.items() if name.endswith(f"/{end}")), np.zeros(shape, bool))


def _may_round(a, b):
  """Whether two leaves are of numbers that rounding may change; NaN is never near, so it is compared by its bits."""
  is_float = np.issubdtype(a.dtype, np.floating) or a.dtype.kind == "V"  # V: bfloat16.
  return is_float and a.dtype == b.dtype and a.shape == b.shape and np.isfinite(_wide(a)).all()


def _wide(x):
  return x.astype(np.float64)


def _apart(a, b):
  return np.nan_to_num(np.abs(_wide(a) - _wide(b)), nan=np.inf)


def _size(a):
  return max(np.abs(_wide(a)).max(initial=0), 1e-30)


def _part(name, state):
  """The name without the parameter's: the leaves of one kind, such as a moment, are of one part."""
  ends = (n.removeprefix("params/") for n in state if n.startswith("params/"))
  end = max((e for e in ends if name.endswith(f"/{e}")), key=len, default=None)
  return name if end is None else name.removesuffix(f"/{end}")


def _files_same(a, b):
  """Whether the metrics are the same byte by byte."""
  names = ("metrics.jsonl", "metrics.csv")
  read = lambda w, name: open(os.path.join(w, name), "rb").read() if os.path.exists(os.path.join(w, name)) else None
  return [f"{name}: not the same bytes" for name in names if read(a, name) != read(b, name)]


def _fed(a, b) -> tuple[list[str], int]:
  """What differs in what the steps were fed, and how many records were compared and held against the config's order."""
  config = configs.resolve(configs.read(os.path.join(b, "config.json")), experiment.TrainConfig)
  history = ledger.History.of(b)
  lines, wrong = ledger_command.verified(experiment.order(config), history)
  old, new = ({s: _sums(h, s) for s in h.steps} for h in (ledger.History.of(a), history))
  found = [f"ledger, step {s}" for s in sorted(old.keys() | new.keys()) if old.get(s) != new.get(s)]
  return found + ([f"ledger: {lines}"] if wrong else []), len(old)


def _sums(history, step):
  attempt = history.steps[step]
  return attempt.sums[np.searchsorted(attempt.steps, step)].tolist()


def _rows_close(a, b, rounding):
  pairs = _pairs(a, b)
  return [f"step {s} {k}: {x} -> {y}" for s, k, x, y in pairs if not _distance(x, y) <= rounding.of_metric(k)], len(
    pairs
  )


def _pairs(a, b):
  """(step, name, value, value) of two runs' metrics; None where there is none."""
  old, new = ({(r["step"], k): v for r in metrics.read_rows(w) for k, v in r.items()} for w in (a, b))
  keys = [k for k in old.keys() | new.keys() if k[1].rpartition("/")[2] not in repro.TIMINGS]
  return [(s, k, old.get((s, k)), new.get((s, k))) for s, k in sorted(keys)]


def _distance(x, y):
  """How far two values of a metric are apart, relative to the first; without end where they can't be compared."""
  if repr(x) == repr(y):
    return 0.0
  if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
    return max(map(_distance, x, y))
  if isinstance(x, float) and isinstance(y, float) and np.isfinite([x, y]).all():
    return abs(x - y) / max(abs(x), 1e-3)
  return float("inf")
