"""When a run's state is saved, to which tier, and what has to be on disk before it.

A save is asynchronous: the state is copied off the devices, and written while steps go on. The next one waits until the
last is complete. So a run that is killed has lost the steps since the last save that was complete: less than one
interval and those taken while one was being written, two intervals at most (where a disk takes longer than
`checkpoint.PATIENCE` beyond that, the run goes on and the bound is gone). With `config.keep.synchronous` no step begins
before a save is complete, or has failed: one interval at most, at the cost of the time that writing takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bigjax import tiers, tuned
from bigjax.best import Watch
from bigjax.checkpoint import Checkpoints


class Saves:
  """The saves of a run, permanent and temporary.

  Args:
    run: The experiment.
    checkpoints: The permanent ones.
    temporary: Those of `config.keep.temporary`.
    before: What writes down all that belongs to a step; called in this order before each save, so that no checkpoint is
      ahead of the metrics or the ledger.
    beside: What else than the state a run goes on from: each has `to_json`.
    pause: Tells the clock what the time goes into.
    after: Called once a save is on its way.
  """

  def __init__(
    self,
    run,
    checkpoints: Checkpoints,
    temporary: tiers.Off | tiers.Temporary,
    *,
    before: Sequence[Callable[[], None]],
    beside: Sequence[Any],
    pause: Callable[[str], Any],
    after: Callable[[], None],
  ):
    self._run, self._checkpoints, self._temporary = run, checkpoints, temporary
    self._before, self._beside, self._pause, self._after = before, beside, pause, after
    self._every = [run.steps(run.config.checkpoint_every, "config.checkpoint_every")]
    # What is to be kept has to be saved.
    self._every += [run.keep().every] if run.config.keep.every is not None else []

  def at(self, step: int, state: Any, watch: Watch, *, ending: bool) -> None:
    """Saves the state of a step if that is due, in the background; the last one of a run (`ending`) always."""
    due = any(self._run.due(step, every) for every in self._every)
    lasting = due or watch.improved_at(step) or ending or self._checkpoints.owed()
    if not (self._temporary.due(step) or lasting):
      return
    self._settle()
    with self._pause("save"):
      if lasting:
        insist = ending or step == self._run.total_steps
        self._checkpoints.save(step, *self._kept(state, watch), watch.metric_at(step), insist=insist)
      else:
        self._temporary.save(step, *self._kept(state, watch))
      if self._run.config.keep.synchronous:
        self._checkpoints.settle()
        self._temporary.settle()
    self._after()

  def amend(self, step: int, state: Any, watch: Watch) -> None:
    """Adds to the checkpoint of a step what has been measured of it since."""
    self._settle()
    self._checkpoints.amend(step, self._kept(state, watch)[1], watch.metric_at(step))

  def wait(self) -> None:
    """Returns when all are on disk."""
    self._settle()
    with self._pause("save"):
      self._checkpoints.wait()

  def _settle(self):
    for write in self._before:
      write()

  def _kept(self, state, watch):
    beside = watch.to_json()
    for part in self._beside:
      beside |= part.to_json()
    return tuned.saved(self._run, state, beside)
