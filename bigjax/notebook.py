"""The same things from a notebook: resolve a config, train it, look inside a run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from bigjax import config as configs
from bigjax import experiment, main, metrics, record, train, tuned
from bigjax.checkpoint import Checkpoints
from bigjax.errors import UserError
from bigjax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A run, looked into."""

  run: experiment.Experiment
  state: TrainState

  @property
  def config(self) -> experiment.TrainConfig:
    return self.run.config

  @property
  def model(self) -> nnx.Module:
    """The trained module, to call as any NNX module."""
    return self.run.model.bind(self.state.params, self.state.extras)

  def predict(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What the task's `predict` says of a batch of arrays."""
    return self._predict(self.state, dict(batch))

  @functools.cached_property
  def _predict(self):
    return jax.jit(self.run.predict)


def resolve(config: Any) -> experiment.TrainConfig:
  """Returns the checked config of a file (`"configs/digits_vit.py:arg"`), a `ConfigDict` or a dict."""
  config = configs.read(config) if isinstance(config, str) else config
  config = config.to_dict() if hasattr(config, "to_dict") else config
  return configs.resolve(config, experiment.TrainConfig)


def run(config: Any, workdir: str) -> Loaded:
  """Trains `config` (as `resolve` takes it) in `workdir`, or goes on there, and returns the run."""
  from bigjax.commands.train import after

  main.quiet()
  after(workdir, train.train(resolve(config), workdir))
  return load(workdir)


def plan(config: Any, topology: str, *, num_slices: int = 1, price: float | int | None = None) -> dict[str, Any]:
  """Compiles the step of `config` for TPUs that need not be there; returns what `bigjax plan --json` prints.

  Args:
    config: as `resolve` takes it.
    topology: such as "v5e:4x8", "v5p:4x4x8".
    num_slices: how many of it, joined by the data center's network.
    price: of a chip for an hour.
  """
  from bigjax.plan import prepare, report
  from bigjax.plan import topology as slices

  slices.environment(topology)
  return report.make(prepare.prepare(resolve(config), topology, num_slices), price)


def load(workdir: str, step: int | None = None) -> Loaded:
  """Returns the config, model and state of a run's last checkpoint, or of that of `step`."""
  main.quiet()
  described = record.read_config(workdir)
  run = experiment.build(resolve(described))
  with Checkpoints(workdir, read_only=True) as checkpoints:
    found = tuned.restore(run, checkpoints, step)
  if found is None:
    raise UserError(f"{workdir} has no checkpoint yet.")
  return Loaded(run, found[0])


def read_metrics(workdir: str) -> dict[str, list[tuple[int, float]]]:
  """Returns every metric of a run as a list of (step, value), NaN for a value that was not finite."""
  record.read_config(workdir)  # A directory that holds no run is said so.
  curves: dict[str, list[tuple[int, float]]] = {}
  for row in metrics.read_rows(workdir):
    for key, value in row.items():
      if key != "step":
        curves.setdefault(key, []).append((row["step"], value))
  return curves
