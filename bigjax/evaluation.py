"""Measurements as the loop makes them: evaluators with data and cadence, on every view of the parameters."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from bigjax import sharding
from bigjax import state as states
from bigjax.data import pipeline
from bigjax.errors import UserError, suggest
from bigjax.evaluators import totals
from bigjax.experiment import EvalConfig, Experiment, Stream
from bigjax.stops import Stopped, Stops


class Evaluations:
  """All evaluations of a run. One that a stop cuts short counts for nothing: the next start makes up for it."""

  def __init__(self, run: Experiment, stop: Stops, owed: bool):
    self._all = [Evaluation.of(run, name, e, stop.between) for name, e in run.config.evals.items()]
    self._due = run.due
    self.cut = False  # Whether a stop came in between.
    self.owed = tuple(run.config.evals) if owed else ()  # What is to be measured before the first step.

  def at(self, step: int, state: states.TrainState, pause: Callable[[str], Any]) -> dict[str, Any]:
    """Returns what is measured at a step: {} where nothing is due, or a stop came in between."""
    found = {}
    try:
      for evaluation in self._all:
        if self._due(step, evaluation.every):
          with pause("eval"):
            found |= evaluation.run(state)
    except Stopped:
      self.cut = True
      return {}
    return found

  def to_json(self) -> dict[str, Any]:
    """What is remembered beside a checkpoint."""
    return {"unmeasured": True} if self.cut else {}


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """An evaluator with its data and cadence; it measures the parameters and other views of them, such as the EMA."""

  name: str
  every: int
  evaluator: Any
  views: Mapping[str, Any]
  jit: Callable | None  # How what evaluators compute is compiled, if not as any function.

  @classmethod
  def of(
    cls, run: Experiment, name: str, config: EvalConfig, between: Callable[[Iterable], Iterator] = iter
  ) -> Evaluation:
    """Builds what `config.evals` has by that name; all batches go through `between`."""
    size = config.batch_size or run.config.batch_size

    def batches(stream):
      mine, parts = sharding.data_part(run.mesh)

      def since(start):
        return pipeline.eval_batches(
          stream.source, batch_size=size, preprocess=stream.preprocess, start=start, host=mine, hosts=parts
        )

      def finite():
        with pipeline.to_device(since(0), sharding.batch_sharding(run.mesh), again=since) as on_device:
          yield from between(on_device)

      return finite

    known = inspect.signature(config.evaluator.factory).parameters
    for key in config.extra_data:
      if key not in known:
        raise UserError(
          f"config.evals.{name}.extra_data.{key}: the evaluator takes no such stream.{suggest(key, known)}"
        )
    extra = {k: batches(Stream.of(d)) for k, d in config.extra_data.items()}
    stream = Stream.of(config.data)
    evaluator = _told_bytes(config.evaluator, known, stream.source)
    evaluator = evaluator(predict=run.division.predicting(run.predict), batches=batches(stream), **extra)
    views = {view: jax.jit(of) for view, of in run.optimizer.views.items()}
    return cls(name, run.steps(config.every, f"config.evals.{name}.every"), evaluator, views, run.division.jit_measure)

  def run(self, state: states.TrainState) -> dict[str, Any]:
    """Returns every measurement by name, `val/accuracy`, and those of a view as `val/ema/accuracy`."""
    found = self._named("", state)
    for view, of in self.views.items():
      viewed = dataclasses.replace(state, params=of(state.opt_state, state.params))
      found |= self._named(f"{view}/", viewed)
    return found

  def _named(self, view, state):
    try:
      with totals.compiled_by(self.jit):
        return {f"{self.name}/{view}{k}": v for k, v in self.evaluator.run(state)}
    except UserError as e:
      raise UserError(str(e).replace("config.evals:", f"config.evals.{self.name}:", 1)) from e


def _told_bytes(evaluator, known, source):
  """The evaluator, told the length of a token in bytes where it asks for that, nobody says it and the source knows."""
  if "bytes_per_token" not in known or evaluator.kwargs.get("bytes_per_token") is not None:
    return evaluator
  found = getattr(source, "bytes_per_token", None)
  return dataclasses.replace(evaluator, kwargs=dict(evaluator.kwargs, bytes_per_token=found))
