"""A fault again, on one CPU: from the checkpoint that a bundle names to its last step, which is looked into.

Devices, meshes and what only they decide are left out: the numbers are those of the run to rounding, not to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from bigjax import config as configs
from bigjax import experiment, nonfinite, train, tuned
from bigjax import state as states
from bigjax.checkpoint import Checkpoints
from bigjax.errors import UserError

# What can't be had on one CPU, or isn't asked for.
ALONE = dict(
  mesh=(("data", 1),),
  sharding="auto",
  activations={},
  sequence="ring",
  pipeline=experiment.PipelineConfig(),
  determinism="run",
  evals={},
  keep=experiment.KeepConfig(),
  early_stop=None,
  claim=None,
)
LOOKED_AT = ("loss", "grad_norm", "update_norm")


@dataclasses.dataclass(frozen=True)
class Again:
  """What came of a bundle's steps."""

  step: int
  measured: Mapping[str, float]  # Of the last step, compiled as a run's.
  events: Mapping[str, nonfinite.Event]  # What of it isn't finite, one operation at a time.

  @property
  def origin(self) -> nonfinite.Event | None:
    """Where the first of it comes from; of several origins the earliest."""
    return next((e.origins[0] for name in LOOKED_AT if (e := self.events.get(name))), None)


def again(
  bundle: Mapping[str, Any],
  *,
  from_start: bool = False,
  workdir: str | None = None,
  say: Callable[[str], None] = print,
) -> Again:
  """Takes a bundle's steps again.

  Args:
    bundle: As `bundles.read` gives it.
    from_start: Goes on from the first state where the checkpoint is gone.
    workdir: Where the checkpoint is now; where it was otherwise.
    say: Is told the loss of each of the steps that were wrong.

  Raises:
    UserError: It can't be done: the checkpoint is gone, the data are others, this code doesn't know the config.
  """
  config = _config(bundle)
  run = with_names(experiment.build(dataclasses.replace(config, **ALONE), jax.devices("cpu")[:1]))
  skips = tuple(tuple(s) for s in bundle["skips"])
  first, last = bundle["steps"]
  _check_data(bundle, run, skips)
  with jax.set_mesh(run.mesh):
    state = _state(bundle, run, workdir or bundle["workdir"], from_start)
    step_fn, key = train.compile_step(run), jax.random.fold_in(jax.random.key(config.seed), 1)
    with train.train_batches(run, int(state.step), skips) as batches:
      for step in range(int(state.step) + 1, last + 1):
        batch = next(batches)
        if step == last:
          found = nonfinite.trace(train.make_step(run).__wrapped__, state, batch, key)
        state, measured = step_fn(state, batch, key)
        if step >= first:
          measured = {k: float(v) for k, v in jax.device_get(measured).items()}
          say(f"step {step:,}: " + "  ".join(f"{k} {measured[k]:.6g}" for k in LOOKED_AT))
  # The state after the step comes first, then what was measured.
  events = {n.partition("/")[2]: e for n, e in found.items() if e is not None and n.startswith("1/")}
  return Again(last, measured, events)


def _config(bundle):
  try:
    config = configs.resolve(bundle["config"], experiment.TrainConfig)
    same = configs.describe(config) == bundle["config"]
  except UserError as e:
    raise UserError(f"The config in the bundle is of another version of the code: {e}{_versions(bundle)}") from e
  if not same:
    changed = ", ".join(k for k, *_ in configs.diff(bundle["config"], configs.describe(config)))
    raise UserError(f"The config in the bundle is of another version of the code ({changed}).{_versions(bundle)}")
  return config


def _versions(bundle):
  code = bundle.get("git", {}).get("commit", "")
  version = bundle["versions"].get("bigjax", "?")
  return f" It was written by bigjax {version}{code and f', commit {code[:12]}'}: use that."


def _check_data(bundle, run, skips):
  """Refuses data in another order than the bundle's."""
  plan = dataclasses.replace(experiment.order(run.config), skips=skips)
  size = plan.batch_size
  found = plan.examples((bundle["steps"][1] - 1) * size + np.arange(size))
  batch = bundle["batch"]
  if any(not np.array_equal(batch[name], x) for name, x in zip(("epochs", "ids", "mask"), found, strict=True)):
    raise UserError(
      f"config.data: step {bundle['steps'][1]} has other examples now than the bundle says. Bring back the data."
    )


def _state(bundle, run, workdir, from_start):
  """Returns the state before the steps."""
  wanted, first = bundle["checkpoint"], bundle["steps"][0]
  with contextlib.suppress(_Gone), _checkpoints(workdir) as checkpoints:
    # An earlier one does as well, and takes longer.
    step = max((s for s in checkpoints.steps() if s <= wanted and s < first), default=None)
    if step is not None:
      return tuned.restore(run, checkpoints, step)[0]
  if wanted and not from_start:
    raise UserError(
      f"The checkpoint of step {wanted} in {workdir} is gone, and there is none before it. Bring it back, say where it "
      f"is with --workdir, or take all {bundle['steps'][1]:,} steps again with --from_start."
    )
  return tuned.first_state(run, jax.random.key(run.config.seed))


def with_names(run: experiment.Experiment) -> experiment.Experiment:
  """Returns the experiment, what its model computes under the names of its modules."""
  model = run.model
  return dataclasses.replace(run, model=_Named(*(getattr(model, f.name) for f in dataclasses.fields(model))))


class _Gone(Exception):
  """There are no checkpoints."""


def _checkpoints(workdir):
  try:
    return Checkpoints(workdir, read_only=True)
  except UserError as e:
    raise _Gone from e


class _Named(states.Model):
  """A model whose modules give what they compute their names."""

  def bind(self, params, extras, key=None):
    return named(super().bind(params, extras, key))


def named(module: nnx.Module) -> nnx.Module:
  """Returns the module, the calls of its parts under `jax.named_scope` of their place in it."""
  places = {path: part for path, part in nnx.iter_modules(module) if path and _methods(type(part))}
  for path, part in places.items():
    above = max((p for p in places if p != path and path[: len(p)] == p), key=len, default=())
    scope = "/".join(map(str, path[len(above) :]))
    part.__class__ = _scoped(type(part), scope)
  return module


_classes: dict[tuple[type, str], type] = {}


def _scoped(kind, scope):
  """The class of a module, with its name put around what its methods compute."""
  if (kind, scope) not in _classes:
    methods = {n: _under(scope, m) for n, m in _methods(kind).items()}
    _classes[kind, scope] = type(kind)(kind.__name__, (kind,), methods | {"__module__": kind.__module__})
  return _classes[kind, scope]


def _methods(kind) -> dict[str, Callable]:
  """The calls of a module that others make; a list of modules has none."""
  names = ("__call__", "features")  # Any class has the first by its own being callable.
  return {n: getattr(kind, n) for n in names if any(n in vars(c) for c in kind.__mro__)}


def _under(scope, method):
  def call(*args, **kwargs):
    with jax.named_scope(scope):
      return method(*args, **kwargs)

  return call


def verdict(found: Again, kind: str) -> tuple[list[str], bool]:
  """Returns what there is to say, and whether the fault was there again."""
  broken = [k for k in LOOKED_AT if not math.isfinite(found.measured[k])]
  if found.origin is None:
    if kind == "spike" and not broken:
      return ["all of it is finite"], True
    if broken:
      return [f"{broken[0]} is {found.measured[broken[0]]} compiled, and finite one operation at a time."], True
    return [f"Step {found.step:,} is finite on one CPU: the fault is of other devices or numbers than here."], False
  event = found.events[next(k for k in LOOKED_AT if k in found.events)]
  lines = [f"first not finite: {found.origin}"]
  if (nan := event.first_nan) is not None and nan is not found.origin:
    lines.append(f"first NaN that came of it: {nan}")
  lines += [f"also: {e}" for e in event.origins[1:4]]
  return lines, True
