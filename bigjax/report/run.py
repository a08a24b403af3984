"""What the report knows of a run: the workdir's files, and the metrics sorted into panels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bigjax.errors import UserError
from bigjax.metrics.reading import best_and_last, direction, is_per_class, is_timing, read_json, read_rows


@dataclasses.dataclass(frozen=True)
class Series:
  """One metric over the steps."""

  name: str  # "test/ema/accuracy"
  label: str  # what it was measured on: "train", "test/ema"
  steps: list[int]
  values: list[float]  # NaN where it was not finite

  @functools.cached_property
  def finite(self) -> tuple[list[int], list[float]]:
    kept = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]

  @property
  def broken(self) -> list[int]:
    """The steps at which the value was not finite."""
    return [step for step, value in zip(self.steps, self.values, strict=True) if not math.isfinite(value)]

  def best(self) -> tuple[int, float] | None:
    """The step and value of the best point; None where no direction is known."""
    steps, values = self.finite
    if not values or direction(self.name) is None:
      return None
    value = (min if direction(self.name) == "min" else max)(values)
    return steps[values.index(value)], value


@dataclasses.dataclass(frozen=True)
class Panel:
  """The series of one metric, of training and evaluations together."""

  title: str
  series: tuple[Series, ...]


@dataclasses.dataclass(frozen=True)
class Run:
  """A workdir, read."""

  workdir: Path
  rows: list[dict[str, Any]]
  config: Mapping[str, Any]
  facts: Mapping[str, Any]  # run.json
  parameters: list[Mapping[str, Any]]
  panels: tuple[Panel, ...]
  table: Mapping[str, Mapping[str, int | float]]  # best and last value of each metric
  evals: tuple[str, ...]  # the names of the evaluations
  labels: tuple[str, ...]  # of all series, "train" first; their order is that of the colours

  @classmethod
  def read(cls, workdir: Path) -> Run:
    """Reads the files of `workdir`; those that are missing count as empty."""
    if not workdir.is_dir():
      raise UserError(f"--workdir={workdir} is no folder; name the one that the run was given.")
    found = {}
    for name, kind in (("config", dict), ("run", dict), ("parameters", list)):
      found[name] = read_json(workdir / f"{name}.json") or kind()
      if not isinstance(found[name], kind):
        raise UserError(f"{workdir / name}.json should hold a JSON {kind.__name__}; mend it or remove it.")
    rows = read_rows(workdir)
    evals = evals_of(rows, found["config"])
    panels = sort_into_panels(rows, evals)
    labels = dict.fromkeys(series.label for panel in panels for series in panel.series)
    labels = tuple(sorted(labels, key=lambda label: label != "train"))
    facts = {"rows": rows, "config": found["config"], "facts": found["run"], "parameters": found["parameters"]}
    return cls(workdir=workdir, panels=panels, table=best_and_last(rows), evals=evals, labels=labels, **facts)

  @property
  def name(self) -> str:
    return self.workdir.resolve().name

  @property
  def steps(self) -> tuple[int, int]:
    """The first and the last step that anything was measured at."""
    return min(row["step"] for row in self.rows), max(row["step"] for row in self.rows)

  def last(self, name: str) -> tuple[int, Any] | None:
    """The step and value of the newest row that has `name`."""
    return next(((row["step"], row[name]) for row in reversed(self.rows) if name in row), None)


def evals_of(rows: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> tuple[str, ...]:
  """The names of the evaluations: the config's, or without one the first parts of names like `val/accuracy`."""
  configured = config.get("evals")
  if isinstance(configured, Mapping) and configured:
    return tuple(configured)
  firsts = {name.split("/")[0]: None for row in rows for name in row if "/" in name}
  return tuple(first for first in firsts if not first.startswith("learning_rate"))


def split_name(name: str, evals: Iterable[str]) -> tuple[str, str]:
  """`("test/ema", "accuracy")` of an evaluation's `test/ema/accuracy`, `("train", "loss")` of training's `loss`."""
  first, _, rest = name.partition("/")
  if first in evals and rest:
    label, _, base = name.rpartition("/")
    return label, base
  return rest or "train", first


def sort_into_panels(rows: Iterable[Mapping[str, Any]], evals: Iterable[str]) -> tuple[Panel, ...]:
  """One panel a metric: the loss first, then what has a better and a worse, then the rest, timing last."""
  series: dict[str, Series] = {}
  for row in rows:
    for name, value in row.items():
      if name == "step" or isinstance(value, list) or is_per_class(name):
        continue
      if name not in series:
        series[name] = Series(name, split_name(name, evals)[0], [], [])
      series[name].steps.append(row["step"])
      series[name].values.append(float(value))
  panels: dict[str, list[Series]] = {}
  for one in series.values():
    panels.setdefault(split_name(one.name, evals)[1], []).append(one)
  rank = lambda title: (title != "loss", direction(title) is None, is_timing(title))
  return tuple(Panel(title, tuple(panels[title])) for title in sorted(panels, key=rank))
