"""The first state of a run and what is kept of one, where most of the model may be another run's.

With `config.lora` and `config.init_from`, a checkpoint holds the adapters, their moments, and a digest of the model
they are for. That model is read anew from where it came from; another one in its place is refused.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax

from bigjax import initialise, lora
from bigjax.checkpoint import Checkpoints
from bigjax.errors import UserError
from bigjax.state import TrainState


def first_state(run, key: jax.Array) -> TrainState:
  """Returns the state before the first step: fresh, or as `config.init_from` says, with fresh adapters."""
  model = run.model
  if model.adapters is None:
    return initialise.first_state(run, key)
  if not run.borrows:
    return run.init(key)
  own = initialise.first_state(_without_adapters(run), key)
  make = jax.jit(lambda key: model.init(key)[0], out_shardings=run.shardings.params)  # The rest of it is cut away.
  adapters = make(key)
  params, extras = model.with_own(adapters, own.params, own.extras)
  opt_state = jax.jit(run.optimizer.tx.init, out_shardings=run.shardings.opt_state)(params)
  return TrainState(own.step, params, extras, opt_state)


def _without_adapters(run):
  """The run as `initialise` has to see it: the model's own parameters are its parameters."""
  own = lambda state: TrainState(state.step, *run.model.own(state.params, state.extras), ())
  nothing = types.SimpleNamespace(init=lambda params: ())
  return types.SimpleNamespace(
    config=run.config,
    mesh=run.mesh,
    layout=run.layout,
    model=run.model,
    abstract=own(run.abstract),
    shardings=own(run.shardings),
    init=lambda key: own(run.init(key)),
    optimizer=types.SimpleNamespace(tx=nothing),
  )


def saved(run, state: TrainState, loop: Mapping[str, Any]) -> tuple[TrainState, dict[str, Any]]:
  """Returns what of a state, and beside it, a checkpoint is to hold."""
  if not run.borrows:
    return state, dict(loop)
  return _kept(state), dict(loop) | {"base": lora.digest(state.extras["base"])}


def restore(run, checkpoints: Checkpoints, step: int | None = None) -> tuple[TrainState, Mapping[str, Any]] | None:
  """Returns (state, loop) of the last checkpoint or of `step`; None where there is none.

  Raises:
    UserError: It isn't of this config, or the model that its adapters are for is not what it was.
  """
  if not run.borrows:
    return checkpoints.restore(run.abstract, run.shardings, step)
  found = checkpoints.restore(_kept(run.abstract), _kept(run.shardings), step)
  if found is None:
    return None
  state, loop = found
  base = first_state(run, jax.random.key(run.config.seed)).extras["base"]
  if loop["base"] != (here := lora.digest(base)):
    init = run.config.init_from
    raise UserError(
      f"config.init_from: {init.workdir or init.weights} is not the model that the adapters in {checkpoints.directory} "
      f"were trained on (digest {here}, then {loop['base']}). Bring that one back, or start anew in another --workdir."
    )
  return dataclasses.replace(state, extras={"base": base, **state.extras}), loop


def _kept(state):
  return dataclasses.replace(state, extras={"kept": state.extras["kept"]})
