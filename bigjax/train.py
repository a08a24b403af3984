"""The training loop: read this file to know what one run does."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigjax import config as configs
from bigjax import guard as guards
from bigjax import hosts, metrics, overview, record, sharding, tiers, tuned
from bigjax import state as states
from bigjax.best import Watch
from bigjax.checkpoint import Checkpoints
from bigjax.data import pipeline
from bigjax.errors import UserError
from bigjax.evaluation import Evaluation, Evaluations
from bigjax.experiment import OBSERVING, Experiment, TrainConfig, build
from bigjax.goodput import Spent
from bigjax.guard import Guard
from bigjax.ledger import Ledger
from bigjax.plan import mfu, profiles
from bigjax.saves import Saves
from bigjax.sentry import Step
from bigjax.stops import Stopped, Stops
from bigjax.watchdog import Watchdog


def train(config: TrainConfig, workdir: str, stop: Stops | None = None) -> str:
  """Trains until `config.total_steps`, from the last checkpoint in `workdir` if there is one.

  Args:
    config: What to train.
    workdir: Where all of it goes.
    stop: Says where to stop; listens to signals in the loop where it is not given.

  Returns:
    How it ended: "finished", "stopped" (asked to, see stops.py) or "stopped early" (`config.early_stop`).
  """
  with contextlib.ExitStack() as throughout:
    stop = stop or Stops()
    # Going back is a new start: it reads the last checkpoint, and leaves out what guard.py wrote down.
    while (status := attempt(config, workdir, stop, throughout)) == "rolled back":
      pass
  return status


def attempt(config: TrainConfig, workdir: str, stop: Stops, throughout: contextlib.ExitStack) -> str:
  """Trains as `train` does, once; may also end "rolled back". What is entered into `throughout` outlives it."""
  clock, described = metrics.Stopwatch(), configs.describe(config)
  record.open_workdir(workdir, described, free=OBSERVING)
  run = build(config)
  primary = jax.process_index() == 0

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(run.mesh))
    note = record.noting(workdir)
    checkpoints = stack.enter_context(Checkpoints(workdir, run.keep(), note=note))
    temporary = stack.enter_context(tiers.of(config.keep.temporary, workdir, note))
    with concurrent.futures.ThreadPoolExecutor(1) as background:
      compiling = background.submit(compile_step, run)  # While the first state is made or read.
      with clock.within("restore"):
        state, beside = start(run, temporary.newest(checkpoints))
      with clock.within("compile"):
        step_fn, first = compiling.result(), int(state.step)
    evaluations = Evaluations(run, stop, owed=beside.get("unmeasured", False))
    watch = Watch.of(config.keep, config.early_stop, config.evals, beside)
    guard = Guard(run, workdir, checkpoints, beside, forget=temporary.clear)
    spent = Spent(workdir, clock, primary)
    if primary:
      overview.write(run, workdir)
      record.start(workdir, described, **overview.facts(run), **spent.facts())
      stack.enter_context(record.failure_noted(workdir))

    ledger = stack.enter_context(Ledger.of(run, workdir, first, guard.skips))
    batches = stack.enter_context(train_batches(run, first, guard.skips, ledger.following))
    rows = dict(resume_step=first or None, again=evaluations.owed)
    writers = stack.enter_context(metrics.Writers(workdir, config.writers, **rows, primary=primary))
    progress = metrics.Progress(run.total_steps, first, *run.pace, quiet=not primary, watch=clock)
    stack.enter_context(progress)
    stack.enter_context(Watchdog(config.watchdog, progress, workdir, note, stop.ends))
    throughout.enter_context(stop.heeded())
    stack.enter_context(hosts.failure_told())  # Near the last, so that no peer is waited for before it knows.
    stack.enter_context(guard)
    progress.say(overview.headline(run))

    logger = metrics.Logger(writers, progress, mfu.of(run))
    saves = Saves(
      run,
      checkpoints,
      temporary,
      before=(logger.flush, guard.settle, ledger.flush, writers.flush),
      beside=(evaluations, guard),
      pause=progress.pause,
      after=spent.note,
    )
    loop = Loop(run, step_fn, batches, guard, ledger, logger, evaluations, saves, stop, progress)
    status, state, watch = loop.run_from(state, watch)
    saves.wait()
    progress.close()
    facts = spent.facts(over=True) | stop.outcome() | dict(steps_per_second=progress.steps_per_second())
    if primary:
      record.finish(workdir, status, step=int(state.step), best=watch.to_json(), **facts)
  temporary.clear()  # Not after an error: then it is what the next start goes on from.
  return "rolled back" if guard.rolled_back else status


@dataclasses.dataclass(frozen=True)
class Loop:
  """The loop, and the parts of a run that it uses: each does its work in one call a step."""

  run: Experiment
  step_fn: Step
  batches: pipeline.Ahead
  guard: Guard
  ledger: Ledger
  logger: metrics.Logger
  evaluations: Evaluations
  saves: Saves
  stop: Stops
  progress: metrics.Progress

  def run_from(self, state: states.TrainState, watch: Watch) -> tuple[str, states.TrainState, Watch]:
    """Trains from `state`, which it consumes; returns how that ended (see `train`), the last state and watch."""
    run, first, last = self.run, int(state.step), self.run.total_steps
    key = jax.device_put(jax.random.fold_in(jax.random.key(run.config.seed), 1), sharding.replicated(run.mesh))
    log_every = run.steps(run.config.log_every, "config.log_every")
    if self.evaluations.owed:
      watch = self.measure(first, state, watch)
      self.saves.amend(first, state, watch)
    status = "stopped early" if watch.tired else "stopped" if self.evaluations.cut else "finished"

    try:
      for step in range(first + 1, 1 + (last if status == "finished" else first)):
        with self.progress.pause("input"):
          batch = self.stop.awaited(self.batches)
        with jax.profiler.StepTraceAnnotation("train", step_num=step), jax.transfer_guard("disallow"):
          state, measured = self.step_fn(state, batch, key)
        with self.progress.pause("device"):
          self.guard.seen(step, measured)
        self.ledger.note(step)
        self.logger.step(step, measured if run.due(step, log_every) else None)
        watch = self.measure(step, state, watch)

        asked = self.stop.look()  # By all hosts at every step.
        status = "stopped early" if watch.tired else "stopped" if asked else "finished"
        self.saves.at(step, state, watch, ending=status != "finished")
        if status != "finished":
          break
    except Stopped:  # While it waited for input: what there is to save is the state of the step before.
      status = "stopped"
      self.saves.at(step - 1, state, watch, ending=True)
    return status, state, watch

  def measure(self, step: int, state: states.TrainState, watch: Watch) -> Watch:
    """Returns the watch after what is measured at a step, which is written."""
    measurements = self.evaluations.at(step, state, self.logger.pause)
    if not measurements:
      return watch
    self.logger.evals(step, measurements)
    return watch.seen(step, measurements)


def evaluate(config: TrainConfig, workdir: str, step: int | None = None) -> tuple[int, dict[str, Any]]:
  """Measures the last checkpoint in `workdir`, or that of `step`, by all of the config's evaluators, on any mesh."""
  run = build(config)
  with jax.set_mesh(run.mesh), Checkpoints(workdir, read_only=True) as checkpoints:
    step = checkpoints.newest() if step is None else step
    if step is None:
      raise UserError(f"--workdir={workdir} has no checkpoint yet.")
    state, _ = tuned.restore(run, checkpoints, step)
    results = {}
    for name, e in config.evals.items():
      results |= Evaluation.of(run, name, e).run(state)
    return int(state.step), results


def start(run: Experiment, checkpoints: Checkpoints) -> tuple[states.TrainState, Mapping[str, Any]]:
  """Returns the state to go on from, and what the loop remembered: the last checkpoint's, or a fresh one."""
  last = checkpoints.latest()
  if last is not None:
    return tuned.restore(run, checkpoints, last)
  return tuned.first_state(run, jax.random.key(run.config.seed)), {}


def compile_step(run: Experiment):
  """Returns the step compiled for the run's shapes and layouts: one program, which takes no others."""
  with jax.set_mesh(run.mesh):
    compiled = lower_step(run).compile(compiler_options=profiles.compiler_options(run.mesh.devices.flat[0]))
  return Step(compiled, step_takes(run))


def lower_step(run: Experiment):
  """Returns what the compiler is given."""
  with jax.set_mesh(run.mesh):
    return make_step(run).lower(*step_takes(run).values())


def step_takes(run: Experiment) -> dict[str, Any]:
  """The arguments of the step by name: shapes with their layouts."""
  replicated = sharding.replicated(run.mesh)
  laid_out = lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
  state = jax.tree.map(laid_out, run.abstract, run.shardings)
  batch = {k: laid_out(v, sharding.batch_sharding(run.mesh)) for k, v in run.batch.items()}
  key = laid_out(jax.eval_shape(lambda: jax.random.key(0)), replicated)
  return {"state": state, "batch": batch, "key": key}


def make_step(run: Experiment):
  """Returns `(state, batch, key) -> (state, metrics)`, under `jit`, the old state's memory given to the new."""
  tx, optimizer, keeping = run.optimizer.tx, run.optimizer, guards.keeping(run.config)

  def mean_and_grads(params, extras, batch, key, scale):
    """One division by the global weight, after everything is added up."""

    def loss(params, extras, batch, key):
      sums, extras = run.loss(params, extras, batch, key)
      return sums.sums["loss"] * scale, (sums, extras)

    accumulated = lambda grad_fn: accumulate(grad_fn, run.config.accumulate, skip=run.growth is not None)
    summed = run.division.summed(jax.grad(loss, has_aux=True), accumulated)
    grads, (sums, extras) = summed(params, extras, batch, key)
    weight = sums.weights["loss"]
    divisor = jnp.where(weight == 0, 1, weight) * scale
    return jax.tree.map(lambda g: g / divisor, grads), sums.means(), extras

  def step(state, batch, key):
    key, scale = jax.random.fold_in(key, state.step), optimizer.loss_scale(state.opt_state)
    grads, means, extras = mean_and_grads(state.params, state.extras, batch, key, scale)
    again = lambda params, _=None: mean_and_grads(params, state.extras, batch, key, scale)[0]
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=means["loss"], grad_fn=again)
    params = optax.apply_updates(state.params, updates)
    extras = optimizer.unless_skipped(opt_state, run.model.settled(params, extras), state.extras)
    rates = {f"learning_rate{name}": rate for name, rate in optimizer.rates(opt_state, state.step).items()}
    norms = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
    measured = means | rates | norms | optimizer.measures(opt_state)
    return keeping(states.TrainState(state.step + 1, params, extras, opt_state), state, measured)

  return run.division.jit(step, donate_argnums=0, out_shardings=(run.shardings, None))


def accumulate(grad_fn, parts: int, skip: bool = False):
  """Returns `grad_fn` computed over `parts` of the batch, one after another, sums added; as the whole batch at once.

  `skip` leaves out those that are all padding, but for the first.
  """
  if parts == 1:
    return grad_fn

  def summed(params, extras, batch, key):
    # Part i takes every parts-th example, so that each device splits what it already has.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    part = lambda i: jax.tree.map(lambda x: x[i], split)

    def add(carry, i):
      total, sums, extras = carry
      grads, (more, extras) = grad_fn(params, extras, part(i), jax.random.fold_in(key, i))
      return jax.tree.map(jnp.add, total, grads), sums + more, extras

    def body(carry, i):
      if not skip:
        return add(carry, i), None
      return jax.lax.cond(part(i)["mask"].any(), add, lambda carry, _: carry, carry, i), None

    grads, (sums, extras) = grad_fn(params, extras, part(0), jax.random.fold_in(key, 0))
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)  # Those of bfloat16 parameters are bfloat16.
    (grads, sums, extras), _ = jax.lax.scan(body, (grads, sums, extras), jnp.arange(1, parts))
    return grads, (sums, extras)

  return summed


def train_batches(
  run: Experiment,
  first: int,
  skips: pipeline.Skips = (),
  following: Callable[[int], Callable[..., None]] = lambda step: None,
) -> pipeline.Ahead:
  """Batches on the devices, after those of the first steps; `skips` are those of the pipeline.

  `following(step)` gives what is told of the batches after those of a step, as the pipeline's `fetched`.
  """
  mine, parts = sharding.data_part(run.mesh)

  def since(taken):
    batches = pipeline.train_batches(
      run.data.source,
      batch_size=run.config.batch_size,
      seed=run.config.seed,
      preprocess=run.data.preprocess,
      start_step=first + taken,
      growth=run.growth,
      skips=skips,
      fetched=following(first + taken),
      host=mine,
      hosts=parts,
    )
    return run.checked(batches)

  return pipeline.to_device(since(0), sharding.batch_sharding(run.mesh), again=since)
